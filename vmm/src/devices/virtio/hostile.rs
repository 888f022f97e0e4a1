//! A driver that breaks the rules, for the tests of every device: [`survives`].
//!
//! Each case is made from its number alone, by dice. The driver sets its device up, mostly as it should; writes descriptors,
//! indirect tables and rings of its own, with chains that run in circles, lengths beyond 4 GiB, addresses outside of memory, or in
//! the rings themselves, and indices that run away; and then notifies, changes what it wrote, and writes to any register, in turns
//! with whoever else has to do with the device ([`World`]): clients of its socket, requests of the API.
//!
//! What has to hold, counted in events and not by a clock:
//!
//! * nothing panics, which the test would;
//! * the device comes to rest in as many events as full queues make turns, whatever the rings say;
//! * while it is notified again and again, its neighbour, a disk with a driver that behaves, answers in its own next event, and
//!   does not stand still: the device does not wait for anything (only the Sync engine of a disk may), by the kernel's count of
//!   the thread's voluntary switches, and what never comes back is ended by a watchdog;
//! * after a reset the device is at rest, and serves the next driver.

mod dice;
mod witness;

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::Shared;
use super::testing::{BUFFERS, Driver, NEEDS_RESET, READY, RINGS, STATUS};
use crate::config::HugePages;
use crate::memory::GuestMemory;
pub use dice::Dice;
pub use witness::disk;
use witness::{Neighbour, Watchdog, waits};

/// Cases a device.
const CASES: u64 = 10_000;
/// Cases that one device lives through, with resets between them: what one case leaves behind the next one finds.
const LIFE: u64 = 100;
/// MiB of the hostile guest's memory: little, so that its end is near.
const MEMORY_MIB: usize = 4;
const MEMORY_END: u64 = (MEMORY_MIB as u64) << 20;
/// Events in which a device has answered full queues: there are five at most, of 256 chains, and no turn takes fewer than four
/// chains unless it is the last.
const REST: usize = 5 * (256 / 4 + 1);

/// Where devices come from, and who else has to do with them.
pub trait World {
    /// Another device.
    fn make(&mut self) -> Shared;

    /// What others than its driver do with the device made last, between two steps of the driver's.
    fn meanwhile(&mut self, _dice: &mut Dice) {}

    /// What the driver tells it in a buffer, if not any numbers.
    fn says(&mut self, _dice: &mut Dice) -> Option<Vec<u8>> {
        None
    }

    /// Whether the device may have its thread wait.
    fn may_wait(&self) -> bool {
        false
    }

    /// What a queue's buffers are, where one of another kind is only ever the end of it.
    fn buffers(&self, _queue: usize) -> Option<Shape> {
        None
    }
}

/// A kind of buffers.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// For the device to write.
    pub writable: bool,
    /// So long, or longer.
    pub least: u32,
}

/// Of a device that nobody else has to do with.
impl<F: FnMut() -> Shared> World for F {
    fn make(&mut self) -> Shared {
        self()
    }
}

/// Where the driver put a queue.
#[derive(Clone, Copy, Debug)]
struct Place {
    descriptors: u64,
    available: u64,
    used: u64,
    size: u16,
    /// The available ring's index.
    index: u16,
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

struct Hostile<'d, W> {
    dice: Dice,
    driver: &'d mut Driver,
    world: &'d mut W,
    places: Vec<Place>,
    /// One field in so many is not what it should be; none, where this is none.
    evil: Option<u64>,
}

