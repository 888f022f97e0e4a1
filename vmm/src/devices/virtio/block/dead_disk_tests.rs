//! Disks that do not answer: requests end when the test says so, or when the kernel can cancel them.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, Weak};

use io_uring::squeue;
use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::devices::virtio::hostile;
use crate::devices::virtio::testing::{BUFFERS, Driver, NEEDS_RESET, READY, STATUS, for_driver, from_driver};
use crate::memory::GuestMemory;
use crate::testing::TempFile;

const HEAD: u64 = BUFFERS;
const STATUS_BYTE: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;

/// What has become of a ring's entries.
#[derive(Debug, Default)]
struct Entries {
    line: Vec<u64>,
    /// Requests that the disk has, by their user data.
    begun: Vec<u64>,
    /// Cancellations, of which none is of any use.
    cancellations: Vec<u64>,
    ended: VecDeque<(u64, i32)>,
    /// Nothing is taken from the line.
    busy: bool,
}

/// A ring over a disk that has died.
#[derive(Debug)]
struct DeadRing(Arc<Mutex<Entries>>);

impl ring::Ring for DeadRing {
    #[expect(unsafe_code, reason = "as the trait has it; nothing here follows an address")]
    unsafe fn push(&mut self, entry: &squeue::Entry) -> bool {
        let mut entries = self.0.lock().unwrap();
        // As many as the engine was made for.
        let room = entries.line.len() < usize::from(QUEUE_SIZE);
        if room {
            entries.line.push(entry.get_user_data());
        }
        room
    }

    fn submit(&mut self) -> std::io::Result<()> {
        let mut entries = self.0.lock().unwrap();
        if entries.busy {
            return Err(std::io::ErrorKind::ResourceBusy.into());
        }
        let (cancellations, requests): (Vec<_>, Vec<_>) = entries.line.drain(..).partition(|&entry| entry == u64::MAX);
        entries.begun.extend(requests);
        entries.cancellations.extend(cancellations);
        Ok(())
    }

    fn confine_workers(&self, _cpus: &accounting::host::CpuSet) -> std::io::Result<()> {
        Ok(())
    }

    fn next(&mut self) -> Option<(u64, i32)> {
        self.0.lock().unwrap().ended.pop_front()
    }
}

/// A disk that has died, and its driver.
struct Setup {
    entries: Arc<Mutex<Entries>>,
    done: OwnedFd,
    block: Arc<Mutex<Block>>,
    driver: Driver,
    _image: TempFile,
}

impl Setup {
    fn new() -> Self {
        let image = TempFile::new(&[0; 4096]);
        let mut block = block(&image);
        let entries = Arc::new(Mutex::new(Entries::default()));
        let done = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let ring = Box::new(DeadRing(entries.clone()));
        let uring = Uring::over(ring, done.try_clone().unwrap(), QUEUE_SIZE);
        block.engine = Engine::Async(Box::new(uring));
        block.patience = Duration::ZERO;
        let block = Arc::new(Mutex::new(block));
        Self {
            driver: Driver::start(block.clone(), u64::MAX),
            entries,
            done,
            block,
            _image: image,
        }
    }

    /// Asks for a sector; the chain's head.
    fn ask(&mut self) -> u16 {
        let head = ask(&mut self.driver);
        self.driver.turn(100);
        head
    }

    /// Ends what came first of all that the disk has.
    fn end(&mut self, result: i32) {
        let mut entries = self.entries.lock().unwrap();
        let request = entries.begun.remove(0);
        entries.ended.push_back((request, result));
        drop(entries);
        self.announce();
    }

    /// The kernel says of every cancellation that it came too late.
    fn end_cancellations(&mut self) {
        let mut entries = self.entries.lock().unwrap();
        let late: Vec<_> = entries
            .cancellations
            .drain(..)
            .map(|entry| (entry, -libc::EALREADY))
            .collect();
        entries.ended.extend(late);
        drop(entries);
        self.announce();
    }

    fn announce(&mut self) {
        rustix::io::write(&self.done, &1u64.to_ne_bytes()).unwrap();
        self.driver.turn(100);
    }

    fn begun(&self) -> usize {
        self.entries.lock().unwrap().begun.len()
    }

    fn cancellations(&self) -> usize {
        self.entries.lock().unwrap().cancellations.len()
    }
}

fn block(image: &TempFile) -> Block {
    let drive: Drive = serde_json::from_value(serde_json::json!({
        "drive_id": "d", "is_root_device": false, "path_on_host": image.path(), "io_engine": "Async",
    }))
    .unwrap();
    Block::new(&drive).unwrap()
}

