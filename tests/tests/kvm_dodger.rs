//! The tick dodger: a guest that burns between the host's ticks and sleeps across each one. A kernel that samples does not
//! see it; a reading charges it in full.
//!
//! Machines are noisy, and a dodger that is held up is caught like anybody else. So there are several rounds, and one
//! that the host disturbed is discarded, by figures that no reading had a part in: the guest's TSC, the clock around each
//! slice, and the scheduler's exact times.

use std::fmt::{self, Display, Formatter};

use accounting::host::HostCpus;
use accounting::reading::Source;
use tests::workload::{Burned, DODGER, run_traced};
use tests::{bed, require_bed};

/// A round takes some 1.3 s.
const ROUNDS: usize = 10;

/// One round, in the terms it is judged by.
struct Round(Burned);

impl Round {
    /// What disturbed it, if something did.
    fn disturbed(&self) -> Option<String> {
        let Self(b) = self;
        let least = b.burned_ns;
        // A slice that is caught is charged one tick, of 4/3 slices: of the 10 % that are allowed, 4 are left to chance.
        if b.dodged.caught * 100 > b.dodged.slices * 3 {
            return Some(format!("{} of {} slices were caught", b.dodged.caught, b.dodged.slices));
        }
        // What the guest lost it may have burned or not: with more of it, 1 % would say little.
        if b.most_ns() * 100 > least * 103 {
            return Some(format!("it lost {} us to others", b.lost_ns / 1_000));
        }
        // A wait for the CPU at the end of a sleep looks like VMM time on a CPU: `oncpu` takes it off guest time, to which it
        // adds the entries and exits. Half of the 1 % is left for it.
        let waited = b.counted(|k| k.run_delay_ns);
        if waited > b.exits_ns + least / 200 {
            return Some(format!("it waited {} us for its CPU", waited / 1_000));
        }
        // /proc/stat is of the CPU, whoever ran there.
        let others = self.others_ns();
        if others * 20 > least {
            return Some(format!("others ran on its CPU for {} us", others / 1_000));
        }
        None
    }

    /// For how long others ran on the CPU: the scheduler's and the idle loop's times are exact.
    fn others_ns(&self) -> u64 {
        let Self(b) = self;
        let elapsed = b.told.reading.at_ns - b.ready.reading.at_ns;
        elapsed.saturating_sub(b.counted(|k| k.idle_ns) + b.counted(|k| k.sched_ns))
    }
}

impl Display for Round {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self(b) = self;
        let us = |ns: u64| ns / 1_000;
        write!(
            f,
            "CPU {}: {} slices, {} caught; burned {} to {} us, entries and exits {} us",
            b.told.kernel.cpu,
            b.dodged.slices,
            b.dodged.caught,
            us(b.burned_ns),
            us(b.most_ns()),
            us(b.exits_ns)
        )?;
        if let Some(trace_ns) = b.trace_ns {
            write!(f, ", {} us by KVM's trace", us(trace_ns))?;
        }
        write!(
            f,
            "; /proc: utime {} us, stime {} us, gtime {} us; /proc/stat: {} us, others ran for {} us",
            us(b.counted(|k| k.utime_ns)),
            us(b.counted(|k| k.stime_ns)),
            us(b.counted(|k| k.gtime_ns)),
            us(b.counted(|k| k.charged_ns)),
            us(self.others_ns())
        )?;
        for figure in &b.told.figures {
            let [point, lower, upper] = [figure.point, figure.lower, figure.upper].map(us);
            write!(f, "; {}: {point} us in [{lower}, {upper}]", figure.source.name())?;
        }
        Ok(())
    }
}

#[test]
fn a_guest_that_dodges_every_tick_is_hidden_from_the_kernel_and_charged_in_full_here() {
    require_bed!(kvm);
    let host = HostCpus::read().expect("sysfs");
    // The kernel stamps on a nohz_full CPU and samples on any other: x86 has no CONFIG_VIRT_CPU_ACCOUNTING_NATIVE.
    let Some(&cpu) = host.allowed.iter().rfind(|&&cpu| !host.is_nohz_full(cpu)) else {
        return bed::skipped("kvm", "the kernel samples on no CPU of this host");
    };
    let mut why = String::new();
    for _ in 0..ROUNDS {
        let round = Round(run_traced(&DODGER, cpu).expect("the guest runs").remove(0));
        println!("{round}");
        match round.disturbed() {
            Some(disturbed) => why = disturbed,
            None => return check(&round),
        }
        println!("  discarded: {why}");
    }
    bed::skipped(
        "kvm",
        &format!("each of {ROUNDS} rounds was disturbed, the last: {why}"),
    );
}

fn check(round: &Round) {
    let Round(b) = round;
    let (least, most) = (b.burned_ns, b.most_ns());
    for (name, charged) in [
        ("gtime", b.counted(|k| k.gtime_ns)),
        ("/proc/stat", b.counted(|k| k.charged_ns)),
    ] {
        // Both ends are rounded down to 10 ms, which is 1.1 % of what was burned.
        assert!(
            charged * 10 < least,
            "the kernel saw it: {name} says {charged} ns: {round}"
        );
    }
    // Entering and leaving the guest takes a microsecond of a slice of 3 ms on a processor, some 20 on a software backend,
    // some 100 in an emulator. The guest does not see it, and no source can tell all of it from guest time.
    let most = most + b.exits_ns;
    for figure in &b.told.figures {
        let source = figure.source.name();
        assert!(
            figure.point * 100 >= least * 99 && figure.point * 100 <= most * 101,
            "{source} is not within 1 %: {round}"
        );
        assert!(
            figure.lower <= most && least <= figure.upper,
            "{source} is not true: {round}"
        );
        // KVM's tracepoints see what entering and leaving takes as `bpf` does.
        if let (Source::Bpf, Some(trace)) = (figure.source, b.trace_ns) {
            assert!(
                figure.point.abs_diff(trace) * 100 <= trace,
                "{source} is not within 1 % of the trace, {trace} ns: {round}"
            );
        }
    }
}
