//! The block device (5.2): a raw file, or a block device of the host's, as a disk of 512-byte sectors.
//!
//! Requests are parsed in `request.rs` and reach the file (`disk.rs`) by one of two engines: `sync.rs`, one after the other, or
//! `uring.rs`, many at once. Bounds are exact to the sector; a request that leaves them, or a file that fails, is answered by
//! its status byte, and nothing else is changed by it.
//!
//! `cache_type` Writeback offers the driver a flush, which is an `fdatasync`; Unsafe offers none, as Firecracker's does, and a
//! driver that flushes all the same is told that it is done.
//!
//! A disk may stop answering. Then its requests stay unanswered, as they would on a machine with such a disk, and with the Async
//! engine most else does not wait for it: a reset waits for nothing, and has ended once they have (`uring.rs`). A change of file is
//! refused where they have not ended after [`PATIENCE`], and where the old file is not safe [`SAFE_PATIENCE`] after that; the VMM
//! thread waits meanwhile, with all that it does. So it does at the end of the microVM, as long for each disk, one after the other.
//! A driver that does not wait for its reset to end is set up meanwhile, and served once it has. The Sync engine waits for its disk
//! on the VMM thread, with all that thread does.

mod answer;
mod disk;
mod request;
mod ring;
mod sync;
mod uring;

use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use accounting::host::CpuSet;
use event_manager::EventSet;
use serde::Serialize;

use super::queue::QueueError;
use super::rate_limiter::RateLimiter;
use super::timer::Timer;
use super::{Active, Complaints, F_EVENT_IDX, F_INDIRECT_DESC, VirtioDevice, count};
use crate::config::{self, CacheType, Drive, IoEngine};
use answer::{Done, answer, signal};
use disk::Disk;
use request::{Kind, Request};
use uring::Uring;

/// Bytes in a sector, whatever the file's own.
const SECTOR: u64 = 512;
/// Requests at once: Linux's default for a disk.
const QUEUE_SIZE: u16 = 256;
/// Bytes moved for one notification: then others have their turn. A flush counts as a quarter.
const TURN: u64 = 8 << 20;
/// How long a change of file, or the end, waits for requests under way. Disks that are alive answer in far less, those behind a
/// network that has just lost a packet in about one second.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long it waits after that for cancelled ones.
const CANCEL_PATIENCE: Duration = Duration::from_secs(1);
/// How long they wait for what was written to be safe: a few GiB, on a slow disk.
const SAFE_PATIENCE: Duration = Duration::from_secs(30);
/// How long io_uring is left alone that would not take requests.
const RETRY: Duration = Duration::from_millis(10);
/// Pieces of memory in one request: all of a queue, less its head and its status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// Feature: `seg_max` is in the configuration space. A driver that does not find it sends pages one by one.
const F_SEG_MAX: u64 = 1 << 2;
/// Feature: the disk cannot be written.
const F_RO: u64 = 1 << 5;
/// Feature: flush is a command.
const F_FLUSH: u64 = 1 << 9;

/// Status byte of a request (5.2.6).
const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// The file cannot be opened.
    #[error("drive {drive}: cannot open {}: {source}; check the path and its permissions, or make the drive read-only", path.display())]
    Open {
        /// The drive.
        drive: String,
        /// Its file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A directory, a pipe, a socket.
    #[error("drive {drive}: {} is neither a regular file nor a block device: name a raw image", path.display())]
    NotADisk {
        /// The drive.
        drive: String,
        /// Its file.
        path: PathBuf,
    },
    /// Another disk is the same file, and one of them is written.
    #[error(
        "drive {drive}: {} is in use, by another drive or another microVM: one that is written is one disk's alone; copy it, \
         or make every drive of it read-only",
        path.display()
    )]
    InUse {
        /// The drive.
        drive: String,
        /// Its file.
        path: PathBuf,
    },
    /// Less than a sector.
    #[error("drive {drive}: {} has {len} bytes, less than one sector of 512: is it an image?", path.display())]
    TooSmall {
        /// The drive.
        drive: String,
        /// Its file.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
    /// No file at all.
    #[error("drive {drive} has no path_on_host: name its image")]
    NoPath {
        /// The drive.
        drive: String,
    },
    /// The file before could not be made safe.
    #[error("drive {drive}: what was written to its file so far cannot be made safe: {source}; it stays that file")]
    Sync {
        /// The drive.
        drive: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The disk does not answer.
    #[error(
        "drive {drive}: {requests} requests to its file so far have not ended in {} s: it stays that file; see whether its \
         disk answers, and try again",
        waited.as_secs()
    )]
    UnderWay {
        /// The drive.
        drive: String,
        /// How many they are.
        requests: usize,
        /// For how long they were waited for.
        waited: Duration,
    },
    /// No io_uring.
    #[error(
        "drive {drive}: this host has no io_uring for io_engine Async: {source}; use Linux 5.10 or later with \
         kernel.io_uring_disabled=0, or io_engine Sync"
    )]
    Uring {
        /// The drive.
        drive: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// No descriptors.
    #[error("drive {drive}: cannot make its timer: {source}; raise the limit on open files (ulimit -n)")]
    Timer {
        /// The drive.
        drive: String,
        /// What the system said.
        source: std::io::Error,
    },
}

