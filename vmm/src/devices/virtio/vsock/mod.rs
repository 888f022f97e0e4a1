//! The socket device (5.10): streams between the guest's AF_VSOCK and the host's AF_UNIX sockets, by Firecracker's
//! protocol.
//!
//! * The host connects to the socket at `uds_path`, says `CONNECT port\n`, and hears `OK port\n` (the host's port, of
//!   no use but to tell connections apart) once the guest has accepted; or the socket is closed.
//! * The guest connects to port P of context id 2, and is connected to whoever listens at `uds_path_P`; or is refused.
//!
//! `packet.rs` is what is exchanged with the driver, `connection.rs` what becomes of one connection, `stream.rs` the
//! host's end of it, `mux.rs` all of them together, `socket.rs` the socket at `uds_path`. Here they meet the queues.
//! Clients are taken in from when the guest's driver is ready: until then they wait in the socket's queue.

mod connection;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzz;
mod metrics;
mod mux;
mod packet;
mod socket;
mod stream;

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use event_manager::EventSet;

use super::queue::{Chain, QueueError};
use super::{Active, F_EVENT_IDX, F_INDIRECT_DESC, VirtioDevice};
use crate::config;
pub use metrics::VsockMetrics;
use mux::Mux;
use packet::{HEADER_LEN, Header};
use socket::Socket;

/// Packets at once, as Firecracker's. The driver takes at most as many for its event queue.
const QUEUE_SIZES: [u16; 3] = [256; 3];
/// [`HEADER_LEN`], as descriptors count.
const HEADER_SIZE: u32 = 44;
const _: () = assert!(HEADER_SIZE as usize == HEADER_LEN);
/// The queue of packets to the guest.
const RX: usize = 0;
/// The queue of packets from the guest. The third is for events, of which there are none: they tell of migration.
const TX: usize = 1;

/// Why there is no socket device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VsockError {
    /// A context id that is not a guest's.
    #[error("vsock: guest_cid {0} is not a guest's: choose one from 3 to 4294967294")]
    Cid(u32),
    /// The path does not fit in a socket's address.
    #[error(
        "vsock: uds_path {}: it has {length} bytes, and a unix socket's path at most 107: choose a shorter one",
        path.display()
    )]
    TooLong {
        /// As given.
        path: PathBuf,
        /// Its length, in bytes.
        length: usize,
    },
    /// Another process answers there.
    #[error("vsock: uds_path {0}: another process is listening there: end it, or choose another path")]
    InUse(PathBuf),
    /// A socket nobody listens on, and not ours to replace: another user's, or its directory cannot be locked.
    #[error(
        "vsock: uds_path {0}: a socket nobody listens on, which is not replaced: it is another user's, or its \
         directory cannot be locked: see that no other process is about to use it, and remove it (rm {0}), or choose another path"
    )]
    Stale(PathBuf),
    /// Something else has that name.
    #[error("vsock: uds_path {0}: this file exists and is not a socket: choose another path")]
    NotASocket(PathBuf),
    /// Its directory is not there.
    #[error("vsock: uds_path {}: its directory does not exist: create it, or choose another path", .0.display())]
    NoDirectory(PathBuf),
    /// Anything else.
    #[error("vsock: uds_path {}: cannot listen there: {source}", path.display())]
    Socket {
        /// As given.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// No descriptors.
    #[error("vsock: cannot make its epoll descriptor and timer: {0}; raise the limit on open files (ulimit -n)")]
    Descriptors(std::io::Error),
}

/// A socket device. Its socket's file goes with it.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u64,
    mux: Mux,
    active: Option<Active>,
    /// Since when the guest is held, if it is: it cannot answer, and nobody is late.
    held_since: Option<Instant>,
    /// Where time stands still, it is this.
    #[cfg(any(test, feature = "fuzzing"))]
    clock: Option<Instant>,
}

impl Vsock {
    /// The device that `config` describes, its socket listening.
    ///
    /// # Errors
    /// See [`VsockError`].
    pub fn new(config: &config::Vsock) -> Result<Self, VsockError> {
        let cid = config.guest_cid;
        // VMADDR_CID_HYPERVISOR, _LOCAL, _HOST, and _ANY (vsock(7)).
        if cid < 3 || cid == u32::MAX {
            return Err(VsockError::Cid(cid));
        }
        let socket = Socket::bind(&config.uds_path)?;
        Ok(Self {
            guest_cid: cid.into(),
            mux: Mux::new(cid.into(), socket).map_err(VsockError::Descriptors)?,
            active: None,
            held_since: None,
            #[cfg(any(test, feature = "fuzzing"))]
            clock: None,
        })
    }

