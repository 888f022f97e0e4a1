//! Frames that go no way to the tap: a service inside of the VMM that the guest reaches over the same wire. That is MMDS.

use std::fmt::Debug;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use rustix::fd::OwnedFd;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// Such a service, for one interface. Frames have no virtio-net header here.
pub trait Detour: Debug + Send {
    /// Whether a frame of the guest's that begins with `start` is for the service: [`START_LEN`] bytes of it, or all. Such a frame
    /// reaches no tap.
    fn takes(&self, start: &[u8]) -> bool;

    /// The guest sent `frame`, which it takes. Checksums of TCP may be left out, and it may be longer than the MTU: features
    /// that the driver took let it.
    fn receive(&mut self, frame: &[u8], now: Instant);

    /// The next frame for the guest, if one is due.
    fn transmit(&mut self, now: Instant) -> Option<Vec<u8>>;

    /// How long until [`Detour::transmit`], which just gave none, may have one of itself.
    fn next_poll(&mut self, now: Instant) -> Option<Duration>;
}

/// Ethernet, and all of ARP, or of IPv4's header without options.
pub const START_LEN: usize = 14 + 28;

/// A service with its timer, and the frame that waits for the guest to have room.
#[derive(Debug)]
pub(super) struct Side {
    detour: Box<dyn Detour>,
    timer: OwnedFd,
    waits: Option<Vec<u8>>,
}

impl Side {
    /// # Errors
    /// There is no descriptor left for its timer.
    pub fn new(detour: Box<dyn Detour>) -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Self {
            detour,
            timer,
            waits: None,
        })
    }

    pub fn takes(&self, start: &[u8]) -> bool {
        self.detour.takes(start)
    }

    pub fn receive(&mut self, frame: &[u8]) {
        self.detour.receive(frame, Instant::now());
    }

    /// Whether there is a frame for the guest: [`Side::take`] has it. If not, the timer says when to ask again.
    pub fn has_frame(&mut self) -> bool {
        let now = Instant::now();
        if self.waits.is_none() {
            self.waits = self.detour.transmit(now);
        }
        if self.waits.is_none() {
            let wait = self.detour.next_poll(now);
            self.set_timer(wait);
        }
        self.waits.is_some()
    }

    pub fn take(&mut self) -> Option<Vec<u8>> {
        self.waits.take()
    }

    /// Sets it, or stops it.
    fn set_timer(&self, wait: Option<Duration>) {
        const STOPPED: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
        // A timer set to zero would be stopped.
        let at = wait.map(|wait| Timespec::try_from(wait.max(Duration::from_nanos(1))));
        let spec = Itimerspec {
            it_interval: STOPPED,
            it_value: at.and_then(Result::ok).unwrap_or(STOPPED),
        };
        // A valid time and a timer: there is nothing to refuse.
        let set = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec);
        debug_assert!(set.is_ok(), "{set:?}");
    }

    /// Its timer's descriptor was readable.
    pub fn expired(&self) {
        let _ = rustix::io::read(&self.timer, &mut [0u8; 8]);
    }
}

impl AsRawFd for Side {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}
