use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::*;
use crate::devices::virtio::Shared;
use crate::devices::virtio::hostile;
use crate::devices::virtio::testing::{BUFFERS, Buffer, Driver, for_driver, from_driver};
use crate::testing::TempFile;

const HEAD: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;

const ENGINES: [IoEngine; 2] = [IoEngine::Sync, IoEngine::Async];

fn drive(image: &TempFile, io_engine: IoEngine) -> Drive {
    let path_on_host = Some(image.path().to_owned());
    Drive {
        path_on_host,
        io_engine,
        cache_type: CacheType::Writeback,
        ..serde_json::from_str(r#"{"drive_id": "d", "is_root_device": false}"#).unwrap()
    }
}

/// A disk of `sectors` sectors, each filled with its number, and its driver.
struct Setup {
    image: TempFile,
    block: Arc<Mutex<Block>>,
    driver: Driver,
}

impl Setup {
    fn with(sectors: u8, change: impl FnOnce(&mut Drive), engine: IoEngine) -> Self {
        let image: Vec<_> = (0..sectors).flat_map(|sector| [sector; 512]).collect();
        let image = TempFile::new(&image);
        let mut drive = drive(&image, engine);
        change(&mut drive);
        let block = Arc::new(Mutex::new(Block::new(&drive).unwrap()));
        let driver = Driver::start(block.clone(), u64::MAX);
        Self { image, block, driver }
    }

    fn new(sectors: u8, engine: IoEngine) -> Self {
        Self::with(sectors, |_| {}, engine)
    }

    fn head(&self, kind: u32, sector: u64) {
        let mut head = kind.to_le_bytes().to_vec();
        head.extend([0; 4]);
        head.extend(sector.to_le_bytes());
        self.driver.write(HEAD, &head);
        self.driver.write(STATUS, &[0xff]);
    }

    /// Asks, and says with which status and how many bytes it was answered.
    fn ask(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        self.head(kind, sector);
        let mut chain = vec![from_driver(HEAD, 16)];
        chain.extend(data);
        chain.push(for_driver(STATUS, 1));
        let head = self.driver.put(0, &chain);
        self.driver.notify(0);
        let used = loop {
            assert!(self.driver.turn_for(1, Duration::from_secs(60)) > 0, "no answer");
            assert!(!self.driver.needs_reset());
            let used = self.driver.used(0);
            if !used.is_empty() {
                break used;
            }
        };
        assert_eq!((used.len(), used[0].0), (1, u32::from(head)));
        assert!(self.driver.interrupted());
        (self.driver.read(STATUS, 1)[0], used[0].1)
    }
}

#[test]
fn a_sector_reads_as_it_was_written_and_its_neighbours_stay() {
    for engine in ENGINES {
        let mut disk = Setup::new(8, engine);
        disk.driver.write(DATA, &[0xaa; 1024]);
        // In three pieces, none of them a sector.
        let pieces = [(0, 100), (100, 600), (700, 324)].map(|(at, len)| from_driver(DATA + at, len));
        assert_eq!(disk.ask(1, 3, &pieces), (S_OK, 1), "{engine:?}");
        let expected: Vec<_> = [0, 1, 2, 0xaa, 0xaa, 5, 6, 7]
            .iter()
            .flat_map(|&byte| [byte; 512])
            .collect();
        assert_eq!(fs::read(disk.image.path()).unwrap(), expected);
        let pieces = [(0, 1), (0x2000, 4095)].map(|(at, len)| for_driver(DATA + at, len));
        assert_eq!(disk.ask(0, 0, &pieces), (S_OK, 4097));
        assert_eq!(disk.driver.read(DATA, 1), [0]);
        assert_eq!(disk.driver.read(DATA + 0x2000, 4095), expected[1..]);
        assert_eq!(disk.ask(4, 0, &[]), (S_OK, 1));
    }
}

#[test]
fn bounds_are_exact_to_the_sector() {
    for engine in ENGINES {
        let mut disk = Setup::new(8, engine);
        let before = fs::read(disk.image.path()).unwrap();
        let table = [
            (0, 512, true),
            (7, 512, true),
            (6, 1024, true),
            (0, 4096, true),
            (7, 1024, false),
            (8, 512, false),
            (0, 4608, false),
            (0, 511, false),
            (0, 513, false),
            (u64::MAX, 512, false),
            (u64::MAX / 512, 512, false),
            (1 << 55, 512, false),
        ];
        for (sector, len, good) in table {
            let read = disk.ask(0, sector, &[for_driver(DATA, len)]);
            let expected = if good { (S_OK, len + 1) } else { (S_IOERR, 1) };
            assert_eq!(read, expected, "{engine:?}: read {len} at {sector}");
            if good {
                // What it read is what it writes.
                assert_eq!(
                    disk.ask(1, sector, &[from_driver(DATA, len)]),
                    (S_OK, 1),
                    "write {len} at {sector}"
                );
            } else {
                disk.driver.write(DATA, &[0x55; 8192]);
                assert_eq!(
                    disk.ask(1, sector, &[from_driver(DATA, len)]),
                    (S_IOERR, 1),
                    "write {len} at {sector}"
                );
            }
            assert!(fs::read(disk.image.path()).unwrap() == before, "{len} at {sector}");
        }
    }
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    let mut disk = Setup::with(2, |drive| drive.is_read_only = true, IoEngine::Sync);
    assert_ne!(disk.block.lock().unwrap().features() & F_RO, 0);
    assert_eq!(disk.ask(1, 0, &[from_driver(DATA, 512)]), (S_IOERR, 1));
    assert_eq!(disk.ask(0, 1, &[for_driver(DATA, 512)]), (S_OK, 513));
}

#[test]
fn what_is_no_request_of_a_disk_is_answered_as_unsupported() {
    let mut disk = Setup::new(2, IoEngine::Sync);
    for kind in [2, 3, 5, 11, 13, u32::MAX] {
        assert_eq!(disk.ask(kind, 0, &[for_driver(DATA, 512)]), (S_UNSUPP, 1), "{kind}");
    }
    assert_eq!(disk.ask(0, 0, &[]), (S_IOERR, 1), "a read of nothing");
}

#[test]
fn the_serial_number_is_the_files() {
    let mut disk = Setup::new(2, IoEngine::Async);
    assert_eq!(disk.ask(8, 0, &[for_driver(DATA, 20)]), (S_OK, 21));
    let metadata = fs::metadata(disk.image.path()).unwrap();
    let expected = format!("{}{}{}", metadata.dev(), metadata.rdev(), metadata.ino());
    let text = disk.driver.read(DATA, 20);
    let text: Vec<_> = text.into_iter().take_while(|&byte| byte != 0).collect();
    assert!(expected.starts_with(std::str::from_utf8(&text).unwrap()));
    assert_eq!(disk.ask(8, 0, &[for_driver(DATA, 19)]), (S_IOERR, 1));
}

#[test]
fn the_configuration_space_has_the_capacity_and_no_more_than_there_is() {
    let disk = Setup::new(9, IoEngine::Sync);
    assert_eq!(disk.driver.config(0), 9u64.to_le_bytes());
    assert_eq!(disk.driver.config(12), 254u32.to_le_bytes());
    assert_eq!(disk.driver.config(14), [0u8; 4]);
    assert_eq!(disk.driver.config(0xefc), [0u8; 4]);
    assert_eq!(disk.driver.config(4), [0u8; 8], "an access may be of any width");
}

#[test]
fn what_can_not_be_answered_asks_for_a_reset_after_which_the_disk_serves() {
    for engine in ENGINES {
        let good = |at| from_driver(at, 16);
        let table: [(&str, Vec<Buffer>); 6] = [
            ("no status byte", vec![good(HEAD)]),
            ("no head", vec![for_driver(STATUS, 1)]),
            ("half a head", vec![from_driver(HEAD, 15), for_driver(STATUS, 1)]),
            (
                "outside of memory",
                vec![good(HEAD), for_driver(1 << 40, 512), for_driver(STATUS, 1)],
            ),
            (
                "over the end of addresses",
                vec![good(HEAD), for_driver(u64::MAX - 10, 512), for_driver(STATUS, 1)],
            ),
            (
                "readable behind writable",
                vec![good(HEAD), for_driver(STATUS, 1), from_driver(DATA, 512)],
            ),
        ];
        for (what, chain) in table {
            let mut disk = Setup::new(2, engine);
            disk.head(0, 0);
            disk.driver.put(0, &chain);
            disk.driver.notify(0);
            disk.driver.turn(100);
            assert!(
                disk.driver.needs_reset() && disk.driver.interrupted(),
                "{engine:?}: {what}"
            );
            assert_eq!(disk.driver.used(0), []);
            disk.driver.set_up(u64::MAX);
            assert!(!disk.driver.needs_reset());
            assert_eq!(
                disk.ask(0, 0, &[for_driver(DATA, 512)]),
                (S_OK, 513),
                "{engine:?}: {what}"
            );
        }
    }
}

#[test]
fn a_file_that_shrank_fails_its_requests_and_nothing_else() {
    for engine in ENGINES {
        let mut disk = Setup::new(8, engine);
        fs::OpenOptions::new()
            .write(true)
            .open(disk.image.path())
            .unwrap()
            .set_len(1024)
            .unwrap();
        assert_eq!(disk.ask(0, 1, &[for_driver(DATA, 1024)]), (S_IOERR, 1), "{engine:?}");
        assert_eq!(disk.ask(0, 1, &[for_driver(DATA, 512)]), (S_OK, 513), "{engine:?}");
    }
}

#[test]
fn another_file_takes_the_place_of_the_first_and_its_length_is_told() {
    for engine in ENGINES {
        let mut disk = Setup::new(2, engine);
        let other = TempFile::new(&[7; 2048]);
        disk.block.lock().unwrap().set_file(other.path()).unwrap();
        assert!(disk.driver.interrupted());
        assert_eq!((disk.driver.get(0x60), disk.driver.config(0)), (2, 4u64.to_le_bytes()));
        assert_eq!(disk.ask(0, 3, &[for_driver(DATA, 512)]), (S_OK, 513));
        assert_eq!(disk.driver.read(DATA, 512), [7; 512]);
        let refused = disk
            .block
            .lock()
            .unwrap()
            .set_file(Path::new("/no/such/file"))
            .unwrap_err();
        assert!(
            refused
                .to_string()
                .starts_with("drive d: cannot open /no/such/file: No such file")
        );
        assert_eq!(
            disk.ask(0, 3, &[for_driver(DATA, 512)]),
            (S_OK, 513),
            "it stays what it was"
        );
    }
}

#[test]
fn a_limited_disk_serves_what_it_may_and_the_rest_later() {
    for engine in ENGINES {
        let ops = r#"{"ops": {"size": 2, "refill_time": 40}}"#;
        let limit = |drive: &mut Drive| drive.rate_limiter = Some(serde_json::from_str(ops).unwrap());
        let mut disk = Setup::with(2, limit, engine);
        disk.head(0, 0);
        for place in 0..5 {
            let data = for_driver(DATA + 0x1000 * place, 512);
            disk.driver
                .put(0, &[from_driver(HEAD, 16), data, for_driver(STATUS, 1)]);
        }
        disk.driver.notify(0);
        let (begun, mut used) = (Instant::now(), Vec::new());
        while used.len() < 5 {
            disk.driver.turn_for(1, Duration::from_secs(60));
            used.extend(disk.driver.used(0));
        }
        // Two at once, then one each 20 ms: no sooner, and how often it waits for that depends on when this thread runs.
        assert!(begun.elapsed() >= Duration::from_millis(60), "{engine:?}");
        assert!(
            disk.block
                .lock()
                .unwrap()
                .metrics
                .rate_limiter_throttled_events
                .load(Ordering::Relaxed)
                >= 1
        );
    }
}

#[test]
fn what_is_no_disk_is_refused_in_words() {
    let image = TempFile::new(&[0; 511]);
    let refusal = |path: &Path| {
        let mut drive = drive(&image, IoEngine::Sync);
        drive.path_on_host = Some(path.to_owned());
        Block::new(&drive).unwrap_err().to_string()
    };
    assert!(refusal(image.path()).contains("has 511 bytes, less than one sector of 512"));
    assert!(refusal(Path::new("/no/such")).starts_with("drive d: cannot open /no/such: No such file"));
    assert!(refusal(Path::new("/")).starts_with("drive d: cannot open /: Is a directory"));
    assert!(refusal(Path::new("/dev/null")).contains("neither a regular file nor a block device"));
    let mut drive = drive(&image, IoEngine::Sync);
    drive.path_on_host = None;
    assert_eq!(
        Block::new(&drive).unwrap_err().to_string(),
        "drive d has no path_on_host: name its image"
    );
}

/// Disks of one file, one after the other.
struct Disks<'i>(&'i TempFile, IoEngine);

