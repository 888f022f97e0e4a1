//! What the kernel's tracer saw of one vCPU thread: the truth that guest time is held against.
//!
//! A tracefs instance of its own (`Documentation/trace/ftrace.rst`, "Instances") records `kvm_entry`, `kvm_exit` and
//! `sched_switch` of one thread, stamped with the raw TSC (`trace_clock` `x86-tsc`), which compares directly with
//! `accounting::clock::ticks`. It needs root and `/sys/kernel/tracing`. A record that was lost is an error.
//!
//! [`kernel`] records where the kernel's own guest time begins and ends, which is not quite at KVM's tracepoints.

pub mod kernel;

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail, ensure};

/// Enough for 100,000 exits: an entry and an exit take some 130 bytes.
const BUFFER_KIB_PER_CPU: &str = "16384";

/// What the thread did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// `kvm_entry`: KVM is about to enter the guest.
    Entry,
    /// `kvm_exit`: the guest has been left.
    Exit,
    /// `sched_switch`: the thread leaves its CPU.
    SwitchOut,
    /// `sched_switch`: the thread is put on a CPU.
    SwitchIn,
}

/// When it did so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// The host's TSC.
    pub tsc: u64,
    /// What happened.
    pub what: What,
}

/// A recording under way; dropped, it leaves nothing behind.
#[derive(Debug)]
pub struct Trace {
    instance: PathBuf,
}

/// KVM's tracepoints, and the scheduler's.
const EVENTS: [&str; 3] = ["kvm/kvm_entry", "kvm/kvm_exit", "sched/sched_switch"];

impl Trace {
    /// Starts to record the threads `tids` (as the initial PID namespace knows them).
    ///
    /// # Errors
    /// The file of tracefs that refused, and why.
    pub fn start(tids: &[i32]) -> Result<Self> {
        Self::begin(tids, &EVENTS)
    }

    /// Starts to record the threads that this one is going to start: one that is not there yet can be recorded from its
    /// first step.
    ///
    /// # Errors
    /// The file of tracefs that refused, and why.
    pub fn start_for_children() -> Result<Self> {
        Self::begin(&[rustix::thread::gettid().as_raw_nonzero().get()], &EVENTS)
    }

    fn begin(tids: &[i32], events: &[&str]) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let instance =
            Path::new("/sys/kernel/tracing/instances").join(format!("chronovisor-{}-{n}", std::process::id()));
        fs::create_dir(&instance).with_context(|| format!("cannot create {}", instance.display()))?;
        let trace = Self { instance };
        trace.set("tracing_on", "0")?;
        trace.set("trace_clock", "x86-tsc")?;
        trace.set("buffer_size_kb", BUFFER_KIB_PER_CPU)?;
        // A thread that a recorded one starts is recorded too.
        trace.set("options/event-fork", "1")?;
        let tids: Vec<_> = tids.iter().map(i32::to_string).collect();
        trace.set("set_event_pid", &tids.join(" "))?;
        for event in events {
            trace.set(&format!("events/{event}/enable"), "1")?;
        }
        trace.set("tracing_on", "1")?;
        Ok(trace)
    }

    /// Ends the recording: what thread `tid` did, in order.
    ///
    /// # Errors
    /// What could not be read; a line that was not understood; records that were lost.
    pub fn stop(&self, tid: i32) -> Result<Vec<Event>> {
        let mut events = Vec::new();
        self.each_line(|line| {
            events.extend(parse(line, tid)?);
            Ok(())
        })?;
        Ok(events)
    }

    /// Ends the recording and hands on its lines.
    fn each_line(&self, mut take: impl FnMut(&str) -> Result<()>) -> Result<()> {
        self.set("tracing_on", "0")?;
        self.nothing_lost()?;
        let path = self.instance.join("trace");
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        for line in BufReader::with_capacity(1 << 20, file).lines() {
            let line = line.with_context(|| format!("cannot read {}", path.display()))?;
            if !line.starts_with('#') && !line.is_empty() {
                take(&line).with_context(|| format!("cannot understand the trace's line {line:?}"))?;
            }
        }
        Ok(())
    }

    fn set(&self, file: &str, value: &str) -> Result<()> {
        let path = self.instance.join(file);
        fs::write(&path, value).with_context(|| format!("cannot write {value} to {}", path.display()))
    }

    fn nothing_lost(&self) -> Result<()> {
        for cpu in fs::read_dir(self.instance.join("per_cpu")).context("cannot read the trace's per_cpu")? {
            let path = cpu?.path().join("stats");
            let stats = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            for line in stats.lines() {
                let (name, value) = line.split_once(": ").unwrap_or((line, ""));
                if ["overrun", "commit overrun", "dropped events"].contains(&name) {
                    ensure!(
                        value.trim() == "0",
                        "the trace has lost records: {}: {line}",
                        path.display()
                    );
                }
            }
        }
        Ok(())
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // It takes its events with it. That it should fail is no reason for a test to.
        let _ = fs::remove_dir(&self.instance);
    }
}

