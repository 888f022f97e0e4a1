//! The true guest time is inside the bounds of every reading: in the emulated `nohz_full` host, against the kernel's tracer.
//!
//! Each source has its own beginning and end of guest time (`accounting::split::claims`), so each is held against stamps
//! at just those: `bpf` against KVM's tracepoints, `vtime` and `oncpu` against where the kernel's own accounting turns.
//! The truth itself is an interval, since a stamp of the tracer is never of the same nanosecond as the one it is to check:
//! one recording's probes run before and one's after.

use std::thread::sleep;
use std::time::Duration;

use accounting::account::Explained;
use accounting::clock::{Instant, Scale, ticks};
use accounting::reading::{Bounds, Source};
use accounting::{Gtime, GtimeSource};
use tests::flat::{Guest, Program};
use tests::require_bed;
use tests::trace::Trace;
use tests::trace::kernel::{Recording, Stay, between, guest_ticks_until};

/// The isolated CPU: `nohz_full=1,2 isolcpus=1,2`.
const CPU: u32 = 1;

/// A reading taken apart, and when it was made, in ticks: not before, not after.
struct Sample {
    made: [u64; 2],
    explained: Explained,
}

/// What the tracer saw, and what was read meanwhile.
struct Run {
    samples: Vec<Sample>,
    /// Between KVM's tracepoints.
    kvm: Vec<Stay>,
    /// Between the kernel's own stamps.
    kernel: Vec<Stay>,
    scale: Scale,
    /// By how many nanoseconds the figures may differ for the clocks' sake.
    slack_ns: u64,
}

/// Both clocks at once, the closest of a hundred, and how many ticks that took.
fn paired() -> (Instant, u64) {
    let pair = |()| {
        let (before, now) = (ticks(), Instant::now());
        (now, ticks() - before)
    };
    let pairs = [(); 100].map(pair);
    *pairs.iter().min_by_key(|(_, apart)| *apart).expect("a hundred")
}

impl Run {
    fn of(program: &Program, samples: usize) -> Self {
        let before = Trace::start_for_children().expect("tracefs");
        let gtime = Gtime::prepare(GtimeSource::Auto);
        let guest = Guest::by(program, Some(CPU), gtime).unwrap_or_else(|error| panic!("{error:#}"));
        let tid = guest.read().tid;
        let after = Trace::start(&[tid]).expect("tracefs");
        let kernel = Recording::start(&[tid]).expect("tracefs, and kprobes");
        let (from, from_apart) = paired();
        guest.vcpu.resume();
        let samples = (0..samples).filter_map(|i| {
            sleep(Duration::from_millis(2 + i as u64 % 7));
            let begun = ticks();
            let explained = guest.vcpu.account().explain()?;
            let made = [begun, ticks()];
            Some(Sample { made, explained })
        });
        let samples: Vec<_> = samples.collect();
        guest.vcpu.pause();
        let (to, to_apart) = paired();
        let kernel = kernel.stop(tid).expect("the whole trace");
        let [before, after] = [before, after].map(|trace| trace.stop(tid).expect("the whole trace"));
        let kvm = between(&before, &after).expect("the same slices");
        // Each stamp of the programs is rounded down to a nanosecond; 2 more a stay are the kernel's
        // (Documentation/core-api/timekeeping.rst, ktime_get_mono_fast_ns: not quite monotone at an update). Each of the two pairs
        // of clocks may be as far apart as it took to read, which scales with the share of the time that was guest: at most 1.
        let scale = Scale::of(from, to);
        let slack_ns = 3 * kvm.len() as u64 + scale.to_ns(from_apart + to_apart);
        Self {
            samples,
            kvm,
            kernel,
            scale,
            slack_ns,
        }
    }

    /// The true guest time at a sample, by the stamps that `source` is held against, in nanoseconds.
    fn truth(&self, source: Source, sample: &Sample) -> Bounds {
        let stays = match source {
            Source::Bpf => &self.kvm,
            Source::Vtime | Source::Oncpu => &self.kernel,
        };
        let [lower, upper] = guest_ticks_until(stays, sample.made).map(|ticks| self.scale.to_ns(ticks));
        Bounds { lower, upper }
    }

    /// Whether the truth may be within `bounds`.
    fn may_hold(&self, bounds: Bounds, truth: Bounds) -> bool {
        truth.lower <= bounds.upper + self.slack_ns && bounds.lower <= truth.upper + self.slack_ns
    }

    /// Holds each claim of each sample against the truth, and says how wide both are in the end.
    fn check(&self, what: &str) {
        let width = |bounds: Bounds| bounds.upper - bounds.lower;
        for source in Source::ALL {
            let mut last = None;
            for sample in &self.samples {
                let claims = &sample.explained.explain.sources;
                let claim = claims.iter().find(|claim| claim.source == source).expect("each source");
                let bounds = claim.gtime_bounds_ns.expect("each source is there in this bed");
                let truth = self.truth(source, sample);
                assert!(
                    self.may_hold(bounds, truth),
                    "{what}, {}: {bounds:?}, the truth {truth:?}; {:#?}",
                    source.name(),
                    sample.explained
                );
                last = Some((bounds, truth));
            }
            let (bounds, truth) = last.expect("samples");
            println!(
                "{what}, {}: the truth, known to {} ns after {} stays, was in the bounds of all {} samples; {} ns apart at last",
                source.name(),
                width(truth),
                self.kvm.len(),
                self.samples.len(),
                width(bounds),
            );
        }
        for sample in &self.samples {
            let reading = &sample.explained.reading;
            assert_eq!(reading.source, Source::Bpf);
            let truth = self.truth(Source::Bpf, sample);
            assert!(
                self.may_hold(reading.gtime_bounds_ns, truth),
                "{what}: {reading:#?}, the truth {truth:?}"
            );
        }
    }
}

#[test]
fn the_truth_is_inside_the_bounds_of_every_reading_of_a_guest_that_spins() {
    require_bed!(nohz_full);
    Run::of(&Program::spin_forever(), 300).check("spin");
}

#[test]
fn the_truth_is_inside_the_bounds_of_every_reading_of_a_guest_that_exits_now_and_then() {
    require_bed!(nohz_full);
    // 10 ms at a GHz or so: some hundred exits a second.
    Run::of(&Program::spin_for(10_000_000, 0), 300).check("spin, exit");
}

#[test]
fn the_truth_is_inside_the_bounds_of_every_reading_of_a_guest_that_exits_all_the_time() {
    require_bed!(nohz_full);
    Run::of(&Program::exit_storm(0), 300).check("exit storm");
}
