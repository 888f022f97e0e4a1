//! What the guest receives: frames from the tap, or from the VMM, into the chains that the driver put into its queue.
//!
//! A frame is read into guest memory before its length is known, so that there has to be room for the longest. The chains it took are given
//! back together, the others are put back where they were. A frame that the rate limiter holds up stays in its chains, which the driver gets once
//! it may.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::GuestMemoryMmap;

use super::spec::{F_MRG_RXBUF, HEADER_LEN, LONG_FRAMES, MAX_FRAME_LEN, MAX_PIECES, NUM_BUFFERS, PLAIN_FRAME_LEN, RX};
use super::tap::{Received, is_gone};
use super::{Net, RETRY_FIRST, RETRY_MOST, count};
use crate::devices::virtio::queue::{Chain, Queue, QueueError};

/// Chains that a frame can be put into.
#[derive(Debug, Default)]
struct Room<'m> {
    chains: VecDeque<Chain<'m>>,
    len: usize,
    pieces: usize,
}

/// A frame in guest memory that its driver does not have yet.
#[derive(Debug)]
pub(super) struct Frame {
    /// Heads, and how much is in each.
    chains: Vec<(u16, u32)>,
    /// Bytes, less the header.
    len: u64,
}

impl<'m> Room<'m> {
    /// Takes chains from the driver until the longest frame has room. False if it put in too few: it is asked to tell of the next.
    fn gather(&mut self, queue: &mut Queue, memory: &'m GuestMemoryMmap, features: u64) -> Result<bool, QueueError> {
        let (wanted, needed) = if features & F_MRG_RXBUF == 0 {
            // All of a frame goes into one chain, however long.
            (1, 1)
        } else if features & LONG_FRAMES == 0 {
            (MAX_FRAME_LEN, PLAIN_FRAME_LEN)
        } else {
            (MAX_FRAME_LEN, MAX_FRAME_LEN)
        };
        while self.len < wanted {
            let Some(chain) = queue.pop(memory)? else {
                // A driver that put in all it can will not put in more.
                if self.len >= needed || self.chains.len() == usize::from(queue.size()) {
                    break;
                }
                if queue.listen(memory)? {
                    continue;
                }
                return Ok(false);
            };
            if chain.writable.len() < HEADER_LEN {
                return Err(chain.error("has no room for the header of a frame"));
            }
            let pieces = self.pieces + chain.writable.slices().len();
            if pieces > MAX_PIECES {
                if self.chains.is_empty() {
                    return Err(chain.error("is in more pieces than a frame can be"));
                }
                queue.unpop();
                break;
            }
            self.pieces = pieces;
            self.len += chain.writable.len();
            self.chains.push_back(chain);
        }
        Ok(!self.chains.is_empty())
    }

    /// The chains that a frame goes into.
    fn iter(&self) -> impl Iterator<Item = &Chain<'m>> {
        self.chains.iter()
    }

    /// Writes `frame` behind a header that asks for nothing. False if there is no room.
    fn write(&mut self, frame: &[u8]) -> bool {
        if HEADER_LEN + frame.len() > self.len {
            return false;
        }
        let bytes = [&[0; HEADER_LEN], frame].concat();
        let mut left = &bytes[..];
        for chain in &self.chains {
            let done = chain.writable.clone().write(left);
            left = &left[done..];
        }
        true
    }

    /// Takes away the chains that hold a frame of `len` bytes, and says in its header how many they are.
    fn take(&mut self, len: usize) -> Frame {
        let mut chains = Vec::new();
        let mut left = len;
        let mut header = None;
        while left > 0 {
            let chain = self.chains.pop_front().expect("a frame is no longer than its room");
            self.len -= chain.writable.len();
            self.pieces -= chain.writable.slices().len();
            let here = left.min(chain.writable.len());
            left -= here;
            // Less than MAX_FRAME_LEN, or what a driver without mergeable buffers put into one chain of less than 4 GiB.
            chains.push((chain.head, u32::try_from(here).unwrap_or(u32::MAX)));
            header.get_or_insert(chain.writable);
        }
        if let Some(mut header) = header {
            let _ = header.take_front(NUM_BUFFERS);
            // At most a queue's length.
            let num_buffers = u16::try_from(chains.len()).unwrap_or(u16::MAX);
            header.write(&num_buffers.to_le_bytes());
        }
        Frame {
            chains,
            len: (len - HEADER_LEN) as u64,
        }
    }

    /// Puts back what was not used, as if it had never been taken.
    fn put_back(self, queue: &mut Queue) {
        self.chains.iter().for_each(|_| queue.unpop());
    }
}

