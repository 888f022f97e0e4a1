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
//! The writer may be preempted anywhere, for any time, so no reader may wait for it: a latch of two slots has the last
//! complete transition to be read at any instant.
//!
//! Counted by the way: the exits by reason, and in powers of two how long each exit's handling and each stay in `KVM_RUN`
//! took. A slot is not written whole but where the last two transitions changed it, so the histograms cost a transition
//! one product, one addition and two stores.
//!
//! All figures are raw TSC ticks; the reader converts.

mod histogram;
mod latch;
mod reader;
mod slot;
mod writer;

use std::sync::Arc;

pub use histogram::{BUCKETS, upper_edge_ns};
pub use reader::VtimeReader;
pub use writer::VtimeWriter;

use crate::clock::Scale;
use histogram::Edges;
use latch::Latch;
use slot::Slot;

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

/// The histograms as of one transition: of the slices that have ended. See [`BUCKETS`] for what each counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Histograms {
    /// How many transitions there have been.
    pub sequence: u64,
    /// Stays in `KVM_RUN`, by length.
    pub run: [u64; BUCKETS],
    /// Sum of their lengths, in ticks: [`Snapshot::guest`].
    pub run_ticks: u64,
    /// Exits by how long the VMM took to handle them; one for each in [`Snapshot::exits`].
    pub vmm: [u64; BUCKETS],
    /// Sum of what they took, in ticks.
    pub vmm_ticks: u64,
}

/// Makes a writer and its reader, in state `Paused` since `now` (TSC ticks), when the thread had used `cpu_ns` of CPU time.
#[must_use]
pub fn vtime(now: u64, cpu_ns: u64) -> (VtimeWriter, VtimeReader) {
    vtime_at(Scale::of_this_host(), now, cpu_ns)
}

/// As [`vtime`], on a TSC whose rate is known, as from `KVM_GET_TSC_KHZ`: `scale` need not be measured.
#[must_use]
pub fn vtime_at(scale: Scale, now: u64, cpu_ns: u64) -> (VtimeWriter, VtimeReader) {
    let latch = Arc::new(Latch::new([Slot::default(), Slot::default()]));
    let writer = VtimeWriter::new(Arc::clone(&latch), Edges::new(scale), now, cpu_ns);
    (writer, VtimeReader::new(latch))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use proptest::prelude::*;

    use super::*;

    fn step(writer: &mut VtimeWriter, now: u64, to: State, handled: Option<ExitReason>) -> Snapshot {
        let likely = if to == State::Guest { State::Vmm } else { State::Guest };
        writer.turn_at(now, likely, to, handled);
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

    #[test]
    fn the_clocks_end_and_a_clock_that_stands_still_or_wraps_lose_nothing() {
        // 2^64 ticks are 117 years at 5 GHz.
        let five_ghz = Scale::of(Instant::default(), Instant { ticks: 5, ns: 1 });
        let (mut writer, reader) = vtime_at(five_ghz, 0, 0);
        let times = [1 << 63, 1 << 63, u64::MAX - 1, u64::MAX, u64::MAX, 5, 0, u64::MAX];
        for (i, now) in times.into_iter().enumerate() {
            let to = if i % 2 == 0 { State::Vmm } else { State::Guest };
            writer.turn_at(now, to, (to == State::Guest).then_some(ExitReason::Io));
            let (s, h) = (
                reader.snapshot().expect("nobody writes"),
                reader.histograms().expect("nobody writes"),
            );
            assert_eq!(s.paused + s.vmm + s.guest, s.stamp);
            assert_eq!(h.vmm.iter().sum::<u64>(), s.exits[ExitReason::Io as usize].count);
        }
        assert_eq!(reader.snapshot().expect("nobody writes").stamp, u64::MAX);
    }

    #[test]
    fn a_transition_while_the_clock_is_read_makes_the_reader_take_both_anew() {
        let (writer, reader) = vtime_at(ns_clock(), 0, 0);
        let writer = std::cell::RefCell::new(writer);
        let read = reader.snapshot_at(|| {
            let now = writer.borrow().totals.stamp + 10;
            if now < 50 {
                writer.borrow_mut().turn_at(now, State::Vmm, None);
            }
            now
        });
        let (snapshot, now) = read.expect("five tries are enough");
        assert_eq!((snapshot.stamp, now), (40, 50));
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
            writer.turn_at(tick(), State::Guest, State::Vmm, None);
            for i in 0..300_000 {
                writer.turn_at(
                    tick(),
                    State::Vmm,
                    State::Guest,
                    (i > 0).then_some(ExitReason::ALL[i % ExitReason::COUNT]),
                );
                writer.turn_at(tick(), State::Guest, State::Vmm, None);
            }
            done.store(true, Ordering::Relaxed);
            for reader in readers {
                reader.join().expect("a reader saw half a stamp");
            }
        });
    }
}

/// The real slots under the model checker; see the latch's own models for what it proves.
#[cfg(all(test, loom))]
mod model {
    use super::*;
    use crate::clock::Instant;

    /// A try stores and loads some 20 words a transition, so not every interleaving can be tried: all with up to two
    /// preemptions, which is what it takes to tear a read (into the writer, and back).
    const PREEMPTIONS: usize = 2;

    /// Runs an exit and its handling, every slice one tick long, while `read` reads.
    fn exit_and_read(read: fn(&VtimeReader)) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(PREEMPTIONS);
        model.check(move || {
            let ns_clock = Scale::of(Instant::default(), Instant { ticks: 1, ns: 1 });
            let (mut writer, reader) = vtime_at(ns_clock, 0, 0);
            writer.turn_at(1, State::Vmm, None);
            writer.turn_at(2, State::Guest, None);
            let vcpu = loom::thread::spawn(move || {
                writer.turn_at(3, State::Vmm, None);
                writer.turn_at(4, State::Guest, Some(ExitReason::Io));
            });
            read(&reader);
            vcpu.join().expect("it only stores");
        });
    }

    #[test]
    fn a_snapshot_is_of_one_transition() {
        exit_and_read(|reader| {
            let s = reader.snapshot().expect("a reader was kept waiting");
            assert_eq!(s.paused + s.vmm + s.guest, s.stamp);
            assert_eq!(s.stamp + 1, s.sequence);
            assert_eq!(s.exits[ExitReason::Io as usize].count, u64::from(s.sequence == 5));
        });
    }

    #[test]
    fn histograms_are_of_one_transition() {
        exit_and_read(|reader| {
            let h = reader.histograms().expect("a reader was kept waiting");
            let [run, vmm] = [h.run, h.vmm].map(|counts| counts.iter().sum::<u64>());
            assert_eq!((run, vmm), (u64::from(h.sequence >= 4), u64::from(h.sequence == 5)));
            assert_eq!((run, vmm), (h.run_ticks, h.vmm_ticks));
        });
    }
}
