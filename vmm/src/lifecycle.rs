//! What may be asked of a microVM when, and what becomes of it.
//!
//! ```text
//!                     Pause
//!  ┌────────────┐ Start ┌─────────┐ ─────────► ┌────────┐
//!  │ NotStarted │ ────► │ Running │            │ Paused │
//!  └────────────┘       └─────────┘ ◄───────── └────────┘
//!    │  ▲    │ Start      │           Resume      │
//!    │  └────┘ failed     │                       │
//!    │ Stop               │ Stop, or the guest    │ Stop
//!    │                    │ or KVM ends it        │
//!    ▼                    ▼                       ▼
//!  ┌────────────────────────────────────────────────┐
//!  │ Ended: vCPUs joined, memory dropped, accounts  │
//!  │ closed but readable                            │
//!  └────────────────────────────────────────────────┘
//! ```
//!
//! A failed Start leaves nothing behind: whatever had been built is dropped, the configuration stays as it was, and may be
//! changed and started again. Pause and Resume cannot fail, and asking for what already is has no effect. A vCPU that
//! ends takes the machine with it, whichever vCPU it is; the first reason heard is the one reported, since the others
//! follow from it. After the end every request is refused.
//!
//! This is policy only. The machine is behind a trait (`machinery.rs`), so all of it is tested without one.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use serde_json::json;

use crate::action::{Action, Info, Metadata, Reply, RunState};
use crate::config::{
    BalloonRefused, BalloonStatsUpdate, BalloonUpdate, BootSource, CpuConfig, CpuTemplate, Devices, DriveUpdate,
    Logger, MachineConfig, Metrics, NetworkInterfaceUpdate, Pinning, Processor, RateLimiter, Serial, VmConfig,
};
use crate::devices::MachineEvent;
use crate::devices::i8042::KeysUnread;
use crate::devices::virtio::balloon::BalloonError;
use crate::devices::virtio::net::Taps;
use crate::end::{self, End};
use crate::machine::Plan;
use crate::machinery::{Builder, Run};
use crate::metrics::{MetricsError, MetricsFile};
use crate::mmds::config::MmdsConfig;
use crate::mmds::{Mmds, SharedMmds};
use crate::{ActionError, Shared};

enum State<M> {
    /// The taps of the interfaces so far; with the start they are the machine's.
    NotStarted(Taps),
    Running(M),
    Paused(M),
    Ended(End),
}

/// One microVM's life.
pub struct Lifecycle<B: Builder> {
    id: String,
    builder: B,
    /// Without its template, which is in `cpu`.
    machine_config: MachineConfig,
    boot_source: Option<BootSource>,
    /// Whichever of a template and a `/cpu-config` came last.
    cpu: Processor,
    devices: Devices,
    serial: Option<Serial>,
    logger: Option<Logger>,
    metrics: Option<(Metrics, MetricsFile)>,
    /// Made when it is first asked for.
    mmds: Option<SharedMmds>,
    mmds_config: Option<MmdsConfig>,
    mmds_limit_bytes: usize,
    pinning: Pinning,
    shared: Arc<Shared>,
    state: State<B::Machine>,
}

impl<B: Builder> Lifecycle<B> {
    /// A microVM that is not started, with Firecracker's default configuration.
    pub fn new(id: String, builder: B, shared: Arc<Shared>, mmds_limit_bytes: usize) -> Self {
        Self {
            id,
            builder,
            machine_config: MachineConfig::default(),
            boot_source: None,
            cpu: Processor::default(),
            devices: Devices::default(),
            serial: None,
            logger: None,
            metrics: None,
            mmds: None,
            mmds_config: None,
            mmds_limit_bytes,
            pinning: Pinning::default(),
            shared,
            state: State::NotStarted(Taps::default()),
        }
    }

    /// How it ended, once it has.
    pub fn end(&self) -> Option<&End> {
        match &self.state {
            State::Ended(end) => Some(end),
            _ => None,
        }
    }

    /// The machine, from its start to its end.
    pub fn running(&self) -> Option<&B::Machine> {
        self.machine().ok()
    }

