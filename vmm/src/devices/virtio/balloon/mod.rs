//! The balloon (5.5): a guest puts pages into it that it does without, and the host takes their memory.
//!
//! ```text
//!  PATCH /balloon ──► num_pages ──► the guest's driver ──► inflate queue ──► pages given back to the host
//!                                                          deflate queue ──► nothing to do: a page is there when it is touched
//!  hinting/start ───► command id ─► what is free just now  hinting queue ──► pages given back
//!                                   what becomes free      reporting queue ► pages given back
//!  the timer ───────► a buffer ───► statistics             stats queue ────► kept for GET /balloon/statistics
//! ```
//!
//! However it is told of pages, the order is the same: chains are taken until they make a turn; their pages are checked one by
//! one, sorted and merged, and given back in as few calls as that leaves ([`GuestMemory::discard`]); only then are the chains
//! answered, for after that the driver may use the pages again.
//!
//! A page that is no guest memory is left out, for inflating is the driver's own loss. With hugetlbfs there
//! is nothing to give back in pages of 4 KiB: a machine has either.
//!
//! [`GuestMemory::discard`]: crate::memory::GuestMemory::discard

mod hinting;
mod stats;

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use event_manager::EventSet;
use serde::Serialize;
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _, VolatileSlice};

pub use hinting::{HintingStart, HintingStatus};
pub use stats::{BalloonStats, GuestStats};

use super::queue::{Chain, QueueError};
use super::timer::Timer;
use super::{Active, F_EVENT_IDX, F_INDIRECT_DESC, VirtioDevice, count};
use crate::config;
use crate::memory::PAGE;
use hinting::Hinting;

/// Chains at once.
const QUEUE_SIZE: u16 = 256;
/// Pages in a MiB: the specification's pages are 4 KiB, whatever the guest's.
const PAGES_PER_MIB: u32 = 256;
/// Page numbers that one chain of the inflate queue may hold, as Linux puts in and Firecracker takes.
const NUMBERS_MAX: usize = 256;
/// Pieces of memory of one turn, after which others have theirs.
const TURN_MAX: usize = 2048;

/// Feature: the guest tells of its memory.
const F_STATS_VQ: u64 = 1 << 1;
/// Feature: the guest may take pages back when it runs out of them.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// Feature: the guest can be asked which pages are free.
const F_FREE_PAGE_HINT: u64 = 1 << 3;
/// Feature: the guest tells of pages as it frees them.
const F_REPORTING: u64 = 1 << 5;

/// Why something cannot be asked of the balloon. Firecracker's words.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BalloonError {
    /// The running microVM has none.
    #[error("Failed perform action on device: Device not found")]
    Missing,
    /// The guest's driver has not set it up.
    #[error("Device not activated yet.")]
    NotActive,
    /// It was made without hinting.
    #[error("Attempting to use hinting when not enabled")]
    NoHinting,
    /// It was made without statistics.
    #[error("Received stats query when stats are disabled.")]
    NoStatistics,
    /// Statistics are there from the start, or never.
    #[error("Statistics cannot be enabled/disabled after activation.")]
    StatisticsChange,
    /// More than the guest has, or than can be told in pages.
    #[error("Requested memory should be less than {0}MiB")]
    TooMuch(u32),
    /// No descriptors.
    #[error("cannot make the balloon's timer: {0}; raise the limit on open files (ulimit -n)")]
    Timer(std::io::Error),
}

/// What the balloon did, since its start.
#[derive(Debug, Default, Serialize)]
pub struct BalloonMetrics {
    /// Chains of pages put in.
    pub inflate_count: AtomicU64,
    /// Chains of pages taken out.
    pub deflate_count: AtomicU64,
    /// Statistics that came.
    pub stats_updates_count: AtomicU64,
    /// What of them could not be made sense of.
    pub stats_update_fails: AtomicU64,
    /// How often pages put in could not be given back to the host.
    pub event_fails: AtomicU64,
    /// Pieces of memory reported as free.
    pub free_page_report_count: AtomicU64,
    /// Bytes of them that were given back.
    pub free_page_report_freed: AtomicU64,
    /// How often they could not be given back.
    pub free_page_report_fails: AtomicU64,
    /// Pieces of memory hinted at as free.
    pub free_page_hint_count: AtomicU64,
    /// Bytes of them that were given back.
    pub free_page_hint_freed: AtomicU64,
    /// How often they could not be given back.
    pub free_page_hint_fails: AtomicU64,
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Hinting,
    Reporting,
}

