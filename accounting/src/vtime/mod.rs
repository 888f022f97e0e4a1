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
//! one product, one addition and four stores.
//!
//! All figures are raw TSC ticks; the reader converts.

mod histogram;
mod latch;
#[cfg(all(test, loom))]
mod model;
mod reader;
mod slot;
#[cfg(test)]
mod tests;
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
    let edges = Edges::new(scale);
    let writer = VtimeWriter::new(Arc::clone(&latch), edges, now, cpu_ns);
    (writer, VtimeReader::new(latch, edges))
}
