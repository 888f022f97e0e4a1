//! What spoils the claim of a tickless vCPU: noticed, named, and said with what to do.
//!
//! A CPU named by `nohz_full=` stops its tick only while one task runs there and nothing asks for the tick; and the
//! kernel divides CPU time exactly only on such a CPU. Each [`Disturbance`] breaks one of the two:
//!
//! | disturbance | evidence | the tick | source `vtime` |
//! |---|---|---|---|
//! | `rlimit_cpu` | `getrlimit` | runs | stays true |
//! | `cfs_quota` | `cpu.max`, `cpu.cfs_quota_us` of the cgroup and its ancestors | runs, if the kernel has `HZ_BW` | stays true |
//! | `cpu_timer` | `getitimer`, `/proc/self/timers`, `timer_gettime` | runs | stays true |
//! | `second_task` | run_delay and involuntary switches of the vCPU thread | runs | stays true |
//! | `tick_runs` | the CPU's LOC count, `/proc/timer_list` | runs | stays true |
//! | `moved_affinity` | `Cpus_allowed_list`, the CPU it was seen on, `nr_migrations` | - | void, if moved to a CPU that samples |
//!
//! A kernel without the scheduler's feature `HZ_BW` (Linux 6.1 is one) stops the tick in spite of a quota, and then looks once a
//! second whether it is used up: vCPUs run past it, and are kept off their CPUs until they have paid that back.
//!
//! [`of_process`] finds what concerns the whole process; a [`Watch`] finds what concerns one vCPU thread, and judges its
//! CPU's tick by behaviour ([`TickWatch`]). All of it reads; nothing here restarts a tick or sends an interrupt to
//! another CPU. A look takes 0.1 to 0.2 ms, where a reading takes 10 us, so a watch looks at most once a second.
//!
//! Not to be seen in time: a thread that is moved to a CPU that samples and back again between two looks. It is seen at the
//! next look, a second later at most; what the readings between have proved by then may be a sample's.
//!
//! Not to be seen from here: a CPU timer that another process has set on a thread of ours, and a quota on a cgroup above
//! the root of this process's cgroup namespace. Their effect, a tick that runs, is seen.

mod placement;
mod process;
mod system_file;
mod text;
mod tick;
mod watch;

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use placement::{Placement, Whereabouts};
pub use process::of_process;
pub use system_file::SystemFile;
pub use text::{
    Cgroups, Loc, Mount, Status, TextError, parse_cfs_quota, parse_cgroup, parse_cpu_max, parse_loc, parse_migrations,
    parse_mountinfo, parse_status, parse_tick_stopped, parse_timers,
};
pub use tick::{Judgement, Sample, TickWatch};
pub use watch::{Findings, Watch};

/// Something on this host that makes a vCPU less tickless, or its time less well known, than its CPU promises.
///
/// `Display` is one line: what, where and by how much; and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Disturbance {
    /// `RLIMIT_CPU` is set: a CPU timer of the process, which needs the tick (`kernel/time/posix-cpu-timers.c`).
    RlimitCpu {
        /// The soft limit, in seconds.
        limit_s: u64,
    },
    /// The scheduler caps the cgroup's CPU time, for which it needs the tick (`sched_can_stop_tick`).
    CfsQuota {
        /// The file that sets the quota.
        file: PathBuf,
        /// CPU time in each period, in microseconds.
        quota_us: u64,
        /// The period, in microseconds.
        period_us: u64,
    },
    /// A timer on a CPU clock is armed in this process (`kernel/time/posix-cpu-timers.c`, `TICK_DEP_BIT_POSIX_TIMER`).
    CpuTimer {
        /// Which: `ITIMER_PROF`, `ITIMER_VIRTUAL`, or `POSIX timer N`.
        timer: String,
    },
    /// Others ran on the vCPU's CPU, which keeps its tick for as long as two want it.
    SecondTask {
        /// The vCPU thread.
        tid: i32,
        /// Its CPU.
        cpu: u32,
        /// How long the vCPU waited for the CPU, in nanoseconds.
        waited_ns: u64,
        /// In how long, in nanoseconds.
        over_ns: u64,
        /// How often it was taken off the CPU to let another run.
        preempted: u64,
    },
    /// The tick of a `nohz_full` CPU runs while its vCPU does, for a reason that is not known.
    TickRuns {
        /// The CPU.
        cpu: u32,
    },
    /// The vCPU thread was moved off the CPU it was pinned to.
    MovedAffinity {
        /// The vCPU thread.
        tid: i32,
        /// The CPU it was pinned to.
        pinned: u32,
        /// The CPUs it may run on now, as the kernel lists them.
        allowed: String,
        /// Whether all it may run on, and was seen on, are `nohz_full`; a move that was not watched is not known to be.
        tickless: bool,
    },
}

