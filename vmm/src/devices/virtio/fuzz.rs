//! Any device, its driver made up by a fuzzer: see [`crate::fuzz`].
//!
//! An input is: which device, by a byte; which of its features are taken, by another; then one step after another, each of a byte that
//! says what, and a few that say of what. Most steps are those of a driver that knows how: it puts chains in, and notifies. The
//! others write to registers, rings and buffers whatever the input says, or are of the host's side.
//!
//! What has to hold is what [`super`]'s tests of hostile drivers hold devices to: nothing panics, the device comes to rest, and after a
//! reset it serves the next driver.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use serde_json::json;
use vm_memory::{Bytes, GuestAddress};

use super::balloon::{Balloon, HintingStart};
use super::block::Block;
use super::net::Net;
use super::rng::Rng;
use super::testing::{Buffer, Driver, NEEDS_RESET, READY, STATUS, from_driver};
use super::{F_VERSION_1, Shared};
use crate::config::{Entropy, HugePages};
use crate::fuzz::{Input, file};
use crate::memory::GuestMemory;
use crate::mmds::config::DEFAULT_IPV4;
use crate::mmds::{Mmds, Stack};

const MEMORY_MIB: usize = 1;
const MEMORY_END: u64 = (MEMORY_MIB as u64) << 20;
/// Behind the rings, of which there are five at most.
const TABLES: u64 = 0x3_0000;
const BUFFERS: u64 = 0x4_0000;
/// Events in which a device has answered full queues: five of 256 chains, four a turn at least, and a turn that finds nothing more.
const REST: usize = 5 * (256 / 4 + 1);
/// Of one input: some of the largest that there are, or all that a driver does in a second.
const MOST_STEPS: usize = 64;
const MOST_EVENTS: usize = 2 * REST;
const DISK_BYTES: u64 = 32 << 10;

/// Who else has to do with the device.
enum Host {
    Nobody,
    Disk(Arc<Mutex<Block>>, File, std::path::PathBuf),
    Wire(OwnedFd),
    Balloon(Arc<Mutex<Balloon>>),
}

fn device(input: &mut Input) -> Option<(Shared, Host)> {
    const NONE: &str = "there are descriptors";
    let kind = input.u8() % 8;
    Some(match kind {
        0 => {
            let mut rng = Rng::new(&Entropy::default()).expect(NONE);
            rng.source = |bytes| {
                bytes.fill(0x5a);
                Ok(bytes.len())
            };
            (Arc::new(Mutex::new(rng)), Host::Nobody)
        }
        1..=3 => {
            let (image, path) = file(DISK_BYTES);
            image
                .write_all_at(&[0x11; 1024], 512)
                .expect("a file in memory takes it");
            let drive = json!({
                "drive_id": "d", "is_root_device": false, "path_on_host": path, "is_read_only": kind == 2,
                "io_engine": if kind == 3 { "Async" } else { "Sync" }, "cache_type": "Writeback",
            });
            // There may be no io_uring here.
            let block = Block::new(&serde_json::from_value(drive).expect("a drive")).ok()?;
            let block = Arc::new(Mutex::new(block));
            (block.clone(), Host::Disk(block, image, path))
        }
        4 | 5 => {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let (host, device) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect(NONE);
            let config = json!({ "iface_id": "eth0", "host_dev_name": "test", "guest_mac": "06:00:ac:10:00:02" });
            let config = serde_json::from_value(config).expect("an interface");
            let mut net = Net::on_wire(&config, device).expect(NONE);
            if kind == 5 {
                let now = Instant::now();
                let mmds = Arc::new(Mutex::new(Mmds::new(1024, now).expect("the kernel has random bytes")));
                net.set_detour(Box::new(Stack::new(DEFAULT_IPV4, mmds, now)))
                    .expect(NONE);
            }
            (Arc::new(Mutex::new(net)), Host::Wire(host))
        }
        6 => {
            let config = json!({
                "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 3600, "free_page_hinting": true,
                "free_page_reporting": true,
            });
            let balloon = Balloon::new(&serde_json::from_value(config).expect("a balloon")).expect(NONE);
            let balloon = Arc::new(Mutex::new(balloon));
            (balloon.clone(), Host::Balloon(balloon))
        }
        _ => (super::vsock::fuzz::device(), Host::Nobody),
    })
}

