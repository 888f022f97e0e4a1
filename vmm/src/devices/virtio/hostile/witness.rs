//! Who sees whether a device stands a hostile driver: its neighbour, the kernel's count of sleeps, and a watchdog.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::config::{Drive, IoEngine};
use crate::devices::virtio::Shared;
use crate::devices::virtio::block::Block;
use crate::devices::virtio::testing::{BUFFERS, Driver, for_driver, from_driver};
use crate::testing::TempFile;

/// A disk whose driver behaves.
#[derive(Debug)]
pub(super) struct Neighbour {
    driver: Driver,
    _image: TempFile,
}

impl Neighbour {
    pub(super) fn new() -> Self {
        let image = TempFile::new(&[0x5a; 1024]);
        let disk = disk(&image, IoEngine::Sync);
        Self {
            driver: Driver::start(disk, u64::MAX),
            _image: image,
        }
    }

    /// Asks for a sector while `other` is notified of all its queues; each has its turn once.
    pub(super) fn serves_beside(&mut self, other: &mut Driver) {
        let (head, data, status) = (BUFFERS, BUFFERS + 0x1000, BUFFERS + 0x2000);
        self.driver.write(head, &[0; 16]);
        self.driver.write(data, &[0; 512]);
        let chain = [from_driver(head, 16), for_driver(data, 512), for_driver(status, 1)];
        let head = self.driver.put(0, &chain);
        self.driver.notify(0);
        for queue in 0..other.transport.notifications().len() {
            other.notify(queue);
        }
        other.turn(1);
        self.driver.turn(1);
        assert_eq!(
            self.driver.used(0),
            [(head.into(), 513)],
            "the neighbour does not serve"
        );
        assert_eq!(self.driver.read(data, 512), [0x5a; 512]);
    }
}

/// A disk over `image`, for tests.
pub fn disk(image: &TempFile, io_engine: IoEngine) -> Shared {
    let drive: Drive = serde_json::from_value(serde_json::json!({
        "drive_id": "d", "is_root_device": false, "path_on_host": image.path(), "io_engine": io_engine,
        "cache_type": "Writeback",
    }))
    .unwrap();
    Arc::new(Mutex::new(Block::new(&drive).unwrap()))
}

/// How often this thread has gone to sleep so far: to wait for something, not because others had their turn.
pub(super) fn waits() -> u64 {
    #[expect(unsafe_code, reason = "a plain system call that no crate of ours wraps")]
    // SAFETY: a structure of numbers, for which zeros are as good as any, and which the call fills.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage), 0);
        usage
    };
    u64::try_from(usage.ru_nvcsw).unwrap()
}

/// Ends the process if a case does not end: a device that never comes back keeps its test from failing otherwise.
pub(super) struct Watchdog {
    case: Arc<AtomicU64>,
    _over: Sender<()>,
}

impl Watchdog {
    /// A case takes a millisecond.
    const PATIENCE: Duration = Duration::from_secs(120);

    pub(super) fn new() -> Self {
        let case = Arc::new(AtomicU64::new(0));
        let (over, is_over) = channel();
        std::thread::spawn({
            let case = Arc::clone(&case);
            move || {
                let mut last = None;
                while is_over.recv_timeout(Self::PATIENCE) == Err(RecvTimeoutError::Timeout) {
                    let now = Some(case.load(Ordering::Relaxed));
                    if now == last {
                        eprintln!("hostile driver: case {now:?} does not end: the device waits, or runs in a circle");
                        std::process::abort();
                    }
                    last = now;
                }
            }
        });
        Self { case, _over: over }
    }

    pub(super) fn see(&self, case: u64) {
        self.case.store(case, Ordering::Relaxed);
    }
}