    /// Does `action`, or says why not.
    pub fn act(&mut self, action: Action) -> Result<Reply, ActionError> {
        if self.end().is_some() {
            return Err(ActionError::Ended);
        }
        match action {
            Action::GetInfo => return Ok(Reply::Info(self.info())),
            Action::GetKvm => return Ok(Reply::Kvm(Box::new(self.builder.kvm(self.machine().is_ok())))),
            Action::GetConfig => return Ok(Reply::Config(Box::new(self.config()))),
            Action::GetMachineConfig => return Ok(Reply::MachineConfig(self.machine_config())),
            Action::PutMachineConfig(config) => {
                self.before_start()?;
                self.set_machine(config)?;
            }
            Action::PatchMachineConfig(update) => {
                self.before_start()?;
                self.set_machine(self.machine_config.updated(&update))?;
            }
            Action::PutBootSource(source) => {
                self.before_start()?;
                self.builder.check(&source)?;
                self.boot_source = Some(source);
            }
            Action::PutCpuConfig(config) => {
                self.before_start()?;
                self.cpu = if config == CpuConfig::default() {
                    Processor::Host
                } else {
                    Processor::Custom(config)
                };
            }
            Action::PutDrive(drive) => {
                self.before_start()?;
                self.devices.check_drive(&drive)?;
                self.builder.check_drive(&drive)?;
                self.devices.put_drive(drive);
            }
            Action::PatchDrive(update) => self.patch_drive(update)?,
            Action::PutInterface(interface) => {
                let State::NotStarted(taps) = &mut self.state else {
                    return Err(ActionError::AFTER_START);
                };
                self.devices.check_interface(&interface)?;
                self.builder.hold_tap(&interface, taps)?;
                self.devices.put_interface(interface);
            }
            Action::PatchInterface(update) => self.patch_interface(&update)?,
            Action::PutVsock(vsock) => {
                self.before_start()?;
                self.devices.put_vsock(vsock)?;
            }
            Action::PutEntropy(entropy) => {
                self.before_start()?;
                self.devices.entropy = Some(entropy);
            }
            Action::PutBalloon(balloon) => {
                self.before_start()?;
                self.devices.put_balloon(balloon, &self.machine_config)?;
            }
            Action::GetBalloon => {
                let balloon = self.devices.balloon.ok_or_else(|| match self.state {
                    State::NotStarted(_) => BalloonRefused::None.into(),
                    _ => ActionError::ReadBalloon(BalloonError::Missing),
                });
                return Ok(Reply::Balloon(balloon?));
            }
            Action::PatchBalloon(BalloonUpdate { amount_mib }) => {
                let machine = self.machine()?;
                let mut balloon = self.devices.balloon.ok_or(BalloonError::Missing)?;
                machine.update_balloon(amount_mib)?;
                balloon.amount_mib = amount_mib;
                self.devices.balloon = Some(balloon);
            }
            Action::PatchBalloonStats(BalloonStatsUpdate {
                stats_polling_interval_s,
            }) => {
                let machine = self.machine()?;
                let mut balloon = self.devices.balloon.ok_or(BalloonError::Missing)?;
                machine.update_balloon_stats(stats_polling_interval_s)?;
                balloon.stats_polling_interval_s = stats_polling_interval_s;
                self.devices.balloon = Some(balloon);
            }
            Action::GetBalloonStats => {
                let stats = match self.with_balloon(Run::balloon_stats) {
                    Err(ActionError::AskBalloon(error)) => return Err(ActionError::ReadBalloon(error)),
                    answer => answer?,
                };
                return Ok(Reply::BalloonStats(Box::new(stats)));
            }
            Action::StartHinting(start) => self.with_balloon(|machine| machine.start_hinting(start))?,
            Action::GetHintingStatus => {
                return Ok(Reply::HintingStatus(self.with_balloon(Run::hinting_status)?));
            }
            Action::StopHinting => self.with_balloon(Run::stop_hinting)?,
            Action::GetMmds => {
                let mmds = self.mmds.as_ref().map(|mmds| lock(mmds).data.get().cloned());
                return Ok(Reply::Mmds(Metadata(mmds.flatten().unwrap_or_default())));
            }
            Action::PutMmds(Metadata(document)) => lock(self.mmds()?).data.put(document)?,
            Action::PatchMmds(Metadata(patch)) => lock(self.mmds()?).data.patch(patch)?,
            Action::GetMmdsConfig => return Ok(Reply::MmdsConfig(self.mmds_config.clone())),
            Action::PutMmdsConfig(config) => {
                self.before_start()?;
                let interfaces = self.devices.network_interfaces.iter();
                config.check(interfaces.map(|interface| interface.iface_id.as_str()))?;
                lock(self.mmds()?).configure(&config);
                self.mmds_config = Some(config);
            }
            Action::PutSerial(serial) => {
                self.before_start()?;
                self.serial = Some(serial);
            }
            Action::PutLogger(logger) => {
                self.before_start()?;
                self.builder.configure_log(&logger)?;
                self.logger = Some(logger);
            }
            Action::PutMetrics(config) => {
                self.before_start()?;
                if self.metrics.is_some() {
                    return Err(MetricsError::Again.into());
                }
                let file = MetricsFile::open(&config)?;
                self.metrics = Some((config, file));
            }
            Action::FlushMetrics => {
                self.machine()?;
                self.flush_metrics()?;
            }
            Action::SetPinning(pinning) => {
                self.before_start()?;
                self.pinning = pinning;
            }
            Action::Start => return self.start(),
            Action::SendCtrlAltDel => self.machine()?.ctrl_alt_del()?,
            Action::PutAffinity { index, place } => {
                if let Some(warning) = self.machine()?.put(index, place)? {
                    tracing::warn!("{warning}");
                }
            }
            Action::Pause => {
                self.machine()?;
                self.step(|state| match state {
                    State::Running(machine) => {
                        machine.pause();
                        State::Paused(machine)
                    }
                    other => other,
                });
            }
            Action::Resume => {
                self.machine()?;
                self.step(|state| match state {
                    State::Paused(machine) => {
                        machine.resume();
                        State::Running(machine)
                    }
                    other => other,
                });
            }
            Action::ShutDown => {
                // One that is held hears nothing, and might be held for ever.
                if let State::Running(machine) = &self.state
                    && machine.hears_keys()
                {
                    // Refused, it has the last ones still to read: they ask the same of it.
                    let _: Result<(), KeysUnread> = machine.ctrl_alt_del();
                    return Ok(Reply::GuestAsked);
                }
                self.finish(End::Stopped);
            }
            Action::Stop => self.finish(End::Stopped),
        }
        Ok(Reply::Done)
    }

