//! A driver for tests: well-behaved unless told otherwise. It sets a device up through its registers, writes the rings itself,
//! and turns the device's side of the event loop by hand.

use std::sync::Arc;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::fd::{BorrowedFd, OwnedFd};
use vm_memory::{Bytes, GuestAddress};

use super::mmio::Transport;
use super::{DeviceEvents, Interrupt, Shared};
use crate::config::HugePages;
use crate::memory::GuestMemory;

pub const STATUS: u64 = 0x70;
/// All of a driver that is ready.
pub const READY: u32 = 15;
pub const NEEDS_RESET: u32 = 64;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;

/// Where a queue's parts lie, and where its driver is in them.
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    pub size: u16,
    next_descriptor: u16,
    next_available: u16,
    next_used: u16,
}

impl Ring {
    /// Where the next chain begins.
    pub fn next_descriptor(&self) -> u16 {
        self.next_descriptor
    }
}

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    pub at: u64,
    pub len: u32,
    /// Whether it is the device's to write.
    pub writable: bool,
}

/// For the device to read.
pub fn from_driver(at: u64, len: u32) -> Buffer {
    Buffer {
        at,
        len,
        writable: false,
    }
}

/// For the device to write.
pub fn for_driver(at: u64, len: u32) -> Buffer {
    Buffer {
        at,
        len,
        writable: true,
    }
}

/// A device with its driver.
#[derive(Debug)]
pub struct Driver {
    pub transport: Transport,
    pub memory: Arc<GuestMemory>,
    pub rings: Vec<Ring>,
    events: DeviceEvents,
    /// Waits for what the device waits for, as the event loop does.
    epoll: OwnedFd,
}

/// Rings begin here, a page for each part.
pub const RINGS: u64 = 0x1_0000;
/// The first address that the rings leave free: buffers go here.
pub const BUFFERS: u64 = 0x10_0000;
/// Guest memory, in MiB.
pub const MEMORY_MIB: usize = 16;

impl Driver {
    /// A driver that takes all that the device offers, of `features`, and is ready.
    pub fn start(device: Shared, features: u64) -> Self {
        let mut driver = Self::new(device);
        driver.set_up(features);
        driver
    }

    /// A driver that has not touched its device.
    pub fn new(device: Shared) -> Self {
        let memory = Arc::new(GuestMemory::new(MEMORY_MIB, HugePages::None).unwrap());
        Self::with_memory(device, memory)
    }

    pub fn with_memory(device: Shared, memory: Arc<GuestMemory>) -> Self {
        let interrupt = Arc::new(Interrupt::new().unwrap());
        let transport = Transport::new("test device".into(), device, interrupt, Arc::clone(&memory)).unwrap();
        let events = transport.events();
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        for ((fd, set), place) in events.sources().into_iter().zip(0..) {
            // SAFETY: the device keeps its descriptors open for as long as it lives, which is longer than this function.
            #[expect(unsafe_code, reason = "descriptors as the event manager takes them")]
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            let flags = epoll::EventFlags::from_bits_retain(set.bits());
            epoll::add(&epoll, fd, epoll::EventData::new_u64(place), flags).unwrap();
        }
        Self {
            transport,
            memory,
            rings: Vec::new(),
            events,
            epoll,
        }
    }

    pub fn set(&self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    pub fn get(&self, register: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(register, &mut word);
        u32::from_le_bytes(word)
    }

    pub fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.transport.read(0x100 + offset, &mut data);
        data
    }

    /// Resets the device, and has it do what it has to until it is reset (2.4).
    pub fn reset(&mut self) {
        self.set(STATUS, 0);
        while self.get(STATUS) != 0 {
            let events = self.turn_for(1, Duration::from_secs(60));
            assert!(events > 0 || self.get(STATUS) == 0, "a reset that does not end");
        }
    }

    /// From reset to ready (3.1.1), without waiting for the reset to end, as Linux's driver.
    pub fn set_up(&mut self, features: u64) {
        self.set(STATUS, 0);
        self.set(STATUS, 1);
        self.set(STATUS, 3);
        let mut taken = [0; 2];
        for (word, taken) in (0..).zip(&mut taken) {
            self.set(0x14, word);
            let wanted = u32::try_from((features | super::F_VERSION_1) >> (32 * word) & 0xffff_ffff).unwrap();
            *taken = self.get(0x10) & wanted;
            self.set(0x24, word);
            self.set(0x20, *taken);
        }
        self.set(STATUS, 11);
        assert_eq!(self.get(STATUS), 11, "the device refused its own features");
        self.rings.clear();
        for queue in 0.. {
            self.set(0x30, queue);
            let size = u16::try_from(self.get(0x34)).unwrap();
            if size == 0 {
                break;
            }
            let base = RINGS + u64::from(queue) * 0x4000;
            let ring = Ring {
                descriptors: base,
                available: base + 0x2000,
                used: base + 0x3000,
                size: size.min(256),
                next_descriptor: 0,
                next_available: 0,
                next_used: 0,
            };
            let zeros = [0u8; 0x4000];
            self.memory.view().write_slice(&zeros, GuestAddress(base)).unwrap();
            self.set(0x38, ring.size.into());
            for (low, address) in [(0x80, ring.descriptors), (0x90, ring.available), (0xa0, ring.used)] {
                self.set(low, u32::try_from(address).unwrap());
                self.set(low + 4, 0);
            }
            self.set(0x44, 1);
            self.rings.push(ring);
        }
        self.set(STATUS, READY);
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.view().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.view().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn word(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.read(at, 2).try_into().unwrap())
    }

