//! What one slot of the latch holds: every word of a snapshot, and the histograms.

use super::histogram::{Counts, Edges, Ended, Kind, Place};
use super::{ExitReason, Histograms, Snapshot, State};
use crate::sync::{AtomicU64, Ordering};

#[derive(Debug, Default)]
struct ExitWords {
    count: AtomicU64,
    vmm: AtomicU64,
}

/// One copy of everything published.
#[derive(Debug, Default)]
pub(super) struct Slot {
    state: AtomicU64,
    stamp: AtomicU64,
    ended_kind: AtomicU64,
    ended_ticks: AtomicU64,
    guest: AtomicU64,
    vmm: AtomicU64,
    paused: AtomicU64,
    paused_cpu_ns: AtomicU64,
    pause_began_cpu_ns: AtomicU64,
    exits: [ExitWords; ExitReason::COUNT],
    counts: Counts<AtomicU64>,
}

/// A count of a histogram, and where it stands.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Count {
    pub(super) place: Place,
    pub(super) count: u64,
}

/// Which words one transition changes, of those that not every transition does.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Changed {
    /// The exit counted.
    pub(super) exit: Option<ExitReason>,
    /// The slice counted; where none was, any count that is up to date: storing it changes nothing, and costs less than
    /// asking whether to.
    pub(super) slice: Count,
}

impl Slot {
    /// Brings a slot last filled two transitions ago up to date. Of the words that not every transition changes, only
    /// those that the last two changed differ.
    #[inline(always)]
    pub(super) fn fill(&self, t: &Snapshot, ended: Ended, last_two: [Changed; 2]) {
        self.state.store(t.state as u64, Ordering::Relaxed);
        self.stamp.store(t.stamp, Ordering::Relaxed);
        self.ended_kind.store(ended.kind as u64, Ordering::Relaxed);
        self.ended_ticks.store(ended.ticks, Ordering::Relaxed);
        self.guest.store(t.guest, Ordering::Relaxed);
        self.vmm.store(t.vmm, Ordering::Relaxed);
        self.paused.store(t.paused, Ordering::Relaxed);
        self.paused_cpu_ns.store(t.paused_cpu_ns, Ordering::Relaxed);
        self.pause_began_cpu_ns.store(t.pause_began_cpu_ns, Ordering::Relaxed);
        for changed in last_two {
            if let Some(reason) = changed.exit {
                let (words, exit) = (&self.exits[reason as usize], &t.exits[reason as usize]);
                words.count.store(exit.count, Ordering::Relaxed);
                words.vmm.store(exit.vmm, Ordering::Relaxed);
            }
            // In this order: should both be of one place, the later count is the one that stays.
            let Count { place, count } = changed.slice;
            place.of(&self.counts).store(count, Ordering::Relaxed);
        }
    }

    #[inline]
    pub(super) fn snapshot(&self, sequence: u64) -> Snapshot {
        let mut snapshot = Snapshot {
            sequence,
            state: State::from_word(self.state.load(Ordering::Relaxed)),
            stamp: self.stamp.load(Ordering::Relaxed),
            guest: self.guest.load(Ordering::Relaxed),
            vmm: self.vmm.load(Ordering::Relaxed),
            paused: self.paused.load(Ordering::Relaxed),
            paused_cpu_ns: self.paused_cpu_ns.load(Ordering::Relaxed),
            pause_began_cpu_ns: self.pause_began_cpu_ns.load(Ordering::Relaxed),
            ..Snapshot::default()
        };
        for (exit, words) in snapshot.exits.iter_mut().zip(&self.exits) {
            exit.count = words.count.load(Ordering::Relaxed);
            exit.vmm = words.vmm.load(Ordering::Relaxed);
        }
        snapshot
    }

    pub(super) fn histograms(&self, sequence: u64, edges: Edges) -> Histograms {
        let mut counts = self
            .counts
            .each_ref()
            .map(|counts| counts.each_ref().map(|count| count.load(Ordering::Relaxed)));
        let ended = Ended {
            kind: Kind::from_word(self.ended_kind.load(Ordering::Relaxed)),
            ticks: self.ended_ticks.load(Ordering::Relaxed),
        };
        if let Some(place) = edges.place(ended) {
            *place.of_mut(&mut counts) += 1;
        }
        let [run, vmm] = counts;
        Histograms {
            sequence,
            run,
            run_ticks: self.guest.load(Ordering::Relaxed),
            vmm,
            vmm_ticks: self.exits.iter().map(|words| words.vmm.load(Ordering::Relaxed)).sum(),
        }
    }
}
