//! One vCPU thread, watched for what disturbs it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::sync::Arc;

use super::process::of_task;
use super::system_file::SystemFile;
use super::text::{parse_loc, parse_migrations, parse_status, parse_tick_stopped};
use super::tick::{Sample, TickWatch};
use super::{Disturbance, Status};
use crate::clock::Instant;
use crate::host::{CpuSet, HostCpus, cpu_list, tick_ns};
use crate::probe::{ThreadClock, Which};

/// How long a look is as good as new. It takes as long as ten readings or more: a reading must not pay that each time.
const EVERY_NS: u64 = 1_000_000_000;

/// How long a wake-up may take until the thread runs, though nothing else does: the interrupt, and the CPU's way out of its
/// idle state. The kernel counts it as run_delay.
const WAKE_NS: u64 = 100_000;

/// What is known of a vCPU thread's surroundings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Whether the CPU's tick is stopped while the vCPU runs; `None` where that cannot be told.
    pub tick_stopped: Option<bool>,
    /// Whether the kernel's division of the thread's CPU time proves nothing any more: once true, true for good. Guest time
    /// is then known by source `oncpu` only.
    pub vtime_void: bool,
    /// What disturbs it, the process's disturbances included.
    pub disturbances: Vec<Disturbance>,
}

/// Watches one thread of this process.
#[derive(Debug)]
pub struct Watch {
    tid: i32,
    pinned: Option<u32>,
    host: Arc<HostCpus>,
    task: PathBuf,
    tick: TickWatch,
    /// The CPU that the thread was asleep on when it was pinned to another: where the kernel still has it until it wakes.
    asleep_on: Option<u32>,
    last: Option<Look>,
    /// Stays for good: what was sampled stays sampled.
    moved: Option<Disturbance>,
    findings: Findings,
}

/// What the last look saw.
#[derive(Clone, Copy, Debug)]
struct Look {
    at_ns: u64,
    run_delay_ns: u64,
    voluntary: u64,
    involuntary: u64,
    /// `None` without `CONFIG_SCHED_DEBUG`.
    migrations: Option<u64>,
}

impl Watch {
    /// A watch of thread `tid`, which has been pinned to the CPU `pinned`, if to one.
    #[must_use]
    pub fn new(tid: i32, pinned: Option<u32>, host: Arc<HostCpus>) -> Self {
        Self {
            tid,
            pinned,
            host,
            task: format!("/proc/self/task/{tid}").into(),
            tick: TickWatch::new(tick_ns()),
            asleep_on: None,
            last: None,
            moved: None,
            findings: Findings::default(),
        }
    }

    /// A watch of a thread that has been moved to where it is pinned, if to one CPU, just now; asleep on the CPU `asleep_on`,
    /// which it has not left, if it is.
    #[must_use]
    pub fn of_moved(tid: i32, pinned: Option<u32>, host: Arc<HostCpus>, asleep_on: Option<u32>) -> Self {
        Self {
            asleep_on,
            ..Self::new(tid, pinned, host)
        }
    }

    /// What is found, at the instant `now_ns`; fresh if the last look was a second ago or more. The caller says what it knows
    /// from its probes: the thread's time on a CPU, field 39 of its stat file, and its run_delay. That the thread is on another
    /// CPU than its own is noticed at once.
    #[inline]
    pub fn look(&mut self, now_ns: u64, on_cpu_ns: u64, stat_processor: u32, run_delay_ns: u64) -> &Findings {
        if self.pinned.is_some_and(|cpu| cpu != stat_processor) {
            if self.asleep_on != Some(stat_processor) {
                self.moved(&[stat_processor].into());
            }
        } else {
            self.asleep_on = None;
        }
        let due = |last: &Look| now_ns.saturating_sub(last.at_ns) >= EVERY_NS;
        if self.last.as_ref().is_none_or(due) {
            self.look_afresh(now_ns, on_cpu_ns, stat_processor, run_delay_ns);
        }
        &self.findings
    }

