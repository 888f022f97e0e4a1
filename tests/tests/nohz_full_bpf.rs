//! The BPF probe in the emulated `nohz_full` host, against what the kernel's tracer saw of the same run.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use accounting::clock::{monotonic_ns, ticks};
use accounting::probe::bpf::{Meter, Tracked};
use accounting::probe::{ThreadClock, Which, parse_stat};
use tests::flat::{Event, Guest, Program};
use tests::require_bed;
use tests::trace::{self, Trace};
use tests::vm::PATIENCE;

/// The isolated CPU: `nohz_full=1,2 isolcpus=1,2`.
const CPU: u32 = 1;

fn held(program: &Program) -> (Guest, i32) {
    let guest = Guest::new(program, Some(CPU)).unwrap_or_else(|error| panic!("{error:#}"));
    let tid = guest.read().tid;
    (guest, tid)
}

fn until_done(guest: &Guest) {
    while guest.next() != Event::Done {}
}

/// Both clocks at once: ticks, nanoseconds of the clock that BPF's stamps are of, and by how many ticks the two may be apart.
fn both_clocks() -> (u64, u64, u64) {
    let pair = |()| {
        let (before, ns, after) = (ticks(), monotonic_ns(), ticks());
        (before, ns, after - before)
    };
    let pairs = [(); 100].map(pair);
    *pairs.iter().min_by_key(|pair| pair.2).expect("a hundred")
}

/// One run of a program, from its first entry until it is held again, in nanoseconds of guest time.
struct Run {
    slices: u64,
    exits: u64,
    bpf: u64,
    /// The tracer's, of a probe before ours at each tracepoint, and of one after it.
    tracers: Option<[u64; 2]>,
    /// What the figure must lie between, by the two.
    bounds: Option<[u64; 2]>,
    /// utime, less the VMM's wall time outside KVM_RUN.
    virt_less_vmm: u64,
    /// guest_time of /proc, in units of 10 ms.
    gtime: u64,
}

/// At a tracepoint, probes run in the order they were registered in. So with one recording begun before the programs
/// are attached and one after, each of the programs' stamps lies between the two recordings' stamps of the same event.
fn run(program: &Program, traced: bool) -> Run {
    let (guest, tid) = held(program);
    let record = || traced.then(|| Trace::start(&[tid]).expect("tracefs"));
    let before = record();
    let meter = Meter::attach().expect("root, and the kvm module is loaded");
    let after = record();
    let tracked = meter.track(tid).expect("a vCPU thread of ours");
    let virt = ThreadClock::new(tid, Which::Virt);
    let kernel = || {
        let stat = fs::read(format!("/proc/self/task/{tid}/stat")).expect("the thread is there");
        let gtime = parse_stat(&stat).expect("the kernel's text").guest_time_clk * 10_000_000;
        (virt.read_ns().expect("a thread of ours"), gtime)
    };
    let (virt_before, gtime_before) = kernel();
    let (from_ticks, from_ns, from_apart) = both_clocks();
    guest.vcpu.resume();
    until_done(&guest);
    guest.vcpu.pause();
    let (to_ticks, to_ns, to_apart) = both_clocks();
    let (virt_after, gtime_after) = kernel();
    let reading = guest.read();
    let time = tracked.read().expect("nobody writes");
    assert_eq!(time.began_ns, None, "the vCPU is held");

    let vmm_ns: u64 = reading.exits.by_reason.values().map(|exit| exit.vmm_ns).sum();
    let mut run = Run {
        slices: time.sequence / 2,
        exits: reading.exits.total,
        bpf: time.sum_ns,
        tracers: None,
        bounds: None,
        virt_less_vmm: (virt_after - virt_before).saturating_sub(vmm_ns),
        gtime: gtime_after - gtime_before,
    };
    let (Some(before), Some(after)) = (before, after) else {
        return run;
    };
    let [before, after] = [before, after].map(|recording| recording.stop(tid).expect("the whole trace"));
    let to_ns = |ticks: u64| {
        let ns = u128::from(ticks) * u128::from(to_ns - from_ns) / u128::from(to_ticks - from_ticks);
        u64::try_from(ns).expect("less than 500 years")
    };
    run.tracers = Some([to_ns(trace::guest_ticks(&before)), to_ns(trace::guest_ticks(&after))]);
    let slices = |events| trace::slices(events).map(|(from, to)| (from, to.expect("the vCPU is held")));
    let count = |events| slices(events).count() as u64;
    assert_eq!(
        (time.sequence, count(&before)),
        (2 * count(&before), count(&after)),
        "each slice was opened and closed, as the tracer saw it"
    );
    let (mut least, mut most) = (0, 0);
    for (before, after) in slices(&before).zip(slices(&after)) {
        least += before.1.saturating_sub(after.0);
        most += after.1 - before.0;
    }
    // The two pairs of clocks may each be as far apart as they were read, which scales with the share of the time that
    // was guest: at most 1. Each stamp in nanoseconds is rounded down; 2 more a slice are the kernel's
    // (Documentation/core-api/timekeeping.rst, ktime_get_mono_fast_ns: not quite monotone at an update).
    let slack = to_ns(from_apart + to_apart) + 3 * run.slices;
    run.bounds = Some([to_ns(least).saturating_sub(slack), to_ns(most) + slack]);
    run
}

