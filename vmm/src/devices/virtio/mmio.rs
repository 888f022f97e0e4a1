//! The MMIO transport (4.2): one page of registers in front of a device.
//!
//! ```text
//!  status:  0 ──► ACKNOWLEDGE ──► +DRIVER ──► +FEATURES_OK ──► +DRIVER_OK      a bit is only ever added;
//!           ▲                                 features taken    queues taken,   writing 0 resets from anywhere
//!           └─────────────────────────────────────────────────  device active
//! ```
//!
//! What is written out of this order has no effect: features after FEATURES_OK, queues after DRIVER_OK. A driver that takes what
//! was not offered finds FEATURES_OK still clear (3.1.1); one that is ready with queues that are none finds the device in need
//! of a reset.
//!
//! **A reset** may have to wait for a disk, and the vCPU that wrote it does not. The status then reads as DEVICE_NEEDS_RESET, and as
//! 0, which is what a driver has to wait for (2.1.1, 2.4), once the device's [`is_resetting`](super::VirtioDevice::is_resetting)
//! ends. Linux's driver for this transport does not wait: it goes on with ACKNOWLEDGE, adding each of its bits to those that it
//! reads. So what reads as not yet reset is a bit that nobody may write, and no bit of the driver before (Linux stops at a
//! DRIVER_OK that it has not set); it is gone as soon as the driver adds one. From then on all is as after any other reset: features,
//! queues and DRIVER_OK are taken, and the device takes its first chain from the new rings when the last request from the old ones
//! has ended. No answer to an old request is ever put into a ring, old or new. What a driver who does not wait has to answer for
//! itself is the memory that it gave to old requests: that is the device's until the reset has ended, here as with any hardware.
//!
//! Notifications never arrive here: KVM turns the write into an eventfd's ([`Transport::NOTIFY`]). Interrupt status and its
//! acknowledgement take no lock. Other registers take one that no I/O is done under. Configuration space, a reset and DRIVER_OK
//! take the device's own, under which it does its I/O: none that waits, but for a disk with the Sync engine, and for a change of a
//! disk's file, which has a time limit.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

use super::queue::Queue;
use super::{Active, Complaints, DeviceEvents, F_VERSION_1, Interrupt, Shared};
use crate::layout::{VIRTIO_IRQS, VIRTIO_MMIO};
use crate::memory::GuestMemory;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
/// Of the transport: 2 is virtio 1.x, 1 was before.
const VERSION: u32 = 2;
/// Nobody's in particular: as Firecracker and kvmtool, whose drivers do not look.
const VENDOR: u32 = 0;

mod register {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM_MAX: u64 = 0x34;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC_LOW: u64 = 0x80;
    pub const QUEUE_DESC_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    /// Length and base of a shared memory region: all ones where there is none (4.2.2).
    pub const SHM_FIRST: u64 = 0xb0;
    pub const SHM_LAST: u64 = 0xbc;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

/// Where a guest finds a device: told to it by ACPI, and on the kernel's command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Guest physical address.
    pub base: u64,
    /// Interrupt, by its pin of the I/O APIC.
    pub irq: u32,
}

impl Window {
    /// Its length.
    pub const LEN: u64 = 0x1000;

    /// That of the device at `place`; [`None`] where there is no interrupt left for it.
    #[must_use]
    pub fn nth(place: usize) -> Option<Self> {
        let irq = *VIRTIO_IRQS.get(place)?;
        let base = VIRTIO_MMIO + Self::LEN * place as u64;
        Some(Self { base, irq })
    }
}

/// As `CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES` of Linux reads it, for kernels without ACPI; others ignore it.
impl std::fmt::Display for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "virtio_mmio.device=4K@{:#x}:{}", self.base, self.irq)
    }
}

/// A device's registers.
#[derive(Debug)]
pub struct Transport {
    name: String,
    device: Shared,
    device_type: u32,
    offered: u64,
    memory: Arc<GuestMemory>,
    notifications: Arc<Vec<EventFd>>,
    interrupt: Arc<Interrupt>,
    registers: Mutex<Registers>,
    complaints: Complaints,
    events: Arc<AtomicU64>,
}

#[derive(Debug, Default)]
struct Registers {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<virtio_queue::Queue>,
    /// A queue was given a size that none has: it is none.
    bad_size: bool,
}

impl Registers {
    fn queue(&mut self) -> Option<&mut virtio_queue::Queue> {
        self.queues.get_mut(self.queue_sel as usize)
    }

