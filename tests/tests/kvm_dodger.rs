//! The tick dodger: a guest that burns between the host's ticks and sleeps across each one. A kernel that samples does not
//! see it; a reading charges it in full.
//!
//! *Within 1 %.* What a reading says is held against what the guest burned and nothing else: by its own TSC, from the
//! steps that were its own to those and all that it lost (`Program::burn`), with no allowance for entering and leaving it.
//! Where KVM's tracepoints speak and the reading is by source `bpf`, which stamps there, it is held against the tracer's
//! stamps of the same; the guest's own are printed beside it. `oncpu` cannot tell an entry or an exit from guest time. A dodger
//! has one of each in a tick: 30 us on a software backend, 60 and more in an emulator, of 3.4 ms. Where they take
//! more than 1 % there is no telling whether a reading by `oncpu` is within 1 %, and the test says so and is skipped.
//!
//! The sources that the reading does not use are held to 1 % of what the guest burned with its entries and exits.
//!
//! Machines are noisy, and a dodger that is held up is caught like anybody else. So there are several rounds, and one
//! that the host disturbed is discarded, by figures that no reading had a part in: the guest's TSC, the clock around each
//! slice, the tracer, and the scheduler's exact times.

use std::fmt::{self, Display, Formatter};

use accounting::host::HostCpus;
use accounting::reading::{Bounds, Source};
use tests::workload::{Burned, DODGER, run_traced};
use tests::{bed, require_bed};

/// A round takes some 1.3 s.
const ROUNDS: usize = 20;

/// One round, in the terms it is judged by.
struct Round(Burned);

impl Round {
    /// Which source the reading is by.
    fn source(&self) -> Source {
        self.0.told.reading.source
    }

    /// What disturbed it, if something did.
    fn disturbed(&self) -> Option<String> {
        let Self(b) = self;
        let least = b.burned_ns;
        // A slice that is caught is charged one tick, of 20/17 slices: of the 10 % that are allowed, 5 are left to chance.
        if b.dodged.caught * 100 > b.dodged.slices * 4 {
            return Some(format!("{} of {} slices were caught", b.dodged.caught, b.dodged.slices));
        }
        // Of a truth that is not known to 1 % nothing can be said to 1 %.
        let truth = b.truth(self.source());
        if truth.upper * 100 > truth.lower * 101 {
            return Some(format!(
                "what it burned is known to {} us only",
                (truth.upper - truth.lower) / 1_000
            ));
        }
        // Where in the VMM or in KVM_RUN it waited for its CPU, `oncpu` can only guess, so a wait may be taken off guest time or added
        // to it. Half of the 1 % is left for that, so that it makes up for no more of what entries and exits add.
        let waited = b.counted(|k| k.run_delay_ns);
        if waited * 200 > least {
            return Some(format!("it waited {} us for its CPU", waited / 1_000));
        }
        // /proc/stat is of the CPU, whoever ran there.
        let others = self.others_ns();
        if others * 20 > least {
            return Some(format!("others ran on its CPU for {} us", others / 1_000));
        }
        None
    }

    /// Why this backend cannot be held to 1 %, if it cannot.
    fn too_coarse(&self) -> Option<String> {
        let Self(b) = self;
        let coarse = self.source() == Source::Oncpu && b.exits_ns * 100 > b.burned_ns;
        coarse.then(|| {
            format!(
                "entering and leaving the guest took {} us of {} us, more than 1 %, and source oncpu cannot tell it from guest time",
                b.exits_ns / 1_000,
                b.burned_ns / 1_000
            )
        })
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
        if let Some(traced) = b.traced {
            let Bounds { lower, upper } = traced.kvm;
            write!(f, ", {} to {} us by KVM's trace", us(lower), us(upper))?;
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
        for figure in b.grown() {
            let [point, lower, upper] = [figure.point, figure.lower, figure.upper].map(us);
            let source = figure.source.name();
            write!(f, "; {source}: {point} us in [{lower}, {upper}], ")?;
            write!(f, "{:+.2} % from what it burned", off(figure.point, b.own()))?;
            if b.traced.is_some() {
                write!(
                    f,
                    ", {:+.2} % from the trace",
                    off(figure.point, b.truth(figure.source))
                )?;
            }
        }
        Ok(())
    }
}

/// How far `ns` is outside of `truth`, in percent.
#[expect(clippy::cast_precision_loss, reason = "printed only")]
fn off(ns: u64, truth: Bounds) -> f64 {
    let nearest = ns.clamp(truth.lower, truth.upper);
    (ns as f64 - nearest as f64) / nearest as f64 * 100.0
}

/// Whether `ns` is within 1 % of what may be true.
fn within_1_percent(ns: u64, truth: Bounds) -> bool {
    ns * 100 >= truth.lower * 99 && ns * 100 <= truth.upper * 101
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
        if let Some(disturbed) = round.disturbed() {
            why = disturbed;
            println!("  discarded: {why}");
            continue;
        }
        check(&round);
        match round.too_coarse() {
            Some(coarse) => why = coarse,
            None => return check_within_1_percent(&round),
        }
        println!("  not held to 1 %: {why}");
    }
    bed::skipped("kvm", &format!("none of {ROUNDS} rounds will do, the last: {why}"));
}

/// What holds on every backend.
fn check(round: &Round) {
    let Round(b) = round;
    let least = b.burned_ns;
    for (name, charged) in [
        ("gtime", b.counted(|k| k.gtime_ns)),
        ("/proc/stat", b.counted(|k| k.charged_ns)),
    ] {
        // Both ends are rounded down to 10 ms, which is 1 % of what was burned.
        assert!(
            charged * 10 < least,
            "the kernel saw it: {name} says {charged} ns: {round}"
        );
    }
    let upper = b.most_ns() + b.exits_ns;
    for figure in b.grown() {
        let source = figure.source.name();
        assert!(
            within_1_percent(figure.point, Bounds { lower: least, upper }),
            "{source} is not within 1 % of what it burned with its entries and exits: {round}"
        );
        let truth = b.truth(figure.source);
        assert!(
            figure.lower <= truth.upper && truth.lower <= figure.upper,
            "{source} is not true: {round}"
        );
    }
}

/// What the reading says, against what it burned, and no more than that.
fn check_within_1_percent(round: &Round) {
    let Round(b) = round;
    let figures = b.grown();
    let figure = figures.iter().find(|figure| figure.source == round.source());
    let figure = figure.expect("the reading is by one of the sources");
    let truth = b.truth(figure.source);
    assert!(
        within_1_percent(figure.point, truth),
        "{} is not within 1 % of {truth:?}: {round}",
        figure.source.name()
    );
}