impl Host {
    fn act(&self, input: &mut Input) {
        match self {
            Self::Nobody => {}
            Self::Disk(block, image, path) => {
                image
                    .set_len(u64::from(input.u16()))
                    .expect("a file in memory can have any length");
                // Refused where it is less than a sector.
                drop(lock(block).set_file(path));
            }
            Self::Wire(host) => {
                let mut frame = [0; 128];
                while recv(host, &mut frame, RecvFlags::empty()).is_ok() {}
                let (head, more) = (input.short(), input.pick(&[0, 46, 1500, 9000, 0xffff]));
                let frame = [head, &vec![0xa5; more]].concat();
                // Fails where the guest has left too many.
                let _ = send(host, &frame, SendFlags::empty());
            }
            Self::Balloon(balloon) => {
                let mut balloon = lock(balloon);
                let number = input.pick(&[0, 1, 2, 3, 255, u32::MAX]);
                // Refused where its driver is not ready, or the guest has less.
                match input.u8() % 6 {
                    0 | 1 => drop(balloon.update_amount(number)),
                    2 => drop(balloon.update_stats_interval(1 + input.u16() % 9000)),
                    3 => {
                        let acknowledge_on_stop = number == 0;
                        drop(balloon.start_hinting(HintingStart { acknowledge_on_stop }));
                    }
                    4 => drop(balloon.stop_hinting()),
                    _ => {
                        let target = balloon.stats().expect("it has statistics").target_mib;
                        assert_eq!(balloon.config().amount_mib, target);
                        drop(balloon.hinting_status());
                    }
                }
            }
        }
    }
}

fn lock<T>(shared: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    shared.lock().expect("no holder of this lock panics")
}

pub(crate) fn run(mut input: Input) {
    let Some((device, host)) = device(&mut input) else {
        return;
    };
    let memory = Arc::new(GuestMemory::new(MEMORY_MIB, HugePages::None).expect("the host has a MiB"));
    let mut play = Play {
        driver: Driver::with_memory(device, memory),
        events: 0,
    };
    play.set_up(&mut input);
    for _ in 0..MOST_STEPS {
        if input.is_empty() || play.events > MOST_EVENTS {
            break;
        }
        match input.u8() % 16 {
            0..=3 => play.chain(&mut input),
            4 => play.indirect(&mut input),
            5 => play.descriptor(&mut input),
            6 => play.offer(&mut input),
            7 => play.write(&mut input),
            8 => play.available(&mut input),
            9 | 10 => play.notify(&mut input),
            11 => play.write_register(&mut input),
            12 => play.read_register(&mut input),
            13 => play.set_up(&mut input),
            _ => {
                host.act(&mut input);
                play.turn();
            }
        }
    }
    play.serves_the_next_driver();
}

struct Play {
    driver: Driver,
    events: usize,
}

impl Play {
    fn set_up(&mut self, input: &mut Input) {
        let features = match input.u8() {
            0 => u64::MAX,
            1 => F_VERSION_1,
            _ => input.u64(),
        };
        self.driver.set_up(features);
        self.turn();
    }

    fn turn(&mut self) {
        let events = self.driver.turn(REST + 1);
        assert!(events <= REST, "no rest after {events} events");
        self.events += events;
    }

    fn queue(&self, input: &mut Input) -> usize {
        usize::from(input.u8()) % self.driver.rings.len()
    }

    fn address(input: &mut Input) -> u64 {
        let near = u64::from(input.u8());
        match input.u8() % 8 {
            0 => near,
            // In the rings.
            1 => 0x1_0000 + near * 0x100,
            2 => MEMORY_END - near,
            3 => u64::MAX - near,
            4 => (4 << 30) - near,
            5 => TABLES + near,
            _ => input.u64(),
        }
    }

    fn buffer(&self, input: &mut Input) -> Buffer {
        let shape = input.u8();
        let mut at = BUFFERS + u64::from(input.u16()) * 8;
        if shape & 0x80 != 0 {
            at = Self::address(input);
        }
        let writable = shape & 1 != 0;
        let len = match shape >> 1 & 7 {
            0 => 16,
            1 => 1,
            2 => 512,
            3 => 44,
            4 => 4096,
            5 => u32::from(input.u8()),
            6 => u32::from(input.u16()),
            _ => input.u32(),
        };
        if shape & 0x40 != 0 {
            self.write_at(at, input.short());
        }
        Buffer { at, len, writable }
    }