impl Run {
    #[expect(clippy::cast_precision_loss, reason = "printed only")]
    fn tell(&self, what: &str) {
        println!("{what}: {} exits, {} slices in the guest", self.exits, self.slices);
        let rows = [
            ("bpf", self.bpf),
            ("VIRT - VMM", self.virt_less_vmm),
            ("/proc gtime", self.gtime),
        ];
        let tracers = self
            .tracers
            .iter()
            .flat_map(|&[a, b]| [("tracer before", a), ("tracer after", b)]);
        for (name, ns) in rows.into_iter().chain(tracers) {
            let apart = ns as f64 - self.bpf as f64;
            println!(
                "  {name:13} {ns:>11} ns, {:+8.1} ns a slice from bpf",
                apart / self.slices as f64
            );
        }
    }

    /// No tolerance but the clocks': the programs ran between the two recordings' probes.
    fn check(&self) {
        let [least, most] = self.bounds.expect("it was traced");
        println!("  bpf must be from {least} to {most} ns");
        assert!((least..=most).contains(&self.bpf), "{} ns", self.bpf);
    }
}

#[test]
fn bpf_charges_a_guest_that_spins_what_the_tracer_saw() {
    require_bed!(nohz_full);
    let tsc_khz = u64::from(held(&Program::spin_forever()).0.tsc_khz);
    let spin = Program::spin_for(tsc_khz * 1_000, 1);
    run(&spin, false).tell("spin for 1 s, no tracer");
    let traced = run(&spin, true);
    traced.tell("spin for 1 s");
    traced.check();
}

#[test]
fn bpf_charges_a_guest_that_exits_all_the_time_what_the_tracer_saw() {
    require_bed!(nohz_full);
    let storm = Program::exit_storm(40_000);
    run(&storm, false).tell("40,000 exits, no tracer");
    let traced = run(&storm, true);
    traced.tell("40,000 exits");
    traced.check();
}

#[test]
fn bpf_counts_an_open_slice_live_with_no_transition() {
    /// Longer than anything but a tickless guest stays in the guest at HZ=250.
    const LONG_NS: u64 = 20_000_000;
    require_bed!(nohz_full);
    let meter = Meter::attach().expect("root, and the kvm module is loaded");
    let (guest, tid) = held(&Program::spin_forever());
    let tracked = meter.track(tid).expect("a vCPU thread of ours");
    guest.vcpu.resume();
    let begun = Instant::now();
    let mut first = None;
    loop {
        assert!(begun.elapsed() < PATIENCE, "no slice of 20 ms: {:?}", tracked.read());
        let now = monotonic_ns();
        let Some(time) = tracked.read() else { continue };
        if time.began_ns.is_none_or(|began| began > now) {
            continue;
        }
        match first {
            Some((sequence, then, at)) if sequence == time.sequence => {
                assert_eq!(time.at(now) - at, now - then, "it grows as the clock does");
                if now - then >= LONG_NS {
                    break;
                }
            }
            _ => first = Some((time.sequence, now, time.at(now))),
        }
    }
}

/// The BPF programs in the kernel, by id.
#[expect(unsafe_code, reason = "no safe wrapper for bpf(2) exists")]
fn programs() -> BTreeSet<u32> {
    const BPF_PROG_GET_NEXT_ID: libc::c_long = 11;
    let mut ids = BTreeSet::new();
    // start_id, next_id, open_flags of union bpf_attr.
    let mut attr = [0u32; 3];
    // SAFETY: the attribute is ours, of the size given, and holds no address.
    while unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_GET_NEXT_ID,
            attr.as_mut_ptr(),
            size_of_val(&attr),
        )
    } == 0
    {
        ids.insert(attr[1]);
        attr[0] = attr[1];
    }
    ids
}