    /// The machine reports something that ends it.
    pub fn hear(&mut self, event: MachineEvent) {
        // Before Start: said by a machine whose build failed half-way. After the end: what follows from it.
        if let (State::Running(_) | State::Paused(_), Some(end)) = (&self.state, end::of(event)) {
            self.finish(end);
        }
    }

    /// Stops the machine, where there is one, for good.
    fn finish(&mut self, end: End) {
        if self.has_metrics() {
            // Held, its vCPUs count no more: the last line tells all they counted.
            if let State::Running(machine) = &self.state {
                machine.pause();
            }
            if let Err(error) = self.flush_metrics() {
                tracing::warn!("{error}");
            }
        }
        self.state = State::Ended(end);
    }

    fn before_start(&self) -> Result<(), ActionError> {
        match self.state {
            State::NotStarted(_) => Ok(()),
            _ => Err(ActionError::AFTER_START),
        }
    }

    fn machine(&self) -> Result<&B::Machine, ActionError> {
        match &self.state {
            State::Running(machine) | State::Paused(machine) => Ok(machine),
            State::NotStarted(_) => Err(ActionError::BEFORE_START),
            State::Ended(_) => Err(ActionError::Ended),
        }
    }

    fn step(&mut self, next: impl FnOnce(State<B::Machine>) -> State<B::Machine>) {
        self.state = next(std::mem::replace(&mut self.state, State::NotStarted(Taps::default())));
    }

    fn machine_config(&self) -> MachineConfig {
        MachineConfig {
            cpu_template: CpuTemplate::of(&self.cpu),
            ..self.machine_config.clone()
        }
    }

    fn set_machine(&mut self, config: MachineConfig) -> Result<(), ActionError> {
        config.check()?;
        self.devices.check_machine(&config)?;
        if let Some(processor) = config.processor()? {
            self.cpu = processor;
        }
        self.machine_config = MachineConfig {
            cpu_template: None,
            ..config
        };
        Ok(())
    }

    fn patch_drive(&mut self, update: DriveUpdate) -> Result<(), ActionError> {
        self.machine()?;
        let drive = self.devices.drive_mut(&update.drive_id)?;
        if let State::Running(machine) | State::Paused(machine) = &self.state {
            machine.update_drive(&update).map_err(ActionError::PatchDrive)?;
        }
        drive.path_on_host = update.path_on_host.or(drive.path_on_host.take());
        limit(&mut drive.rate_limiter, update.rate_limiter);
        Ok(())
    }

    fn patch_interface(&mut self, update: &NetworkInterfaceUpdate) -> Result<(), ActionError> {
        self.machine()?;
        let interface = self.devices.interface_mut(&update.iface_id)?;
        if let State::Running(machine) | State::Paused(machine) = &self.state {
            machine.update_interface(update);
        }
        limit(&mut interface.rx_rate_limiter, update.rx_rate_limiter);
        limit(&mut interface.tx_rate_limiter, update.tx_rate_limiter);
        Ok(())
    }