    /// Writes a descriptor, whatever it says.
    pub fn descriptor(&self, queue: usize, index: u16, buffer: Buffer, flags: u16, next: u16) {
        let mut bytes = buffer.at.to_le_bytes().to_vec();
        bytes.extend(buffer.len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(self.rings[queue].descriptors + 16 * u64::from(index), &bytes);
    }

    /// Makes the chain at descriptor `head` available.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let slot = ring.available + 4 + 2 * u64::from(ring.next_available % ring.size);
        ring.next_available = ring.next_available.wrapping_add(1);
        let (at, index) = (ring.available, ring.next_available);
        self.write(slot, &head.to_le_bytes());
        self.write(at + 2, &index.to_le_bytes());
    }

    /// Puts a chain of `buffers` in; its head.
    pub fn put(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        let Ring {
            size, next_descriptor, ..
        } = self.rings[queue];
        let index = |place: usize| (next_descriptor + u16::try_from(place).unwrap()) % size;
        for (place, &buffer) in buffers.iter().enumerate() {
            let last = place + 1 == buffers.len();
            let flags = if last { 0 } else { F_NEXT } | if buffer.writable { F_WRITE } else { 0 };
            self.descriptor(queue, index(place), buffer, flags, index(place + 1));
        }
        self.rings[queue].next_descriptor = index(buffers.len());
        let head = index(0);
        self.offer(queue, head);
        head
    }

    /// Notifies the device of `queue`.
    pub fn notify(&self, queue: usize) {
        self.transport.notifications()[queue].write(1).unwrap();
    }

    /// Has the device do all that it has to do now; how many events that took. It is given up after `most` of them.
    pub fn turn(&mut self, most: usize) -> usize {
        self.turn_for(most, Duration::ZERO)
    }

    /// As [`Driver::turn`], waiting up to `patience` for each event.
    pub fn turn_for(&mut self, most: usize, patience: Duration) -> usize {
        let mut events = 0;
        while events < most {
            let ready = self.ready(patience);
            if ready.is_empty() {
                break;
            }
            for place in ready {
                self.events.happened(place);
                events += 1;
            }
        }
        events
    }

    /// The places of the sources that are ready.
    fn ready(&self, patience: Duration) -> Vec<usize> {
        let patience = Timespec::try_from(patience).unwrap();
        let mut ready = Vec::with_capacity(16);
        // What io_uring has to do for this thread interrupts it, as a signal would.
        let wait = || epoll::wait(&self.epoll, spare_capacity(&mut ready), Some(&patience));
        rustix::io::retry_on_intr(wait).unwrap();
        let mut places: Vec<_> = ready
            .iter()
            .map(|event| usize::try_from(event.data.u64()).unwrap())
            .collect();
        places.sort_unstable();
        places
    }

    /// What the device gave back since this was last called: heads, and how many bytes it says it wrote.
    pub fn used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let index = self.word(self.rings[queue].used + 2);
        let mut used = Vec::new();
        while self.rings[queue].next_used != index {
            let ring = &mut self.rings[queue];
            let slot = ring.used + 4 + 8 * u64::from(ring.next_used % ring.size);
            ring.next_used = ring.next_used.wrapping_add(1);
            let entry = self.read(slot, 8);
            let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap());
            used.push((word(0), word(4)));
        }
        // The next interrupt is wanted for the next chain (2.7.7.1); where that was not negotiated nobody looks.
        let ring = self.rings[queue];
        self.write(
            ring.available + 4 + 2 * u64::from(ring.size),
            &ring.next_used.to_le_bytes(),
        );
        used
    }

    /// Whether an interrupt came since this was last called.
    pub fn interrupted(&self) -> bool {
        self.transport.interrupt().line().read().is_ok()
    }

    pub fn needs_reset(&self) -> bool {
        self.get(STATUS) & NEEDS_RESET != 0
    }
}