    /// The selected queue, where it may still be changed (4.2.3.2).
    fn queue_to_set_up(&mut self) -> Option<&mut virtio_queue::Queue> {
        if self.status & (status::FEATURES_OK | status::DRIVER_OK) != status::FEATURES_OK {
            return None;
        }
        self.queue()
    }
}

impl Transport {
    /// The register whose writes KVM has to turn into [`Transport::notifications`], by the value written.
    pub const NOTIFY: u64 = register::QUEUE_NOTIFY;

    /// Registers for `device`, which log lines call `name`.
    ///
    /// # Errors
    /// There are no descriptors left for its eventfds.
    ///
    /// # Panics
    /// A queue size of the device's is no power of two.
    pub fn new(
        name: String,
        device: Shared,
        interrupt: Arc<Interrupt>,
        memory: Arc<GuestMemory>,
    ) -> std::io::Result<Self> {
        let (device_type, offered, queues) = {
            let device = device.lock().expect("no holder of this lock panics");
            let new = |&size| virtio_queue::Queue::new(size).expect("queue sizes are powers of two");
            let queues: Vec<_> = device.queue_sizes().iter().map(new).collect();
            (device.device_type(), device.features() | F_VERSION_1, queues)
        };
        let eventfd = |_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let notifications = queues.iter().map(eventfd).collect::<Result<_, _>>()?;
        let registers = Mutex::new(Registers {
            queues,
            ..Registers::default()
        });
        Ok(Self {
            name,
            device,
            device_type,
            offered,
            memory,
            notifications: Arc::new(notifications),
            interrupt,
            registers,
            complaints: Complaints::default(),
            events: Arc::default(),
        })
    }

    /// One for each queue, in order.
    #[must_use]
    pub fn notifications(&self) -> &[EventFd] {
        &self.notifications
    }

    /// Its interrupt.
    #[must_use]
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// Its side of the event loop.
    #[must_use]
    pub fn events(&self) -> DeviceEvents {
        DeviceEvents {
            name: self.name.clone(),
            device: Arc::clone(&self.device),
            notifications: Arc::clone(&self.notifications),
            interrupt: Arc::clone(&self.interrupt),
            complaints: Complaints::default(),
            count: Arc::clone(&self.events),
            unheard: None,
        }
    }

    /// How often the event loop had something for the device.
    #[must_use]
    pub fn event_count(&self) -> u64 {
        self.events.load(Ordering::Relaxed)
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().expect("no holder of this lock panics")
    }

