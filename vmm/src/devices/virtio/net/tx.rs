//! What the guest sends: each chain a frame with its header, to the tap or to the VMM itself.
//!
//! The frame is read by the kernel where the driver put it, after its first bytes were looked at here. A driver may change it in
//! between; it can then send to the tap what the VMM would have taken, which it can do anyway by another address. What may leave
//! the host is for the host's firewall to say, as with Firecracker.

use std::sync::Arc;
use std::time::Instant;

use vm_memory::GuestMemoryMmap;

use super::detour::START_LEN;
use super::spec::{ETHERNET_LEN, HEADER_LEN, MAX_FRAME_LEN, MAX_PIECES, TX};
use super::{Net, count};
use crate::devices::virtio::queue::{Buffers, QueueError};

impl Net {
    /// Sends what the driver has put in, at most a queue's length of frames.
    pub(super) fn transmit(&mut self) -> Result<(), QueueError> {
        self.prepare();
        let Some(active) = &self.active else { return Ok(()) };
        if self.tx_limiter.is_waiting() {
            return Ok(());
        }
        let memory = Arc::clone(&active.memory);
        let (more, detoured) = self.transmit_from(memory.view())?;
        let Some(active) = &mut self.active else { return Ok(()) };
        if active.queues[TX].wants_signal(memory.view())? {
            active.interrupt.signal_used();
        }
        if more {
            active.again(TX);
        }
        if detoured {
            // There may be an answer.
            self.receive()?;
        }
        Ok(())
    }

    /// As [`Net::transmit`]; whether there may be more, and whether the VMM took a frame.
    fn transmit_from(&mut self, memory: &GuestMemoryMmap) -> Result<(bool, bool), QueueError> {
        let mut detoured = false;
        let Some(active) = &self.active else {
            return Ok((false, false));
        };
        for _ in 0..active.queues[TX].size() {
            let Some(active) = &mut self.active else { break };
            let queue = &mut active.queues[TX];
            let Some(chain) = queue.pop(memory)? else {
                return Ok((queue.listen(memory)?, detoured));
            };
            let (head, frame) = (chain.head, chain.readable);
            let well_formed = (HEADER_LEN + ETHERNET_LEN..=MAX_FRAME_LEN).contains(&frame.len())
                && frame.slices().len() <= MAX_PIECES;
            let mut start = [0; HEADER_LEN + START_LEN];
            let start = start_of(&frame, &mut start);
            if !well_formed {
                count(&self.metrics.tx_malformed_frames, 1);
            } else if let Some(side) = &mut self.side
                && side.takes(&start[HEADER_LEN..])
            {
                // These are not limited: they do not leave the VMM.
                let mut whole = vec![0; frame.len()];
                let whole = start_of(&frame, &mut whole);
                side.receive(&whole[HEADER_LEN..]);
                detoured = true;
            } else {
                let len = (frame.len() - HEADER_LEN) as u64;
                if !self.tx_limiter.take(1, len, Instant::now()) {
                    queue.unpop();
                    count(&self.metrics.tx_rate_limiter_throttled, 1);
                    return Ok((false, detoured));
                }
                let from = &start[HEADER_LEN + 6..HEADER_LEN + 12];
                if self.guest_mac.is_some_and(|mac| mac.0 != from) {
                    count(&self.metrics.tx_spoofed_mac_count, 1);
                }
                self.write_tap(&frame, len);
            }
            if let Some(active) = &mut self.active {
                active.queues[TX].give_back(memory, head, 0)?;
            }
        }
        Ok((true, detoured))
    }

    fn write_tap(&mut self, frame: &Buffers<'_>, len: u64) {
        if self.gone {
            count(&self.metrics.tx_fails, 1);
            return;
        }
        match self.tap.send(frame) {
            Ok(()) => {
                count(&self.metrics.tx_packets_count, 1);
                count(&self.metrics.tx_bytes_count, len);
            }
            Err(error) => {
                count(&self.metrics.tx_fails, 1);
                count(&self.metrics.tap_write_fails, 1);
                self.tap_failed("send to", &error);
            }
        }
    }
}

/// Copies the first bytes of `frame`; as many as there are, and room for.
fn start_of<'a>(frame: &Buffers<'_>, to: &'a mut [u8]) -> &'a [u8] {
    let mut done = 0;
    for slice in frame.slices() {
        done += slice.copy_to(&mut to[done..]);
        if done == to.len() {
            break;
        }
    }
    &to[..done]
}