impl<W: World> Hostile<'_, W> {
    fn is_evil(&mut self) -> bool {
        self.evil.is_some_and(|rarely| self.dice.once_in(rarely))
    }

    /// Writes to memory, if it is memory.
    fn write_in(&self, base: u64, offset: u64, bytes: &[u8]) {
        let at = GuestAddress(base.wrapping_add(offset));
        let _ = self.driver.memory.view().write_slice(bytes, at);
    }

    /// From reset to ready, or not quite.
    fn set_up(&mut self) {
        for step in [0, 1, 3] {
            self.driver.set(STATUS, step);
        }
        let mask = self.dice.roll();
        let mask = self.dice.pick(&[u64::MAX, u64::MAX, 0, mask]) | super::F_VERSION_1;
        for word in 0..2 {
            self.driver.set(0x14, word);
            self.driver.set(0x24, word);
            let mut taken = self.driver.get(0x10) & u32::try_from(mask >> (32 * word) & 0xffff_ffff).unwrap();
            if self.is_evil() && self.dice.once_in(16) {
                taken |= self.dice.word32();
            }
            self.driver.set(0x20, taken);
        }
        self.driver.set(STATUS, 11);
        self.places.clear();
        for queue in 0.. {
            self.driver.set(0x30, queue);
            let max = self.driver.get(0x34);
            if max == 0 {
                break;
            }
            let base = RINGS + u64::from(queue) * 0x4000;
            let size = self.dice.pick(&[4, 8, 16, 64, 256]).min(max);
            let mut place = Place {
                descriptors: base,
                available: base + 0x2000,
                used: base + 0x3000,
                size: u16::try_from(size).unwrap(),
                index: 0,
            };
            if self.is_evil() && self.dice.once_in(4) {
                let address = self.evil_address() & !3;
                match self.dice.below(3) {
                    0 => place.descriptors = address,
                    1 => place.available = address,
                    _ => place.used = address,
                }
            }
            let told = if self.is_evil() && self.dice.once_in(8) {
                self.dice.word32()
            } else {
                size
            };
            self.driver.set(0x38, told);
            for (low, address) in [(0x80, place.descriptors), (0x90, place.available), (0xa0, place.used)] {
                self.driver.set(low, u32::try_from(address & 0xffff_ffff).unwrap());
                self.driver.set(low + 4, u32::try_from(address >> 32).unwrap());
            }
            let left_out = self.is_evil() && self.dice.once_in(8);
            self.driver.set(0x44, u32::from(!left_out));
            self.places.push(place);
        }
        self.driver.set(STATUS, READY);
    }

    fn evil_address(&mut self) -> u64 {
        let near = self.dice.below(64);
        // Not far from where a part of a ring begins.
        let ring = RINGS + 0x1000 * self.dice.below(20) + 2 * self.dice.below(16);
        let any = self.dice.roll();
        let inside = self.dice.below(MEMORY_END);
        self.dice.pick(&[
            0,
            near,
            ring,
            ring,
            inside,
            MEMORY_END - near,
            MEMORY_END,
            3 << 30,
            (3 << 30) - near,
            4 << 30,
            u64::MAX - near,
            any,
        ])
    }

    /// A descriptor's bytes.
    fn descriptor(&mut self, writable: bool, least: u32, index: u16, last: bool) -> [u8; 16] {
        let len = self
            .dice
            .pick(&[1, 1, 4, 10, 16, 16, 44, 512, 512, 1024, 4096, 0x1_0000])
            .max(least);
        let room = MEMORY_END - BUFFERS - 0x1_0000;
        let at = BUFFERS + self.dice.below(room) / 512 * 512;
        let (mut at, mut len) = (at, len);
        let mut flags = if last { 0 } else { NEXT } | if writable { WRITE } else { 0 };
        let mut next = index.wrapping_add(1);
        if self.is_evil() {
            at = self.evil_address();
        }
        if self.is_evil() {
            let any = self.dice.word32();
            len = self.dice.pick(&[0, u32::MAX, 1 << 31, 1 << 24, 1 << 20, any]);
        }
        if self.is_evil() {
            let any = self.dice.word16();
            flags = self
                .dice
                .pick(&[flags ^ NEXT, flags ^ WRITE, flags | INDIRECT, INDIRECT, NEXT, any]);
        }
        if self.is_evil() {
            let any = self.dice.word16();
            next = self.dice.pick(&[index, 0, index.wrapping_sub(1), 256, u16::MAX, any]);
        }
        if !writable {
            let bytes = self.world.says(&mut self.dice);
            let bytes = bytes.unwrap_or_else(|| (0..16).flat_map(|_| self.dice.small().to_le_bytes()).collect());
            self.write_in(at, 0, &bytes[..bytes.len().min(usize::try_from(len).unwrap())]);
        }
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&at.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        bytes
    }

    /// Writes descriptors of one chain at `first` of `table`, whose indices begin with `index`; how many.
    fn chain(&mut self, table: u64, index: u16, room: u16, shape: Option<Shape>) -> u16 {
        let few = u16::try_from(1 + self.dice.below(5)).unwrap();
        let count = self.dice.pick(&[few, 3, 3]).min(room);
        let any = u16::try_from(self.dice.below(u64::from(count) + 1)).unwrap();
        // A head, data in either direction, and a byte for the status.
        let mut readable = self.dice.pick(&[any, 1, count - 1, count - 1]).min(count);
        if let Some(Shape { writable, .. }) = shape {
            readable = if writable { 0 } else { count };
        }
        let least = shape.map_or(0, |shape| shape.least);
        for place in 0..count {
            let bytes = self.descriptor(place >= readable, least, index + place, place + 1 == count);
            self.write_in(table, 16 * u64::from(index + place), &bytes);
        }
        count
    }

    /// Fills a queue with chains, and makes them available.
    fn fill(&mut self, queue: usize) {
        let place = self.places[queue];
        let mut index = 0;
        let mut heads = Vec::new();
        let most = self.dice.pick(&[1, 2, 3, 8, 256]);
        let shape = self.world.buffers(queue);
        while index < place.size && heads.len() < most {
            heads.push(index);
            let shape = shape.filter(|_| !self.is_evil());
            if self.dice.once_in(4) {
                // An indirect table, whose place no buffer has.
                let table = MEMORY_END - 0x1_0000 + 0x100 * u64::from(index);
                let count = self.chain(table, 0, 16, shape);
                let (mut at, mut len, mut flags) = (table, u32::from(count) * 16, INDIRECT);
                if self.is_evil() {
                    at = self.evil_address();
                    let any = self.dice.word32();
                    len = self.dice.pick(&[0, 15, 16 * 0xffff, 16 * 0x1_0000, any]);
                    flags = self.dice.pick(&[INDIRECT, INDIRECT | NEXT, INDIRECT | WRITE]);
                }
                let mut bytes = [0; 16];
                bytes[..8].copy_from_slice(&at.to_le_bytes());
                bytes[8..12].copy_from_slice(&len.to_le_bytes());
                bytes[12..14].copy_from_slice(&flags.to_le_bytes());
                self.write_in(place.descriptors, 16 * u64::from(index), &bytes);
                index += 1;
            } else {
                index += self.chain(place.descriptors, index, place.size - index, shape);
            }
        }
        for (slot, &head) in (0u16..).zip(&heads) {
            let head = if self.is_evil() { self.dice.word16() } else { head };
            let slot = place.index.wrapping_add(slot) % place.size;
            self.write_in(place.available, 4 + 2 * u64::from(slot), &head.to_le_bytes());
        }
        let count = u16::try_from(heads.len()).unwrap();
        self.make_available(queue, place.index.wrapping_add(count));
    }

    /// Writes the available ring's index, and what the driver wishes of interrupts.
    fn make_available(&mut self, queue: usize, index: u16) {
        let place = self.places[queue];
        let index = if self.is_evil() {
            let any = self.dice.word16();
            self.dice.pick(&[
                index.wrapping_add(place.size),
                index.wrapping_add(1),
                0x8000,
                u16::MAX,
                any,
            ])
        } else {
            index
        };
        self.places[queue].index = index;
        self.write_in(place.available, 2, &index.to_le_bytes());
        let event = 4 + 2 * u64::from(place.size);
        let wish = self.dice.word16().to_le_bytes();
        self.write_in(place.available, event, &wish);
    }

    /// Whether a chain came back, by the used rings' indices.
    fn was_answered(&self) -> bool {
        let view = self.driver.memory.view();
        let index = |place: &Place| view.read_obj::<u16>(GuestAddress(place.used.wrapping_add(2)));
        self.places
            .iter()
            .any(|place| index(place).is_ok_and(|index| index != 0))
    }

    /// Any access to any register, or next to one.
    fn any_register(&mut self) {
        let register = 4 * self.dice.below(64);
        let config = 0x100 + self.dice.below(32);
        let any = self.dice.below(0x1100);
        let offset = self.dice.pick(&[register, register, register, config, any]);
        let width = usize::try_from(self.dice.pick(&[4, 4, 4, 1, 2, 8, 3])).unwrap();
        let words = [self.dice.small(), self.dice.word32()];
        let small = self.dice.pick(&[words[0], words[0], words[1], 1, 3, 11, 15]);
        let bytes = [small.to_le_bytes(), words[1].to_le_bytes()].concat();
        if self.dice.once_in(3) {
            self.driver.transport.read(offset, &mut bytes.clone()[..width]);
        } else {
            self.driver.transport.write(offset, &bytes[..width]);
        }
    }

    /// One thing after the start.
    fn step(&mut self) {
        let queues = self.places.len() as u64;
        let queue = usize::try_from(self.dice.below(queues)).unwrap();
        let step = self.dice.below(8);
        match step {
            0..=3 => self.driver.notify(queue),
            4 if self.evil.is_some() && self.dice.once_in(2) => {
                let index = self.dice.word16();
                self.make_available(queue, index);
                self.driver.notify(queue);
            }
            5 if self.evil.is_some() => {
                let index = self.dice.below(self.places[queue].size.into());
                let index = u16::try_from(index).unwrap();
                let (writable, last) = (self.dice.once_in(2), self.dice.once_in(2));
                let bytes = self.descriptor(writable, 0, index, last);
                self.write_in(self.places[queue].descriptors, 16 * u64::from(index), &bytes);
            }
            6 if self.evil.is_some() && self.dice.once_in(4) => {
                self.any_register();
            }
            7 if self.evil.is_some() && self.dice.once_in(4) => {
                self.set_up();
                self.fill(queue);
            }
            _ => self.fill(queue),
        }
    }
}

