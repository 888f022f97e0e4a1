//! vtime: the stamps at the `KVM_RUN` boundary, and how they are published.
//!
//! The vCPU thread is in one of four states. At each boundary the writer reads the clock once, adds the slice to
//! the bucket of the state it leaves, and publishes state, stamp and totals as one unit:
//!
//! ```text
//!            resume             guest_enter
//!   Paused ----------> Vmm -------------------> Guest
//!          <----------     <-------------------
//!            pause      |       guest_exit
//!                       | end
//!                       v
//!                    Inactive
//! ```
//!
//! The writer may be preempted anywhere, for any time, so no reader may wait for it. Publication is a latch of two
//! slots: transition *n* fills slot *n* mod 2 and then stores *n* as the sequence; a reader copies the slot that the
//! sequence names and takes the copy if the sequence still says *n*. Slot *n* mod 2 is written again only by
//! transition *n + 2*, which starts after *n + 1* is published, so an unchanged sequence means an untouched slot. A
//! writer stopped in mid-stamp leaves the last complete slot to be read; a reader retries only when the writer has
//! meanwhile completed a whole transition.
//!
//! Every field is an atomic accessed Relaxed between the fences of Boehm, "Can seqlocks get along with programming
//! language memory models?" (MSPC 2012): there is no data race to reason about, and on x86 both fences are free.
//!
//! All figures are raw TSC ticks; the reader converts.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::clock;

/// Why `KVM_RUN` returned: KVM's exit reasons, those without a use here folded into `Other`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ExitReason {
    /// Port input or output (`KVM_EXIT_IO`).
    Io,
    /// Memory-mapped input or output (`KVM_EXIT_MMIO`).
    Mmio,
    /// HLT, where no in-kernel interrupt controller handles it (`KVM_EXIT_HLT`).
    Hlt,
    /// A signal or a kick (`EINTR`).
    Interrupted,
    /// Triple fault (`KVM_EXIT_SHUTDOWN`).
    Shutdown,
    /// `KVM_EXIT_SYSTEM_EVENT`.
    SystemEvent,
    /// KVM could not go on (`KVM_EXIT_INTERNAL_ERROR`).
    InternalError,
    /// The processor refused the guest's state (`KVM_EXIT_FAIL_ENTRY`).
    FailEntry,
    /// Anything else.
    Other,
}

impl ExitReason {
    /// How many reasons there are.
    pub const COUNT: usize = 9;

    /// All of them, in the order of their discriminants.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Io,
        Self::Mmio,
        Self::Hlt,
        Self::Interrupted,
        Self::Shutdown,
        Self::SystemEvent,
        Self::InternalError,
        Self::FailEntry,
        Self::Other,
    ];

    /// The name in a reading's `by_reason`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Io => "io",
            Self::Mmio => "mmio",
            Self::Hlt => "hlt",
            Self::Interrupted => "interrupted",
            Self::Shutdown => "shutdown",
            Self::SystemEvent => "system_event",
            Self::InternalError => "internal_error",
            Self::FailEntry => "fail_entry",
            Self::Other => "other",
        }
    }
}

/// The state of a vCPU thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum State {
    /// The thread's last stamp is taken.
    Inactive,
    /// Outside `KVM_RUN`.
    Vmm,
    /// Inside `KVM_RUN`.
    Guest,
    /// Held by request, or not started.
    #[default]
    Paused,
}

impl State {
    fn from_word(word: u64) -> Self {
        match word {
            1 => Self::Vmm,
            2 => Self::Guest,
            3 => Self::Paused,
            _ => Self::Inactive,
        }
    }
}

/// Completed exits of one reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExitTicks {
    /// How many.
    pub count: u64,
    /// Ticks outside `KVM_RUN` that they took.
    pub vmm: u64,
}

/// What the writer publishes, as of one transition. The slice since `stamp` belongs to `state` and is not yet in its
/// bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// How many transitions there have been.
    pub sequence: u64,
    /// The state since `stamp`.
    pub state: State,
    /// When it was entered, in TSC ticks.
    pub stamp: u64,
    /// Ticks inside `KVM_RUN`.
    pub guest: u64,
    /// Ticks outside it, not paused.
    pub vmm: u64,
    /// Ticks paused.
    pub paused: u64,
    /// CPU time of the thread within the pauses that have ended, in nanoseconds: going to sleep and waking up.
    pub paused_cpu_ns: u64,
    /// CPU time of the thread when the current pause, or the last, began, in nanoseconds.
    pub pause_began_cpu_ns: u64,
    /// By [`ExitReason`]'s discriminant.
    pub exits: [ExitTicks; ExitReason::COUNT],
}

