//! The console's output on its way from the vCPUs to the VMM thread.
//!
//! ```text
//! vCPU: wait_for_room ─► push ─► [ bytes, bounded ] ─► take :VMM thread ─► write(2)
//! ```
//!
//! A vCPU never writes to the console itself. While nobody reads the console the ring fills, and the vCPU that has more to say
//! sleeps in [`OutputRing::wait_for_room`]: off the CPU inside the VMM, which is the mode `blocked`. No output is dropped.
//!
//! The VMM thread, which empties the ring, must never wait for a vCPU that waits for room: before it pauses or stops vCPUs it
//! lets them pass ([`OutputRing::let_pass`]). The bound is then exceeded by what each says before it notices: a page at most,
//! KVM's buffer for one string instruction.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard};

use vmm_sys_util::eventfd::EventFd;

/// Room for a screenful of boot messages and more, between two runs of the VMM thread.
pub const CAPACITY: usize = 64 << 10;

/// The ring. Shared by the vCPUs, through the serial port, and the VMM thread.
#[derive(Debug)]
pub struct OutputRing {
    state: Mutex<State>,
    room: Condvar,
    ready: EventFd,
}

#[derive(Debug)]
struct State {
    bytes: VecDeque<u8>,
    pass: bool,
}

impl OutputRing {
    /// An empty ring, allocated in full.
    ///
    /// # Errors
    /// There is no descriptor left for its eventfd.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            state: Mutex::new(State {
                bytes: VecDeque::with_capacity(CAPACITY),
                pass: false,
            }),
            room: Condvar::new(),
            ready: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    /// Readable when the ring went from empty to not empty.
    #[must_use]
    pub fn ready(&self) -> &EventFd {
        &self.ready
    }

    /// Sleeps while the ring is full. Two vCPUs may both pass at the last free byte: the bound is exceeded by one byte a vCPU.
    pub fn wait_for_room(&self) {
        let state = self.state();
        if state.bytes.len() >= CAPACITY {
            let full = |state: &mut State| state.bytes.len() >= CAPACITY && !state.pass;
            drop(
                self.room
                    .wait_while(state, full)
                    .expect("no holder of this lock panics"),
            );
        }
    }

    /// Adds a byte. The VMM thread is woken for the first only: it takes all there are.
    pub fn push(&self, byte: u8) {
        let mut state = self.state();
        state.bytes.push_back(byte);
        if state.bytes.len() == 1 {
            drop(state);
            // Fails only when the counter is full, and then the VMM thread is awake.
            let _ = self.ready.write(1);
        }
    }

    /// Moves everything to the end of `out`, and says how much.
    pub fn take(&self, out: &mut Vec<u8>) -> usize {
        let mut state = self.state();
        let taken = state.bytes.len();
        out.extend(state.bytes.drain(..));
        drop(state);
        if taken >= CAPACITY {
            self.room.notify_all();
        }
        taken
    }

    /// Whether a full ring lets vCPUs pass.
    pub fn let_pass(&self, pass: bool) {
        self.state().pass = pass;
        self.room.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc::{RecvTimeoutError, channel};
    use std::time::Duration;

    fn full() -> Arc<OutputRing> {
        let ring = Arc::new(OutputRing::new().unwrap());
        (0..CAPACITY).for_each(|_| ring.push(b'x'));
        ring
    }

    #[test]
    fn the_vmm_thread_is_woken_once_for_what_it_takes_at_once() {
        let ring = OutputRing::new().unwrap();
        ring.push(b'a');
        ring.push(b'b');
        assert_eq!(ring.ready().read().unwrap(), 1);
        let mut out = Vec::new();
        assert_eq!((ring.take(&mut out), out.as_slice()), (2, &b"ab"[..]));
        ring.push(b'c');
        assert_eq!(ring.ready().read().unwrap(), 1);
    }

    #[test]
    fn a_vcpu_waits_while_the_ring_is_full_and_until_it_is_emptied() {
        let ring = full();
        let (passed, seen) = channel();
        let waiting = std::thread::spawn({
            let ring = Arc::clone(&ring);
            move || {
                ring.wait_for_room();
                ring.push(b'y');
                passed.send(()).unwrap();
            }
        });
        assert_eq!(
            seen.recv_timeout(Duration::from_millis(50)),
            Err(RecvTimeoutError::Timeout)
        );
        let mut out = Vec::new();
        assert_eq!(ring.take(&mut out), CAPACITY);
        seen.recv_timeout(Duration::from_secs(10)).unwrap();
        waiting.join().unwrap();
        assert_eq!(ring.take(&mut out), 1);
        assert_eq!(out.last(), Some(&b'y'));
    }

    #[test]
    fn a_full_ring_does_not_hold_a_vcpu_that_is_to_be_paused() {
        let ring = full();
        let waiting = std::thread::spawn({
            let ring = Arc::clone(&ring);
            move || {
                ring.wait_for_room();
                ring.push(b'y');
            }
        });
        ring.let_pass(true);
        waiting.join().unwrap();
        assert_eq!(ring.take(&mut Vec::new()), CAPACITY + 1, "nothing is dropped");
    }
}
