//! What the lifecycle needs of a machine, and of whoever makes them: the seam at which its rules are tested without one.

use std::sync::Arc;

use accounting::Account;
use seccomp::Role;

use crate::affinity::{AffinityError, Place};
use crate::boot::BootError;
use crate::config::{BootSource, Drive, DriveUpdate, Logger, NetworkInterface, NetworkInterfaceUpdate};
use crate::console::Output;
use crate::devices::i8042::KeysUnread;
use crate::devices::virtio::balloon::{BalloonError, BalloonStats, HintingStart, HintingStatus};
use crate::devices::virtio::block::{Block, BlockError};
use crate::devices::virtio::net::{NetError, Taps};
use crate::host::{self, KvmStatus};
use crate::log::LogError;
use crate::machine::{Machine, Plan, StartError, Surroundings};
use crate::metrics::Counters;

/// What the lifecycle needs of a machine.
pub trait Run {
    /// Sets it running.
    fn resume(&self);
    /// Holds it.
    fn pause(&self);
    /// Presses Ctrl-Alt-Del.
    fn ctrl_alt_del(&self) -> Result<(), KeysUnread>;
    /// Whether the guest has a driver for the keyboard.
    fn hears_keys(&self) -> bool;
    /// Changes a drive that it has. What cannot be had leaves the drive as it was.
    fn update_drive(&self, update: &DriveUpdate) -> Result<(), BlockError>;
    /// Changes an interface that it has.
    fn update_interface(&self, update: &NetworkInterfaceUpdate);
    /// Puts a vCPU on a host CPU. Says what the user should know.
    fn put(&self, index: u32, place: Place) -> Result<Option<String>, AffinityError>;
    /// Asks the guest for so many MiB.
    fn update_balloon(&self, amount_mib: u32) -> Result<(), BalloonError>;
    /// What the guest said of its memory last.
    fn balloon_stats(&self) -> Result<BalloonStats, BalloonError>;
    /// Asks it every so many seconds.
    fn update_balloon_stats(&self, interval_s: u16) -> Result<(), BalloonError>;
    /// Asks the guest which pages are free.
    fn start_hinting(&self, start: HintingStart) -> Result<(), BalloonError>;
    /// How far that is.
    fn hinting_status(&self) -> Result<HintingStatus, BalloonError>;
    /// Ends it.
    fn stop_hinting(&self) -> Result<(), BalloonError>;
    /// What its devices and vCPUs counted so far.
    fn metrics(&self) -> Counters;
    /// Its vCPUs' accounts.
    fn accounts(&self) -> Vec<Arc<Account>>;
}

/// Where machines come from.
pub trait Builder {
    /// What is built; dropped to stop it.
    type Machine: Run;
    /// Whether `source` looks bootable: what can be said of it before Start.
    fn check(&self, source: &BootSource) -> Result<(), BootError>;
    /// Whether `drive` can be had now.
    fn check_drive(&self, drive: &Drive) -> Result<(), BlockError>;
    /// Adds to `taps` that of `interface`, or puts it in the place of the one that the interface had.
    fn hold_tap(&self, interface: &NetworkInterface, taps: &mut Taps) -> Result<(), NetError>;
    /// Has the log written as asked.
    fn configure_log(&self, logger: &Logger) -> Result<(), LogError>;
    /// What this host's KVM is good for, tried out unless a machine is `beside` it.
    fn kvm(&self, beside: bool) -> KvmStatus;
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
    fn hears_keys(&self) -> bool {
        Machine::hears_keys(self)
    }
    fn update_drive(&self, update: &DriveUpdate) -> Result<(), BlockError> {
        self.attached().update_drive(update)
    }
    fn update_interface(&self, update: &NetworkInterfaceUpdate) {
        self.attached().update_interface(update);
    }
    fn put(&self, index: u32, place: Place) -> Result<Option<String>, AffinityError> {
        Machine::put(self, index, place)
    }
    fn update_balloon(&self, amount_mib: u32) -> Result<(), BalloonError> {
        self.attached().update_balloon(amount_mib)
    }
    fn balloon_stats(&self) -> Result<BalloonStats, BalloonError> {
        self.attached().balloon_stats()
    }
    fn update_balloon_stats(&self, interval_s: u16) -> Result<(), BalloonError> {
        self.attached().update_balloon_stats(interval_s)
    }
    fn start_hinting(&self, start: HintingStart) -> Result<(), BalloonError> {
        self.attached().start_hinting(start)
    }
    fn hinting_status(&self) -> Result<HintingStatus, BalloonError> {
        self.attached().hinting_status()
    }
    fn stop_hinting(&self) -> Result<(), BalloonError> {
        self.attached().stop_hinting()
    }
    fn metrics(&self) -> Counters {
        Machine::metrics(self)
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

    fn check_drive(&self, drive: &Drive) -> Result<(), BlockError> {
        Block::new(drive).map(drop)
    }

    fn hold_tap(&self, interface: &NetworkInterface, taps: &mut Taps) -> Result<(), NetError> {
        taps.hold(interface)
    }

    fn configure_log(&self, logger: &Logger) -> Result<(), LogError> {
        self.log.configure(logger)
    }

    fn kvm(&self, beside: bool) -> KvmStatus {
        if beside { host::kvm_at_its_word() } else { host::kvm() }
    }

    fn build(&self, plan: &Plan) -> Result<(Machine, Vec<String>), StartError> {
        let output = plan.serial.as_ref().map(|serial| {
            Output::open(serial).map_err(|source| StartError::Serial {
                path: serial.serial_out_path.clone().unwrap_or_default(),
                source,
            })
        });
        let output = output.transpose()?;
        let built = Machine::build(plan, self)?;
        *self.redirect.lock().expect("no holder of this lock panics") = output;
        self.serial.open_input();
        // Last: a start may be tried again, what is allowed may not be given back. Nothing of the guest has run yet.
        seccomp::enter(Role::Vmm).map_err(|source| StartError::Host {
            what: "confine the VMM's thread",
            source,
        })?;
        Ok(built)
    }
}