/// Those that a process' descriptors attach, as /proc/PID/fdinfo tells.
fn attached_by(process: &str) -> BTreeSet<u32> {
    let descriptors = fs::read_dir(format!("/proc/{process}/fdinfo")).expect("procfs");
    let info = descriptors.filter_map(|entry| fs::read_to_string(entry.expect("an entry").path()).ok());
    info.filter(|text| text.contains("link_type:"))
        .filter_map(|text| {
            let id = text.lines().find_map(|line| line.strip_prefix("prog_id:"))?;
            Some(id.trim().parse().expect("a program's id"))
        })
        .collect()
}

/// The kernel frees a program some time after its last user is gone.
fn wait_until_gone(ids: &BTreeSet<u32>) {
    let begun = Instant::now();
    while !programs().is_disjoint(ids) {
        assert!(begun.elapsed() < PATIENCE, "{ids:?} are still loaded");
        sleep(Duration::from_millis(10));
    }
}

/// Set in the processes that a test starts, which run that same test.
const INNER: &str = "CHRONOVISOR_TEST_INNER";

/// `command`, given this program and the one test to run of it.
fn this_test(command: &mut Command, name: &str) -> Child {
    command
        .args([name, "--exact", "--nocapture"])
        .env(INNER, "1")
        .stdout(Stdio::piped())
        .spawn()
        .expect("this program runs")
}

fn this_program() -> PathBuf {
    std::env::current_exe().expect("procfs")
}

#[test]
fn bpf_leaves_nothing_attached_when_its_meter_is_dropped_or_its_process_killed() {
    require_bed!(nohz_full);
    let meter = Meter::attach().expect("root, and the kvm module is loaded");
    if std::env::var_os(INNER).is_some() {
        println!("attached");
        sleep(PATIENCE);
        return;
    }
    let ours = attached_by("self");
    assert!(ours.len() == 3 && ours.is_subset(&programs()), "{ours:?}");
    drop(meter);
    wait_until_gone(&ours);

    let name = "bpf_leaves_nothing_attached_when_its_meter_is_dropped_or_its_process_killed";
    let mut child = this_test(&mut Command::new(this_program()), name);
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    assert!(lines.any(|line| line.expect("text").contains("attached")));
    let theirs = attached_by(&child.id().to_string());
    assert!(theirs.len() == 3 && theirs.is_subset(&programs()), "{theirs:?}");
    child.kill().expect("it runs");
    child.wait().expect("it is ours");
    wait_until_gone(&theirs);
}

#[test]
fn bpf_knows_its_threads_inside_a_pid_namespace() {
    require_bed!(nohz_full);
    if std::env::var_os(INNER).is_some() {
        assert_eq!(std::process::id(), 1, "the first process of its namespace");
        let run = run(&Program::exit_storm(100), false);
        assert!(
            run.slices >= 100 && run.bpf > 0,
            "{} slices, {} ns",
            run.slices,
            run.bpf
        );
        return;
    }
    let mut command = Command::new("busybox");
    command
        .args(["unshare", "--mount", "--pid", "--fork", "--mount-proc"])
        .arg(this_program());
    let child = this_test(&mut command, "bpf_knows_its_threads_inside_a_pid_namespace");
    let output = child.wait_with_output().expect("it is ours");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// Ticks from the vCPU's release to its report of `exits` exits.
fn storm_ticks(exits: u64, meter: Option<&Arc<Meter>>) -> u64 {
    let (guest, tid) = held(&Program::exit_storm(exits));
    let _tracked: Option<Tracked> = meter.map(|meter| meter.track(tid).expect("a vCPU thread of ours"));
    let begun = ticks();
    guest.vcpu.resume();
    match guest.next() {
        Event::Report(report) => report.told.tsc - begun,
        event => panic!("the guest reports, and not {event:?}"),
    }
}

/// Not a promise but a figure: it depends on the processor, and an emulated one is none to judge by.
#[test]
fn what_bpf_costs_an_exit_is_told() {
    require_bed!(nohz_full);
    const EXITS: u64 = 20_000;
    const ROUNDS: usize = 5;
    let (mut without, mut with): (Vec<_>, Vec<_>) = (0..ROUNDS)
        .map(|_| {
            let without = storm_ticks(EXITS, None);
            let meter = Meter::attach().expect("root, and the kvm module is loaded");
            (without, storm_ticks(EXITS, Some(&meter)))
        })
        .unzip();
    without.sort_unstable();
    with.sort_unstable();
    let (without, with) = (without[ROUNDS / 2], with[ROUNDS / 2]);
    println!(
        "an exit takes {} ticks without the programs, {} with them: {}.{:02} times as long",
        without / EXITS,
        with / EXITS,
        with / without,
        with * 100 / without % 100
    );
}
