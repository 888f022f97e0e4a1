//! What may be asked of a running machine's devices: changes, and what they counted.

use std::sync::{Arc, Mutex, MutexGuard};

use serde::Serialize;
use serde_json::{Value, json};

use crate::attach::Attached;
use crate::config::{DriveUpdate, NetworkInterfaceUpdate};
use crate::devices::virtio::block::BlockError;
use crate::metrics::{self, Counters};

fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().expect("no holder of this lock panics")
}

impl Attached {
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

    /// Changes the interface that `update` names, if it is there.
    pub fn update_interface(&self, update: &NetworkInterfaceUpdate) {
        if let Some((_, net)) = self.nets.iter().find(|(id, _)| *id == update.iface_id) {
            lock(net).set_rate_limiters(update.rx_rate_limiter, update.tx_rate_limiter);
        }
    }

    /// What each device counted so far, by Firecracker's names.
    #[must_use]
    pub fn metrics(&self) -> Counters {
        let mut counters = Counters::new();
        metrics::add(&mut counters, "block", &self.blocks, |block| json!(**block.metrics()));
        metrics::add(&mut counters, "net", &self.nets, |net| json!(**net.metrics()));
        counters.insert("balloon".into(), of(self.balloon.as_ref(), |balloon| balloon.metrics()));
        counters.insert("entropy".into(), of(self.entropy.as_ref(), |rng| rng.metrics()));
        counters
    }
}

/// The metrics of the one device of its kind; of none, nothing.
fn of<T, M: Serialize>(device: Option<&Arc<Mutex<T>>>, metrics: impl Fn(&T) -> &Arc<M>) -> Value {
    device.map_or_else(|| json!({}), |device| json!(**metrics(&lock(device))))
}
