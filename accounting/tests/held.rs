//! Threads held at whatever instruction a signal finds them at: a vCPU thread in mid-stamp neither hangs nor tears a
//! reader, and a reader in mid-read does not delay a vCPU thread.
//!
//! The latch's unit tests stop both sides between any two words, and its models try every interleaving; here it is the
//! machine code that is stopped, some thousand times.
#![expect(unsafe_code, reason = "signals are sent and handled by libc")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::IntoRawFd;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use accounting::clock::ticks;
use accounting::vtime::{ExitReason, Histograms, Snapshot, State, VtimeReader, vtime};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::pipe;

/// What a held thread says as it stops, and what it waits for, each a byte in a pipe.
static STOPPED: AtomicI32 = AtomicI32::new(-1);
static GO_ON: AtomicI32 = AtomicI32::new(-1);

/// One test at a time: there is one pair of pipes.
static PIPES: Mutex<Option<Pipes>> = Mutex::new(None);

/// The test's ends of the pipes.
struct Pipes {
    stopped: File,
    go_on: File,
}

const HOLDS: usize = 500;
const EXITS: usize = 50;

/// How long is waited for a thread to stop, and how often: together a guard, far above what the slowest machine needs.
const POLL: Duration = Duration::from_millis(100);
const POLLS: usize = 600;

extern "C" fn stay(_: libc::c_int) {
    let mut byte = 0u8;
    // SAFETY: write and read are async-signal-safe; both are given a byte of this frame.
    unsafe {
        libc::write(STOPPED.load(Ordering::Relaxed), (&raw const byte).cast(), 1);
        libc::read(GO_ON.load(Ordering::Relaxed), (&raw mut byte).cast(), 1);
    }
}

impl Pipes {
    /// Makes them, and sets the handler, the first time.
    fn get(pipes: &mut Option<Self>) -> &mut Self {
        pipes.get_or_insert_with(|| {
            let (stopped, tell_stopped) = pipe().expect("a pipe");
            let (wait_to_go_on, go_on) = pipe().expect("a pipe");
            STOPPED.store(tell_stopped.into_raw_fd(), Ordering::Relaxed);
            GO_ON.store(wait_to_go_on.into_raw_fd(), Ordering::Relaxed);
            let handler: extern "C" fn(libc::c_int) = stay;
            // SAFETY: the handler makes nothing but async-signal-safe system calls.
            let before = unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };
            assert_ne!(before, libc::SIG_ERR);
            Self {
                stopped: File::from(stopped),
                go_on: File::from(go_on),
            }
        })
    }

    /// Waits until `thread` says that it is held: one that has failed has nothing to say.
    fn await_stop(&mut self, thread: &JoinHandle<()>) {
        let timeout = Timespec::try_from(POLL).expect("it is short");
        for _ in 0..POLLS {
            let mut stopped = [PollFd::new(&self.stopped, PollFlags::IN)];
            match poll(&mut stopped, Some(&timeout)) {
                Ok(0) => assert!(!thread.is_finished(), "the thread has failed: its own message says how"),
                Ok(_) => return self.stopped.read_exact(&mut [0]).expect("a byte is there"),
                Err(error) => assert_eq!(error, Errno::INTR),
            }
        }
        panic!("the thread neither ended nor got its signal");
    }

    /// Does `work` while `thread` is held.
    fn while_held(&mut self, thread: &JoinHandle<()>, work: impl FnOnce()) {
        // SAFETY: the thread is not joined yet, so its handle is good.
        assert_eq!(unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGUSR1) }, 0);
        self.await_stop(thread);
        work();
        self.go_on.write_all(&[0]).expect("it waits");
    }
}

/// Both kinds of read, each whole by itself: every tick since `first` is in one bucket, and every stay and exit in one
/// of its histogram.
fn read_whole(reader: &VtimeReader, first: u64) -> Option<(Snapshot, Histograms)> {
    let (s, h) = (reader.snapshot()?, reader.histograms()?);
    assert_eq!(s.paused + s.vmm + s.guest, s.stamp - first, "{s:?}");
    let [run, vmm] = [h.run, h.vmm].map(|counts| counts.iter().sum::<u64>());
    // Resumed, entered, and from then on one stay and one exit in turn.
    assert_eq!(
        (run, vmm),
        ((h.sequence.max(3) - 2) / 2, (h.sequence.max(3) - 3) / 2),
        "{h:?}"
    );
    Some((s, h))
}

#[test]
fn a_vcpu_thread_held_in_mid_stamp_neither_hangs_nor_tears_a_reader() {
    let mut pipes = PIPES.lock().expect("the other test passed");
    let pipes = Pipes::get(&mut pipes);
    let first = ticks();
    let (mut writer, reader) = vtime(first, 0);
    let done = std::sync::Arc::new(AtomicBool::new(false));
    let vcpu = thread::spawn({
        let done = done.clone();
        move || {
            writer.resume();
            writer.guest_enter(None);
            while !done.load(Ordering::Relaxed) {
                writer.guest_exit();
                writer.guest_enter(Some(ExitReason::Io));
            }
        }
    });
    for _ in 0..HOLDS {
        pipes.while_held(&vcpu, || {
            let read = || read_whole(&reader, first).expect("the writer stands still: the first try succeeds");
            assert_eq!(read(), read());
        });
    }
    done.store(true, Ordering::Relaxed);
    vcpu.join().expect("it only stamps");
}

#[test]
fn a_reader_held_in_mid_read_does_not_delay_a_vcpu_thread_and_takes_nothing_torn() {
    let mut pipes = PIPES.lock().expect("the other test passed");
    let pipes = Pipes::get(&mut pipes);
    let first = ticks();
    let (mut writer, reader) = vtime(first, 0);
    writer.resume();
    writer.guest_enter(None);
    let done = std::sync::Arc::new(AtomicBool::new(false));
    let other = thread::spawn({
        let (done, reader) = (done.clone(), reader.clone());
        move || {
            let mut last = 0;
            while !done.load(Ordering::Relaxed) {
                // None if the writer, which does nothing but stamp, outran every try.
                let Some((s, h)) = read_whole(&reader, first) else {
                    continue;
                };
                assert!(last <= s.sequence && s.sequence <= h.sequence);
                last = h.sequence;
            }
        }
    });
    for _ in 0..HOLDS {
        // Were the writer to wait for the reader, this would not end.
        pipes.while_held(&other, || {
            for _ in 0..EXITS {
                writer.guest_exit();
                writer.guest_enter(Some(ExitReason::Mmio));
            }
        });
    }
    done.store(true, Ordering::Relaxed);
    other.join().expect("what it read was whole");
    let s = reader.snapshot().expect("nobody writes");
    assert_eq!(s.state, State::Guest);
    assert_eq!(s.exits[ExitReason::Mmio as usize].count, (HOLDS * EXITS) as u64);
}
