//! The network device (5.1): Ethernet between the guest and a tap of the host's.
//!
//! ```text
//!   driver ── TX queue ──► tx.rs ──► detour.rs (MMDS takes what is for it)
//!                            │            │ answers
//!                            ▼ writev     ▼
//!                          tap.rs ──► rx.rs ──► RX queue ──► driver
//!                                readv into guest memory
//! ```
//!
//! Frames are copied once, by the kernel, with all offloads that a tap has: checksums and segmentation are left to whoever is last. A
//! frame either goes whole or is lost, as on any wire: a driver's frame that is none, or that the tap refuses, is counted and given back.
//!
//! Nothing here waits or spins. What holds a direction up is remembered, and its end is an event: tap empty (edge-triggered descriptor),
//! no buffers (notification of the queue), limit reached (the limiter's timer), tap failed (a timer, for what else it has is no
//! event any more). A tap that is deleted ends its events with it.

mod detour;
mod rx;
mod spec;
mod tap;
mod taps;
mod tx;

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use event_manager::EventSet;
use serde::Serialize;

use super::queue::QueueError;
use super::rate_limiter::RateLimiter;
use super::timer::Timer;
use super::{Active, F_EVENT_IDX, F_INDIRECT_DESC, VirtioDevice};
use crate::config::{self, MacAddr, NetworkInterface};
pub use detour::Detour;
use detour::Side;
use rx::Frame;
use spec::{
    DEVICE_TYPE, F_CSUM, F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_UFO, F_HOST_TSO4, F_HOST_TSO6, F_HOST_UFO,
    F_MAC, F_MRG_RXBUF, F_MTU, RX, TX,
};
use tap::Tap;
pub use tap::TapError;
pub use taps::Taps;

/// Chains at once, either way: Firecracker's.
const QUEUE_SIZE: u16 = 256;
/// The smallest MTU that IPv4 knows (RFC 791): the specification's, too.
const MIN_MTU: u16 = 68;

/// Places among [`VirtioDevice::sources`].
const TAP: usize = 0;
const RX_LIMITER: usize = 1;
const TX_LIMITER: usize = 2;
const RETRY: usize = 3;

/// How long a tap that failed is left alone: doubled each time that it fails again, to [`RETRY_MOST`] at most.
const RETRY_FIRST: Duration = Duration::from_millis(10);
const RETRY_MOST: Duration = Duration::from_secs(1);

/// Why there is no interface.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// No tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// An MTU that is none.
    #[error("interface {iface}: an MTU of {mtu} is not possible: it is {MIN_MTU} at least")]
    Mtu {
        /// The interface.
        iface: String,
        /// Its MTU, in bytes.
        mtu: u16,
    },
    /// No descriptors.
    #[error("interface {iface}: cannot make its timers: {source}; raise the limit on open files (ulimit -n)")]
    Timer {
        /// The interface.
        iface: String,
        /// What the system said.
        source: std::io::Error,
    },
}

/// What an interface did, since its start. Lengths are those of frames, their virtio-net headers not counted.
#[derive(Debug, Default, Serialize)]
pub struct NetMetrics {
    /// Frames that the guest received.
    pub rx_packets_count: AtomicU64,
    /// Bytes of them.
    pub rx_bytes_count: AtomicU64,
    /// Frames for the guest that were lost, for it has no buffers of that length.
    pub rx_fails: AtomicU64,
    /// How often the guest had too few buffers for what there was for it.
    pub no_rx_avail_buffer: AtomicU64,
    /// How often the rate limiter held up what the guest receives.
    pub rx_rate_limiter_throttled: AtomicU64,
    /// How often the tap failed to give a frame.
    pub tap_read_fails: AtomicU64,
    /// Frames that the guest sent to the tap.
    pub tx_packets_count: AtomicU64,
    /// Bytes of them.
    pub tx_bytes_count: AtomicU64,
    /// Frames of the guest's that were lost: the tap is gone or refused them.
    pub tx_fails: AtomicU64,
    /// Frames of the guest's that are none: too short, too long, or in too many pieces.
    pub tx_malformed_frames: AtomicU64,
    /// Frames of the guest's with another address than `guest_mac` as their sender's. They are sent.
    pub tx_spoofed_mac_count: AtomicU64,
    /// How often the rate limiter held up what the guest sends.
    pub tx_rate_limiter_throttled: AtomicU64,
    /// How often the tap refused a frame.
    pub tap_write_fails: AtomicU64,
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

fn check_mtu(config: &NetworkInterface) -> Result<(), NetError> {
    match config.mtu {
        Some(mtu) if mtu < MIN_MTU => Err(NetError::Mtu {
            iface: config.iface_id.clone(),
            mtu,
        }),
        _ => Ok(()),
    }
}

/// An interface.
#[derive(Debug)]
pub struct Net {
    iface: String,
    guest_mac: Option<MacAddr>,
    mtu: Option<u16>,
    tap: Arc<Tap>,
    /// The tap may have a frame: it said so, and has not been found empty since.
    readable: bool,
    /// The tap was deleted.
    gone: bool,
    /// When the tap is read again that has failed.
    retry: Timer,
    /// How long that took last.
    retry_wait: Duration,
    /// The user knows that the tap fails.
    complained: bool,
    side: Option<Side>,
    rx_limiter: RateLimiter,
    tx_limiter: RateLimiter,
    /// What the rate limiter holds up.
    held: Option<Frame>,
    metrics: Arc<NetMetrics>,
    active: Option<Active>,
    /// The driver's features have not reached the tap yet.
    unprepared: bool,
}

impl Net {
    /// The interface that `config` describes, with its tap; one of `taps`, if it is among them.
    ///
    /// # Errors
    /// See [`NetError`].
    pub fn new(config: &NetworkInterface, taps: &Taps) -> Result<Self, NetError> {
        check_mtu(config)?;
        Self::with_tap(config, taps.tap_of(config)?)
    }