/// Has the driver ask for the first sector; the chain's head.
fn ask(driver: &mut Driver) -> u16 {
    driver.write(HEAD, &[0; 16]);
    driver.write(STATUS_BYTE, &[0xff]);
    let chain = [from_driver(HEAD, 16), for_driver(DATA, 512), for_driver(STATUS_BYTE, 1)];
    let head = driver.put(0, &chain);
    driver.notify(0);
    head
}

#[test]
fn a_reset_waits_for_nothing_and_has_ended_when_the_last_request_has() {
    let mut disk = Setup::new();
    let requests = 3;
    for _ in 0..requests {
        disk.ask();
    }
    assert_eq!(disk.begun(), requests);
    // On this thread: if it waited, nobody would end them.
    disk.driver.set(STATUS, 0);
    assert_eq!(disk.driver.get(STATUS), NEEDS_RESET);
    assert_eq!(disk.cancellations(), 0, "by the VMM's thread, not by a vCPU's");
    disk.driver.turn(100);
    assert_eq!(disk.cancellations(), requests);
    disk.end(-libc::ECANCELED);
    disk.end(512);
    disk.end_cancellations();
    assert_eq!(disk.driver.get(STATUS), NEEDS_RESET, "one is still under way");
    disk.end(-libc::EIO);
    assert_eq!(disk.driver.get(STATUS), 0);
    assert_eq!(disk.driver.used(0), [], "a driver that is gone is answered");
    assert_eq!(disk.driver.read(STATUS_BYTE, 1), [0xff]);
    // The engine has all of its places again.
    disk.driver.set_up(u64::MAX);
    let head = disk.ask();
    disk.end(512);
    assert_eq!(disk.driver.used(0), [(head.into(), 513)]);
}

#[test]
fn a_cancellation_that_is_late_is_waited_for_too() {
    let mut disk = Setup::new();
    disk.ask();
    disk.driver.set(STATUS, 0);
    disk.driver.turn(100);
    disk.end(512);
    assert_eq!(
        disk.driver.get(STATUS),
        NEEDS_RESET,
        "its completion would come to the next driver"
    );
    disk.end_cancellations();
    assert_eq!(disk.driver.get(STATUS), 0);
}

#[test]
fn a_driver_that_does_not_wait_is_served_from_its_own_rings_once_the_reset_has_ended() {
    let mut disk = Setup::new();
    // Of the old driver, at other places of the rings than the new one's.
    for _ in 0..5 {
        disk.ask();
    }
    disk.driver.turn(100);
    // Goes on at once, as Linux: with each bit that it reads, and one of its own.
    disk.driver.set(STATUS, 0);
    for bit in [1, 2] {
        disk.driver.set(STATUS, disk.driver.get(STATUS) | bit);
    }
    assert_eq!(disk.driver.get(STATUS), 3, "no bit but its own");
    disk.driver.set_up(u64::MAX);
    assert_eq!(disk.driver.get(STATUS), READY);
    let head = disk.ask();
    assert_eq!(disk.begun(), 5, "its request has begun among the old ones");
    for _ in 0..4 {
        disk.end(512);
    }
    disk.end_cancellations();
    assert_eq!((disk.driver.used(0), disk.begun()), (vec![], 1));
    disk.end(512);
    // Without another notification.
    assert_eq!((disk.driver.used(0), disk.begun()), (vec![], 1));
    assert_eq!(disk.driver.read(STATUS_BYTE, 1), [0xff]);
    disk.end(512);
    assert_eq!(disk.driver.used(0), [(head.into(), 513)]);
    assert_eq!(disk.driver.read(STATUS_BYTE, 1), [S_OK]);
}

#[test]
fn a_driver_that_breaks_the_rules_has_to_wait_for_its_requests_like_any_other() {
    let mut disk = Setup::new();
    disk.ask();
    disk.driver.put(0, &[from_driver(HEAD, 15), for_driver(STATUS_BYTE, 1)]);
    disk.driver.notify(0);
    disk.driver.turn(100);
    assert!(disk.driver.needs_reset());
    for _ in 0..3 {
        disk.driver.set(STATUS, 0);
        disk.driver.turn(100);
        assert_eq!(disk.driver.get(STATUS), NEEDS_RESET);
    }
    assert_eq!(disk.cancellations(), 1, "each request is cancelled once");
    disk.end(512);
    disk.end_cancellations();
    assert_eq!(disk.driver.get(STATUS), 0);
}