impl hostile::World for Disks<'_> {
    fn make(&mut self) -> Shared {
        hostile::disk(self.0, self.1)
    }

    fn may_wait(&self) -> bool {
        self.1 == IoEngine::Sync
    }
}

#[test]
fn a_hostile_driver_harms_nobody() {
    let image = TempFile::new(&[0x11; 32 << 10]);
    for engine in ENGINES {
        hostile::survives(Disks(&image, engine));
        hostile::survives_registers(|| hostile::disk(&image, engine));
    }
}

#[test]
fn a_file_that_is_written_is_one_disks_alone_and_one_that_is_read_may_be_anybodys() {
    let image = TempFile::new(&[0; 4096]);
    let mut writer = drive(&image, IoEngine::Sync);
    let mut reader = writer.clone();
    reader.is_read_only = true;
    let mut disk = Block::new(&writer).unwrap();
    for other in [&writer, &reader] {
        let refused = Block::new(other).unwrap_err().to_string();
        assert!(
            refused.contains("is in use, by another drive or another microVM"),
            "{refused}"
        );
    }
    // The same file once more, longer now.
    fs::OpenOptions::new()
        .write(true)
        .open(image.path())
        .unwrap()
        .set_len(8192)
        .unwrap();
    disk.set_file(image.path()).unwrap();
    assert_eq!(disk.disk.sectors, 16);
    drop(disk);
    writer.is_read_only = true;
    let _readers = [&writer, &reader].map(|drive| Block::new(drive).unwrap());
}

