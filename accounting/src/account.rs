//! One vCPU's account: the writer's half stays on the vCPU thread, the reader's half is shared.
use std::fs::File;
use std::sync::Arc;

use crate::reading::Reading;
use crate::vtime::VtimeWriter;

/// What [`Account::open`] needs to know.
#[derive(Debug)]
pub struct Open {
    /// The vCPU's index, from 0.
    pub index: u32,
    /// The descriptor `KVM_GET_STATS_FD` gave for this vCPU; `None` where KVM has none (before Linux 5.14).
    pub kvm_stats: Option<File>,
    /// The one CPU the calling thread is pinned to, if it is.
    pub pinned: Option<u32>,
    /// The host's CPUs.
    pub host: Arc<crate::host::HostCpus>,
}

/// Why an account could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A probe's file or clock cannot be read.
    #[error("cannot read {what} of the vCPU thread: {source}")]
    Probe {
        /// Which probe.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

/// The reading side of one vCPU's account. Any thread may read; no reading touches the vCPU thread.
#[derive(Debug)]
pub struct Account {}

impl Account {
    /// Opens the calling thread's account: takes the first stamp, in state `Paused`, and the baselines of every probe.
    /// Call it on the vCPU thread itself, pinned.
    ///
    /// # Errors
    /// When a probe this host must have cannot be read.
    pub fn open(open: Open) -> Result<(VtimeWriter, Arc<Self>), OpenError> {
        let _ = open;
        todo!()
    }

    /// Closes the account: takes the last stamp and the last value of every probe, so that readings go on being answered,
    /// standing still, when the thread is gone. Call it on the vCPU thread, last.
    pub fn close(&self, writer: VtimeWriter) {
        let _ = writer;
        todo!()
    }

    /// A reading, the running slice included. May be called from any thread of this process, at any rate.
    #[must_use]
    pub fn read(&self) -> Reading {
        todo!()
    }
}