impl Disturbance {
    /// The name of its kind, as in JSON.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::RlimitCpu { .. } => "rlimit_cpu",
            Self::CfsQuota { .. } => "cfs_quota",
            Self::CpuTimer { .. } => "cpu_timer",
            Self::SecondTask { .. } => "second_task",
            Self::TickRuns { .. } => "tick_runs",
            Self::MovedAffinity { .. } => "moved_affinity",
        }
    }

    /// Whether it voids the source `vtime`: part of the thread's time was, or may have been, sampled, so the VIRT and PROF
    /// clocks and the stat file prove nothing from then on. The others only bring the tick back, with which the kernel's
    /// own accounting on a `nohz_full` CPU is as exact as without.
    #[must_use]
    pub const fn voids_vtime(&self) -> bool {
        matches!(self, Self::MovedAffinity { tickless: false, .. })
    }

    /// Whether it is known to keep the tick running.
    #[must_use]
    pub const fn keeps_tick(&self) -> bool {
        match self {
            Self::RlimitCpu { .. }
            | Self::CfsQuota { .. }
            | Self::CpuTimer { .. }
            | Self::SecondTask { .. }
            | Self::TickRuns { .. } => true,
            Self::MovedAffinity { .. } => false,
        }
    }
}

impl Disturbance {
    /// What is found, where, and by how much.
    #[must_use]
    pub fn says(&self) -> String {
        match self {
            Self::RlimitCpu { limit_s } => {
                format!("CPU time of the process is limited to {limit_s} s (RLIMIT_CPU), which keeps the tick running")
            }
            Self::CfsQuota {
                file,
                quota_us,
                period_us,
            } => format!(
                "{} allows {quota_us} us of CPU time in {period_us} us, which keeps vCPUs off their CPUs, or the tick running",
                file.display()
            ),
            Self::CpuTimer { timer } => {
                format!("{timer} is armed on a CPU clock in this process, which keeps the tick running")
            }
            Self::SecondTask {
                tid,
                cpu,
                waited_ns,
                over_ns,
                preempted,
            } => format!(
                "another task runs on CPU {cpu}, and keeps the tick running: thread {tid} waited {} ms of {} ms for the CPU \
                 and was taken off it {preempted} times",
                waited_ns / 1_000_000,
                over_ns / 1_000_000
            ),
            Self::TickRuns { cpu } => format!("the tick of CPU {cpu} runs, though nohz_full= names the CPU"),
            Self::MovedAffinity {
                tid,
                pinned,
                allowed,
                tickless,
            } => {
                let so = if *tickless {
                    "it is not on the CPU it was given"
                } else {
                    "the kernel's own accounting no longer tells its guest time"
                };
                format!("thread {tid}, pinned to CPU {pinned}, was moved from outside to CPUs {allowed}: {so}")
            }
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn advice(&self) -> String {
        match self {
            Self::RlimitCpu { .. } => "lift the limit (ulimit -t unlimited) and start it again".to_owned(),
            Self::CfsQuota { .. } => "lift the quota (max), or run in a cgroup without one".to_owned(),
            Self::CpuTimer { timer } => format!("disarm {timer}"),
            Self::SecondTask { cpu, .. } => {
                format!("move that task away (taskset), and isolate the CPU (isolcpus={cpu})")
            }
            Self::TickRuns { .. } => "the trace event timer:tick_stop tells what keeps it".to_owned(),
            Self::MovedAffinity { .. } => {
                "leave the affinity of vCPU threads alone; to put the vCPU on a CPU through the microVM's own API, or to start \
                 the microVM again, puts it right"
                    .to_owned()
            }
        }
    }
}

impl fmt::Display for Disturbance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.says(), self.advice())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Disturbance> {
        let moved = |tickless| Disturbance::MovedAffinity {
            tid: 42,
            pinned: 1,
            allowed: "0-2".into(),
            tickless,
        };
        vec![
            Disturbance::RlimitCpu { limit_s: 60 },
            Disturbance::CfsQuota {
                file: "/sys/fs/cgroup/a/cpu.max".into(),
                quota_us: 50_000,
                period_us: 100_000,
            },
            Disturbance::CpuTimer {
                timer: "ITIMER_PROF".into(),
            },
            Disturbance::SecondTask {
                tid: 42,
                cpu: 1,
                waited_ns: 500_000_000,
                over_ns: 1_000_000_000,
                preempted: 125,
            },
            Disturbance::TickRuns { cpu: 1 },
            moved(true),
            moved(false),
        ]
    }

    #[test]
    fn each_says_in_one_line_what_it_is_and_what_to_do() {
        for (disturbance, says) in all().iter().zip([
            "60 s (RLIMIT_CPU)",
            "/sys/fs/cgroup/a/cpu.max allows 50000 us",
            "ITIMER_PROF is armed",
            "CPU 1, and keeps the tick running: thread 42 waited 500 ms of 1000 ms",
            "the tick of CPU 1 runs",
            "thread 42, pinned to CPU 1, was moved from outside to CPUs 0-2",
            "no longer tells",
        ]) {
            let line = disturbance.to_string();
            assert!(line.contains(says) && !line.contains('\n'), "{line}");
        }
    }

    #[test]
    fn only_time_that_was_sampled_voids_vtime() {
        let voids: Vec<_> = all().iter().map(Disturbance::voids_vtime).collect();
        assert_eq!(voids, [false, false, false, false, false, false, true]);
    }

    #[test]
    fn the_kind_is_the_one_in_json() {
        for disturbance in all() {
            let json = serde_json::to_value(&disturbance).expect("plain data");
            assert_eq!(json["kind"], disturbance.kind());
            assert_eq!(
                serde_json::from_value::<Disturbance>(json).expect("what was written"),
                disturbance
            );
        }
    }
}