    /// What the last look found.
    #[must_use]
    pub fn findings(&self) -> &Findings {
        &self.findings
    }

    /// [`Watch::look`], however short ago the last one was.
    #[inline(never)] // seldom called, and large: readings look once a second
    pub fn look_afresh(&mut self, now_ns: u64, on_cpu_ns: u64, stat_processor: u32, run_delay_ns: u64) -> &Findings {
        if self.pinned == Some(stat_processor) {
            self.asleep_on = None;
        }
        let mut disturbances = of_task(&self.task);
        let status = fs::read(self.task.join("status"));
        let status = status.ok().and_then(|text| parse_status(&text).ok());
        if let (Some(cpu), Some(status)) = (self.pinned, status) {
            let sched = fs::read(self.task.join("sched"));
            let look = Look {
                at_ns: now_ns,
                run_delay_ns,
                voluntary: status.voluntary,
                involuntary: status.involuntary,
                // It is moved once more, of its own accord, when it wakes up.
                migrations: (sched.ok().and_then(|text| parse_migrations(&text).ok()))
                    .map(|moves| moves + u64::from(self.asleep_on.is_some())),
            };
            let last = self.last.replace(look);
            if self.was_elsewhere(cpu, &status, last, look) {
                // What it waited for, and what it ran beside, was there and not here.
                self.tick.forget();
                let tickless = |&cpu: &u32| self.host.is_nohz_full(cpu);
                self.findings.tick_stopped = (!status.allowed.iter().any(tickless)).then_some(false);
            } else {
                let capped = |d: &Disturbance| matches!(d, Disturbance::CfsQuota { .. });
                // The wait for a quota's next period is run_delay too, and has been named.
                if !disturbances.iter().any(capped) {
                    disturbances.extend(last.and_then(|last| self.second_task(cpu, &last, &look)));
                }
                disturbances.extend(self.judge_tick(cpu, &status, on_cpu_ns, &disturbances));
            }
        } else {
            // Not pinned, or gone: then what it runs on is no promise, and only where no tick stops is there an answer.
            self.findings.tick_stopped = (!self.host.is_nohz_full(stat_processor)).then_some(false);
            self.last = Some(Look {
                at_ns: now_ns,
                run_delay_ns,
                voluntary: 0,
                involuntary: 0,
                migrations: None,
            });
        }
        disturbances.extend(self.moved.clone());
        self.findings.disturbances = disturbances;
        &self.findings
    }

    /// Whether the thread may have run elsewhere since the last look: its affinity is not the one CPU; or it is, again, and
    /// the thread has been moved meanwhile.
    fn was_elsewhere(&mut self, cpu: u32, status: &Status, last: Option<Look>, now: Look) -> bool {
        let away = status.allowed != CpuSet::from([cpu]);
        if away {
            self.moved(&status.allowed);
        }
        let migrated = last.and_then(|last| Some(now.migrations? > last.migrations?)) == Some(true);
        if migrated && self.moved.is_none() {
            // Where to is not known: to any CPU there is.
            let host = Arc::clone(&self.host);
            self.moved(&host.present);
        }
        away || migrated
    }

    /// The thread may run, or ran, on `cpus`.
    fn moved(&mut self, cpus: &CpuSet) {
        let Some(pinned) = self.pinned else { return };
        let before = match &self.moved {
            Some(Disturbance::MovedAffinity { tickless, .. }) => *tickless,
            _ => true,
        };
        let tickless = before && cpus.iter().all(|&cpu| self.host.is_nohz_full(cpu));
        // A thread pinned to a CPU that samples had no claim to lose.
        self.findings.vtime_void |= !tickless && self.host.is_nohz_full(pinned);
        let disturbance = Disturbance::MovedAffinity {
            tid: self.tid,
            pinned,
            allowed: cpu_list(cpus),
            tickless,
        };
        if self.moved.as_ref() != Some(&disturbance) {
            self.findings.disturbances.retain(|d| Some(d) != self.moved.as_ref());
            self.findings.disturbances.push(disturbance.clone());
            self.moved = Some(disturbance);
        }
    }