#[derive(Debug, Default)]
struct ExitWords {
    count: AtomicU64,
    vmm: AtomicU64,
}

/// One copy of everything published. Slots are a cache line apart, so that filling one does not disturb a reader of
/// the other.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Slot {
    state: AtomicU64,
    stamp: AtomicU64,
    guest: AtomicU64,
    vmm: AtomicU64,
    paused: AtomicU64,
    paused_cpu_ns: AtomicU64,
    pause_began_cpu_ns: AtomicU64,
    exits: [ExitWords; ExitReason::COUNT],
}

#[derive(Debug, Default)]
struct Latch {
    slots: [Slot; 2],
    sequence: AtomicU64,
}

impl Latch {
    fn slot(&self, sequence: u64) -> &Slot {
        &self.slots[usize::from(sequence & 1 == 1)]
    }
}

/// Makes a writer and its reader, in state `Paused` since `now` (TSC ticks), when the thread had used `cpu_ns` of CPU time.
#[must_use]
pub fn vtime(now: u64, cpu_ns: u64) -> (VtimeWriter, VtimeReader) {
    let latch = Arc::new(Latch::default());
    let mut writer = VtimeWriter {
        latch: Arc::clone(&latch),
        totals: Snapshot {
            stamp: now,
            pause_began_cpu_ns: cpu_ns,
            ..Snapshot::default()
        },
        handled: None,
        not_sync: PhantomData,
    };
    writer.turn_at(now, State::Paused, None);
    (writer, VtimeReader { latch })
}

/// The writing side: one per vCPU, on its thread. Each method is one transition: one read of the clock, no lock, no
/// system call, no allocation.
///
/// There is one writer by type: it is neither `Clone` nor `Sync`, and every transition takes `&mut self`.
#[derive(Debug)]
pub struct VtimeWriter {
    latch: Arc<Latch>,
    totals: Snapshot,
    /// The reason the last transition counted: its words are stale in the slot that the next one fills.
    handled: Option<ExitReason>,
    not_sync: PhantomData<Cell<()>>,
}

impl VtimeWriter {
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
    fn turn_at(&mut self, now: u64, to: State, handled: Option<ExitReason>) {
        let t = &mut self.totals;
        // A TSC that steps back (a move between unsynchronised CPUs) must not turn into 500 years.
        let now = now.max(t.stamp);
        let slice = now - t.stamp;
        match t.state {
            State::Guest => t.guest += slice,
            State::Vmm => t.vmm += slice,
            State::Paused => t.paused += slice,
            State::Inactive => {}
        }
        if let Some(reason) = handled {
            let exit = &mut t.exits[reason as usize];
            exit.count += 1;
            exit.vmm += slice;
        }
        t.state = to;
        t.stamp = now;
        t.sequence += 1;

        let slot = self.latch.slot(t.sequence);
        // Whoever sees a word of this slot change sees the previous sequence, or a later one.
        fence(Ordering::Release);
        slot.state.store(t.state as u64, Ordering::Relaxed);
        slot.stamp.store(t.stamp, Ordering::Relaxed);
        slot.guest.store(t.guest, Ordering::Relaxed);
        slot.vmm.store(t.vmm, Ordering::Relaxed);
        slot.paused.store(t.paused, Ordering::Relaxed);
        slot.paused_cpu_ns.store(t.paused_cpu_ns, Ordering::Relaxed);
        slot.pause_began_cpu_ns.store(t.pause_began_cpu_ns, Ordering::Relaxed);
        // This slot was last filled two transitions ago: of the exits, only what the last and this one counted differs.
        for reason in [self.handled, handled].into_iter().flatten() {
            let (words, exit) = (&slot.exits[reason as usize], &t.exits[reason as usize]);
            words.count.store(exit.count, Ordering::Relaxed);
            words.vmm.store(exit.vmm, Ordering::Relaxed);
        }
        self.handled = handled;
        self.latch.sequence.store(t.sequence, Ordering::Release);
    }
}

/// The reading side. Reading writes nothing shared: the vCPU thread cannot tell.
#[derive(Clone, Debug)]
pub struct VtimeReader {
    latch: Arc<Latch>,
}

impl VtimeReader {
    /// A try fails only if the writer completes a transition within its some 50 ns; transitions are two an exit, and
    /// an exit takes a microsecond at least. A reader that fails this often was itself held up each time.
    const TRIES: usize = 64;

    /// The last complete snapshot; `None` where a writer in full career outran every one of a bounded number of tries.
    #[must_use]
    pub fn snapshot(&self) -> Option<Snapshot> {
        (0..Self::TRIES).find_map(|_| self.try_snapshot())
    }

