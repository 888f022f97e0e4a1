//! io_uring, as far as the Async engine needs it: the seam at which tests play a disk that does not answer.
#![allow(
    unsafe_code,
    reason = "the kernel is given addresses of guest memory, to use after the call"
)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use accounting::host::CpuSet;
use io_uring::{IoUring, squeue};

/// A ring of requests, and one of completions.
pub(super) trait Ring: Send {
    /// Puts `entry` in line. False where there is no room before the next [`Ring::submit`].
    ///
    /// # Safety
    /// What `entry` names, buffers and files, has to stay until its completion comes out of [`Ring::next`].
    unsafe fn push(&mut self, entry: &squeue::Entry) -> bool;

    /// Has the kernel begin what stands in line.
    ///
    /// # Errors
    /// It would not take all of it now, for want of memory or because completions fill their ring: what is left stays in line.
    fn submit(&mut self) -> io::Result<()>;

    /// Has the kernel's workers run on `cpus`: threads that it starts for what it cannot do at once, a flush above all. They are
    /// those of the thread that calls this and submits, whichever ring of its they work for, and would run on any CPU.
    ///
    /// # Errors
    /// `EINVAL` where the kernel has no `IORING_REGISTER_IOWQ_AFF` (before Linux 5.14).
    fn confine_workers(&self, cpus: &CpuSet) -> io::Result<()>;

    /// The next completion: whose, by its entry's user data, and with which result.
    fn next(&mut self) -> Option<(u64, i32)>;
}

/// The kernel's.
pub(super) struct KernelRing(IoUring);

impl KernelRing {
    /// For `entries` entries in line, and twice as many completions; each of these is announced on `done`.
    ///
    /// # Errors
    /// The host has no io_uring for us.
    pub fn new(entries: u16, done: &OwnedFd) -> io::Result<Self> {
        let ring = IoUring::new(entries.into())?;
        ring.submitter().register_eventfd(done.as_raw_fd())?;
        Ok(Self(ring))
    }
}

impl Ring for KernelRing {
    unsafe fn push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: the caller's promise is the one that is asked for.
        unsafe { self.0.submission().push(entry) }.is_ok()
    }

    fn submit(&mut self) -> io::Result<()> {
        while !self.0.submission().is_empty() {
            match self.0.submit() {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    fn confine_workers(&self, cpus: &CpuSet) -> io::Result<()> {
        // SAFETY: a set of bits, of which none is.
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        let most = 8 * std::mem::size_of_val(&set);
        for cpu in cpus.iter().map(|&cpu| cpu as usize).filter(|&cpu| cpu < most) {
            // SAFETY: a bit that the set has.
            unsafe { libc::CPU_SET(cpu, &mut set) };
        }
        self.0.submitter().register_iowq_aff(&set)
    }

    fn next(&mut self) -> Option<(u64, i32)> {
        let entry = self.0.completion().next()?;
        Some((entry.user_data(), entry.result()))
    }
}