impl Net {
    /// Gives the driver what there is for it, at most a queue's length of frames.
    pub(super) fn receive(&mut self) -> Result<(), QueueError> {
        self.prepare();
        let Some(active) = &self.active else { return Ok(()) };
        if self.rx_limiter.is_waiting() {
            return Ok(());
        }
        let memory = Arc::clone(&active.memory);
        let mut room = Room::default();
        let more = self.receive_into(&mut room, memory.view())?;
        let Some(active) = &mut self.active else { return Ok(()) };
        room.put_back(&mut active.queues[RX]);
        if active.queues[RX].wants_signal(memory.view())? {
            active.interrupt.signal_used();
        }
        if more {
            active.again(RX);
        }
        Ok(())
    }

    /// As [`Net::receive`]; true if there may be more.
    fn receive_into<'m>(&mut self, room: &mut Room<'m>, memory: &'m GuestMemoryMmap) -> Result<bool, QueueError> {
        if let Some(frame) = self.held.take()
            && !self.deliver(frame, memory)?
        {
            return Ok(false);
        }
        let Some(active) = &self.active else { return Ok(false) };
        for _ in 0..active.queues[RX].size() {
            let detours = self.side.as_mut().is_some_and(|side| side.has_frame());
            if !detours && !self.readable {
                return Ok(false);
            }
            let Some(active) = &mut self.active else {
                return Ok(false);
            };
            if !room.gather(&mut active.queues[RX], memory, active.features)? {
                count(&self.metrics.no_rx_avail_buffer, 1);
                return Ok(false);
            }
            let len = if detours {
                self.read_side(room)
            } else {
                self.read_tap(room)
            };
            if let Some(len) = len
                && !self.deliver(room.take(len), memory)?
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads a frame of the tap's into `room`; its length with the header.
    fn read_tap(&mut self, room: &Room<'_>) -> Option<usize> {
        match self.tap.receive(room.iter()) {
            Ok(Received::Frame(len)) => {
                self.retry_wait = Duration::ZERO;
                return Some(len);
            }
            Ok(Received::TooLong) => count(&self.metrics.rx_fails, 1),
            // The next one is an event of its own: the tap's descriptor is edge-triggered.
            Ok(Received::Nothing) => self.readable = false,
            Err(error) => {
                self.readable = false;
                count(&self.metrics.tap_read_fails, 1);
                self.tap_failed("receive from", &error);
                if !self.gone {
                    // What it has besides this is announced no more.
                    self.retry_wait = (2 * self.retry_wait).clamp(RETRY_FIRST, RETRY_MOST);
                    self.retry.after(self.retry_wait);
                }
            }
        }
        None
    }

    /// Writes a frame of the VMM's into `room`; its length with the header.
    fn read_side(&mut self, room: &mut Room<'_>) -> Option<usize> {
        let frame = self.side.as_mut()?.take()?;
        if room.write(&frame) {
            return Some(HEADER_LEN + frame.len());
        }
        count(&self.metrics.rx_fails, 1);
        None
    }

    /// Gives the driver `frame`, or keeps it where the limit is reached: then false.
    fn deliver(&mut self, frame: Frame, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        let Some(active) = &mut self.active else {
            return Ok(false);
        };
        if !self.rx_limiter.take(1, frame.len, Instant::now()) {
            count(&self.metrics.rx_rate_limiter_throttled, 1);
            self.held = Some(frame);
            return Ok(false);
        }
        active.queues[RX].give_back_together(memory, &frame.chains)?;
        count(&self.metrics.rx_packets_count, 1);
        count(&self.metrics.rx_bytes_count, frame.len);
        Ok(true)
    }

    /// Says so once: what a tap does not do now it will not do for long.
    pub(super) fn tap_failed(&mut self, what: &str, error: &std::io::Error) {
        let gone = is_gone(error);
        if gone && !self.gone {
            tracing::warn!(
                "interface {}: tap {} is gone: the guest sends to and hears from nobody",
                self.iface,
                self.tap.name()
            );
        } else if !gone && !self.complained {
            let tap = self.tap.name();
            // What the kernel says of one that is down.
            let advice = match error.raw_os_error() {
                Some(libc::EIO) => format!(" (is it up? `ip link set {tap} up`)"),
                _ => String::new(),
            };
            tracing::warn!(
                "interface {}: cannot {what} tap {tap}: {error}{advice}; the frame is lost, further ones are only counted",
                self.iface
            );
        }
        self.gone |= gone;
        self.complained = true;
    }
}