    /// Others ran on its CPU for a hundredth of the time or more, and took it from the thread.
    fn second_task(&self, cpu: u32, last: &Look, now: &Look) -> Option<Disturbance> {
        let over_ns = now.at_ns.saturating_sub(last.at_ns);
        let waited_ns = now.run_delay_ns.saturating_sub(last.run_delay_ns);
        let preempted = now.involuntary.saturating_sub(last.involuntary);
        let waking_ns = now.voluntary.saturating_sub(last.voluntary).saturating_mul(WAKE_NS);
        let by_others_ns = waited_ns.saturating_sub(waking_ns);
        (preempted > 0 && by_others_ns > 0 && by_others_ns >= over_ns / 100).then_some(Disturbance::SecondTask {
            tid: self.tid,
            cpu,
            waited_ns,
            over_ns,
            preempted,
        })
    }

    /// Judges the tick; a disturbance where it runs and none is known that keeps it.
    fn judge_tick(&mut self, cpu: u32, status: &Status, on_cpu_ns: u64, known: &[Disturbance]) -> Option<Disturbance> {
        if !self.host.is_nohz_full(cpu) {
            // The kernel stops the tick of no other CPU while a task runs there (can_stop_full_tick, kernel/time/tick-sched.c).
            self.findings.tick_stopped = Some(false);
            return None;
        }
        let is_known = known.iter().any(Disturbance::keeps_tick);
        let loc = SystemFile::Interrupts.read();
        let Some(loc) = loc.ok().and_then(|text| parse_loc(&text, cpu).ok()) else {
            self.findings.tick_stopped = None;
            return None;
        };
        let sample = Sample {
            loc: loc.here,
            loc_elsewhere: loc.elsewhere,
            busy_ns: on_cpu_ns,
            switches: status.voluntary.saturating_add(status.involuntary),
        };
        let tid = self.tid;
        // A busy timer beside something that keeps the tick is the tick.
        self.tick
            .observe(sample, || tick_runs(tid, cpu).or(is_known.then_some(true)));
        self.findings.tick_stopped = self.tick.stopped();
        (self.findings.tick_stopped == Some(false) && !is_known).then_some(Disturbance::TickRuns { cpu })
    }
}

