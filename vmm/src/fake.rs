//! A microVM without a machine, for tests: the lifecycle and its rules are the real ones, the machine only writes down what is
//! done to it. With the feature `fake`, so that other rooms can be tested over it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use accounting::Account;

use crate::action::{Action, ActionError, Reply};
use crate::affinity::{AffinityError, Place};
use crate::boot::BootError;
use crate::config::{BootSource, Drive, DriveUpdate, Logger, NetworkInterface, NetworkInterfaceUpdate};
use crate::devices::i8042::KeysUnread;
use crate::devices::virtio::balloon::{Balloon, BalloonError, BalloonStats, HintingStart, HintingStatus};
use crate::devices::virtio::block::BlockError;
use crate::devices::virtio::net::{NetError, Taps};
use crate::host::KvmStatus;
use crate::kvm::KvmError;
use crate::lifecycle::Lifecycle;
use crate::log::LogError;
use crate::machine::{Plan, StartError};
use crate::machinery::{Builder, Run};
use crate::metrics::Counters;
use crate::mmds::data::DEFAULT_LIMIT_BYTES;

/// Under this directory there is nothing: a file named there is refused, and every other one taken.
pub const NOWHERE: &str = "/nowhere";

/// See the module.
pub struct FakeVm(Mutex<Lifecycle<FakeBuilder>>);

impl FakeVm {
    /// One that is not started.
    #[must_use]
    pub fn new() -> Self {
        let life = Lifecycle::new(
            "fake".into(),
            FakeBuilder::default(),
            Arc::default(),
            DEFAULT_LIMIT_BYTES,
        );
        Self(Mutex::new(life))
    }

    /// Does `action`, or says why not.
    ///
    /// # Errors
    /// As the real one.
    pub fn act(&self, action: Action) -> Result<Reply, ActionError> {
        self.0.lock().expect("no holder of this lock panics").act(action)
    }
}

impl Default for FakeVm {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for FakeVm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FakeVm")
    }
}

/// What was done to a machine.
pub(crate) type Log = Arc<Mutex<Vec<&'static str>>>;

fn log(log: &Log) -> MutexGuard<'_, Vec<&'static str>> {
    log.lock().expect("no holder of this lock panics")
}

/// A machine that writes down what is done to it.
#[derive(Debug)]
pub(crate) struct FakeMachine {
    log: Log,
    deaf: bool,
    mem_size_mib: usize,
    vcpus: usize,
    balloon: Option<Mutex<Balloon>>,
}

impl FakeMachine {
    fn with_balloon<T>(&self, ask: impl FnOnce(&mut Balloon) -> Result<T, BalloonError>) -> Result<T, BalloonError> {
        let balloon = self.balloon.as_ref().ok_or(BalloonError::Missing)?;
        ask(&mut balloon.lock().expect("no holder of this lock panics"))
    }
}

impl Run for FakeMachine {
    fn resume(&self) {
        log(&self.log).push("resume");
    }
    fn pause(&self) {
        log(&self.log).push("pause");
    }
    /// Its guest never reads.
    fn ctrl_alt_del(&self) -> Result<(), KeysUnread> {
        let unread = log(&self.log).contains(&"keys");
        log(&self.log).push("keys");
        if unread { Err(KeysUnread) } else { Ok(()) }
    }
    fn hears_keys(&self) -> bool {
        !self.deaf
    }
    fn update_drive(&self, update: &DriveUpdate) -> Result<(), BlockError> {
        update
            .path_on_host
            .as_deref()
            .map_or(Ok(()), |path| open(&update.drive_id, path))?;
        log(&self.log).push("drive");
        Ok(())
    }
    fn update_interface(&self, _update: &NetworkInterfaceUpdate) {
        log(&self.log).push("interface");
    }
    /// It has the vCPUs it was built with, and takes any place.
    fn put(&self, index: u32, _place: Place) -> Result<Option<String>, AffinityError> {
        log(&self.log).push("put");
        let vcpus = self.vcpus;
        if (index as usize) < vcpus {
            Ok(None)
        } else {
            Err(AffinityError::NoVcpu { index, vcpus })
        }
    }
    /// Its driver is always ready, as none of a real balloon without a guest is.
    fn update_balloon(&self, amount_mib: u32) -> Result<(), BalloonError> {
        if amount_mib as usize > self.mem_size_mib {
            return Err(BalloonError::TooMuch(amount_mib));
        }
        Ok(())
    }
    fn balloon_stats(&self) -> Result<BalloonStats, BalloonError> {
        self.with_balloon(|balloon| balloon.stats())
    }
    fn update_balloon_stats(&self, interval_s: u16) -> Result<(), BalloonError> {
        self.with_balloon(|balloon| balloon.update_stats_interval(interval_s))
    }
    fn start_hinting(&self, _start: HintingStart) -> Result<(), BalloonError> {
        self.hinting_status().map(drop)
    }
    fn hinting_status(&self) -> Result<HintingStatus, BalloonError> {
        self.with_balloon(|balloon| balloon.hinting_status())
    }
    fn stop_hinting(&self) -> Result<(), BalloonError> {
        self.hinting_status().map(drop)
    }
    fn metrics(&self) -> Counters {
        Counters::new()
    }
    fn accounts(&self) -> Vec<Arc<Account>> {
        vec![]
    }
}

