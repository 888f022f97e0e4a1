//! The writing side of vtime: a stamp at each boundary.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::Arc;

use super::histogram::{BUCKETS, Counts, Edges, Of};
use super::latch::Latch;
use super::slot::{Changed, Slot};
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
    counts: Counts<u64>,
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
            last: Changed::default(),
            not_sync: PhantomData,
        };
        writer.turn_at(now, State::Paused, State::Paused, None);
        writer
    }

    /// VMM -> guest, right before `KVM_RUN`. `handled` is the exit just handled, if one was: it is counted now, with
    /// the time its handling took.
    #[inline]
    pub fn guest_enter(&mut self, handled: Option<ExitReason>) {
        self.turn_at(clock::ticks(), State::Vmm, State::Guest, handled);
    }

    /// Guest -> VMM, right after `KVM_RUN` returns, before the exit is looked at.
    #[inline]
    pub fn guest_exit(&mut self) {
        self.turn_at(clock::ticks(), State::Guest, State::Vmm, None);
    }

    /// VMM -> paused. `handled` is the exit just handled, if one was. Not on the exit path: reads the thread's CPU clock, so
    /// that what going to sleep and waking up will cost is not taken for the guest's.
    pub fn pause(&mut self, handled: Option<ExitReason>) {
        self.totals.pause_began_cpu_ns = clock::thread_cpu_ns();
        self.turn_at(clock::ticks(), State::Vmm, State::Paused, handled);
    }

    /// Paused -> VMM. Not on the exit path, as [`VtimeWriter::pause`].
    pub fn resume(&mut self) {
        let within = clock::thread_cpu_ns().saturating_sub(self.totals.pause_began_cpu_ns);
        self.totals.paused_cpu_ns += within;
        self.turn_at(clock::ticks(), State::Paused, State::Vmm, None);
    }

    /// The last transition; at `now`, in TSC ticks, so that the account can pair it with the other clock.
    pub(crate) fn end(mut self, now: u64) {
        self.turn_at(now, State::Vmm, State::Inactive, None);
    }

    /// One transition. `likely` is the state that is left, as the caller knows it: that spares the exit path a jump
    /// through a table, which costs as much as reading the clock does. Should it be another, it is found out.
    #[inline(always)]
    pub(super) fn turn_at(&mut self, now: u64, likely: State, to: State, handled: Option<ExitReason>) {
        // A TSC that steps back (a move between unsynchronised CPUs) must not turn into 500 years.
        let now = now.max(self.totals.stamp);
        let slice = now - self.totals.stamp;
        let changed = if self.totals.state == likely {
            self.leave(likely, slice, handled)
        } else {
            self.leave_another(slice, handled)
        };
        let t = &mut self.totals;
        t.state = to;
        t.stamp = now;
        t.sequence += 1;
        let last_two = [self.last, changed];
        self.last = changed;
        self.latch.publish(t.sequence, |slot| slot.fill(t, last_two));
    }

    /// Adds the slice to the bucket of the state that is left.
    #[inline(always)]
    fn leave(&mut self, state: State, slice: u64, handled: Option<ExitReason>) -> Changed {
        let t = &mut self.totals;
        let mut changed = Changed {
            exit: None,
            ..self.last
        };
        match state {
            State::Guest => {
                t.guest += slice;
                changed = self.count(Of::Run, slice);
            }
            State::Vmm => {
                t.vmm += slice;
                // In no other state is there an exit to handle.
                if let Some(reason) = handled {
                    let exit = &mut t.exits[reason as usize];
                    exit.count += 1;
                    exit.vmm += slice;
                    changed = Changed {
                        exit: handled,
                        ..self.count(Of::Vmm, slice)
                    };
                }
            }
            State::Paused => t.paused += slice,
            State::Inactive => {}
        }
        changed
    }

    #[inline(always)]
    fn count(&mut self, of: Of, slice: u64) -> Changed {
        let place = self.edges.place(of, slice);
        let count = *place.of(&self.counts) + 1;
        *place.of_mut(&mut self.counts) = count;
        Changed {
            exit: None,
            place,
            count,
        }
    }

    #[cold]
    #[inline(never)]
    fn leave_another(&mut self, slice: u64, handled: Option<ExitReason>) -> Changed {
        self.leave(self.totals.state, slice, handled)
    }
}
