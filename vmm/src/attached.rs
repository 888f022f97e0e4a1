//! What may be asked of a running machine's devices: changes, and what they counted.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use accounting::host::CpuSet;
use serde::Serialize;
use serde_json::{Value, json};

use crate::attach::Attached;
use crate::config::{DriveUpdate, NetworkInterfaceUpdate};
use crate::devices::virtio::balloon::{Balloon, BalloonError, BalloonStats, HintingStart, HintingStatus};
use crate::devices::virtio::block::BlockError;
use crate::devices::virtio::net::NetError;
use crate::metrics::{self, Counters};
use crate::mmds::config::MmdsConfig;
use crate::mmds::{SharedMmds, Stack};

fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().expect("no holder of this lock panics")
}

impl Attached {
    /// The guest is held, or runs again.
    pub(crate) fn set_held(&self, held: bool) {
        if let Some(vsock) = &self.vsock {
            lock(vsock).set_held(held);
        }
    }

    /// Changes the drive that `update` names, if it is there.
    ///
    /// # Errors
    /// The new file cannot be had; nothing has changed.
    pub fn update_drive(&self, update: &DriveUpdate) -> Result<(), BlockError> {
        let Some((_, block)) = self.blocks.iter().find(|(id, _)| *id == update.drive_id) else {
            return Ok(());
        };
        let mut block = lock(block);
        if let Some(path) = &update.path_on_host {
            block.set_file(path)?;
        }
        if let Some(limit) = update.rate_limiter {
            block.set_rate_limiter(limit);
        }
        Ok(())
    }

    /// Has what the kernel starts for the disks run on `cpus`, if it can be told.
    pub(crate) fn confine_workers(&self, cpus: &CpuSet) {
        for (_, block) in &self.blocks {
            lock(block).confine_workers(cpus);
        }
    }

    /// Changes the interface that `update` names, if it is there.
    pub fn update_interface(&self, update: &NetworkInterfaceUpdate) {
        if let Some((_, net)) = self.nets.iter().find(|(id, _)| *id == update.iface_id) {
            lock(net).set_rate_limiters(update.rx_rate_limiter, update.tx_rate_limiter);
        }
    }

    /// Lets the interfaces that `config` names reach `mmds`. Before the machine runs.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub(crate) fn set_mmds(&self, config: &MmdsConfig, mmds: &SharedMmds) -> Result<(), NetError> {
        for (_, net) in self
            .nets
            .iter()
            .filter(|(id, _)| config.network_interfaces.contains(id))
        {
            let stack = Stack::new(config.ipv4_address, Arc::clone(mmds), Instant::now());
            lock(net).set_detour(Box::new(stack))?;
        }
        Ok(())
    }

    /// Asks the guest for so many MiB, all in all.
    ///
    /// # Errors
    /// See [`Balloon::update_amount`].
    pub fn update_balloon(&self, amount_mib: u32) -> Result<(), BalloonError> {
        self.with_balloon(|balloon| balloon.update_amount(amount_mib))
    }

    /// What the guest said of its memory last.
    ///
    /// # Errors
    /// See [`Balloon::stats`].
    pub fn balloon_stats(&self) -> Result<BalloonStats, BalloonError> {
        self.with_balloon(|balloon| balloon.stats())
    }

    /// Asks it every so many seconds.
    ///
    /// # Errors
    /// See [`Balloon::update_stats_interval`].
    pub fn update_balloon_stats(&self, interval_s: u16) -> Result<(), BalloonError> {
        self.with_balloon(|balloon| balloon.update_stats_interval(interval_s))
    }

    /// Asks the guest which pages are free.
    ///
    /// # Errors
    /// See [`Balloon::start_hinting`].
    pub fn start_hinting(&self, start: HintingStart) -> Result<(), BalloonError> {
        self.with_balloon(|balloon| balloon.start_hinting(start))
    }

    /// How far that is.
    ///
    /// # Errors
    /// See [`Balloon::hinting_status`].
    pub fn hinting_status(&self) -> Result<HintingStatus, BalloonError> {
        self.with_balloon(|balloon| balloon.hinting_status())
    }

    /// Ends it.
    ///
    /// # Errors
    /// See [`Balloon::stop_hinting`].
    pub fn stop_hinting(&self) -> Result<(), BalloonError> {
        self.with_balloon(Balloon::stop_hinting)
    }

    /// A balloon that is not there is as one without a driver.
    fn with_balloon<T>(&self, ask: impl FnOnce(&mut Balloon) -> Result<T, BalloonError>) -> Result<T, BalloonError> {
        ask(&mut lock(self.balloon.as_ref().ok_or(BalloonError::Missing)?))
    }

    /// What each device counted so far, by Firecracker's names.
    #[must_use]
    pub fn metrics(&self) -> Counters {
        let mut counters = Counters::new();
        metrics::add(&mut counters, "block", &self.blocks, |block| json!(**block.metrics()));
        metrics::add(&mut counters, "net", &self.nets, |net| json!(**net.metrics()));
        counters.insert("balloon".into(), of(self.balloon.as_ref(), |balloon| balloon.metrics()));
        counters.insert("entropy".into(), of(self.entropy.as_ref(), |rng| rng.metrics()));
        counters.insert("vsock".into(), of(self.vsock.as_ref(), |vsock| vsock.metrics()));
        counters
    }
}

/// The metrics of the one device of its kind; of none, nothing.
fn of<T, M: Serialize>(device: Option<&Arc<Mutex<T>>>, metrics: impl Fn(&T) -> &Arc<M>) -> Value {
    device.map_or_else(|| json!({}), |device| json!(**metrics(&lock(device))))
}
