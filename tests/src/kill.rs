//! `kill -9`, at any moment: what a microVM leaves behind is such that the next one starts, and no write is lost that its guest was
//! told is flushed.
//!
//! Each guest writes records to its disk, one by one, flushes each, and only then says its number on the console. By turns a microVM is
//! killed while it boots, and while it writes: with a socket, a tap, a vsock and a disk that are the same ones for all of them, and
//! that nobody cleans up in between. What this shows is that nothing of a flushed write is kept in the process, that writes and
//! flushes are not told before they are done, and that no lock, socket or tap holds up who comes next. That the host's page
//! cache outlives a process, and not the host, is another matter: there `fdatasync` counts, which a flush calls.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::bed::Folder;
use crate::client;
use crate::flat::{Program, RECORD, elf, record};
use crate::vm::{PATIENCE, Process};

/// Records that fit on the disk: 20,000 for each of 200.
const RECORDS: u32 = 1 << 22;

/// What was seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Killed before the API answered.
    pub unanswered: u32,
    /// Killed after that, before the guest had said anything.
    pub booting: u32,
    /// Killed while the guest wrote.
    pub writing: u32,
    /// Records that guests were told are flushed.
    pub flushed: u32,
}

impl Tally {
    /// One was killed whose guest's last record was `last`.
    fn wrote(&mut self, next: &mut u32, last: u32) {
        self.writing += 1;
        self.flushed += last - *next + 1;
        *next = last + 1;
    }
}

/// Numbers that look random, the same for a seed each time.
#[derive(Debug)]
pub struct Dice(u64);

impl Dice {
    /// By `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A time below `limit`.
    pub fn below(&mut self, limit: Duration) -> Duration {
        // SplitMix64 (Steele, Lea and Flood, 2014).
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        let share = ((x ^ x >> 31) >> 11) as f64 / (1u64 << 53) as f64;
        limit.mul_f64(share)
    }
}

/// What all the microVMs have, one after the other.
struct Stage {
    folder: Folder,
    image: File,
    tap: bool,
}

impl Stage {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Starts one whose guest goes on with record `first`.
    fn start(&self, first: u32, engine: &str) -> Process {
        self.folder.write("kernel", elf(&Program::write_records(first)));
        let mut config = json!({
            "boot-source": { "kernel_image_path": self.path("kernel"), "boot_args": "quiet" },
            "machine-config": { "vcpu_count": 1, "mem_size_mib": 16 },
            // Writeback: it offers a flush.
            "drives": [{
                "drive_id": "disk", "path_on_host": self.path("disk"), "is_root_device": false, "io_engine": engine,
                "cache_type": "Writeback",
            }],
            "vsock": { "guest_cid": 3, "uds_path": self.path("vsock") },
        });
        if self.tap {
            config["network-interfaces"] = json!([{ "iface_id": "eth0", "host_dev_name": "kill0" }]);
        }
        let config = self.folder.write("config", config.to_string());
        Process::chronovisor([
            "--api-sock".as_ref(),
            self.path("socket").as_os_str(),
            "--config-file".as_ref(),
            config.as_os_str(),
        ])
    }

    /// Kills `process`; the last record of those from `first` on that its guest was told is flushed, each of which is held to
    /// what it should be on the disk.
    fn kill(&self, mut process: Process, first: u32) -> Option<u32> {
        assert!(!process.has_ended(), "it ended by itself: {}", process.stderr());
        process.kill();
        let (_, told, stderr) = process.wait();
        assert!(!stderr.contains("panicked"), "{stderr}");
        // The last line may be half of one.
        let told: Vec<&str> = told.split_inclusive('\n').filter(|line| line.ends_with('\n')).collect();
        let mut last = None;
        for (number, line) in (first..).zip(told) {
            assert_eq!(line, format!("{number:08x}\n"), "what the guest says");
            last = Some(number);
        }
        last.inspect(|&last| self.check(first..=last))
    }

    /// That the disk has these records.
    fn check(&self, numbers: impl IntoIterator<Item = u32>) {
        let mut bytes = [0; RECORD];
        for number in numbers {
            self.image
                .read_exact_at(&mut bytes, u64::from(number) * RECORD as u64)
                .expect("the image is as long as the disk");
            assert!(
                bytes == record(number),
                "record {number}, told to be flushed, is not on the disk: {bytes:x?}"
            );
        }
    }
}

/// Kills `times` microVMs, at moments by `dice`. `tap`: whether each has a network interface, for which the calling thread has a network
/// of its own.
///
/// # Panics
/// When one does not start, or a record is lost.
#[must_use]
pub fn kill(times: u32, mut dice: Dice, tap: bool) -> Tally {
    let folder = Folder::new();
    let disk = folder.write("disk", "");
    let image = File::options().read(true).write(true).open(disk).expect("it is there");
    image
        .set_len(u64::from(RECORDS) * RECORD as u64)
        .expect("a sparse file");
    let stage = Stage { folder, image, tap };
    let mut tally = Tally::default();
    let mut next = 0;
    // What a boot takes, to the first word of the guest.
    let mut boot = Duration::from_millis(100);
    for round in 0..times {
        let engine = if round / 2 % 2 == 0 { "Sync" } else { "Async" };
        let begun = Instant::now();
        let mut process = stage.start(next, engine);
        if round % 2 == 0 {
            std::thread::sleep(dice.below(boot));
            let answers =
                client::request_within(Duration::from_millis(1), &stage.path("socket"), "GET", "/", None).is_ok();
            match stage.kill(process, next) {
                Some(last) => tally.wrote(&mut next, last),
                None if answers => tally.booting += 1,
                None => tally.unanswered += 1,
            }
        } else {
            // It starts, whatever the one before left behind.
            process.wait_for(&format!("{next:08x}\n"));
            boot = begun.elapsed().min(PATIENCE);
            std::thread::sleep(dice.below(Duration::from_millis(200)));
            let last = stage.kill(process, next).expect("it said so");
            tally.wrote(&mut next, last);
        }
    }
    // All of them, those of the first as those of the last.
    stage.check(0..next);
    tally
}