/// What a disk did, since its start.
#[derive(Debug, Default, Serialize)]
pub struct BlockMetrics {
    /// Requests to read that were done.
    pub read_count: AtomicU64,
    /// Bytes read.
    pub read_bytes: AtomicU64,
    /// Requests to write that were done.
    pub write_count: AtomicU64,
    /// Bytes written.
    pub write_bytes: AtomicU64,
    /// Flushes that were done.
    pub flush_count: AtomicU64,
    /// Requests that were answered by an error.
    pub invalid_reqs_count: AtomicU64,
    /// How often the rate limiter made the driver wait.
    pub rate_limiter_throttled_events: AtomicU64,
}

#[derive(Debug)]
enum Engine {
    Sync,
    Async(Box<Uring>),
}

/// A disk.
#[derive(Debug)]
pub struct Block {
    drive: String,
    read_only: bool,
    cache: CacheType,
    disk: Disk,
    engine: Engine,
    limiter: RateLimiter,
    /// When io_uring is asked again to take what it would not.
    retry: Timer,
    metrics: Arc<BlockMetrics>,
    complaints: Complaints,
    /// The file was changed while no driver was ready.
    changed: bool,
    /// [`PATIENCE`].
    patience: Duration,
    active: Option<Active>,
}

impl Block {
    /// The disk that `drive` describes.
    ///
    /// # Errors
    /// See [`BlockError`].
    pub fn new(drive: &Drive) -> Result<Self, BlockError> {
        let name = &drive.drive_id;
        let path = drive
            .path_on_host
            .as_deref()
            .ok_or_else(|| BlockError::NoPath { drive: name.clone() })?;
        let disk = Disk::open(name, path, drive.is_read_only)?;
        let engine = match drive.io_engine {
            IoEngine::Sync => Engine::Sync,
            IoEngine::Async => Engine::Async(Box::new(Uring::new(QUEUE_SIZE).map_err(|source| {
                BlockError::Uring {
                    drive: name.clone(),
                    source,
                }
            })?)),
        };
        let limiter = RateLimiter::new(drive.rate_limiter).map_err(|source| BlockError::Timer {
            drive: name.clone(),
            source,
        })?;
        let retry = Timer::new().map_err(|source| BlockError::Timer {
            drive: name.clone(),
            source,
        })?;
        Ok(Self {
            drive: name.clone(),
            read_only: drive.is_read_only,
            cache: drive.cache_type,
            disk,
            engine,
            limiter,
            retry,
            metrics: Arc::default(),
            complaints: Complaints::default(),
            changed: false,
            patience: PATIENCE,
            active: None,
        })
    }

    /// What it did so far.
    #[must_use]
    pub fn metrics(&self) -> &Arc<BlockMetrics> {
        &self.metrics
    }