    /// The guest reads `data.len()` bytes at `offset` of the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(at) = offset.checked_sub(register::CONFIG) {
            data.fill(0);
            let device = self.device.lock().expect("no holder of this lock panics");
            // Less than a page.
            device.read_config(usize::try_from(at).unwrap_or(usize::MAX), data);
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            *word = self.read_register(offset).to_le_bytes();
        }
        // Registers are 32 bits wide (4.2.2.2): any other width reads as what the bus filled in.
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            register::INTERRUPT_STATUS => return self.interrupt.status.load(Ordering::Acquire),
            register::CONFIG_GENERATION => return self.interrupt.generation.load(Ordering::Relaxed),
            register::MAGIC => return MAGIC,
            register::VERSION => return VERSION,
            register::DEVICE_ID => return self.device_type,
            register::VENDOR_ID => return VENDOR,
            register::SHM_FIRST..=register::SHM_LAST => return u32::MAX,
            _ => {}
        }
        let mut registers = self.registers();
        match offset {
            register::DEVICE_FEATURES => word(self.offered, registers.device_features_sel),
            register::QUEUE_NUM_MAX => registers.queue().map_or(0, |queue| queue.max_size().into()),
            register::QUEUE_READY => registers.queue().is_some_and(|queue| queue.ready()).into(),
            register::STATUS if self.interrupt.needs_reset() => registers.status | status::NEEDS_RESET,
            register::STATUS if registers.status == 0 && self.interrupt.is_resetting() => status::NEEDS_RESET,
            register::STATUS => registers.status,
            _ => 0,
        }
    }

    /// The guest writes `data` at `offset` of the window.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if let Some(at) = offset.checked_sub(register::CONFIG) {
            let mut device = self.device.lock().expect("no holder of this lock panics");
            device.write_config(usize::try_from(at).unwrap_or(usize::MAX), data);
        } else if let Ok(word) = data.try_into() {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        if offset == register::INTERRUPT_ACK {
            self.interrupt.status.fetch_and(!value, Ordering::AcqRel);
            return;
        }
        let mut registers = self.registers();
        match offset {
            register::STATUS => self.write_status(&mut registers, value),
            register::DEVICE_FEATURES_SEL => registers.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => registers.driver_features_sel = value,
            register::DRIVER_FEATURES if registers.status & status::FEATURES_OK == 0 => {
                let sel = registers.driver_features_sel;
                set_word(&mut registers.driver_features, sel, value);
            }
            register::QUEUE_SEL => registers.queue_sel = value,
            _ => {
                let set_up = |queue| write_queue_register(queue, offset, value);
                if registers.queue_to_set_up().is_some_and(|queue| !set_up(queue)) {
                    registers.bad_size = true;
                }
            }
        }
    }

    fn write_status(&self, registers: &mut Registers, value: u32) {
        if value == 0 {
            self.reset(registers);
            return;
        }
        // The driver gave up; what it had is kept until it resets.
        registers.status |= value & status::FAILED;
        let value = value & !(status::FAILED | status::NEEDS_RESET);
        const STEPS: [u32; 4] = [
            status::ACKNOWLEDGE,
            status::DRIVER,
            status::FEATURES_OK,
            status::DRIVER_OK,
        ];
        let mut before = 0;
        for step in STEPS {
            let had = registers.status & !status::FAILED;
            // One step, from where it is, with no bit left out.
            if had == before && value == before | step && self.may_take(step, registers) {
                registers.status |= step;
                if step == status::DRIVER_OK {
                    self.activate(registers);
                }
                return;
            }
            before |= step;
        }
    }

    fn may_take(&self, step: u32, registers: &Registers) -> bool {
        let taken = registers.driver_features;
        step != status::FEATURES_OK || (taken & !self.offered == 0 && taken & F_VERSION_1 != 0)
    }

    fn activate(&self, registers: &mut Registers) {
        let features = registers.driver_features;
        let view = self.memory.view();
        let queues: Option<Vec<_>> = registers
            .queues
            .iter()
            .map(|queue| {
                let mut queue = virtio_queue::Queue::try_from(queue.state()).ok()?;
                queue.set_event_idx(features & super::F_EVENT_IDX != 0);
                Queue::new(queue, view)
            })
            .collect();
        let Some(queues) = queues.filter(|_| !registers.bad_size) else {
            if self.complaints.due() {
                tracing::warn!(
                    "{}: its driver gave it queues that are none; it waits for a reset",
                    self.name
                );
            }
            self.interrupt.set_needs_reset();
            return;
        };
        self.device
            .lock()
            .expect("no holder of this lock panics")
            .activate(Active {
                memory: Arc::clone(&self.memory),
                queues,
                features,
                interrupt: Arc::clone(&self.interrupt),
                notifications: Arc::clone(&self.notifications),
            });
        for notification in self.notifications.iter() {
            // Fails only where it is as notified as it can be.
            let _ = notification.write(1);
        }
    }

    fn reset(&self, registers: &mut Registers) {
        let mut device = self.device.lock().expect("no holder of this lock panics");
        device.reset();
        self.interrupt.set_resetting(device.is_resetting());
        drop(device);
        let mut queues = std::mem::take(&mut registers.queues);
        queues.iter_mut().for_each(QueueT::reset);
        *registers = Registers {
            queues,
            ..Registers::default()
        };
        self.interrupt.clear();
    }
}

/// False where `value` is a size that the queue cannot have.
fn write_queue_register(queue: &mut virtio_queue::Queue, offset: u64, value: u32) -> bool {
    match offset {
        register::QUEUE_NUM => return queue.try_set_size(u16::try_from(value).unwrap_or(0)).is_ok(),
        register::QUEUE_READY => queue.set_ready(value == 1),
        register::QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
        register::QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
        register::QUEUE_DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
        register::QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
        register::QUEUE_DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
        register::QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
        _ => {}
    }
    true
}

/// The 32 bits of `of` that `select` names; there are two.
fn word(of: u64, select: u32) -> u32 {
    match select {
        0 => (of & 0xffff_ffff) as u32,
        1 => (of >> 32) as u32,
        _ => 0,
    }
}

fn set_word(of: &mut u64, select: u32, value: u32) {
    match select {
        0 => *of = *of & !0xffff_ffff | u64::from(value),
        1 => *of = *of & 0xffff_ffff | u64::from(value) << 32,
        // Features beyond 64 that we do not offer: taking one of them is taking what was not offered.
        _ if value != 0 => *of = 0,
        _ => {}
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