    /// What it did so far.
    #[must_use]
    pub fn metrics(&self) -> &Arc<VsockMetrics> {
        self.mux.metrics()
    }

    /// The guest is held, or runs again: time stands still meanwhile for whoever waits for an answer. Saying it twice changes
    /// nothing.
    pub fn set_held(&mut self, held: bool) {
        let now = self.now();
        match (self.held_since, held) {
            (None, true) => self.held_since = Some(now),
            (Some(since), false) => {
                self.held_since = None;
                self.mux.was_held(now.saturating_duration_since(since), now);
            }
            _ => {}
        }
    }

    /// The time as those who wait have it: it stands still while the guest is held.
    fn time(&self) -> Instant {
        self.held_since.unwrap_or_else(|| self.now())
    }

    #[cfg(not(any(test, feature = "fuzzing")))]
    fn now(&self) -> Instant {
        Instant::now()
    }

    #[cfg(any(test, feature = "fuzzing"))]
    fn now(&self) -> Instant {
        self.clock.unwrap_or_else(Instant::now)
    }

    /// Takes packets from the driver, at most a queue's length of them. True if there may be more.
    fn take(&mut self, now: Instant) -> Result<bool, QueueError> {
        let Some(active) = &mut self.active else {
            return Ok(false);
        };
        let memory = active.memory.view();
        let queue = &mut active.queues[TX];
        for _ in 0..queue.size() {
            let Some(mut chain) = queue.pop(memory)? else {
                return queue.listen(memory);
            };
            let header = header_of(&mut chain)?;
            self.mux.take(&header, chain.readable, now);
            queue.give_back(memory, chain.head, 0)?;
        }
        Ok(true)
    }

    /// Gives packets to the driver, at most a queue's length of them. True if there may be more.
    fn give(&mut self, now: Instant) -> Result<bool, QueueError> {
        let Some(active) = &mut self.active else {
            return Ok(false);
        };
        let memory = active.memory.view();
        let queue = &mut active.queues[RX];
        for _ in 0..queue.size() {
            if !self.mux.has_news() {
                return Ok(false);
            }
            let Some(mut chain) = queue.pop(memory)? else {
                return queue.listen(memory);
            };
            let mut place = chain.writable.take_front(HEADER_LEN);
            if chain.writable.is_empty() {
                return Err(chain.error("has no room for a packet"));
            }
            let Some(header) = self.mux.give(&chain.writable, now) else {
                queue.unpop();
                return Ok(false);
            };
            place.write(&header.to_bytes());
            let len = header.len + HEADER_SIZE;
            queue.give_back(memory, chain.head, len)?;
        }
        Ok(true)
    }

    /// As both, and what belongs around them.
    fn serve(&mut self) -> Result<(), QueueError> {
        let now = self.time();
        let more = [(TX, self.take(now)?), (RX, self.give(now)?)];
        let Some(active) = &mut self.active else { return Ok(()) };
        let memory = active.memory.view();
        for (queue, more) in more {
            if active.queues[queue].wants_signal(memory)? {
                active.interrupt.signal_used();
            }
            if more {
                active.again(queue);
            }
        }
        Ok(())
    }
}

fn header_of(chain: &mut Chain<'_>) -> Result<Header, QueueError> {
    let mut bytes = [0; HEADER_LEN];
    if chain.readable.read(&mut bytes) < HEADER_LEN {
        return Err(chain.error("has no header of a packet"));
    }
    Ok(Header::from_bytes(&bytes))
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        19
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_EVENT_IDX | F_INDIRECT_DESC
    }

    /// `guest_cid`.
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        super::copy_config(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, active: Active) {
        self.active = Some(active);
    }

    fn reset(&mut self) {
        self.mux.close();
        self.active = None;
    }

    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        self.mux.sources().map(|fd| (fd, EventSet::IN)).into()
    }

    fn notified(&mut self, _queue: usize) -> Result<(), QueueError> {
        if self.active.is_some() {
            self.mux.listen();
        }
        self.serve()
    }

    fn ready(&mut self, source: usize) -> Result<(), QueueError> {
        let now = self.time();
        if source == 0 {
            self.mux.ready(now);
        } else if self.held_since.is_some() {
            self.mux.put_off();
        } else {
            self.mux.expired(now);
            if self.active.is_some() {
                // It may have stopped, for want of descriptors.
                self.mux.listen();
            }
        }
        self.serve()
    }
}

#[cfg(test)]
mod tests;