    /// Another file, or the same one with another length: the driver is told the new length. Requests under way finish first.
    ///
    /// # Errors
    /// The file cannot be had; the disk stays what it was.
    pub fn set_file(&mut self, path: &Path) -> Result<(), BlockError> {
        let disk = if self.disk.is_at(path) {
            // It is locked, by us.
            self.disk.measured(&self.drive, path)?
        } else {
            Disk::open(&self.drive, path, self.read_only)?
        };
        if let Err(requests) = self.settle(self.patience) {
            return Err(BlockError::UnderWay {
                drive: self.drive.clone(),
                requests,
                waited: self.patience,
            });
        }
        self.make_safe().map_err(|source| BlockError::Sync {
            drive: self.drive.clone(),
            source,
        })?;
        self.disk = disk;
        match &self.active {
            Some(active) => active.interrupt.signal_config(),
            // A driver that is on its way may have read the old length.
            None => self.changed = true,
        }
        Ok(())
    }

    /// Has io_uring's workers run on `cpus`, from now on. Called by the VMM thread, whose workers they are.
    pub fn confine_workers(&self, cpus: &CpuSet) {
        if let Engine::Async(uring) = &self.engine
            && let Err(error) = uring.confine_workers(cpus)
        {
            tracing::warn!(
                "drive {}: io_uring's workers may run on the vCPUs' host CPUs: {error}; Linux 5.14 or later can be told, or use \
                 io_engine Sync",
                self.drive
            );
        }
    }

    /// Other limits; what waits for the old ones is tried anew.
    pub fn set_rate_limiter(&mut self, config: config::RateLimiter) {
        self.limiter.update(config, Instant::now());
    }

    /// What the driver thinks safe once it flushes has to be so in a file that it will not flush any more. A file that nothing was
    /// written to is left alone: making others' writes safe may take its time.
    fn make_safe(&self) -> std::io::Result<()> {
        if self.cache == CacheType::Writeback && self.metrics.write_count.load(Ordering::Relaxed) > 0 {
            self.disk.sync(SAFE_PATIENCE)?;
        }
        Ok(())
    }

    /// Waits for the requests under way, for `patience`, and answers those that ended.
    ///
    /// # Errors
    /// So many have not.
    fn settle(&mut self, patience: Duration) -> Result<(), usize> {
        let Engine::Async(uring) = &mut self.engine else {
            return Ok(());
        };
        let all = uring.wait(patience);
        if let Some(active) = &mut self.active {
            // A ring that cannot be written any more has no driver that waits.
            let _ = answer(uring, active, &self.metrics, &self.drive, &self.complaints);
        }
        if all { Ok(()) } else { Err(uring.under_way()) }
    }

    /// As [`Block::settle`], at the end: what does not end is cancelled, and what does not heed that is left to the kernel.
    fn settle_for_good(&mut self) -> Result<(), usize> {
        self.settle(self.patience).or_else(|_| {
            if let Engine::Async(uring) = &mut self.engine {
                uring.abandon();
            }
            self.settle(CANCEL_PATIENCE)
        })
    }

    /// Takes requests from the driver, at most a queue's length of them, and starts or does them. True if there may be more.
    fn take(&mut self) -> Result<bool, QueueError> {
        let Some(active) = &mut self.active else {
            return Ok(false);
        };
        let memory = Arc::clone(&active.memory);
        let memory = memory.view();
        let mut turn = TURN;
        for _ in 0..active.queues[0].size() {
            if turn == 0 {
                break;
            }
            if let Engine::Async(uring) = &self.engine
                && uring.is_full()
            {
                // The next completion goes on here.
                return Ok(false);
            }
            let Some(chain) = active.queues[0].pop(memory)? else {
                return active.queues[0].listen(memory);
            };
            let head = chain.head;
            let request = Request::parse(chain, self.disk.sectors, self.read_only)?;
            if let Ok(request) = &request.checked
                && !self.limiter.take(1, request.bytes(), Instant::now())
            {
                active.queues[0].unpop();
                count(&self.metrics.rate_limiter_throttled_events, 1);
                return Ok(false);
            }
            let cost = request.checked.as_ref().map_or(0, |kind| match kind {
                Kind::Flush => TURN / 4,
                kind => kind.bytes(),
            });
            turn = turn.saturating_sub(cost);
            let done = match (request.checked, &mut self.engine) {
                (Err(status), _) => Done::failed(status),
                (Ok(Kind::Id(mut to)), _) => {
                    let len = to.write(&self.disk.id);
                    Done::written(len as u64)
                }
                (Ok(Kind::Flush), _) if self.cache == CacheType::Unsafe => Done::written(0),
                (Ok(kind), Engine::Sync) => {
                    let bytes = kind.bytes();
                    let done = sync::run(&self.disk.file, &kind).map(|()| kind.written_to_guest());
                    let done = Done::of(done, &self.drive, &self.complaints);
                    done.count(&self.metrics, kind.operation(), bytes);
                    done
                }
                (Ok(kind), Engine::Async(uring)) => {
                    let (file, memory) = (Arc::clone(&self.disk.file), Arc::clone(&active.memory));
                    uring.start(file, memory, &kind, head, request.status);
                    continue;
                }
            };
            if done.status != S_OK {
                count(&self.metrics.invalid_reqs_count, 1);
            }
            done.tell(active, head, request.status)?;
        }
        Ok(true)
    }