/// The queues of a driver that took `features`, in order: those of features it did not take are none, and the next ones move up,
/// as in Linux.
fn roles(features: u64) -> Vec<Role> {
    let optional = [
        (F_STATS_VQ, Role::Stats),
        (F_FREE_PAGE_HINT, Role::Hinting),
        (F_REPORTING, Role::Reporting),
    ];
    let taken = optional.into_iter().filter(|(feature, _)| features & feature != 0);
    [Role::Inflate, Role::Deflate]
        .into_iter()
        .chain(taken.map(|(_, role)| role))
        .collect()
}

/// The part of the configuration space that the driver finds at its start (5.5.4).
#[derive(Clone, Copy, Debug, Default)]
struct ConfigSpace {
    num_pages: u32,
    /// The driver writes it.
    actual: u32,
}

/// A balloon.
#[derive(Debug)]
pub struct Balloon {
    features: u64,
    interval_s: u16,
    space: ConfigSpace,
    hinting: Hinting,
    stats: GuestStats,
    /// The chain of the stats queue that goes back when statistics are wanted.
    stats_chain: Option<u16>,
    poll: Timer,
    metrics: Arc<BalloonMetrics>,
    /// What each queue of `active` is for.
    roles: Vec<Role>,
    active: Option<Active>,
}

impl Balloon {
    /// The balloon that `config` describes.
    ///
    /// # Errors
    /// See [`BalloonError`].
    pub fn new(config: &config::Balloon) -> Result<Self, BalloonError> {
        let offered = [
            (config.deflate_on_oom, F_DEFLATE_ON_OOM),
            (config.stats_polling_interval_s > 0, F_STATS_VQ),
            (config.free_page_hinting, F_FREE_PAGE_HINT),
            (config.free_page_reporting, F_REPORTING),
        ];
        let offered = offered.iter().filter(|(offered, _)| *offered);
        Ok(Self {
            features: offered.fold(0, |features, (_, feature)| features | feature),
            interval_s: config.stats_polling_interval_s,
            space: ConfigSpace {
                num_pages: pages(config.amount_mib)?,
                actual: 0,
            },
            hinting: Hinting::default(),
            stats: GuestStats::default(),
            stats_chain: None,
            poll: Timer::new().map_err(BalloonError::Timer)?,
            metrics: Arc::default(),
            roles: Vec::new(),
            active: None,
        })
    }

    /// What it did so far.
    #[must_use]
    pub fn metrics(&self) -> &Arc<BalloonMetrics> {
        &self.metrics
    }

    /// `GET /balloon`: as it was made, with the changes since.
    #[must_use]
    pub fn config(&self) -> config::Balloon {
        config::Balloon {
            amount_mib: self.space.num_pages / PAGES_PER_MIB,
            deflate_on_oom: self.offers(F_DEFLATE_ON_OOM),
            stats_polling_interval_s: self.interval_s,
            free_page_hinting: self.offers(F_FREE_PAGE_HINT),
            free_page_reporting: self.offers(F_REPORTING),
        }
    }