    fn with_balloon<T>(&self, ask: impl FnOnce(&B::Machine) -> Result<T, BalloonError>) -> Result<T, ActionError> {
        let machine = self.machine()?;
        self.devices.balloon.ok_or(BalloonError::Missing)?;
        Ok(ask(machine)?)
    }

    fn mmds(&mut self) -> Result<&SharedMmds, ActionError> {
        let mmds = match self.mmds.take() {
            Some(mmds) => mmds,
            None => {
                let mmds = Mmds::new(self.mmds_limit_bytes, Instant::now()).map_err(ActionError::NoMmds)?;
                Arc::new(Mutex::new(mmds))
            }
        };
        Ok(self.mmds.insert(mmds))
    }

    /// Whether there is a file for metrics.
    pub fn has_metrics(&self) -> bool {
        self.metrics.is_some()
    }

    /// Writes a line of metrics, where there is a file for them and a machine to tell of.
    ///
    /// # Errors
    /// The file took none of it.
    pub fn flush_metrics(&mut self) -> Result<(), MetricsError> {
        match (&self.state, &mut self.metrics) {
            (State::Running(machine) | State::Paused(machine), Some((_, file))) => {
                let mut counters = machine.metrics();
                // Clients look for the section all the same where nobody has asked for the service.
                let mmds = self.mmds.as_ref().map(|mmds| json!(**lock(mmds).metrics()));
                counters.insert("mmds".to_owned(), mmds.unwrap_or_else(|| json!({})));
                counters.extend(self.shared.requests.counters());
                let startup = ("api_server".to_owned(), self.shared.requests.startup());
                file.write(counters, [startup].into_iter().collect())
            }
            _ => Ok(()),
        }
    }

    fn config(&self) -> VmConfig {
        let Devices {
            drives,
            network_interfaces,
            vsock,
            entropy,
            balloon,
        } = self.devices.clone();
        VmConfig {
            balloon,
            drives,
            boot_source: self.boot_source.clone(),
            cpu_config: match &self.cpu {
                Processor::Custom(config) => Some(config.clone()),
                Processor::Host | Processor::Template(_) => None,
            },
            logger: self.logger.clone(),
            machine_config: Some(self.machine_config()),
            metrics: self.metrics.as_ref().map(|(config, _)| config.clone()),
            mmds_config: self.mmds_config.clone(),
            network_interfaces,
            vsock,
            entropy,
            serial: self.serial.clone(),
        }
    }

    fn start(&mut self) -> Result<Reply, ActionError> {
        let State::NotStarted(taps) = &self.state else {
            return Err(ActionError::AFTER_START);
        };
        let boot = self.boot_source.clone().ok_or(ActionError::NoKernel)?;
        let plan = Plan {
            machine: self.machine_config.clone(),
            boot,
            cpu: self.cpu.clone(),
            devices: self.devices.clone(),
            taps: taps.clone(),
            serial: self.serial.clone(),
            mmds: self.mmds_config.clone().zip(self.mmds.clone()),
            pinning: self.pinning.clone(),
        };
        let (machine, warnings) = self.builder.build(&plan)?;
        warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        *self.shared.warnings.lock().expect("no holder of this lock panics") = warnings;
        // Set once: only one Start succeeds.
        let _ = self.shared.accounts.set(machine.accounts());
        machine.resume();
        self.state = State::Running(machine);
        if let Err(error) = self.flush_metrics() {
            tracing::warn!("{error}");
        }
        Ok(Reply::Done)
    }

    fn info(&self) -> Info {
        Info {
            id: self.id.clone(),
            state: match self.state {
                State::Paused(_) => RunState::Paused,
                State::NotStarted(_) => RunState::NotStarted,
                State::Running(_) | State::Ended(_) => RunState::Running,
            },
            vmm_version: env!("CARGO_PKG_VERSION").into(),
            app_name: "Chronovisor".into(),
        }
    }
}

fn lock(mmds: &SharedMmds) -> MutexGuard<'_, Mmds> {
    mmds.lock().expect("no holder of this lock panics")
}

/// Puts the buckets that `update` has in the place of those of `limiter`.
fn limit(limiter: &mut Option<RateLimiter>, update: Option<RateLimiter>) {
    let Some(update) = update else { return };
    let old = limiter.unwrap_or_default();
    *limiter = Some(RateLimiter {
        bandwidth: update.bandwidth.or(old.bandwidth),
        ops: update.ops.or(old.ops),
    });
}

#[cfg(test)]
#[path = "lifecycle_tests.rs"]
mod tests;
