//! The CPU clocks of another thread of this process, by `clock_gettime`.

use std::io;

/// Which of a thread's CPU clocks (`include/linux/posix-timers.h`, `CPUCLOCK_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Which {
    /// utime + stime.
    Prof = 0,
    /// utime, guest time included.
    Virt = 1,
    /// Time on a CPU as the scheduler counts it: exact and live, under the run queue's lock for an instant.
    Sched = 2,
}

/// `CPUCLOCK_PERTHREAD_MASK`: the clock is of a thread, not of its process.
const PER_THREAD: i32 = 4;

/// One CPU clock of one thread of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadClock(i32);

impl ThreadClock {
    /// The clock of thread `tid`: `MAKE_THREAD_CPUCLOCK` of the kernel's header.
    #[must_use]
    pub fn new(tid: i32, which: Which) -> Self {
        Self((!tid << 3) | PER_THREAD | which as i32)
    }

    /// Its value in nanoseconds.
    ///
    /// # Errors
    /// `EINVAL` when the thread is gone or another process's.
    #[expect(unsafe_code, reason = "no safe wrapper takes a clock id made at run time")]
    pub fn read_ns(self) -> io::Result<u64> {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the pointer is to a timespec of ours; the kernel writes it or fails.
        if unsafe { libc::clock_gettime(self.0, &raw mut time) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs())
    }
}