/// Whether the tick of `cpu` runs while thread `tid` does: asks `/proc/timer_list`, which only root can read. The kernel takes
/// the lock of each CPU's timers for an instant at a time to write it, and interrupts nobody; it is read up to the CPU in
/// question only. `None` where it cannot be read, or the thread was not on a CPU meanwhile: the tick of an idle CPU stops
/// without being tickless.
fn tick_runs(tid: i32, cpu: u32) -> Option<bool> {
    let clock = ThreadClock::new(tid, Which::Sched);
    let list = SystemFile::TimerList.open().ok()?;
    let (begun, before_ns) = (Instant::now(), clock.read_ns().ok()?);
    let lines = BufReader::new(list).split(b'\n').map_while(Result::ok);
    let stopped = parse_tick_stopped(lines, cpu).ok()?;
    let (ended, after_ns) = (Instant::now(), clock.read_ns().ok()?);
    let on_cpu_ns = after_ns.saturating_sub(before_ns);
    (on_cpu_ns >= ended.ns.saturating_sub(begun.ns) / 4 * 3).then_some(!stopped)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = EVERY_NS;

    fn host() -> Arc<HostCpus> {
        Arc::new(HostCpus {
            present: (0..4).collect(),
            nohz_full: Some([1, 2].into()),
            ..HostCpus::default()
        })
    }

    /// A watch of this very thread, which is not pinned to one CPU, as if it were.
    fn watch(pinned: Option<u32>) -> Watch {
        Watch::new(rustix::thread::gettid().as_raw_nonzero().get(), pinned, host())
    }

    const fn look(at_ns: u64, run_delay_ns: u64, voluntary: u64, involuntary: u64) -> Look {
        Look {
            at_ns,
            run_delay_ns,
            voluntary,
            involuntary,
            migrations: Some(7),
        }
    }

    fn status(allowed: &[u32]) -> Status {
        Status {
            allowed: allowed.iter().copied().collect(),
            voluntary: 0,
            involuntary: 0,
        }
    }

    #[test]
    fn a_thread_moved_off_its_tickless_cpu_loses_its_claim_for_good() {
        for (what, allowed, migrations, moved, void) in [
            ("where it was put", &[1][..], 7, false, false),
            ("to a tickless one", &[2], 7, true, false),
            ("to one that samples", &[0], 7, true, true),
            ("to it as well", &[0, 1], 7, true, true),
            ("away and back again", &[1], 9, true, true),
        ] {
            let mut watch = watch(Some(1));
            let mut now = look(SECOND, 0, 0, 0);
            now.migrations = Some(migrations);
            let elsewhere = watch.was_elsewhere(1, &status(allowed), Some(look(0, 0, 0, 0)), now);
            assert_eq!(elsewhere, moved, "{what}");
            assert_eq!(
                (watch.moved.is_some(), watch.findings.vtime_void),
                (moved, void),
                "{what}"
            );
            // Back where it was put: what was said of it stays said.
            assert!(!watch.was_elsewhere(1, &status(&[1]), Some(now), now), "{what}");
            assert_eq!(
                (watch.moved.is_some(), watch.findings.vtime_void),
                (moved, void),
                "{what}"
            );
        }
    }

    #[test]
    fn a_thread_seen_elsewhere_is_noticed_between_looks() {
        let mut watch = watch(Some(1));
        watch.last = Some(look(0, 0, 0, 0));
        assert!(!watch.look(1, 0, 1, 0).vtime_void);
        assert!(watch.look(2, 0, 0, 0).vtime_void);
        assert_eq!(watch.findings.disturbances.len(), 1);
        assert_eq!(watch.look(3, 0, 0, 0).disturbances.len(), 1, "and said once");
    }

    #[test]
    fn another_task_is_told_from_wake_ups() {
        let watch = watch(Some(1));
        let start = look(0, 0, 0, 0);
        let found = |end: Look| watch.second_task(1, &start, &end).is_some();
        assert!(found(look(SECOND, SECOND / 2, 0, 100)), "half of the time");
        assert!(found(look(SECOND, SECOND / 50, 10, 1)), "now and then");
        assert!(!found(look(SECOND, 0, 0, 0)), "alone");
        assert!(!found(look(SECOND, 100_000, 0, 2)), "a kernel thread for an instant");
        assert!(
            !found(look(SECOND, SECOND / 20, 1_000, 2)),
            "50 us for each of 1,000 wake-ups"
        );
        assert!(!found(start), "no time at all");
    }

    #[test]
    fn a_cpu_that_is_not_tickless_has_its_tick_and_an_unpinned_thread_no_promise() {
        let mut pinned = watch(Some(0));
        assert_eq!(pinned.judge_tick(0, &status(&[0]), 0, &[]), None);
        assert_eq!(pinned.findings.tick_stopped, Some(false));
        assert_eq!(watch(None).look(0, 0, 0, 0).tick_stopped, Some(false));
        let mut unpinned = watch(None);
        let findings = unpinned.look(0, 0, 1, 0);
        assert_eq!((findings.tick_stopped, findings.vtime_void), (None, false));
    }

    #[test]
    fn it_looks_once_a_second_and_no_more() {
        let mut watch = watch(None);
        let mut looked = Vec::new();
        for now_ns in [5, 6, SECOND + 4, SECOND + 5, SECOND + 6, 0] {
            watch.look(now_ns, 0, 0, 0);
            looked.extend(watch.last.map(|last| last.at_ns));
        }
        assert_eq!(looked, [5, 5, 5, SECOND + 5, SECOND + 5, SECOND + 5]);
    }

    #[test]
    fn a_thread_that_is_gone_is_no_error() {
        let mut watch = Watch::new(i32::MAX, Some(1), host());
        assert!(!watch.look(0, 0, 1, 0).vtime_void);
    }
}