/// Says which case it was, if one panics.
struct Saying(u64);

impl Drop for Saying {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let first = self.0 / LIFE * LIFE;
            eprintln!(
                "hostile driver: case {}, of a device whose first case was {first}",
                self.0
            );
        }
    }
}

/// Has a hostile driver at the devices of `world`, for 10,000 cases.
///
/// # Panics
/// The device, or its neighbour, did not stand it.
pub fn survives(mut world: impl World) {
    let (mut neighbour, watchdog) = (Neighbour::new(), Watchdog::new());
    let mut told = Told::default();
    for life in 0..CASES / LIFE {
        let memory = Arc::new(GuestMemory::new(MEMORY_MIB, HugePages::None).unwrap());
        let mut driver = Driver::with_memory(world.make(), memory);
        for case in life * LIFE..(life + 1) * LIFE {
            let _saying = Saying(case);
            watchdog.see(case);
            // Each case begins with memory that says nothing.
            let view = driver.memory.view();
            let whole = vm_memory::GuestMemoryBackend::get_slice(view, GuestAddress(0), MEMORY_MIB << 20).unwrap();
            driver.memory.discard(&[whole]).unwrap();

            let mut dice = Dice(case);
            let evil = dice.pick(&[None, Some(256), Some(64), Some(16), Some(4)]);
            let mut hostile = Hostile {
                dice,
                driver: &mut driver,
                world: &mut world,
                places: Vec::new(),
                evil,
            };
            hostile.set_up();
            for queue in 0..hostile.places.len() {
                hostile.fill(queue);
            }
            for _ in 0..1 + hostile.dice.below(6) {
                hostile.step();
                hostile.world.meanwhile(&mut hostile.dice);
                let before = waits();
                let events = hostile.driver.turn(REST + 1);
                told.waited += waits() - before;
                assert!(events <= REST, "no rest after {events} events");
                neighbour.serves_beside(hostile.driver);
            }
            told.broke_rules += u64::from(hostile.driver.needs_reset());
            told.answered += u64::from(hostile.was_answered());
            serves_the_next_driver(&mut driver);
        }
    }
    println!("{told:?} of {CASES} cases");
    // Dice that only ever meet the first check, or none, would show nothing.
    assert!(told.broke_rules > CASES / 10 && told.answered > CASES / 10, "{told:?}");
    // Memory that the host has to find first may have it wait now and then; a device that waits does so case for case.
    assert!(
        world.may_wait() || told.waited < CASES / 100,
        "it had its thread wait: {told:?}"
    );
}

