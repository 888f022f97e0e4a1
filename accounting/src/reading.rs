//! The shape of a reading: what `GET /vcpus/{index}/cputime` answers; and of the histograms, which are asked for apart.
//!
//! Every figure is an integer in nanoseconds, `_ns` in its name. All but `pending` are totals since the
//! vCPU thread's first stamp, and no total is ever smaller than in an earlier reading of the same vCPU.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::vtime::{BUCKETS, upper_edge_ns};

/// One vCPU's time, of one instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Reading {
    /// The vCPU's index, from 0.
    pub index: u32,
    /// Linux thread id of the vCPU thread.
    pub tid: i32,
    /// What the vCPU was doing at `at_ns`.
    pub state: VcpuState,
    /// The instant, on `CLOCK_MONOTONIC_RAW`.
    pub at_ns: u64,
    /// Time since the vCPU thread's first stamp; exactly the sum of `modes`.
    pub elapsed_ns: u64,
    /// `host_user + guest`: as in Linux, guest time is counted in utime too.
    pub utime_ns: u64,
    /// `host_kernel`.
    pub stime_ns: u64,
    /// `guest`. Already inside `utime_ns`: never add the two.
    pub gtime_ns: u64,
    /// The disjoint modes; their sum is `elapsed_ns`, to the nanosecond.
    pub modes: Modes,
    /// The slice still running: already included in the figures above.
    pub pending: Pending,
    /// An interval that holds the true guest time.
    pub gtime_bounds_ns: Bounds,
    /// What the guest time was derived from.
    pub source: Source,
    /// Completed exits from `KVM_RUN`.
    pub exits: Exits,
    /// Where the vCPU thread runs.
    pub host_cpu: HostCpu,
}

/// What a vCPU is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum VcpuState {
    /// In `KVM_RUN`, on a CPU.
    Guest,
    /// On a CPU, handling an exit in the VMM.
    Vmm,
    /// Off the CPU: the guest executed HLT.
    Halted,
    /// Runnable, but another task has the CPU.
    Waiting,
    /// Off the CPU inside the VMM or the host kernel: a lock, a disk, a full console.
    Blocked,
    /// Held by request, or not started.
    Paused,
    /// The vCPU thread has ended; its figures stand still.
    Exited,
}

/// Time by mode, in nanoseconds; see the crate's header for what each mode means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Modes {
    /// On a CPU, in guest mode.
    pub guest_ns: u64,
    /// On a CPU, in VMM user space.
    pub host_user_ns: u64,
    /// On a CPU, in the host kernel.
    pub host_kernel_ns: u64,
    /// Off the CPU because the guest executed HLT.
    pub halted_ns: u64,
    /// Runnable, off the CPU.
    pub waiting_ns: u64,
    /// Off the CPU inside the VMM or the host kernel.
    pub blocked_ns: u64,
    /// Held by request, or not started.
    pub paused_ns: u64,
}

/// A mode's name, as in [`Modes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "documented at Modes, name for name")]
pub enum Mode {
    Guest,
    HostUser,
    HostKernel,
    Halted,
    Waiting,
    Blocked,
    Paused,
}

impl Modes {
    /// How many modes there are.
    pub const COUNT: usize = 7;

    /// All of them, in the order of [`Modes::to_array`].
    pub const ALL: [Mode; Self::COUNT] = [
        Mode::Guest,
        Mode::HostUser,
        Mode::HostKernel,
        Mode::Halted,
        Mode::Waiting,
        Mode::Blocked,
        Mode::Paused,
    ];

    /// The figures in the order of [`Mode`]'s variants.
    #[must_use]
    pub const fn to_array(self) -> [u64; Self::COUNT] {
        [
            self.guest_ns,
            self.host_user_ns,
            self.host_kernel_ns,
            self.halted_ns,
            self.waiting_ns,
            self.blocked_ns,
            self.paused_ns,
        ]
    }

    /// The inverse of [`Modes::to_array`].
    #[must_use]
    pub const fn from_array(a: [u64; Self::COUNT]) -> Self {
        Self {
            guest_ns: a[0],
            host_user_ns: a[1],
            host_kernel_ns: a[2],
            halted_ns: a[3],
            waiting_ns: a[4],
            blocked_ns: a[5],
            paused_ns: a[6],
        }
    }

