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
//! This is policy only. The machine is behind a trait, so all of it is tested without one.

use std::sync::Arc;

use accounting::Account;

use crate::action::{Action, Info, Reply, RunState};
use crate::boot::BootError;
use crate::config::{BootSource, Devices, MachineConfig, MachineConfigUpdate, Pinning, VmConfig};
use crate::devices::MachineEvent;
use crate::devices::i8042::KeysUnread;
use crate::end::{self, End};
use crate::machine::{Machine, Plan, StartError, Surroundings};
use crate::{ActionError, Shared};

/// What the lifecycle needs of a machine.
pub trait Run {
    /// Sets it running.
    fn resume(&self);
    /// Holds it.
    fn pause(&self);
    /// Presses Ctrl-Alt-Del.
    fn ctrl_alt_del(&self) -> Result<(), KeysUnread>;
    /// Its vCPUs' accounts.
    fn accounts(&self) -> Vec<Arc<Account>>;
}

/// Where machines come from.
pub trait Builder {
    /// What is built; dropped to stop it.
    type Machine: Run;
    /// Whether `source` looks bootable: what can be said of it before Start.
    fn check(&self, source: &BootSource) -> Result<(), BootError>;
    /// Builds a machine, held. Beside it, what the user should know.
    fn build(&self, plan: &Plan) -> Result<(Self::Machine, Vec<String>), StartError>;
}

impl Run for Machine {
    fn resume(&self) {
        Machine::resume(self);
    }
    fn pause(&self) {
        Machine::pause(self);
    }
    fn ctrl_alt_del(&self) -> Result<(), KeysUnread> {
        Machine::ctrl_alt_del(self)
    }
    fn accounts(&self) -> Vec<Arc<Account>> {
        Machine::accounts(self)
    }
}

impl Builder for Surroundings {
    type Machine = Machine;

    fn check(&self, source: &BootSource) -> Result<(), BootError> {
        crate::boot::check(source)
    }

    fn build(&self, plan: &Plan) -> Result<(Machine, Vec<String>), StartError> {
        let built = Machine::build(plan, self)?;
        self.serial.open_input();
        Ok(built)
    }
}

enum State<M> {
    NotStarted,
    Running(M),
    Paused(M),
    Ended(End),
}

/// One microVM's life.
pub struct Lifecycle<B: Builder> {
    id: String,
    builder: B,
    machine_config: MachineConfig,
    boot_source: Option<BootSource>,
    devices: Devices,
    pinning: Pinning,
    shared: Arc<Shared>,
    state: State<B::Machine>,
}

impl<B: Builder> Lifecycle<B> {
    /// A microVM that is not started, with Firecracker's default configuration.
    pub fn new(id: String, builder: B, shared: Arc<Shared>) -> Self {
        Self {
            id,
            builder,
            machine_config: MachineConfig::default(),
            boot_source: None,
            devices: Devices::default(),
            pinning: Pinning::default(),
            shared,
            state: State::NotStarted,
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
            Action::GetConfig => {
                return Ok(Reply::Config(VmConfig {
                    machine_config: Some(self.machine_config.clone()),
                    boot_source: self.boot_source.clone(),
                }));
            }
            Action::GetMachineConfig => return Ok(Reply::MachineConfig(self.machine_config.clone())),
            Action::PutMachineConfig(config) => {
                self.before_start()?;
                config.check()?;
                self.machine_config = config;
            }
            Action::PatchMachineConfig(update) => {
                self.before_start()?;
                self.patch(&update)?;
            }
            Action::PutBootSource(source) => {
                self.before_start()?;
                self.builder.check(&source)?;
                self.boot_source = Some(source);
            }
            Action::PutDrive(drive) => {
                self.before_start()?;
                let drives = &mut self.devices.drives;
                drives.retain(|known| known.drive_id != drive.drive_id);
                drives.push(drive);
            }
            Action::SetPinning(pinning) => {
                self.before_start()?;
                self.pinning = pinning;
            }
            Action::Start => return self.start(),
            Action::SendCtrlAltDel => self.machine()?.ctrl_alt_del()?,
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
            Action::Stop => self.state = State::Ended(End::Stopped),
        }
        Ok(Reply::Done)
    }

    /// The machine reports something that ends it.
    pub fn hear(&mut self, event: MachineEvent) {
        // Before Start: said by a machine whose build failed half-way. After the end: what follows from it.
        if let (State::Running(_) | State::Paused(_), Some(end)) = (&self.state, end::of(event)) {
            self.state = State::Ended(end);
        }
    }

    fn before_start(&self) -> Result<(), ActionError> {
        match self.state {
            State::NotStarted => Ok(()),
            _ => Err(ActionError::AFTER_START),
        }
    }

    fn machine(&self) -> Result<&B::Machine, ActionError> {
        match &self.state {
            State::Running(machine) | State::Paused(machine) => Ok(machine),
            State::NotStarted => Err(ActionError::BEFORE_START),
            State::Ended(_) => Err(ActionError::Ended),
        }
    }

    fn step(&mut self, next: impl FnOnce(State<B::Machine>) -> State<B::Machine>) {
        self.state = next(std::mem::replace(&mut self.state, State::NotStarted));
    }

    fn patch(&mut self, update: &MachineConfigUpdate) -> Result<(), ActionError> {
        let config = self.machine_config.updated(update);
        config.check()?;
        self.machine_config = config;
        Ok(())
    }

    fn start(&mut self) -> Result<Reply, ActionError> {
        self.before_start()?;
        let boot = self.boot_source.clone().ok_or(ActionError::NoKernel)?;
        let plan = Plan {
            machine: self.machine_config.clone(),
            boot,
            devices: self.devices.clone(),
            pinning: self.pinning.clone(),
        };
        let (machine, warnings) = self.builder.build(&plan)?;
        warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        *self.shared.warnings.lock().expect("no holder of this lock panics") = warnings;
        // Set once: only one Start succeeds.
        let _ = self.shared.accounts.set(machine.accounts());
        machine.resume();
        self.state = State::Running(machine);
        Ok(Reply::Done)
    }

    fn info(&self) -> Info {
        Info {
            id: self.id.clone(),
            state: match self.state {
                State::Paused(_) => RunState::Paused,
                State::NotStarted => RunState::NotStarted,
                State::Running(_) | State::Ended(_) => RunState::Running,
            },
            vmm_version: env!("CARGO_PKG_VERSION").into(),
            app_name: "Chronovisor".into(),
        }
    }
}

#[cfg(test)]
#[path = "lifecycle_tests.rs"]
mod tests;
