//! The Async engine: io_uring, as many requests at once as the guest asks for. Answers come in whatever order they come;
//! a guest that wants an order waits, or flushes.
//!
//! While a request is under way the kernel reads or writes guest memory by address. So each request holds that memory, and its
//! file, until its completion is taken from the ring ([`UnderWay`]); nothing takes them from it before.
//!
//! ```text
//!                    reset                       the last completion
//!   serving ─────────────────────► draining ────────────────────────► serving
//!           Uring::abandon,          │  ▲    Uring::drain, on the VMM thread:
//!           by a vCPU's thread:      └──┘    cancel, take completions, answer none
//!           notes it, wakes the VMM
//! ```
//!
//! *A reset waits for nothing.* A disk that does not answer (a path that went down, a server that is gone) may take minutes, or for
//! ever, and whoever resets is a vCPU's thread. So it only notes that what is under way is nobody's any more. The VMM's thread
//! cancels it (`IORING_OP_ASYNC_CANCEL`), which ends at once what waits in a queue, and is of no use where a disk's driver has the
//! request: that one ends when it ends. It is the VMM's thread, too, because requests belong to the thread that submits them: a
//! vCPU's thread that had submitted any could not end before they do.
//!
//! *The end waits for a while only* ([`Uring::wait`]). What is under way after that keeps its memory and its file for as long as
//! the process lives. The kernel may hold on to the process itself until its disk has answered; that is not ours to change.
#![allow(
    unsafe_code,
    reason = "the kernel is given addresses of guest memory, to use after the call"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use accounting::host::CpuSet;
use io_uring::{opcode, types};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vm_memory::GuestAddress;

use super::request::{Kind, Operation};
use super::ring::{KernelRing, Ring};
use super::sync::transfer;
use crate::memory::GuestMemory;

/// A request under way.
struct UnderWay {
    head: u16,
    status: GuestAddress,
    operation: Operation,
    at: u64,
    bytes: u64,
    // The kernel reads them until the request is done. Boxed by Vec: the entry may move, they do not.
    iovecs: Vec<libc::iovec>,
    file: Arc<File>,
    /// What the vectors name.
    _memory: Arc<GuestMemory>,
}

/// A request that is done.
#[derive(Debug)]
pub(super) struct Completed {
    pub head: u16,
    pub status: GuestAddress,
    pub operation: Operation,
    /// Bytes of data asked for.
    pub bytes: u64,
    /// Bytes that the guest got.
    pub result: io::Result<u64>,
}

/// What is under way is nobody's any more.
#[derive(Debug)]
struct Drain {
    /// Places of requests that have yet to be cancelled.
    to_cancel: Vec<usize>,
    /// Cancellations under way.
    cancelling: usize,
}

/// User data of a cancellation; a request's is its place.
const CANCELLATION: u64 = u64::MAX;

/// See the module.
pub(super) struct Uring {
    ring: Box<dyn Ring>,
    done: OwnedFd,
    under_way: Vec<Option<UnderWay>>,
    free: Vec<usize>,
    /// Taken from the ring while waiting, and not yet answered.
    completed: Vec<Completed>,
    drain: Option<Drain>,
}

// SAFETY: the pointers in `under_way` are the kernel's to follow, from any thread; nothing here does.
unsafe impl Send for Uring {}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring")
            .field("under_way", &self.under_way())
            .field("drain", &self.drain)
            .finish_non_exhaustive()
    }
}

impl Uring {
    /// For `requests` requests at once.
    ///
    /// # Errors
    /// The host has no io_uring for us.
    pub fn new(requests: u16) -> io::Result<Self> {
        let done = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let ring = KernelRing::new(requests, &done)?;
        Ok(Self::over(Box::new(ring), done, requests))
    }

    /// Over `ring`, which announces completions on `done` and has room for twice `requests` of them.
    pub fn over(ring: Box<dyn Ring>, done: OwnedFd, requests: u16) -> Self {
        let count = usize::from(requests);
        Self {
            ring,
            done,
            under_way: (0..count).map(|_| None).collect(),
            free: (0..count).rev().collect(),
            completed: Vec::new(),
            drain: None,
        }
    }

    /// How many requests are under way.
    pub fn under_way(&self) -> usize {
        self.under_way.len() - self.free.len()
    }