    /// Sum of all modes, in nanoseconds.
    #[must_use]
    pub fn sum_ns(self) -> u64 {
        self.to_array().iter().sum()
    }
}

/// The running slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Pending {
    /// The mode the slice counts as, so far.
    pub mode: Mode,
    /// Its length since the last stamp, in nanoseconds.
    pub delta_ns: u64,
}

/// A closed interval, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Bounds {
    /// Not less than this.
    pub lower: u64,
    /// Not more than this.
    pub upper: u64,
}

// See crate::split::claims.
/// What the guest time was derived from; the most exact first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// Stamps at KVM's own tracepoints, taken by a BPF program.
    Bpf,
    /// The kernel's own full-dynticks accounting: the vCPU is pinned to a `nohz_full` CPU.
    Vtime,
    /// On-CPU time inside `KVM_RUN`: any host.
    Oncpu,
}

impl Source {
    /// All of them, the most exact first.
    pub const ALL: [Self; 3] = [Self::Bpf, Self::Vtime, Self::Oncpu];

    /// Its name in a reading.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bpf => "bpf",
            Self::Vtime => "vtime",
            Self::Oncpu => "oncpu",
        }
    }
}

/// Completed exits from `KVM_RUN`: those whose handling has ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Exits {
    /// Sum of the counts in `by_reason`.
    pub total: u64,
    // The names are ExitReason's, in crate::vtime.
    /// By reason, such as `io`, `mmio` and `hlt`; reasons that never occurred are left out.
    pub by_reason: BTreeMap<String, ExitTotals>,
}

/// Exits of one reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ExitTotals {
    /// How many.
    pub count: u64,
    /// Time the VMM took to handle them, from leaving `KVM_RUN` to entering it again, in nanoseconds.
    pub vmm_ns: u64,
}

/// How long stays in `KVM_RUN` and the handling of exits took, of one vCPU and one instant: the slices that have ended
/// by then. Not part of a reading, which is to stay small.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Histograms {
    /// The vCPU's index, from 0.
    pub index: u32,
    /// Stays in `KVM_RUN`, from entering it to leaving it, whatever the guest, the kernel and the scheduler did meanwhile.
    pub run: Histogram,
    /// The VMM's handling of exits, from leaving `KVM_RUN` to entering it again or to a pause; as many as a reading's
    /// `exits.total`.
    pub vmm: Histogram,
}

/// How often something took how long.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Histogram {
    /// How many: the sum of the buckets' counts.
    pub count: u64,
    /// How long they took together, in nanoseconds.
    pub sum_ns: u64,
    /// In the order of their edges, the same on every host: powers of two from 64 ns to 2^36 ns, and what is longer.
    pub buckets: Vec<Bucket>,
}

/// One bucket of a [`Histogram`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Bucket {
    // See crate::vtime::BUCKETS.
    /// Its upper edge, in nanoseconds; `null` in the last, which has none. It begins where the one before ends. An
    /// edge is where it says to a thousandth.
    pub le_ns: Option<u64>,
    /// How many are in this bucket, those in the buckets before it not included.
    pub count: u64,
}

impl Histogram {
    /// A histogram of vtime's counts.
    #[must_use]
    pub fn new(counts: &[u64; BUCKETS], sum_ns: u64) -> Self {
        let bucket = |(index, &count)| Bucket {
            le_ns: upper_edge_ns(index),
            count,
        };
        Self {
            count: counts.iter().sum(),
            sum_ns,
            buckets: counts.iter().enumerate().map(bucket).collect(),
        }
    }
}

/// Where the vCPU thread runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct HostCpu {
    /// The host CPU: the one it is pinned to, else the one it was last seen on.
    pub cpu: u32,
    /// Whether the thread may run on that CPU only.
    pub pinned: bool,
    /// Whether the host was booted with `nohz_full=` naming this CPU.
    pub nohz_full: bool,
    /// Whether the scheduler's load balancing leaves this CPU alone (`isolcpus=` or an isolated cpuset partition).
    pub isolated: bool,
    /// Whether the tick is stopped while the guest runs; `null` where the host does not let us tell.
    pub tick_stopped: Option<bool>,
}