    /// As [`Block::take`], and what belongs around it.
    fn serve(&mut self) -> Result<(), QueueError> {
        // The last completion of the driver before goes on here.
        if self.limiter.is_waiting() || self.is_resetting() {
            return Ok(());
        }
        let mut more = self.take()?;
        if let Engine::Async(uring) = &mut self.engine
            && !uring.submit()
        {
            // In a while, with all that has come by then: asked at once, a kernel that goes on refusing would have this thread
            // do nothing else.
            self.retry.after(RETRY);
            more = false;
        }
        let Some(active) = &mut self.active else { return Ok(()) };
        signal(active)?;
        if more {
            active.again(0);
        }
        Ok(())
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let safe = match self.settle_for_good() {
            Ok(()) => self.make_safe(),
            Err(requests) => Err(std::io::Error::other(format!("{requests} requests have not ended"))),
        };
        if let Err(error) = safe {
            tracing::error!("drive {}: what the guest wrote last may be lost: {error}", self.drive);
        }
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        2
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let mut features = F_EVENT_IDX | F_INDIRECT_DESC | F_SEG_MAX;
        if self.read_only {
            features |= F_RO;
        }
        if self.cache == CacheType::Writeback {
            features |= F_FLUSH;
        }
        features
    }

    /// `capacity`, `size_max` (which is not offered), `seg_max`.
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut config = [0; 16];
        config[..8].copy_from_slice(&self.disk.sectors.to_le_bytes());
        config[12..].copy_from_slice(&SEG_MAX.to_le_bytes());
        super::copy_config(&config, offset, data);
    }

    fn activate(&mut self, active: Active) {
        if std::mem::take(&mut self.changed) {
            active.interrupt.signal_config();
        }
        self.active = Some(active);
    }

    fn reset(&mut self) {
        if let Engine::Async(uring) = &mut self.engine {
            uring.abandon();
        }
        self.active = None;
    }

    fn is_resetting(&self) -> bool {
        matches!(&self.engine, Engine::Async(uring) if uring.is_draining())
    }

    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        let mut sources = vec![(self.limiter.as_raw_fd(), EventSet::IN)];
        if let Engine::Async(uring) = &self.engine {
            sources.push((uring.as_raw_fd(), EventSet::IN));
            sources.push((self.retry.as_raw_fd(), EventSet::IN));
        }
        sources
    }

    fn notified(&mut self, _queue: usize) -> Result<(), QueueError> {
        self.serve()
    }

    fn ready(&mut self, source: usize) -> Result<(), QueueError> {
        match source {
            0 => self.limiter.expired(),
            2 => {
                self.retry.expired();
            }
            _ => {}
        }
        if let Engine::Async(uring) = &mut self.engine {
            if source == 1 {
                uring.hear();
            }
            if uring.is_draining() {
                if !uring.drain() {
                    self.retry.after(RETRY);
                }
            } else if let (1, Some(active)) = (source, &mut self.active) {
                answer(uring, active, &self.metrics, &self.drive, &self.complaints)?;
            }
        }
        // Room in the engine, or tokens: for what has waited.
        self.serve()
    }
}

#[cfg(test)]
mod dead_disk_tests;
#[cfg(test)]
mod tests;