    /// Whether no more can be started now.
    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Starts `kind`, which must not be [`Kind::Id`] and whose buffers are `memory`'s, on `file`; the kernel hears of it at
    /// [`Uring::submit`].
    ///
    /// # Panics
    /// It is full, or draining.
    pub fn start(
        &mut self,
        file: Arc<File>,
        memory: Arc<GuestMemory>,
        kind: &Kind<'_>,
        head: u16,
        status: GuestAddress,
    ) {
        assert!(self.drain.is_none(), "is_draining is asked first");
        let place = self.free.pop().expect("is_full is asked first");
        let (at, iovecs) = match kind {
            Kind::Read(at, data) | Kind::Write(at, data) => (*at, data.iovecs()),
            Kind::Flush | Kind::Id(_) => (0, Vec::new()),
        };
        let fd = types::Fd(file.as_raw_fd());
        let count = u32::try_from(iovecs.len()).unwrap_or(u32::MAX);
        let entry = match kind {
            Kind::Read(..) => opcode::Readv::new(fd, iovecs.as_ptr(), count).offset(at).build(),
            Kind::Write(..) => opcode::Writev::new(fd, iovecs.as_ptr(), count).offset(at).build(),
            Kind::Flush | Kind::Id(_) => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        };
        self.under_way[place] = Some(UnderWay {
            head,
            status,
            operation: kind.operation(),
            at,
            bytes: kind.bytes(),
            iovecs,
            file,
            _memory: memory,
        });
        // SAFETY: the file, the vectors and the memory that they name live in `under_way` until the entry completes, or for ever.
        let pushed = unsafe { self.ring.push(&entry.user_data(place as u64)) };
        // As many entries as places, and every submit empties the queue.
        assert!(pushed, "there is an entry for each place");
    }

    /// Lets the kernel begin what was started. False if it would not take all of it now.
    #[must_use]
    pub fn submit(&mut self) -> bool {
        let submitted = self.ring.submit();
        if let Err(error) = &submitted {
            tracing::debug!("io_uring takes no requests now: {error}");
        }
        submitted.is_ok()
    }

    /// Has the workers of the calling thread's rings run on `cpus`.
    ///
    /// # Errors
    /// As [`Ring::confine_workers`].
    pub fn confine_workers(&self, cpus: &CpuSet) -> io::Result<()> {
        self.ring.confine_workers(cpus)
    }

    /// The eventfd was readable.
    pub fn hear(&self) {
        let _ = rustix::io::read(&self.done, &mut [0; 8]);
    }

    /// Makes the eventfd readable: there is something to do that no completion announces.
    fn wake(&self) {
        // Fails only where it is as readable as it can be.
        let _ = rustix::io::write(&self.done, &1u64.to_ne_bytes());
    }

    /// A request that is done, if there is one.
    pub fn next_completed(&mut self) -> Option<Completed> {
        self.completed.pop().or_else(|| self.reap())
    }

    /// The next completion to be answered.
    fn reap(&mut self) -> Option<Completed> {
        while let Some((user_data, result)) = self.ring.next() {
            if let Some(Drain { cancelling, .. }) = &mut self.drain
                && user_data == CANCELLATION
            {
                // Whether it came in time is seen by the request's own completion.
                *cancelling -= 1;
                continue;
            }
            let place = usize::try_from(user_data).unwrap_or(usize::MAX);
            let Some(done) = self.under_way.get_mut(place).and_then(Option::take) else {
                continue;
            };
            self.free.push(place);
            if self.drain.is_none() {
                return Some(completed(&done, result));
            }
        }
        None
    }

    /// Its driver is gone: nothing that is under way is answered any more. It is cancelled by the VMM's thread, which finds its
    /// eventfd readable; nothing is waited for here.
    pub fn abandon(&mut self) {
        self.completed.clear();
        if self.drain.is_none() && self.under_way() > 0 {
            let is_under_way = |&place: &usize| self.under_way[place].is_some();
            self.drain = Some(Drain {
                to_cancel: (0..self.under_way.len()).filter(is_under_way).collect(),
                cancelling: 0,
            });
            self.wake();
        }
    }

    /// Whether there is still something under way of a driver that is gone: nothing may be started meanwhile.
    pub fn is_draining(&self) -> bool {
        self.drain.is_some()
    }

