//! virtio devices over MMIO (Virtual I/O Device specification 1.2; section numbers below are its).
//!
//! ```text
//!  vCPU threads                     the VMM thread
//!  registers ──► mmio.rs ── lock ──► ┌────────────────┐ ◄── queue notifications (ioeventfd: no exit of ours)
//!                (one Transport a    │ VirtioDevice   │ ◄── its own descriptors: taps, sockets, timers, io_uring
//!                device)             │  over Queue    │
//!  interrupt ◄── Interrupt ◄──────── └────────────────┘
//! ```
//!
//! A device does its work on the VMM thread. A vCPU thread reaches it only to set it up, to reset it and for its configuration
//! space, none of which is on the way of a request; the registers that an interrupt handler reads are atomics.
//!
//! The driver is hostile. [`queue::Queue`] is where all it writes to its rings enters: a chain comes out of it whole and inside of
//! guest memory, or not at all. A ring or chain that breaks the rules breaks the device: it asks for a reset
//! (`DEVICE_NEEDS_RESET`, 2.1.2) and does nothing until it gets one. A request that is well-formed and wrong is answered
//! by the request's own status.
//!
//! Nobody is held up: a device takes at most a queue's length of chains for each notification, then lets others run.

pub mod balloon;
pub mod block;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzz;
#[cfg(test)]
pub mod hostile;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rate_limiter;
pub mod rng;
#[cfg(any(test, feature = "fuzzing"))]
#[cfg_attr(not(test), expect(dead_code, reason = "a part of it is the tests' alone"))]
pub mod testing;
mod timer;
pub mod vsock;

use std::fmt::Debug;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMemory;
use queue::{Queue, QueueError};

/// `VIRTIO_F_VERSION_1`: the only kind of device there is here (6).
pub const F_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_EVENT_IDX`: each side says when it next wants to hear from the other (2.7.10).
pub const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_INDIRECT_DESC`: chains in tables of their own (2.7.5.3).
pub const F_INDIRECT_DESC: u64 = 1 << 28;

/// A device, whatever its transport.
pub trait VirtioDevice: Debug + Send {
    /// Its number (5).
    fn device_type(&self) -> u32;

    /// Each queue's largest size, a power of two.
    fn queue_sizes(&self) -> &[u16];

    /// What it offers, beside `VIRTIO_F_VERSION_1`, which is always offered and has to be taken.
    fn features(&self) -> u64;

    /// The driver reads `data.len()` bytes of configuration space at `offset`. `data` is zeros: what lies outside stays so.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// The driver writes configuration space. Most devices have nothing to write there.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    /// The driver is ready (`DRIVER_OK`). Every queue is notified once after this. Called on a vCPU thread: no I/O here.
    fn activate(&mut self, active: Active);

    /// Back to what it was before [`VirtioDevice::activate`]: [`Active`] is dropped, and nothing of guest memory is written any
    /// more once [`VirtioDevice::is_resetting`] says no. Called on a vCPU thread: it waits for nothing.
    fn reset(&mut self);

    /// Whether a reset has yet to end, for work of the driver before is still under way: its ends come as events of
    /// [`VirtioDevice::sources`]. Meanwhile the device may be activated by a driver that did not wait, and serves it once the reset
    /// has ended.
    fn is_resetting(&self) -> bool {
        false
    }

    /// What else it waits for: a descriptor each, valid as long as the device. [`EventSet::EDGE_TRIGGERED`] where readiness
    /// may last.
    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        Vec::new()
    }

    /// The driver put something into `queue`, or the device was activated.
    ///
    /// # Errors
    /// The driver broke the rules: the device is reset, and marked as one that its driver has to reset.
    fn notified(&mut self, queue: usize) -> Result<(), QueueError>;

    /// A descriptor of [`VirtioDevice::sources`], by its place there, is ready. Called whether the device is active or not.
    ///
    /// # Errors
    /// As [`VirtioDevice::notified`].
    fn ready(&mut self, _source: usize) -> Result<(), QueueError> {
        Ok(())
    }
}

/// What a device works with while its driver runs it.
#[derive(Debug)]
pub struct Active {
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// Its queues, by their numbers; those the driver left out are not ready and give nothing.
    pub queues: Vec<Queue>,
    /// The features that the driver took, of those offered.
    pub features: u64,
    /// How the driver is told.
    pub interrupt: Arc<Interrupt>,
    /// The queues' notifications: see [`Active::again`].
    pub(crate) notifications: Arc<Vec<EventFd>>,
}

impl Active {
    /// Has the device notified of `queue` once more, after others had their turn: there is more in it than one turn takes.
    pub fn again(&self, queue: usize) {
        if let Some(notification) = self.notifications.get(queue) {
            // Fails only where it is as notified as it can be.
            let _ = notification.write(1);
        }
    }
}

/// The part of `config` at `offset`, as [`VirtioDevice::read_config`] gives it.
fn copy_config(config: &[u8], offset: usize, data: &mut [u8]) {
    let from = config.get(offset..).unwrap_or_default();
    let len = from.len().min(data.len());
    data[..len].copy_from_slice(&from[..len]);
}