    fn write_at(&self, at: u64, bytes: &[u8]) {
        // Not everywhere is memory.
        let _ = self.driver.memory.view().write_slice(bytes, GuestAddress(at));
    }

    fn chain(&mut self, input: &mut Input) {
        let (queue, shape) = (self.queue(input), input.u8());
        let buffers: Vec<_> = (0..=shape % 4).map(|_| self.buffer(input)).collect();
        self.driver.put(queue, &buffers);
        if shape & 0x80 == 0 {
            self.driver.notify(queue);
            self.turn();
        }
    }

    fn indirect(&mut self, input: &mut Input) {
        let (queue, shape, at) = (self.queue(input), input.u8(), TABLES + u64::from(input.u8()) * 16);
        let count = shape % 8;
        for place in 0..count {
            let buffer = self.buffer(input);
            let last = place + 1 == count;
            let flags = u16::from(!last) | u16::from(buffer.writable) << 1;
            self.write_at(
                at + 16 * u64::from(place),
                &bytes_of(buffer, flags, u16::from(place) + 1),
            );
        }
        let len = if shape & 0x80 == 0 {
            16 * u32::from(count)
        } else {
            input.u32()
        };
        let table = from_driver(at, len);
        let head = self.driver.put(queue, &[table]);
        self.driver.descriptor(queue, head, table, 4, 0);
        self.driver.notify(queue);
        self.turn();
    }

    fn descriptor(&mut self, input: &mut Input) {
        let queue = self.queue(input);
        let index = input.u16() % self.driver.rings[queue].size;
        let buffer = self.buffer(input);
        let (flags, next) = (input.u16(), input.u16());
        self.driver.descriptor(queue, index, buffer, flags, next);
    }

    fn offer(&mut self, input: &mut Input) {
        let queue = self.queue(input);
        self.driver.offer(queue, input.u16());
        self.driver.notify(queue);
        self.turn();
    }

    fn write(&mut self, input: &mut Input) {
        let at = Self::address(input);
        self.write_at(at, input.short());
    }

    /// The available ring's index, or when the driver wants to be told.
    fn available(&mut self, input: &mut Input) {
        let queue = self.queue(input);
        let ring = self.driver.rings[queue];
        let word = input.pick(&[0, 2, 4 + 2 * u64::from(ring.size)]);
        self.write_at(ring.available + word, &input.u16().to_le_bytes());
        self.driver.notify(queue);
        self.turn();
    }

    fn notify(&mut self, input: &mut Input) {
        self.driver.notify(self.queue(input));
        self.turn();
    }

    fn offset(input: &mut Input) -> u64 {
        let offset = u64::from(input.u8());
        if offset < 0x40 {
            4 * offset
        } else {
            0x100 + offset - 0x40
        }
    }

    fn write_register(&mut self, input: &mut Input) {
        let (offset, width) = (Self::offset(input), input.pick(&[4, 4, 4, 1, 2, 8, 3]));
        let bytes = input.u64().to_le_bytes();
        self.driver.transport.write(offset, &bytes[..width]);
        self.turn();
    }

    fn read_register(&mut self, input: &mut Input) {
        let (offset, width) = (Self::offset(input), input.pick(&[4, 4, 4, 1, 2, 8, 3]));
        self.driver.transport.read(offset, &mut [0; 8][..width]);
    }

    fn serves_the_next_driver(mut self) {
        self.driver.reset();
        // What was signalled before the reset is still heard.
        self.driver.turn(32);
        assert_eq!(self.driver.turn(32), 0, "a device that was reset is busy");
        self.driver.set_up(u64::MAX);
        self.driver.turn(32);
        assert_eq!(self.driver.get(STATUS) & (READY | NEEDS_RESET), READY);
    }
}

fn bytes_of(buffer: Buffer, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&buffer.at.to_le_bytes());
    bytes[8..12].copy_from_slice(&buffer.len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}