/// One line, `vcpu0-84 [001] d..1. 123456789: kvm_entry: vcpu 0, rip 0x10000`: who, when, its name and text.
fn cut(line: &str) -> Result<(i32, u64, &str, &str)> {
    let mut parts = line.splitn(3, ": ");
    let (Some(before), Some(name), Some(text)) = (parts.next(), parts.next(), parts.next()) else {
        bail!("it has no stamp, name and text");
    };
    let tsc = before.split_whitespace().last().unwrap_or_default();
    let tsc = tsc.parse().with_context(|| format!("{tsc:?} is no stamp"))?;
    // The thread's name may hold anything; what follows it does not.
    let who = before.rsplit_once('[').and_then(|(who, _)| who.trim().rsplit_once('-'));
    let tid = who
        .and_then(|(_, tid)| tid.parse().ok())
        .context("it names no thread")?;
    Ok((tid, tsc, name, text))
}

/// What thread `tid` did by this line, if anything.
fn parse(line: &str, tid: i32) -> Result<Option<Event>> {
    let (by, tsc, name, text) = cut(line)?;
    let is = |field: &str| text.split_whitespace().any(|word| word == format!("{field}={tid}"));
    let what = match name {
        "kvm_entry" if by == tid => What::Entry,
        "kvm_exit" if by == tid => What::Exit,
        "sched_switch" if is("prev_pid") => What::SwitchOut,
        "sched_switch" if is("next_pid") => What::SwitchIn,
        "kvm_entry" | "kvm_exit" | "sched_switch" => return Ok(None),
        _ => bail!("{name} was not asked for"),
    };
    Ok(Some(Event { tsc, what }))
}

/// The thread's slices in the guest, `[from, to)` in ticks, by the rule of `accounting::probe::bpf`: an entry opens one
/// unless one is open, an exit or a switch closes it. The last has no end where the trace ends inside it.
pub fn slices(events: &[Event]) -> impl Iterator<Item = (u64, Option<u64>)> {
    let mut events = events.iter();
    std::iter::from_fn(move || {
        let from = events.find(|event| event.what == What::Entry)?.tsc;
        let to = events.find(|event| matches!(event.what, What::Exit | What::SwitchOut));
        Some((from, to.map(|event| event.tsc)))
    })
}

/// Guest time of the slices that ended, in ticks.
#[must_use]
pub fn guest_ticks(events: &[Event]) -> u64 {
    slices(events).filter_map(|(from, to)| Some(to? - from)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_tracer_are_understood() {
        let events = [
            (
                "          vcpu0-84      [001] d..1. 5000000001: kvm_entry: vcpu 0, rip 0x10000",
                What::Entry,
            ),
            (
                "          vcpu0-84      [001] ..... 5000000001: kvm_exit: vcpu 0 reason io rip 0x10013",
                What::Exit,
            ),
            (
                "   kworker/1:1-21      [001] d..2. 5000000001: sched_switch: prev_comm=kworker/1:1 prev_pid=21 prev_prio=120 \
                 prev_state=I ==> next_comm=vcpu0 next_pid=84 next_prio=120",
                What::SwitchIn,
            ),
            (
                "          vcpu0-84      [001] d..2. 5000000001: sched_switch: prev_comm=vcpu0 prev_pid=84 prev_prio=120 \
                 prev_state=S ==> next_comm=swapper/1 next_pid=0 next_prio=120",
                What::SwitchOut,
            ),
        ];
        for (line, what) in events {
            let tsc = 5_000_000_001;
            assert_eq!(parse(line, 84).expect(line), Some(Event { tsc, what }));
            assert_eq!(parse(line, 8).expect(line), None, "another thread's");
        }
        assert!(parse("CPU:1 [LOST 12 EVENTS]", 84).is_err());
    }

    #[test]
    fn guest_time_is_what_lies_between_an_entry_and_what_ends_it() {
        use What::{Entry, Exit, SwitchIn, SwitchOut};
        let events = [
            (10, Entry),
            (20, Entry), // KVM's fast path
            (30, Exit),
            (40, Entry),
            (45, SwitchOut),
            (60, SwitchIn),
            (61, Exit), // late
            (70, Entry),
        ]
        .map(|(tsc, what)| Event { tsc, what });
        let slices: Vec<_> = slices(&events).collect();
        assert_eq!(slices, [(10, Some(30)), (40, Some(45)), (70, None)]);
        assert_eq!(guest_ticks(&events), 20 + 5);
    }
}