impl Drop for FakeMachine {
    fn drop(&mut self) {
        log(&self.log).push("stop");
    }
}

/// Makes them.
#[derive(Debug, Default)]
pub(crate) struct FakeBuilder {
    /// What is done to what it makes.
    pub log: Log,
    /// Whether it fails to.
    pub fails: Arc<AtomicBool>,
    /// Whether its guests have no keyboard driver.
    pub deaf: bool,
}

impl Builder for FakeBuilder {
    type Machine = FakeMachine;

    fn check(&self, source: &BootSource) -> Result<(), BootError> {
        let initrd = source.initrd_path.iter().map(|path| ("initrd", path));
        let mut files = [("kernel", &source.kernel_image_path)].into_iter().chain(initrd);
        if let Some((what, path)) = files.find(|(_, path)| path.starts_with(NOWHERE)) {
            return Err(BootError::Open {
                what,
                path: path.clone(),
                source: not_found(),
            });
        }
        crate::boot::check_boot_args(source)
    }

    fn check_drive(&self, drive: &Drive) -> Result<(), BlockError> {
        match &drive.path_on_host {
            Some(path) => open(&drive.drive_id, path),
            None => Err(BlockError::NoPath {
                drive: drive.drive_id.clone(),
            }),
        }
    }

    fn configure_log(&self, logger: &Logger) -> Result<(), LogError> {
        match &logger.log_path {
            Some(path) if path.starts_with(NOWHERE) => Err(not_found().into()),
            _ => Ok(()),
        }
    }

    /// It has none.
    fn hold_tap(&self, interface: &NetworkInterface, _taps: &mut Taps) -> Result<(), NetError> {
        match interface.mtu {
            Some(mtu) if mtu < 68 => Err(NetError::Mtu {
                iface: interface.iface_id.clone(),
                mtu,
            }),
            _ => Ok(()),
        }
    }

    /// Hardware's, as far as anybody knows.
    fn kvm(&self, _beside: bool) -> KvmStatus {
        KvmStatus {
            error: None,
            modules: vec!["kvm_amd".into()],
            runs_stock_kernels: Some(true),
        }
    }

    fn build(&self, plan: &Plan) -> Result<(FakeMachine, Vec<String>), StartError> {
        if self.fails.load(Ordering::Relaxed) {
            return Err(KvmError::Missing.into());
        }
        let machine = FakeMachine {
            log: Arc::clone(&self.log),
            deaf: self.deaf,
            mem_size_mib: plan.machine.mem_size_mib,
            vcpus: plan.machine.vcpu_count.into(),
            balloon: plan.devices.balloon.map(|config| {
                let balloon = Balloon::new(&config).expect("there are descriptors for a timer");
                Mutex::new(balloon)
            }),
        };
        Ok((machine, vec!["a warning".into()]))
    }
}

fn not_found() -> std::io::Error {
    std::io::Error::from_raw_os_error(libc::ENOENT)
}

fn open(drive: &str, path: &Path) -> Result<(), BlockError> {
    if !path.starts_with(NOWHERE) {
        return Ok(());
    }
    Err(BlockError::Open {
        drive: drive.into(),
        path: PathBuf::from(path),
        source: not_found(),
    })
}