    /// Cancels what is under way of a driver that is gone, and takes what has ended. False where the kernel would not take it all: to
    /// be called again in a while, for completions need not come before.
    #[must_use]
    pub fn drain(&mut self) -> bool {
        while let Some(place) = self.drain.as_mut().and_then(|drain| drain.to_cancel.pop()) {
            let entry = opcode::AsyncCancel::new(place as u64).build().user_data(CANCELLATION);
            // SAFETY: the entry names nothing but a number.
            let pushed = unsafe { self.ring.push(&entry) };
            let Some(drain) = &mut self.drain else { return true };
            if pushed {
                drain.cancelling += 1;
            } else {
                drain.to_cancel.push(place);
                if !self.submit() {
                    break;
                }
            }
        }
        let taken = self.drain.is_none() || self.submit();
        let answered = self.reap();
        debug_assert!(answered.is_none(), "what drains is nobody's");
        // Cancellations too: one that comes late would be taken for the next driver's.
        if let Some(drain) = &self.drain
            && drain.cancelling == 0
            && self.under_way() == 0
        {
            self.drain = None;
        }
        taken
    }

    /// Waits until nothing is under way, for `patience`. What was done is still there to be answered. False where something is
    /// still under way.
    pub fn wait(&mut self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        loop {
            let submitted = if self.is_draining() {
                self.drain()
            } else {
                let submitted = self.submit();
                while let Some(completed) = self.reap() {
                    self.completed.push(completed);
                }
                submitted
            };
            if self.under_way() == 0 && !self.is_draining() {
                break;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            // What it would not take it takes in a moment, which nothing announces.
            let left = if submitted { left } else { left.min(A_MOMENT) };
            let timeout = Timespec::try_from(left).ok();
            let _ = poll(&mut [PollFd::new(&self.done, PollFlags::IN)], timeout.as_ref());
            self.hear();
        }
        // What was heard here is for the event loop to hear of as well.
        self.wake();
        self.under_way() == 0
    }
}

/// Until the kernel is asked again to take what it would not.
const A_MOMENT: Duration = Duration::from_millis(10);

/// The answer to `done`, which the kernel ended with `result`.
fn completed(done: &UnderWay, result: i32) -> Completed {
    let result = match u64::try_from(result) {
        Err(_) => Err(io::Error::from_raw_os_error(-result)),
        Ok(transferred) if transferred == done.bytes || done.operation == Operation::Flush => Ok(()),
        Ok(transferred) => rest(done, transferred),
    };
    Completed {
        head: done.head,
        status: done.status,
        operation: done.operation,
        bytes: done.bytes,
        result: result.map(|()| {
            if done.operation == Operation::Read {
                done.bytes
            } else {
                0
            }
        }),
    }
}

/// Does what the kernel left of a request: it may stop early, at a signal for instance.
fn rest(done: &UnderWay, transferred: u64) -> io::Result<()> {
    let mut skip = usize::try_from(transferred).unwrap_or(usize::MAX);
    let mut iovecs = Vec::with_capacity(done.iovecs.len());
    for iovec in &done.iovecs {
        let cut = skip.min(iovec.iov_len);
        skip -= cut;
        if cut < iovec.iov_len {
            iovecs.push(libc::iovec {
                iov_base: iovec.iov_base.cast::<u8>().wrapping_add(cut).cast(),
                iov_len: iovec.iov_len - cut,
            });
        }
    }
    let fd = done.file.as_raw_fd();
    let count = |iovecs: &[libc::iovec]| libc::c_int::try_from(iovecs.len()).unwrap_or(libc::c_int::MAX);
    let at = done.at.saturating_add(transferred);
    if done.operation == Operation::Read {
        // SAFETY: as in `start`: guest memory, still mapped.
        transfer(iovecs, at, |iovecs, at| unsafe {
            libc::preadv64(fd, iovecs.as_ptr(), count(iovecs), at)
        })
    } else {
        // SAFETY: as above; the memory is only read.
        transfer(iovecs, at, |iovecs, at| unsafe {
            libc::pwritev64(fd, iovecs.as_ptr(), count(iovecs), at)
        })
    }
}

impl AsRawFd for Uring {
    fn as_raw_fd(&self) -> RawFd {
        self.done.as_raw_fd()
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        if self.under_way() > 0 {
            // Whoever drops it has waited for as long as he would. The kernel still has the addresses.
            std::mem::forget(std::mem::take(&mut self.under_way));
        }
    }
}