    fn offers(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// `PATCH /balloon`: asks the guest for so many MiB altogether.
    ///
    /// # Errors
    /// The driver is not ready, or the guest has less.
    pub fn update_amount(&mut self, amount_mib: u32) -> Result<(), BalloonError> {
        let active = self.active.as_ref().ok_or(BalloonError::NotActive)?;
        let bytes: u64 = active.memory.view().iter().map(|region| region.len()).sum();
        if u64::from(amount_mib) > bytes >> 20 {
            return Err(BalloonError::TooMuch(amount_mib));
        }
        self.space.num_pages = pages(amount_mib)?;
        active.interrupt.signal_config();
        Ok(())
    }

    /// `GET /balloon/statistics`: the last that came.
    ///
    /// # Errors
    /// It was made without.
    pub fn stats(&self) -> Result<BalloonStats, BalloonError> {
        if !self.offers(F_STATS_VQ) {
            return Err(BalloonError::NoStatistics);
        }
        let ConfigSpace { num_pages, actual } = self.space;
        Ok(BalloonStats {
            target_pages: num_pages,
            actual_pages: actual,
            target_mib: num_pages / PAGES_PER_MIB,
            actual_mib: actual / PAGES_PER_MIB,
            guest: self.stats,
        })
    }

    /// `PATCH /balloon/statistics`: asks for them every `interval_s` seconds from now on, and now.
    ///
    /// # Errors
    /// From none to some, or from some to none.
    pub fn update_stats_interval(&mut self, interval_s: u16) -> Result<(), BalloonError> {
        if interval_s == self.interval_s {
            return Ok(());
        }
        if interval_s == 0 || self.interval_s == 0 {
            return Err(BalloonError::StatisticsChange);
        }
        self.interval_s = interval_s;
        if self.active.is_some() {
            self.poll.every(self.interval());
        }
        // A ring that cannot be written has a driver that gets no statistics; it is found out at its next notification.
        let _ = self.ask_for_stats();
        Ok(())
    }

    fn interval(&self) -> Duration {
        Duration::from_secs(self.interval_s.into())
    }

    /// `PATCH /balloon/hinting/start`: asks which pages are free, and gives them back to the host as the guest tells.
    ///
    /// # Errors
    /// It was made without, or the driver is not ready.
    pub fn start_hinting(&mut self, start: HintingStart) -> Result<(), BalloonError> {
        self.hint(|hinting| hinting.start(start))
    }

    /// `PATCH /balloon/hinting/stop`: the guest may use again the pages it told.
    ///
    /// # Errors
    /// As [`Balloon::start_hinting`].
    pub fn stop_hinting(&mut self) -> Result<(), BalloonError> {
        self.hint(Hinting::done)
    }

    /// `GET /balloon/hinting/status`.
    ///
    /// # Errors
    /// It was made without.
    pub fn hinting_status(&self) -> Result<HintingStatus, BalloonError> {
        self.offers(F_FREE_PAGE_HINT)
            .then_some(self.hinting.status)
            .ok_or(BalloonError::NoHinting)
    }

    fn hint(&mut self, change: impl FnOnce(&mut Hinting)) -> Result<(), BalloonError> {
        self.hinting_status()?;
        let active = self.active.as_ref().ok_or(BalloonError::NotActive)?;
        change(&mut self.hinting);
        active.interrupt.signal_config();
        Ok(())
    }

    fn inflate(&mut self, queue: usize) -> Result<(), QueueError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let metrics = &self.metrics;
        let discarded = discard_turn(active, queue, |memory, mut chain, pieces| {
            count(&metrics.inflate_count, 1);
            let mut numbers = [0; 4 * NUMBERS_MAX];
            let len = chain.readable.read(&mut numbers);
            for number in numbers[..len].chunks_exact(4) {
                let number = u32::from_le_bytes(number.try_into().expect("four bytes"));
                let page = memory.get_slice(GuestAddress(u64::from(number) << 12), PAGE);
                pieces.extend(page);
            }
        })?;
        if let Err(error) = discarded {
            tracing::warn!("balloon: pages put in cannot be given back to the host: {error}");
            count(&metrics.event_fails, 1);
        }
        Ok(())
    }

    /// A page taken out is there again as soon as the guest touches it.
    fn deflate(&mut self, queue: usize) -> Result<(), QueueError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let metrics = &self.metrics;
        let nothing_discarded = discard_turn(active, queue, |_, _, _| count(&metrics.deflate_count, 1))?;
        debug_assert!(nothing_discarded.is_ok());
        Ok(())
    }

    fn report(&mut self, queue: usize) -> Result<(), QueueError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let metrics = &self.metrics;
        let discarded = discard_turn(active, queue, |_, chain, pieces| {
            count(&metrics.free_page_report_count, chain.writable.slices().len() as u64);
            pieces.extend_from_slice(chain.writable.slices());
        })?;
        match discarded {
            Ok(bytes) => count(&metrics.free_page_report_freed, bytes),
            Err(error) => {
                tracing::warn!("balloon: free pages cannot be given back to the host: {error}");
                count(&metrics.free_page_report_fails, 1);
            }
        }
        Ok(())
    }

    /// A chain holds either what the guest says, to read, or pages, to write (5.5.6.4).
    fn take_hints(&mut self, queue: usize) -> Result<(), QueueError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let (metrics, hinting) = (&self.metrics, &mut self.hinting);
        let mut over = false;
        let discarded = discard_turn(active, queue, |_, mut chain, pieces| {
            let mut command = [0; 4];
            if chain.readable.read(&mut command) == command.len() {
                over = hinting.hear(u32::from_le_bytes(command));
            }
            // Told for an earlier run, or after this one: the guest may be using them.
            if hinting.is_of_this_run() {
                count(&metrics.free_page_hint_count, chain.writable.slices().len() as u64);
                pieces.extend_from_slice(chain.writable.slices());
            }
        })?;
        match discarded {
            Ok(bytes) => count(&metrics.free_page_hint_freed, bytes),
            Err(error) => {
                tracing::warn!("balloon: free pages cannot be given back to the host: {error}");
                count(&metrics.free_page_hint_fails, 1);
            }
        }
        if over {
            hinting.done();
            active.interrupt.signal_config();
        }
        Ok(())
    }

    /// Takes what the guest tells, and keeps its chain until statistics are wanted again.
    fn take_stats(&mut self, queue: usize) -> Result<(), QueueError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let memory = active.memory.view();
        let mut more = true;
        for _ in 0..active.queues[queue].size() {
            let Some(mut chain) = active.queues[queue].pop(memory)? else {
                more = active.queues[queue].listen(memory)?;
                break;
            };
            // A second one is none of a driver that follows the specification; it gets the first one back.
            if let Some(kept) = self.stats_chain.replace(chain.head) {
                active.queues[queue].give_back(memory, kept, 0)?;
            }
            count(&self.metrics.stats_updates_count, 1);
            let unknown = self.stats.update(&mut chain.readable);
            count(&self.metrics.stats_update_fails, unknown);
        }
        finish_turn(active, queue, more)
    }

    /// Gives the guest its chain back, for it to tell anew.
    fn ask_for_stats(&mut self) -> Result<(), QueueError> {
        let queue = self.roles.iter().position(|&role| role == Role::Stats);
        if let (Some(active), Some(queue)) = (&mut self.active, queue)
            && let Some(chain) = self.stats_chain.take()
        {
            active.queues[queue].give_back(active.memory.view(), chain, 0)?;
            finish_turn(active, queue, false)?;
        }
        Ok(())
    }
}

