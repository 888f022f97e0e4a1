//! A reading taken apart: what each source claims by itself, and what each probe said.

use serde::{Deserialize, Serialize};

use super::{Account, Taken};
use crate::probe::Raw;
use crate::reading::{Bounds, Reading, Source};

/// A reading, and what it was made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Explained {
    /// The reading.
    #[serde(flatten)]
    pub reading: Reading,
    /// What it was made of.
    pub explain: Explanation,
}

/// What a reading was made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Explanation {
    /// Every source there is, the most exact first. Raw: a claim may step back from one instant to the next; a reading
    /// does not.
    pub sources: Vec<SourceClaim>,
    /// The probes at this instant.
    pub probes: ProbeValues,
    /// The probes at the vCPU thread's first stamp.
    pub probes_at_first_stamp: ProbeValues,
}

/// What one source says of the guest time since the first stamp.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SourceClaim {
    /// Which one.
    pub source: Source,
    /// Its best figure, in nanoseconds; `null` where the source is not there.
    pub gtime_ns: Option<u64>,
    /// The interval that holds the true guest time, in nanoseconds; `null` where the source is not there.
    pub gtime_bounds_ns: Option<Bounds>,
    /// Why it is not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unavailable: Option<String>,
}

/// The probes' raw values: since the thread's beginning, as the kernel has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ProbeValues {
    /// Time on a CPU: the SCHED clock, in nanoseconds.
    pub sched_ns: u64,
    /// utime, guest included: the VIRT clock, in nanoseconds. On a CPU whose tick samples, anything.
    pub virt_ns: Option<u64>,
    /// utime + stime: the PROF clock, in nanoseconds. On a CPU whose tick samples, anything.
    pub prof_ns: Option<u64>,
    /// Guest time by `/proc/self/task/T/stat`, in units of 1 / `sysconf(_SC_CLK_TCK)` s.
    pub stat_guest_time_clk: u64,
    /// The CPU the thread last ran on, by the same file.
    pub stat_processor: u32,
    /// Time runnable but off the CPU, in nanoseconds.
    pub run_delay_ns: u64,
    /// KVM's `halt_wait_ns`; `null` where this KVM has none.
    pub halt_wait_ns: Option<u64>,
    /// KVM's `halt_poll_success_ns` + `halt_poll_fail_ns`; `null` where this KVM has none.
    pub halt_poll_ns: Option<u64>,
    /// KVM's `blocking`: whether the vCPU is in HLT; `null` where this KVM does not tell.
    pub blocking: Option<bool>,
}

impl From<&Raw> for ProbeValues {
    fn from(raw: &Raw) -> Self {
        let kvm = raw.kvm.unwrap_or_default();
        Self {
            sched_ns: raw.sched_ns,
            virt_ns: raw.utime.map(|utime| utime.virt_ns),
            prof_ns: raw.utime.map(|utime| utime.prof_ns),
            stat_guest_time_clk: raw.stat.guest_time_clk,
            stat_processor: raw.stat.processor,
            run_delay_ns: raw.run_delay_ns,
            halt_wait_ns: kvm.halt_wait_ns,
            halt_poll_ns: kvm.halt_poll_ns,
            blocking: kvm.blocking,
        }
    }
}

impl Explanation {
    pub(super) fn new(account: &Account, taken: &Taken) -> Self {
        let sources = Source::ALL.into_iter().map(|source| {
            let claim = taken.claims.iter().flatten().find(|claim| claim.source == source);
            SourceClaim {
                source,
                gtime_ns: claim.map(|claim| claim.point_ns),
                gtime_bounds_ns: claim.map(|claim| claim.bounds),
                unavailable: claim.is_none().then(|| account.why_not(source, taken)),
            }
        });
        Self {
            sources: sources.collect(),
            probes: (&taken.raw).into(),
            probes_at_first_stamp: (&account.baseline).into(),
        }
    }
}

impl Account {
    /// Why `source` claims nothing.
    fn why_not(&self, source: Source, taken: &Taken) -> String {
        match (source, taken.pinned, &self.stamps) {
            (Source::Vtime, None, _) => "the vCPU is not pinned to one host CPU".to_owned(),
            (Source::Vtime, Some(cpu), _) if taken.vtime_void => {
                format!("the vCPU thread has been moved off CPU {cpu}")
            }
            (Source::Vtime, Some(cpu), _) => format!("the host was not booted with nohz_full= naming CPU {cpu}"),
            (Source::Bpf, _, Err(why)) => why.to_string(),
            (Source::Bpf, ..) => "KVM's tracepoints have been silent so far".to_owned(),
            (Source::Oncpu, ..) => unreachable!("there is always time on a CPU"),
        }
    }
}