/// In how many cases what happened.
#[derive(Debug, Default)]
struct Told {
    /// The device found that its driver broke the rules.
    broke_rules: u64,
    /// It answered a chain, or more.
    answered: u64,
    /// Its thread waited for something; not in how many cases, but how often.
    waited: u64,
}

/// Has a driver that behaves set the device up, and leaves it reset.
fn serves_the_next_driver(driver: &mut Driver) {
    driver.reset();
    // What was signalled before the reset is still heard, once: a notification for each queue, and the device's own.
    driver.turn(32);
    assert_eq!(driver.turn(32), 0, "a device that was reset is busy");
    driver.set_up(u64::MAX);
    driver.turn(32);
    assert_eq!(driver.get(STATUS) & (READY | NEEDS_RESET), READY);
    driver.reset();
    driver.turn(32);
}

/// Has a driver write to any register of the devices of `world`, ready or not, for 10,000 cases.
///
/// # Panics
/// As [`survives`].
pub fn survives_registers(mut world: impl World) {
    let (mut neighbour, watchdog) = (Neighbour::new(), Watchdog::new());
    for life in 0..CASES / LIFE {
        let memory = Arc::new(GuestMemory::new(MEMORY_MIB, HugePages::None).unwrap());
        let mut driver = Driver::with_memory(world.make(), memory);
        for case in life * LIFE..(life + 1) * LIFE {
            let _saying = Saying(case);
            watchdog.see(case);
            let mut hostile = Hostile {
                dice: Dice(case),
                driver: &mut driver,
                world: &mut world,
                places: Vec::new(),
                evil: Some(4),
            };
            if hostile.dice.once_in(2) {
                hostile.set_up();
            }
            for _ in 0..1 + hostile.dice.below(20) {
                hostile.any_register();
                hostile.world.meanwhile(&mut hostile.dice);
                hostile.driver.turn(1);
            }
            neighbour.serves_beside(hostile.driver);
            serves_the_next_driver(&mut driver);
        }
    }
}
