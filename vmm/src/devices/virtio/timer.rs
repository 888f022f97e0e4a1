//! A timer of a device's: a descriptor that becomes readable when its time has come.

use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// Not set at first. The clock is `CLOCK_MONOTONIC`.
#[derive(Debug)]
pub struct Timer(OwnedFd);

impl Timer {
    /// # Errors
    /// There is no descriptor left.
    pub fn new() -> std::io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// Once, in `wait`. A wait of nothing stops it.
    pub fn after(&self, wait: Duration) {
        self.set(wait, Duration::ZERO);
    }

    /// Every `interval`, the first time after one. An interval of nothing stops it.
    pub fn every(&self, interval: Duration) {
        self.set(interval, interval);
    }

    /// Never. What had expired and was not heard is forgotten.
    pub fn stop(&self) {
        self.set(Duration::ZERO, Duration::ZERO);
    }

    fn set(&self, first: Duration, interval: Duration) {
        // What is longer than the kernel can count is as good as never.
        let spec = |time| {
            Timespec::try_from(time).unwrap_or(Timespec {
                tv_sec: i64::MAX,
                tv_nsec: 0,
            })
        };
        let spec = Itimerspec {
            it_interval: spec(interval),
            it_value: spec(first),
        };
        // Valid times and a timer: there is nothing to refuse.
        let set = timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &spec);
        debug_assert!(set.is_ok(), "{set:?}");
    }

    /// The descriptor was readable, which it now is no more. False where that was a mistake.
    pub fn expired(&self) -> bool {
        rustix::io::read(&self.0, &mut [0u8; 8]).is_ok()
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};

    #[test]
    fn it_expires_once_or_again_and_again_and_not_at_all_when_stopped() {
        let timer = Timer::new().unwrap();
        let wait = |timer: &Timer| {
            poll(&mut [PollFd::new(&timer.0, PollFlags::IN)], None).unwrap();
            timer.expired()
        };
        timer.after(Duration::from_millis(1));
        assert!(wait(&timer) && !timer.expired());
        timer.every(Duration::from_millis(1));
        assert!(wait(&timer) && wait(&timer));
        timer.stop();
        assert!(!timer.expired());
        timer.after(Duration::MAX);
        assert!(!timer.expired());
    }
}
