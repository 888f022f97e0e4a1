//! What this host offers a guest: its CPUs and its tick. Answered by `GET /host`.

use std::io;

use accounting::host::{HostCpus, tick_ns};
use serde::Serialize;

/// The host, as read once.
#[derive(Clone, Debug, Serialize)]
pub struct Host {
    /// Its CPUs.
    pub cpus: HostCpus,
    /// Length of its timer tick, in nanoseconds.
    pub tick_ns: u64,
}

impl Host {
    /// Reads it.
    ///
    /// # Errors
    /// A file of sysfs that cannot be read or understood, by its path.
    pub fn read() -> io::Result<Self> {
        Ok(Self {
            cpus: HostCpus::read()?,
            tick_ns: tick_ns(),
        })
    }
}