/// # Errors
/// They are not to be told in 32 bits.
fn pages(mib: u32) -> Result<u32, BalloonError> {
    mib.checked_mul(PAGES_PER_MIB)
        .ok_or(BalloonError::TooMuch(u32::MAX / PAGES_PER_MIB))
}

/// One turn of a queue whose chains name memory that the guest does without: `pieces_of` says which. How many bytes were given
/// back to the host, or what it said.
fn discard_turn(
    active: &mut Active,
    queue: usize,
    mut pieces_of: impl for<'m> FnMut(&'m GuestMemoryMmap, Chain<'m>, &mut Vec<VolatileSlice<'m>>),
) -> Result<std::io::Result<u64>, QueueError> {
    let memory = Arc::clone(&active.memory);
    let view = memory.view();
    let (mut heads, mut pieces) = (Vec::new(), Vec::new());
    let mut more = true;
    while heads.len() < usize::from(active.queues[queue].size()) && pieces.len() < TURN_MAX {
        let Some(chain) = active.queues[queue].pop(view)? else {
            more = active.queues[queue].listen(view)?;
            break;
        };
        heads.push(chain.head);
        pieces_of(view, chain, &mut pieces);
    }
    let discarded = memory.discard(&pieces);
    for head in heads {
        active.queues[queue].give_back(view, head, 0)?;
    }
    finish_turn(active, queue, more)?;
    Ok(discarded)
}

fn finish_turn(active: &mut Active, queue: usize, more: bool) -> Result<(), QueueError> {
    if active.queues[queue].wants_signal(active.memory.view())? {
        active.interrupt.signal_used();
    }
    if more {
        active.again(queue);
    }
    Ok(())
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        5
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 5][..roles(self.features).len()]
    }

    fn features(&self) -> u64 {
        self.features | F_EVENT_IDX | F_INDIRECT_DESC
    }

    /// `num_pages`, `actual`, `free_page_hint_cmd_id`.
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let words = [self.space.num_pages, self.space.actual, self.hinting.status.host_cmd];
        let mut config = [0; 12];
        for (bytes, word) in config.chunks_exact_mut(4).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        super::copy_config(&config, offset, data);
    }

    /// `actual` is the driver's.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let (4, Ok(actual)) = (offset, data.try_into()) {
            self.space.actual = u32::from_le_bytes(actual);
        }
    }

    fn activate(&mut self, active: Active) {
        self.roles = roles(active.features);
        self.active = Some(active);
        if self.roles.contains(&Role::Stats) {
            self.poll.every(self.interval());
        }
    }

    fn reset(&mut self) {
        self.poll.stop();
        self.active = None;
        self.roles.clear();
        self.stats_chain = None;
        self.stats = GuestStats::default();
        self.hinting.reset();
        // The driver to come has none of the last one's pages.
        self.space.actual = 0;
    }

    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        vec![(self.poll.as_raw_fd(), EventSet::IN)]
    }

    fn notified(&mut self, queue: usize) -> Result<(), QueueError> {
        match self.roles.get(queue) {
            Some(Role::Inflate) => self.inflate(queue),
            Some(Role::Deflate) => self.deflate(queue),
            Some(Role::Stats) => self.take_stats(queue),
            Some(Role::Hinting) => self.take_hints(queue),
            Some(Role::Reporting) => self.report(queue),
            None => Ok(()),
        }
    }

    fn ready(&mut self, _source: usize) -> Result<(), QueueError> {
        if self.poll.expired() {
            self.ask_for_stats()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