    /// One on a wire whose other end is that of `socket`.
    #[cfg(feature = "fuzzing")]
    pub(super) fn on_wire(config: &NetworkInterface, socket: std::os::fd::OwnedFd) -> Result<Self, NetError> {
        Self::with_tap(config, Tap::of(socket))
    }

    fn with_tap(config: &NetworkInterface, tap: impl Into<Arc<Tap>>) -> Result<Self, NetError> {
        let limiter = |limit| {
            RateLimiter::new(limit).map_err(|source| NetError::Timer {
                iface: config.iface_id.clone(),
                source,
            })
        };
        let retry = Timer::new().map_err(|source| NetError::Timer {
            iface: config.iface_id.clone(),
            source,
        })?;
        Ok(Self {
            iface: config.iface_id.clone(),
            guest_mac: config.guest_mac,
            mtu: config.mtu,
            tap: tap.into(),
            // What came before anybody waited for it is no event.
            readable: true,
            gone: false,
            retry,
            retry_wait: Duration::ZERO,
            complained: false,
            side: None,
            rx_limiter: limiter(config.rx_rate_limiter)?,
            tx_limiter: limiter(config.tx_rate_limiter)?,
            held: None,
            metrics: Arc::default(),
            active: None,
            unprepared: false,
        })
    }

    /// Has `detour` take the guest's frames that are for it. Before the machine runs: its timer is one of
    /// [`VirtioDevice::sources`].
    ///
    /// # Errors
    /// There is no descriptor left for its timer.
    pub fn set_detour(&mut self, detour: Box<dyn Detour>) -> Result<(), NetError> {
        let side = Side::new(detour).map_err(|source| NetError::Timer {
            iface: self.iface.clone(),
            source,
        })?;
        self.side = Some(side);
        Ok(())
    }

    /// What it did so far.
    #[must_use]
    pub fn metrics(&self) -> &Arc<NetMetrics> {
        &self.metrics
    }

    /// Other limits, where given; what waits for the old ones is tried anew.
    pub fn set_rate_limiters(&mut self, rx: Option<config::RateLimiter>, tx: Option<config::RateLimiter>) {
        let now = std::time::Instant::now();
        if let Some(rx) = rx {
            self.rx_limiter.update(rx, now);
        }
        if let Some(tx) = tx {
            self.tx_limiter.update(tx, now);
        }
    }

    /// Tells the tap what the driver can do, before the first frame: here, for a vCPU thread does no I/O.
    fn prepare(&mut self) {
        if !std::mem::take(&mut self.unprepared) {
            return;
        }
        let Some(active) = &self.active else { return };
        if let Err(error) = self.tap.set_offloads(active.features) {
            tracing::warn!(
                "interface {}: tap {} has no offloads: {error}; traffic is whole, and slower",
                self.iface,
                self.tap.name()
            );
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn features(&self) -> u64 {
        let mut features = F_EVENT_IDX | F_INDIRECT_DESC | F_MRG_RXBUF;
        features |= F_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_UFO;
        features |= F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_UFO;
        if self.guest_mac.is_some() {
            features |= F_MAC;
        }
        if self.mtu.is_some() {
            features |= F_MTU;
        }
        features
    }

    /// `mac`, `status` and `max_virtqueue_pairs` (which are not offered), `mtu`.
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.guest_mac.map_or([0; 6], |mac| mac.0));
        config[10..].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        super::copy_config(&config, offset, data);
    }

    fn activate(&mut self, active: Active) {
        self.active = Some(active);
        self.unprepared = true;
    }

    fn reset(&mut self) {
        self.held = None;
        self.active = None;
    }

    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        let mut sources = vec![
            // A tap stays readable while the guest has no room.
            (self.tap.as_raw_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED),
            (self.rx_limiter.as_raw_fd(), EventSet::IN),
            (self.tx_limiter.as_raw_fd(), EventSet::IN),
            (self.retry.as_raw_fd(), EventSet::IN),
        ];
        sources.extend(self.side.iter().map(|side| (side.as_raw_fd(), EventSet::IN)));
        sources
    }

    fn notified(&mut self, queue: usize) -> Result<(), QueueError> {
        match queue {
            RX => self.receive(),
            TX => self.transmit(),
            _ => Ok(()),
        }
    }

    fn ready(&mut self, source: usize) -> Result<(), QueueError> {
        match source {
            TAP => self.readable = !self.gone,
            RETRY => {
                self.retry.expired();
                self.readable = !self.gone;
            }
            RX_LIMITER => self.rx_limiter.expired(),
            TX_LIMITER => {
                self.tx_limiter.expired();
                return self.transmit();
            }
            _ => {
                if let Some(side) = &self.side {
                    side.expired();
                }
            }
        }
        self.receive()
    }
}

#[cfg(test)]
mod tap_tests;
#[cfg(test)]
mod tests;