#[test]
fn a_request_that_names_the_same_memory_over_and_over_is_refused_and_a_turn_has_an_end() {
    let image = TempFile::sparse(1 << 30);
    let block = Arc::new(Mutex::new(Block::new(&drive(&image, IoEngine::Sync)).unwrap()));
    let mut driver = Driver::start(block, u64::MAX);
    let mut head = 0u32.to_le_bytes().to_vec();
    head.extend([0; 12]);
    driver.write(HEAD, &head);
    // 8 MiB each time: all of the buffers that there are.
    let piece = for_driver(BUFFERS + 0x10_0000, 8 << 20);
    let chain = |pieces: usize| {
        [
            vec![from_driver(HEAD, 16)],
            vec![piece; pieces],
            vec![for_driver(STATUS, 1)],
        ]
        .concat()
    };
    driver.put(0, &chain(9));
    driver.put(0, &chain(1));
    driver.put(0, &chain(1));
    driver.turn(1);
    // What cannot be is answered at no cost; then one that can, which is a turn of its own.
    assert_eq!(driver.used(0), [(0, 1), (11, (8 << 20) + 1)]);
    driver.turn(100);
    assert_eq!(driver.used(0), [(14, (8 << 20) + 1)]);
}

#[test]
fn a_flush_is_offered_and_done_by_writeback_only() {
    for (cache_type, offered, done) in [(CacheType::Writeback, F_FLUSH, 1), (CacheType::Unsafe, 0, 0)] {
        let mut disk = Setup::with(2, |drive| drive.cache_type = cache_type, IoEngine::Sync);
        assert_eq!(disk.block.lock().unwrap().features() & F_FLUSH, offered);
        assert_eq!(
            disk.ask(4, 0, &[]),
            (S_OK, 1),
            "a driver that flushes all the same is told that it is done"
        );
        let flushes = disk.block.lock().unwrap().metrics.flush_count.load(Ordering::Relaxed);
        assert_eq!(flushes, done, "{cache_type:?}");
    }
}
