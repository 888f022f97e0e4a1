//! The writing side of vtime: a stamp at each boundary.
//!
//! Which bucket of a histogram a slice belongs to depends, by way of a product, on the clock just read. Were the slice
//! counted at once, addresses of stores would have to wait for the clock, and much behind them. So it is counted one
//! transition later, when its length is long known; until then the slot tells that length, and a reader counts the slice
//! by itself. (`cargo xtask bench`, row `stamps`: 1.4 instead of 1.65 times two bare reads of the clock.)

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::Arc;

use super::histogram::{BUCKETS, Counts, Edges, Ended, Kind};
use super::latch::Latch;
use super::slot::{Changed, Count, Slot};
use super::{ExitReason, Snapshot, State};
use crate::clock;

/// The writing side: one per vCPU, on its thread. Each method is one transition: one read of the clock, no lock, no
/// system call, no allocation.
///
/// There is one writer by type: it is neither `Clone` nor `Sync`, and every transition takes `&mut self`.
#[derive(Debug)]
pub struct VtimeWriter {
    latch: Arc<Latch<Slot>>,
    pub(super) totals: Snapshot,
    /// All slices that have ended but the last.
    counts: Counts<u64>,
    ended: Ended,
    edges: Edges,
    /// What the last transition changed: stale in the slot that the next one fills.
    last: Changed,
    not_sync: PhantomData<Cell<()>>,
}

impl VtimeWriter {
    /// In state `Paused` since `now`, when the thread had used `cpu_ns`.
    pub(super) fn new(latch: Arc<Latch<Slot>>, edges: Edges, now: u64, cpu_ns: u64) -> Self {
        let mut writer = Self {
            latch,
            totals: Snapshot {
                stamp: now,
                pause_began_cpu_ns: cpu_ns,
                ..Snapshot::default()
            },
            counts: [[0; BUCKETS]; 2],
            edges,
            ended: Ended::default(),
            last: Changed::default(),
            not_sync: PhantomData,
        };
        writer.turn_at(now, State::Paused, None);
        writer
    }

    /// VMM -> guest, right before `KVM_RUN`. `handled` is the exit just handled, if one was: it is counted now, with
    /// the time its handling took.
    #[inline]
    pub fn guest_enter(&mut self, handled: Option<ExitReason>) {
        self.turn_at(clock::ticks(), State::Guest, handled);
    }

    /// Guest -> VMM, right after `KVM_RUN` returns, before the exit is looked at.
    #[inline]
    pub fn guest_exit(&mut self) {
        self.turn_at(clock::ticks(), State::Vmm, None);
    }

    /// VMM -> paused. `handled` is the exit just handled, if one was. Not on the exit path: reads the thread's CPU clock, so
    /// that what going to sleep and waking up will cost is not taken for the guest's.
    pub fn pause(&mut self, handled: Option<ExitReason>) {
        self.totals.pause_began_cpu_ns = clock::thread_cpu_ns();
        self.turn_at(clock::ticks(), State::Paused, handled);
    }

    /// Paused -> VMM. Not on the exit path, as [`VtimeWriter::pause`].
    pub fn resume(&mut self) {
        let within = clock::thread_cpu_ns().saturating_sub(self.totals.pause_began_cpu_ns);
        self.totals.paused_cpu_ns += within;
        self.turn_at(clock::ticks(), State::Vmm, None);
    }

    /// The last transition; at `now`, in TSC ticks, so that the account can pair it with the other clock.
    pub(crate) fn end(mut self, now: u64) {
        self.turn_at(now, State::Inactive, None);
    }

    #[inline(always)]
    pub(super) fn turn_at(&mut self, now: u64, to: State, handled: Option<ExitReason>) {
        let mut changed = Changed {
            exit: None,
            slice: self.count_ended(),
        };
        let t = &mut self.totals;
        // A TSC that steps back (a move between unsynchronised CPUs) must not turn into 500 years.
        let now = now.max(t.stamp);
        let slice = now - t.stamp;
        let mut kind = Kind::Neither;
        match t.state {
            State::Guest => {
                t.guest += slice;
                kind = Kind::Run;
            }
            State::Vmm => {
                t.vmm += slice;
                // In no other state is there an exit to handle.
                if let Some(reason) = handled {
                    let exit = &mut t.exits[reason as usize];
                    exit.count += 1;
                    exit.vmm += slice;
                    changed.exit = handled;
                    kind = Kind::Vmm;
                }
            }
            State::Paused => t.paused += slice,
            State::Inactive => {}
        }
        t.state = to;
        t.stamp = now;
        t.sequence += 1;
        self.ended = Ended { kind, ticks: slice };

        let last_two = [self.last, changed];
        self.last = changed;
        self.latch
            .publish(t.sequence, |slot| slot.fill(t, self.ended, last_two));
    }

    /// Counts the slice that ended last.
    #[inline(always)]
    fn count_ended(&mut self) -> Count {
        let Some(place) = self.edges.place(self.ended) else {
            return self.last.slice;
        };
        let count = *place.of(&self.counts) + 1;
        *place.of_mut(&mut self.counts) = count;
        Count { place, count }
    }
}