#[test]
fn a_full_queue_and_a_kernel_that_takes_nothing_for_a_while_end_as_well() {
    let mut disk = Setup::new();
    // Chains of three descriptors.
    let most = usize::from(QUEUE_SIZE) / 3;
    for _ in 0..most {
        ask(&mut disk.driver);
    }
    disk.entries.lock().unwrap().busy = true;
    disk.driver.turn(10);
    disk.driver.set(STATUS, 0);
    // It asks again in a while, and not at once.
    let events = disk.driver.turn(1000);
    assert!(events < 1000, "{events} events");
    disk.entries.lock().unwrap().busy = false;
    while disk.cancellations() < most {
        let events = disk.driver.turn_for(1, Duration::from_secs(60));
        assert!(events > 0, "it is not asked again");
    }
    assert_eq!((disk.begun(), disk.cancellations()), (most, most));
    for _ in 0..most {
        disk.end(-libc::ECANCELED);
    }
    disk.end_cancellations();
    assert_eq!((disk.driver.get(STATUS), disk.driver.turn(10)), (0, 0));
}

#[test]
fn a_kernel_that_goes_on_refusing_is_asked_in_a_while_and_not_at_once() {
    let mut disk = Setup::new();
    disk.entries.lock().unwrap().busy = true;
    ask(&mut disk.driver);
    // A turn ends when nothing is left to do at once: one that asked again at once would go on to the thousandth.
    let events = disk.driver.turn(1000);
    assert!(events < 1000, "{events} events");
    assert_eq!(disk.begun(), 0);
    disk.entries.lock().unwrap().busy = false;
    // Nobody announces that it would take them now.
    while disk.begun() == 0 {
        assert!(
            disk.driver.turn_for(1, Duration::from_secs(60)) > 0,
            "it is not asked again"
        );
    }
}

#[test]
fn a_disk_that_does_not_answer_keeps_its_file_and_one_that_answers_again_may_have_another() {
    let mut disk = Setup::new();
    let other = TempFile::new(&[7; 2048]);
    let head = disk.ask();
    let refused = disk.block.lock().unwrap().set_file(other.path()).unwrap_err();
    assert!(
        refused
            .to_string()
            .starts_with("drive d: 1 requests to its file so far have not ended in 0 s"),
        "{refused}"
    );
    disk.driver.turn(100);
    assert_eq!(disk.driver.config(0), 8u64.to_le_bytes());
    disk.end(512);
    assert_eq!(disk.driver.used(0), [(head.into(), 513)]);
    disk.block.lock().unwrap().set_file(other.path()).unwrap();
    assert_eq!(disk.driver.config(0), 4u64.to_le_bytes());
}

#[test]
fn the_end_leaves_what_does_not_end_its_memory_and_its_file() {
    let (memory, file): (Weak<GuestMemory>, Weak<File>) = {
        let mut disk = Setup::new();
        disk.ask();
        let memory = Arc::downgrade(&disk.driver.memory);
        let file = Arc::downgrade(&disk.block.lock().unwrap().disk.file);
        (memory, file)
    };
    assert!(memory.upgrade().is_some() && file.upgrade().is_some());
    // One that has ended leaves nothing.
    let memory = {
        let mut disk = Setup::new();
        disk.ask();
        disk.end(512);
        Arc::downgrade(&disk.driver.memory)
    };
    assert!(memory.upgrade().is_none());
}

/// A pipe that nobody writes to, in place of a file, on the kernel's own io_uring.
#[test]
fn what_the_kernel_can_cancel_ends_at_once_and_what_it_has_done_is_nobodys() {
    for answers in [false, true] {
        let image = TempFile::new(&[0; 4096]);
        let mut dead = block(&image);
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        dead.disk.file = Arc::new(File::from(reader));
        let dead = Arc::new(Mutex::new(dead));
        let mut driver = Driver::start(dead, u64::MAX);
        for _ in 0..3 {
            ask(&mut driver);
        }
        driver.turn(100);
        assert_eq!(driver.used(0), []);
        if answers {
            File::from(writer).write_all(&[0x77; 512]).unwrap();
        }
        driver.reset();
        assert_eq!(driver.used(0), []);
        assert_eq!(driver.read(STATUS_BYTE, 1), [0xff]);
        driver.turn(100);
        assert_eq!(driver.turn(100), 0, "a device that was reset is busy");
    }
}

/// Drivers that reset and do not wait, with requests under way, over a file.
#[test]
fn resets_among_requests_lose_and_mix_up_nothing() {
    let image = TempFile::new(&[0x5a; 4096]);
    let disk = hostile::disk(&image, crate::config::IoEngine::Async);
    let mut driver = Driver::start(disk, u64::MAX);
    for round in 0..200 {
        for _ in 0..round % 40 {
            ask(&mut driver);
        }
        driver.turn(round % 3);
        driver.set_up(u64::MAX);
        let head = ask(&mut driver);
        let used = loop {
            assert!(driver.turn_for(1, Duration::from_secs(60)) > 0, "round {round}");
            let used = driver.used(0);
            if !used.is_empty() {
                break used;
            }
        };
        assert_eq!(used, [(head.into(), 513)], "round {round}");
        assert_eq!(driver.read(DATA, 512), [0x5a; 512]);
    }
}