    #[inline]
    fn try_snapshot(&self) -> Option<Snapshot> {
        let sequence = self.latch.sequence.load(Ordering::Acquire);
        let slot = self.latch.slot(sequence);
        let mut snapshot = Snapshot {
            sequence,
            state: State::from_word(slot.state.load(Ordering::Relaxed)),
            stamp: slot.stamp.load(Ordering::Relaxed),
            guest: slot.guest.load(Ordering::Relaxed),
            vmm: slot.vmm.load(Ordering::Relaxed),
            paused: slot.paused.load(Ordering::Relaxed),
            paused_cpu_ns: slot.paused_cpu_ns.load(Ordering::Relaxed),
            pause_began_cpu_ns: slot.pause_began_cpu_ns.load(Ordering::Relaxed),
            ..Snapshot::default()
        };
        for (exit, words) in snapshot.exits.iter_mut().zip(&slot.exits) {
            exit.count = words.count.load(Ordering::Relaxed);
            exit.vmm = words.vmm.load(Ordering::Relaxed);
        }
        // Pairs with the writer's release fence: if any load above saw transition n + 2, this one sees n + 1 or later.
        fence(Ordering::Acquire);
        (self.latch.sequence.load(Ordering::Relaxed) == sequence).then_some(snapshot)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use proptest::prelude::*;

    use super::*;

    fn step(writer: &mut VtimeWriter, now: u64, to: State, handled: Option<ExitReason>) -> Snapshot {
        writer.turn_at(now, to, handled);
        writer.totals
    }

    #[test]
    fn a_slice_goes_to_the_state_that_is_left() {
        let (mut writer, reader) = vtime(100, 0);
        step(&mut writer, 110, State::Vmm, None);
        step(&mut writer, 113, State::Guest, None);
        step(&mut writer, 163, State::Vmm, None);
        step(&mut writer, 170, State::Guest, Some(ExitReason::Io));
        let s = reader.snapshot().expect("nobody writes");
        assert_eq!(
            (s.state, s.stamp, s.guest, s.vmm, s.paused),
            (State::Guest, 170, 50, 10, 10)
        );
        assert_eq!(s.exits[ExitReason::Io as usize], ExitTicks { count: 1, vmm: 7 });
    }

    #[test]
    fn a_clock_that_steps_back_costs_nothing_and_loses_nothing() {
        let (mut writer, reader) = vtime(100, 0);
        step(&mut writer, 90, State::Vmm, None);
        step(&mut writer, 200, State::Guest, None);
        let s = reader.snapshot().expect("nobody writes");
        assert_eq!((s.stamp, s.vmm, s.paused), (200, 100, 0));
    }

    fn any_reason() -> impl Strategy<Value = Option<ExitReason>> {
        proptest::option::of((0..ExitReason::COUNT).prop_map(|i| ExitReason::ALL[i]))
    }

    proptest! {
        #[test]
        fn what_is_read_is_what_was_written_after_every_transition(
            steps in proptest::collection::vec((0u64..1_000, 0u64..4, any_reason()), 1..60),
        ) {
            let (mut writer, reader) = vtime(0, 0);
            let mut now = 0;
            for (slice, to, handled) in steps {
                now += slice;
                let written = step(&mut writer, now, State::from_word(to), handled);
                prop_assert_eq!(reader.snapshot(), Some(written));
            }
        }
    }

    #[test]
    fn no_reader_sees_half_a_stamp() {
        let (mut writer, reader) = vtime(0, 0);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        let mut last = 0;
                        while !done.load(Ordering::Relaxed) {
                            let Some(s) = reader.snapshot() else { continue };
                            // The writer below stamps by ones, so every tick is in exactly one bucket.
                            assert_eq!(s.guest + s.vmm + s.paused, s.stamp);
                            assert_eq!(
                                s.exits.iter().map(|e| e.vmm).sum::<u64>(),
                                s.exits.iter().map(|e| e.count).sum::<u64>()
                            );
                            assert!(s.sequence >= last);
                            last = s.sequence;
                        }
                    })
                })
                .collect();
            let mut now = 0;
            let mut tick = || {
                now += 1;
                now
            };
            writer.turn_at(tick(), State::Vmm, None);
            for i in 0..300_000 {
                writer.turn_at(
                    tick(),
                    State::Guest,
                    (i > 0).then_some(ExitReason::ALL[i % ExitReason::COUNT]),
                );
                writer.turn_at(tick(), State::Vmm, None);
            }
            done.store(true, Ordering::Relaxed);
            for reader in readers {
                reader.join().expect("a reader saw half a stamp");
            }
        });
    }
}
