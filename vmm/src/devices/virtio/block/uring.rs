//! The Async engine: io_uring, as many requests at once as the guest asks for. Answers come in whatever order they come;
//! a guest that wants an order waits, or flushes.
//!
//! While a request is under way the kernel reads or writes guest memory by address: [`Uring::wait`] has to come before that
//! memory may go, and comes at reset and at the end.
#![allow(
    unsafe_code,
    reason = "the kernel is given addresses of guest memory, to use after the call"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::{IoUring, cqueue, opcode, types};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::request::{Kind, Operation};
use super::sync::transfer;

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

/// See the module.
pub(super) struct Uring {
    ring: IoUring,
    done: EventFd,
    under_way: Vec<Option<UnderWay>>,
    free: Vec<usize>,
    /// Taken from the ring while waiting, and not yet answered.
    completed: Vec<Completed>,
}

// SAFETY: the pointers in `under_way` are the kernel's to follow, from any thread; nothing here does.
unsafe impl Send for Uring {}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring")
            .field("under_way", &self.count())
            .finish_non_exhaustive()
    }
}

impl Uring {
    /// For `requests` requests at once.
    ///
    /// # Errors
    /// The host has no io_uring for us.
    pub fn new(requests: u16) -> io::Result<Self> {
        let ring = IoUring::new(requests.into())?;
        let done = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        ring.submitter().register_eventfd(done.as_raw_fd())?;
        let count = usize::from(requests);
        Ok(Self {
            ring,
            done,
            under_way: (0..count).map(|_| None).collect(),
            free: (0..count).rev().collect(),
            completed: Vec::new(),
        })
    }

    fn count(&self) -> usize {
        self.under_way.len() - self.free.len()
    }

    /// Whether no more can be started now.
    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Starts `kind`, which must not be [`Kind::Id`], on `file`; the kernel hears of it at [`Uring::submit`].
    ///
    /// # Panics
    /// It is full.
    pub fn start(&mut self, file: Arc<File>, kind: &Kind<'_>, head: u16, status: GuestAddress) {
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
        });
        // SAFETY: the file and the vectors live in `under_way` until the entry completes. What the vectors name is guest memory,
        // which is unmapped only after `wait`: at reset, or when the device, which holds the memory, is dropped.
        let pushed = unsafe { self.ring.submission().push(&entry.user_data(place as u64)) };
        // As many entries as places, and every submit empties the queue.
        pushed.expect("there is an entry for each place");
    }

    /// Lets the kernel begin what was started. False if it would not take all of it now.
    #[must_use]
    pub fn submit(&mut self) -> bool {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // Want of kernel memory, or a ring full of completions.
                    tracing::debug!("io_uring takes no requests now: {error}");
                    return false;
                }
            }
        }
        true
    }

    /// The eventfd was readable.
    pub fn hear(&self) {
        let _ = self.done.read();
    }

    /// A request that is done, if there is one.
    pub fn next_completed(&mut self) -> Option<Completed> {
        if let Some(completed) = self.completed.pop() {
            return Some(completed);
        }
        let entry = self.ring.completion().next()?;
        self.complete(&entry)
    }

    fn complete(&mut self, entry: &cqueue::Entry) -> Option<Completed> {
        let place = usize::try_from(entry.user_data()).ok()?;
        let done = self.under_way.get_mut(place)?.take()?;
        self.free.push(place);
        let UnderWay {
            head,
            status,
            operation,
            bytes,
            ..
        } = done;
        let result = match u64::try_from(entry.result()) {
            Err(_) => Err(io::Error::from_raw_os_error(-entry.result())),
            Ok(transferred) if transferred == bytes || operation == Operation::Flush => Ok(()),
            Ok(transferred) => rest(&done, transferred),
        };
        let result = result.map(|()| if operation == Operation::Read { bytes } else { 0 });
        Some(Completed {
            head,
            status,
            operation,
            bytes,
            result,
        })
    }

    /// Waits until nothing is under way. What was done is still there to be answered.
    pub fn wait(&mut self) {
        while self.count() > 0 {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::debug!("waiting for a disk: {error}");
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
            }
            loop {
                let Some(entry) = self.ring.completion().next() else {
                    break;
                };
                if let Some(completed) = self.complete(&entry) {
                    self.completed.push(completed);
                }
            }
        }
    }

    /// Drops what was done and not answered: its driver is gone.
    pub fn forget(&mut self) {
        self.completed.clear();
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
        self.wait();
    }
}
