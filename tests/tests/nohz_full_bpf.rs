//! The BPF probe in the emulated `nohz_full` host, against what the kernel's tracer saw of the same run.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use accounting::clock::ticks;
use accounting::probe::bpf::{Meter, Tracked};
use accounting::probe::{ThreadClock, Which, parse_stat};
use rustix::time::{ClockId, clock_gettime};
use tests::flat::{Event, Guest, Program};
use tests::require_bed;
use tests::trace::{self, Trace};
use tests::vm::PATIENCE;

/// The isolated CPU: `nohz_full=1,2 isolcpus=1,2`.
const CPU: u32 = 1;

/// The clock that BPF's stamps are of.
fn monotonic_ns() -> u64 {
    let t = clock_gettime(ClockId::Monotonic);
    t.tv_sec.unsigned_abs() * 1_000_000_000 + t.tv_nsec.unsigned_abs()
}

fn held(program: &Program) -> (Guest, i32) {
    let guest = Guest::new(program, Some(CPU)).unwrap_or_else(|error| panic!("{error:#}"));
    let tid = guest.read().tid;
    (guest, tid)
}

fn until_done(guest: &Guest) {
    while guest.next() != Event::Done {}
}

/// One run of a program, from its first entry until it is held again, as everybody saw it.
struct Run {
    slices: u64,
    trace_ns: f64,
    bpf_ns: f64,
    /// utime less the VMM's wall time outside KVM_RUN.
    virt_less_vmm_ns: f64,
    /// guest_time of /proc, in units of 10 ms.
    gtime_ns: f64,
    exits: u64,
}

#[expect(clippy::cast_precision_loss, reason = "figures to print and compare, far below 2^53")]
fn run(program: &Program) -> Run {
    let meter = Meter::attach().expect("root, and the kvm module is loaded");
    let (guest, tid) = held(program);
    let tracked = meter.track(tid).expect("a vCPU thread of ours");
    let recording = Trace::start(tid).expect("tracefs");
    let virt = ThreadClock::new(tid, Which::Virt);
    let kernel = || {
        let stat = fs::read(format!("/proc/self/task/{tid}/stat")).expect("the thread is there");
        let gtime_ns = parse_stat(&stat).expect("the kernel's text").guest_time_clk * 10_000_000;
        (virt.read_ns().expect("a thread of ours"), gtime_ns)
    };
    let (virt_before, gtime_before) = kernel();
    let (from_ticks, from_ns) = (ticks(), monotonic_ns());
    guest.vcpu.resume();
    until_done(&guest);
    guest.vcpu.pause();
    let (to_ticks, to_ns) = (ticks(), monotonic_ns());
    let (virt_after, gtime_after) = kernel();
    let reading = guest.read();
    let time = tracked.read().expect("nobody writes");
    let events = recording.stop().expect("the whole trace");

    assert_eq!(time.began_ns, None, "the vCPU is held");
    let slices = trace::slices(&events).count() as u64;
    assert_eq!(
        time.sequence,
        slices * 2,
        "each slice opened and closed, as the tracer saw it"
    );
    let ns_per_tick = (to_ns - from_ns) as f64 / (to_ticks - from_ticks) as f64;
    let vmm_ns: u64 = reading.exits.by_reason.values().map(|exit| exit.vmm_ns).sum();
    Run {
        slices,
        trace_ns: trace::guest_ticks(&events) as f64 * ns_per_tick,
        bpf_ns: time.sum_ns as f64,
        virt_less_vmm_ns: (virt_after - virt_before) as f64 - vmm_ns as f64,
        gtime_ns: (gtime_after - gtime_before) as f64,
        exits: reading.exits.total,
    }
}

impl Run {
    #[expect(clippy::cast_precision_loss, reason = "a count of slices")]
    fn tell(&self, what: &str) {
        println!(
            "{what}: {} slices, {} exits, {:.0} ns of guest by the trace",
            self.slices, self.exits, self.trace_ns
        );
        for (name, ns) in [
            ("bpf", self.bpf_ns),
            ("VIRT - VMM", self.virt_less_vmm_ns),
            ("/proc gtime", self.gtime_ns),
        ] {
            let apart = ns - self.trace_ns;
            println!(
                "  {name}: {ns:.0} ns, {apart:+.0} ns from the trace, {:+.1} ns a slice",
                apart / self.slices as f64
            );
        }
    }
}

#[test]
fn bpf_charges_a_guest_that_spins_what_the_tracer_saw() {
    require_bed!(nohz_full);
    let tsc_khz = u64::from(held(&Program::spin_forever()).0.tsc_khz);
    let run = run(&Program::spin_for(tsc_khz * 1_000, 1));
    run.tell("spin for 1 s");
}

#[test]
fn bpf_charges_a_guest_that_exits_all_the_time_what_the_tracer_saw() {
    require_bed!(nohz_full);
    for _ in 0..3 {
        let run = run(&Program::exit_storm(40_000));
        run.tell("40,000 exits");
    }
}

#[test]
fn bpf_counts_an_open_slice_live_with_no_transition() {
    require_bed!(nohz_full);
    let meter = Meter::attach().expect("root, and the kvm module is loaded");
    let (guest, tid) = held(&Program::spin_forever());
    let tracked = meter.track(tid).expect("a vCPU thread of ours");
    guest.vcpu.resume();
    let read = || {
        // The clock first: what is read after it includes at least what was guest by then.
        let now = monotonic_ns();
        tracked.read().map(|time| (time, now))
    };
    let begun = Instant::now();
    let (mut first, mut last) = (None, 0);
    loop {
        assert!(begun.elapsed() < PATIENCE, "no slice of 20 ms");
        let Some((time, now)) = read() else { continue };
        assert!(time.at(now) >= last, "{} ns after {last} ns", time.at(now));
        last = time.at(now);
        match first {
            Some((sequence, then, at)) if time.began_ns.is_some() && sequence == time.sequence => {
                if now - then >= 20_000_000 {
                    assert_eq!(time.at(now) - at, now - then);
                    break;
                }
            }
            _ => first = time.began_ns.map(|_| (time.sequence, now, time.at(now))),
        }
    }
    println!("{:?}", tracked.read());
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

#[test]
fn bpf_leaves_nothing_attached_when_its_meter_is_dropped_or_its_process_killed() {
    const CHILD: &str = "CHRONOVISOR_TEST_ATTACH";
    require_bed!(nohz_full);
    let meter = Meter::attach().expect("root, and the kvm module is loaded");
    if std::env::var_os(CHILD).is_some() {
        println!("attached");
        sleep(PATIENCE);
        return;
    }
    let ours = attached_by("self");
    assert!(ours.len() == 3 && ours.is_subset(&programs()), "{ours:?}");
    drop(meter);
    wait_until_gone(&ours);

    let name = "bpf_leaves_nothing_attached_when_its_meter_is_dropped_or_its_process_killed";
    let mut child = Command::new(std::env::current_exe().expect("procfs"))
        .args([name, "--exact", "--nocapture"])
        .env(CHILD, "1")
        .stdout(Stdio::piped())
        .spawn()
        .expect("this program runs");
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    assert!(lines.any(|line| line.expect("text").contains("attached")));
    let theirs = attached_by(&child.id().to_string());
    assert!(theirs.len() == 3 && theirs.is_subset(&programs()), "{theirs:?}");
    child.kill().expect("it runs");
    child.wait().expect("it is ours");
    wait_until_gone(&theirs);
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
