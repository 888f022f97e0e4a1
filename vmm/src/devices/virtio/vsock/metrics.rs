//! What is counted.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// What the socket device did, since its start. Received and transmitted are the guest's words.
#[derive(Debug, Default, Serialize)]
pub struct VsockMetrics {
    /// Bytes of data sent to the guest.
    pub rx_bytes_count: AtomicU64,
    /// Bytes of data that came from the guest.
    pub tx_bytes_count: AtomicU64,
    /// Packets sent to the guest.
    pub rx_packets_count: AtomicU64,
    /// Packets that came from the guest.
    pub tx_packets_count: AtomicU64,
    /// Connections made.
    pub conns_added: AtomicU64,
    /// Connections ended because nobody answered in time, or a rule was broken.
    pub conns_killed: AtomicU64,
    /// Connections ended, however.
    pub conns_removed: AtomicU64,
    /// Attempts to write to a socket that failed.
    pub tx_write_fails: AtomicU64,
    /// Attempts to read from a socket that failed.
    pub rx_read_fails: AtomicU64,
}

pub(super) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}