/// Adds to a metric.
pub(crate) fn count(metric: &AtomicU64, by: u64) {
    metric.fetch_add(by, Ordering::Relaxed);
}

/// A device's interrupt line, and the register that says why it was raised (4.2.2).
#[derive(Debug)]
pub struct Interrupt {
    line: EventFd,
    status: AtomicU32,
    generation: AtomicU32,
    needs_reset: AtomicBool,
    /// [`VirtioDevice::is_resetting`], for those who do not wait for its lock. Written under that.
    resetting: AtomicBool,
}

/// Interrupt status: a queue has used buffers.
const USED: u32 = 1;
/// Interrupt status: configuration space, or the device's status, changed.
const CONFIG: u32 = 2;

impl Interrupt {
    /// # Errors
    /// There are no descriptors left.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            line: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            resetting: AtomicBool::new(false),
        })
    }

    /// A queue has used buffers that the driver wants to hear of: [`Queue::wants_signal`] says whether it does.
    pub fn signal_used(&self) {
        self.raise(USED);
    }

    /// Configuration space reads differently now.
    pub fn signal_config(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
        self.raise(CONFIG);
    }

    fn raise(&self, why: u32) {
        self.status.fetch_or(why, Ordering::Release);
        // Fails only where it is as pending as it can be.
        let _ = self.line.write(1);
    }

    fn set_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.raise(CONFIG);
    }

    /// Whether the device waits for its driver to reset it.
    #[must_use]
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    fn set_resetting(&self, resetting: bool) {
        self.resetting.store(resetting, Ordering::Release);
    }

    fn is_resetting(&self) -> bool {
        self.resetting.load(Ordering::Acquire)
    }

    fn clear(&self) {
        self.status.store(0, Ordering::Relaxed);
        self.needs_reset.store(false, Ordering::Relaxed);
    }

    /// The line, for KVM.
    #[must_use]
    pub fn line(&self) -> &EventFd {
        &self.line
    }
}

/// A device shared by its transport, the VMM thread's event loop, and whoever changes it by request.
pub type Shared = Arc<Mutex<dyn VirtioDevice>>;

/// A device's side of the VMM thread's event loop.
#[derive(Debug)]
pub struct DeviceEvents {
    name: String,
    device: Shared,
    notifications: Arc<Vec<EventFd>>,
    interrupt: Arc<Interrupt>,
    complaints: Complaints,
    /// Of events, for who looks from outside of the event loop.
    count: Arc<AtomicU64>,
    /// Why its events cannot be waited for.
    pub(crate) unheard: Option<String>,
}

/// How often something was worth a log line, which a guest can bring about as often as it likes: the first few are due, then ever
/// fewer.
#[derive(Debug, Default)]
pub(crate) struct Complaints(AtomicU32);

impl Complaints {
    /// Whether this one is to be logged: one of the first eight, or a power of two.
    pub(crate) fn due(&self) -> bool {
        let number = self.0.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        number <= 8 || number.is_power_of_two()
    }
}

impl DeviceEvents {
    /// All that it waits for: its queues' notifications, then the device's own sources.
    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        let queues = self.notifications.iter().map(|fd| (fd.as_raw_fd(), EventSet::IN));
        let device = self.device.lock().expect("no holder of this lock panics");
        queues.chain(device.sources()).collect()
    }

    /// What stands at `place` among [`DeviceEvents::sources`] is ready.
    fn happened(&mut self, place: usize) {
        count(&self.count, 1);
        let mut device = self.device.lock().expect("no holder of this lock panics");
        let result = match self.notifications.get(place) {
            Some(notification) => {
                let _ = notification.read();
                device.notified(place)
            }
            None => device.ready(place - self.notifications.len()),
        };
        if result.is_err() {
            device.reset();
            // Before a vCPU's thread can reset it: it would find what is over already.
            self.interrupt.set_needs_reset();
        }
        if self.interrupt.is_resetting() {
            self.interrupt.set_resetting(device.is_resetting());
        }
        drop(device);
        if let Err(error) = result
            && self.complaints.due()
        {
            tracing::warn!(
                "{}: its driver broke the rules: {error}; it does nothing until it is reset",
                self.name
            );
        }
    }
}

impl MutEventSubscriber for DeviceEvents {
    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        self.happened(events.data() as usize);
    }

    fn init(&mut self, ops: &mut EventOps) {
        for ((fd, set), place) in self.sources().into_iter().zip(0..) {
            if let Err(error) = ops.add(Events::with_data_raw(fd, place, set)) {
                self.unheard = Some(crate::event_loop::unheard(&self.name, &error));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_can_bring_about_at_will_is_logged_ever_less_often() {
        let complaints = Complaints::default();
        let logged = (0..1_000_000).filter(|_| complaints.due()).count();
        // The first eight, and 16, 32, ... 2^19.
        assert_eq!(logged, 8 + 16);
    }
}
