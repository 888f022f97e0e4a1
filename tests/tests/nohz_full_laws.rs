//! The laws of the ledger on a tickless CPU, in the emulated `nohz_full` host, under as much reading as that host can bear.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::scope;
use std::time::{Duration, Instant};

use accounting::host::tick_ns;
use accounting::probe::{ThreadClock, Which, parse_stat};
use accounting::reading::{Bounds, Reading, Source};
use accounting::{Account, Gtime, GtimeSource, laws};
use tests::flat::{Guest, Program};
use tests::require_bed;

/// The vCPU's, tickless and isolated.
const CPU: u32 = 1;
/// `/proc/PID/stat` counts in units of 10 ms.
const STAT_UNIT_NS: u64 = 10_000_000;

fn storm(source: Source) -> Guest {
    let gtime = Gtime::prepare(GtimeSource::From(source));
    assert_eq!(gtime.refused(), None);
    let guest = Guest::by(&Program::exit_storm(0), Some(CPU), gtime).unwrap_or_else(|error| panic!("{error:#}"));
    guest.vcpu.resume();
    guest
}

/// What one reader saw.
#[derive(Default)]
struct Seen {
    broken: Vec<String>,
    widest_ns: u64,
}

impl Seen {
    /// Reads `times` times, holds each reading against the one before, and wants all of them from `source`.
    fn read(account: &Account, times: u32, source: Source) -> Self {
        let mut seen = Self::default();
        let mut last = account.read();
        for _ in 0..times {
            let reading = account.read();
            if let Err(broken) = laws::check_pair(&last, &reading) {
                seen.broken.push(broken.to_string());
            }
            assert_eq!(reading.source, source, "{reading:#?}");
            seen.widest_ns = seen.widest_ns.max(width(&reading));
            last = reading;
        }
        seen
    }
}

fn width(reading: &Reading) -> u64 {
    let Bounds { lower, upper } = reading.gtime_bounds_ns;
    upper - lower
}

/// How often the kernel's own figures of a thread stepped back while `over` was false, and in how many reads.
#[derive(Debug, Default)]
struct StepsBack {
    reads: u64,
    virt: u64,
    prof: u64,
    stat_gtime: u64,
    sched: u64,
}

impl StepsBack {
    fn count(tid: i32, over: &AtomicBool) -> Self {
        let clocks = [Which::Virt, Which::Prof, Which::Sched].map(|which| ThreadClock::new(tid, which));
        let stat = format!("/proc/self/task/{tid}/stat");
        let gtime = || {
            parse_stat(&fs::read(&stat).expect("the thread is there"))
                .expect("the kernel's text")
                .guest_time_clk
        };
        let read = || {
            let [virt, prof, sched] = clocks.map(|clock| clock.read_ns().expect("the thread is there"));
            [virt, prof, sched, gtime()]
        };
        let mut last = read();
        let mut steps = Self::default();
        while !over.load(Ordering::Relaxed) {
            let now = read();
            let [virt, prof, sched, stat_gtime] = std::array::from_fn(|i| u64::from(now[i] < last[i]));
            steps.reads += 1;
            steps.virt += virt;
            steps.prof += prof;
            steps.sched += sched;
            steps.stat_gtime += stat_gtime;
            last = now;
        }
        steps
    }
}

fn no_law_is_broken(source: Source, readings: u32) -> u64 {
    let guest = storm(source);
    let tid = guest.read().tid;
    let over = AtomicBool::new(false);
    let begun = Instant::now();
    let (seen, steps) = scope(|scope| {
        let kernel = scope.spawn(|| StepsBack::count(tid, &over));
        let account = guest.vcpu.account();
        let readers = [(); 2].map(|()| scope.spawn(|| Seen::read(account, readings / 2, source)));
        let seen = readers.map(|reader| reader.join().expect("a reader"));
        over.store(true, Ordering::Relaxed);
        (seen, kernel.join().expect("the kernel's reader"))
    });
    let last = guest.read();
    let [one, other] = seen;
    let widest_ns = one.widest_ns.max(other.widest_ns);
    println!(
        "source {}: {readings} readings in {:.1} s over {} exits: {} broke a law; bounds at most {widest_ns} ns apart",
        source.name(),
        begun.elapsed().as_secs_f64(),
        last.exits.total,
        one.broken.len() + other.broken.len(),
    );
    println!(
        "the kernel's own figures in {} reads of the same run: raw VIRT stepped back {} times, PROF {}, /proc gtime {}, SCHED {}",
        steps.reads, steps.virt, steps.prof, steps.stat_gtime, steps.sched
    );
    let broken = [one.broken, other.broken].concat();
    assert!(
        broken.is_empty(),
        "{} of {readings}, the first: {}",
        broken.len(),
        broken[0]
    );
    widest_ns
}

#[test]
fn no_law_is_broken_in_half_a_million_readings_of_an_exit_storm_by_vtime_and_the_bounds_stay_narrow() {
    require_bed!(nohz_full);
    let widest_ns = no_law_is_broken(Source::Vtime, 500_000);
    assert!(widest_ns <= 2 * tick_ns() + STAT_UNIT_NS, "{widest_ns} ns");
}

#[test]
fn no_law_is_broken_in_readings_of_an_exit_storm_by_bpf() {
    require_bed!(nohz_full);
    no_law_is_broken(Source::Bpf, 100_000);
}
