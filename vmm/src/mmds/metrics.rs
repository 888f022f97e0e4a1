//! What the service counted, by the names of Firecracker's section `mmds`.
//!
//! Two of its counters are left out, for what they count cannot happen here: a frame that is taken has an Ethernet header
//! (`rx_bad_eth`), and a frame for the guest is whole in memory before it has to go anywhere (`tx_errors`).

use std::sync::atomic::AtomicU64;

use serde::Serialize;

use crate::devices::virtio::count;

/// Counters since the start, over all interfaces that reach the service.
#[derive(Debug, Default, Serialize)]
pub struct MmdsMetrics {
    /// Frames of the guest's that were for the service, and so for no tap.
    pub rx_accepted: AtomicU64,
    /// Of these, dropped: they made no sense, or so many answers waited for the guest that there was no room for one more.
    pub rx_accepted_err: AtomicU64,
    /// Of these, IPv4 that is not TCP.
    pub rx_accepted_unusual: AtomicU64,
    /// Of these, segments of TCP.
    pub rx_count: AtomicU64,
    /// GET requests with a token that is none of ours, or no longer valid. Version 1 answers them all the same.
    pub rx_invalid_token: AtomicU64,
    /// GET requests without a token.
    pub rx_no_token: AtomicU64,
    /// Bytes sent to the guest, Ethernet headers and all.
    pub tx_bytes: AtomicU64,
    /// Frames sent to the guest: sends that succeeded, as all do.
    pub tx_count: AtomicU64,
    /// Frames sent to the guest.
    pub tx_frames: AtomicU64,
    /// Connections that the guest began to open.
    pub connections_created: AtomicU64,
    /// Of these, gone: closed, reset, or given up.
    pub connections_destroyed: AtomicU64,
}

impl MmdsMetrics {
    pub(super) fn frame_sent(&self, len: usize) {
        count(&self.tx_count, 1);
        count(&self.tx_frames, 1);
        count(&self.tx_bytes, len as u64);
    }
}
