//! vCPUs put on other host CPUs over the API, in the emulated `nohz_full` host: the very next reading is of the new place,
//! by the source that it allows, and no law is broken on the way, in either direction.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::Duration;

use accounting::host::{CpuSet, run_on, tick_ns};
use accounting::reading::{Bounds, Reading, Source, VcpuState};
use accounting::{Gtime, GtimeSource, laws};
use serde_json::json;
use tests::bed::Folder;
use tests::client::Response;
use tests::flat::{Guest, Program};
use tests::interrupts;
use tests::over::SetWhenDropped;
use tests::require_bed;
use tests::vm::Vm;

/// The two that are tickless and isolated, and the one that keeps house.
const TICKLESS: u32 = 1;
const OTHER_TICKLESS: u32 = 2;
const HOUSEKEEPING: u32 = 0;
/// `/proc/PID/stat` counts in units of 10 ms.
const STAT_UNIT_NS: u64 = 10_000_000;

fn put(vm: &Vm, index: u32, place: &str) -> Response {
    let (path, body) = (format!("/vcpus/{index}/affinity"), format!(r#"{{"cpu": {place}}}"#));
    vm.ask("PUT", &path, Some(&body))
}

fn width(reading: &Reading) -> u64 {
    let Bounds { lower, upper } = reading.gtime_bounds_ns;
    upper - lower
}

/// The next reading is of `cpu`.
fn assert_on(reading: &Reading, cpu: u32) {
    let host = reading.host_cpu;
    let tickless = cpu != HOUSEKEEPING;
    let source = if tickless { Source::Vtime } else { Source::Oncpu };
    assert_eq!(
        (host.cpu, host.pinned, host.nohz_full, host.isolated, reading.source),
        (cpu, true, tickless, tickless, source),
        "{reading:#?}"
    );
    // That a tick is stopped has to show first: until then nothing is claimed.
    let tick_stopped = host.tick_stopped;
    assert!(
        tick_stopped == Some(false) || tickless && tick_stopped != Some(false),
        "{reading:#?}"
    );
}

#[test]
fn a_running_vcpu_is_put_on_another_cpu_and_the_very_next_reading_is_of_it() {
    require_bed!(nohz_full);
    let mut vm = Vm::flat(&Program::spin_forever(), ["--pin", "1"]);
    assert_on(&vm.reading(), TICKLESS);
    for cpu in [
        HOUSEKEEPING,
        TICKLESS,
        OTHER_TICKLESS,
        HOUSEKEEPING,
        OTHER_TICKLESS,
        TICKLESS,
    ] {
        let answer = put(&vm, 0, &cpu.to_string());
        assert_eq!(answer.status, 204, "{}", answer.fault());
        assert_on(&vm.reading(), cpu);
        assert_eq!(vm.ask("GET", "/vcpus/0/affinity", None).body, json!({ "cpu": cpu }));
        let explained = vm.ask("GET", "/vcpus/0/cputime?explain=1", None).body;
        let ran_on = &explained["explain"]["probes"]["stat_processor"];
        assert_eq!(ran_on, cpu, "and it does run there");
        sleep(Duration::from_millis(50));
        assert_on(&vm.reading(), cpu);
    }
    // An outside move could be missed for a second; these are none, and are not taken for any.
    let host = vm.ask("GET", "/host", None).body;
    assert_eq!(host["disturbances"], json!([]), "{host}");
    vm.wait_until("the tick is seen to be stopped again", |vm| {
        vm.reading().host_cpu.tick_stopped == Some(true)
    });
    let (ticks, before) = (interrupts::count("LOC", TICKLESS), vm.reading());
    sleep(Duration::from_secs(1));
    let ticks = interrupts::count("LOC", TICKLESS) - ticks;
    let after = vm.reading();
    println!(
        "{ticks} local timer interrupts in {} ms",
        (after.elapsed_ns - before.elapsed_ns) / 1_000_000
    );
    assert!(ticks < 25, "{ticks}");
    assert!(
        after.gtime_bounds_ns.lower > before.gtime_bounds_ns.lower,
        "it is proved again: {after:#?}"
    );
}

#[test]
fn a_vcpu_that_is_paused_or_halted_is_where_it_was_put_before_it_runs_there() {
    require_bed!(nohz_full);
    let mut vm = Vm::flat(&Program::spin_forever(), ["--pin", "1"]);
    assert_eq!(vm.ask("PATCH", "/vm", Some(r#"{"state": "Paused"}"#)).status, 204);
    for cpu in [OTHER_TICKLESS, HOUSEKEEPING, TICKLESS] {
        assert_eq!(put(&vm, 0, &cpu.to_string()).status, 204);
        for _ in 0..3 {
            let reading = vm.reading();
            assert_eq!(reading.state, VcpuState::Paused);
            assert_on(&reading, cpu);
        }
    }
    assert_eq!(put(&vm, 0, "2").status, 204);
    assert_eq!(vm.ask("PATCH", "/vm", Some(r#"{"state": "Resumed"}"#)).status, 204);
    sleep(Duration::from_millis(100));
    // By now it has gone there of its own accord, which is no outside move.
    assert_eq!(vm.ask("GET", "/host", None).body["disturbances"], json!([]));
    assert_on(&vm.reading(), OTHER_TICKLESS);
}

#[test]
fn a_vcpu_moved_from_outside_has_its_claim_back_once_it_is_put_through_the_api() {
    require_bed!(nohz_full);
    let mut vm = Vm::flat(&Program::spin_forever(), ["--pin", "1"]);
    let tid = rustix::process::Pid::from_raw(vm.reading().tid);
    let mut mask = rustix::thread::CpuSet::new();
    mask.set(HOUSEKEEPING as usize);
    rustix::thread::sched_setaffinity(tid, &mask).expect("root may");
    vm.wait_until("the move is noticed", |vm| vm.reading().source == Source::Oncpu);
    let proved = vm.reading().gtime_bounds_ns.lower;
    assert_eq!(put(&vm, 0, "1").status, 204);
    assert_on(&vm.reading(), TICKLESS);
    vm.wait_until("guest time is proved again", |vm| {
        vm.reading().gtime_bounds_ns.lower > proved
    });
    assert_eq!(vm.ask("GET", "/host", None).body["disturbances"], json!([]));
}

#[test]
fn what_cannot_be_had_is_refused_in_words_and_the_vcpu_stays_put() {
    require_bed!(nohz_full);
    let mut vm = Vm::debian("sleep:60000", ["--cpus", "2", "--pin", "1,2"]);
    for (index, place, says) in [
        (
            0,
            "2",
            "cannot pin vCPU 0 to host CPU 2: vCPU 1 is pinned to it; move that one first, or name another CPU",
        ),
        (
            0,
            "7",
            "cannot pin to host CPU 7: there is no such CPU; this host has 0-2",
        ),
        (2, "0", "There is no vCPU \"2\": this microVM has 2, numbered 0 to 1."),
    ] {
        let answer = put(&vm, index, place);
        assert_eq!((answer.status, answer.fault()), (400, says));
    }
    let cpus = |vm: &mut Vm| vm.readings().iter().map(|r| r.host_cpu.cpu).collect::<Vec<_>>();
    assert_eq!(cpus(&mut vm), [1, 2]);
    // Unpinned, and then again the best that is left.
    assert_eq!(put(&vm, 0, r#""none""#).status, 204);
    assert_eq!(vm.ask("GET", "/vcpus/0/affinity", None).body, json!({ "cpu": "none" }));
    let reading = vm.reading();
    assert_eq!((reading.source, reading.host_cpu.pinned), (Source::Oncpu, false));
    assert_eq!(put(&vm, 0, r#""auto""#).status, 204);
    assert_on(&vm.reading(), TICKLESS);
}

/// This thread, and what it starts, may run on every CPU of the host; until dropped, when it is back on the one that keeps house.
struct Everywhere;

impl Everywhere {
    fn new() -> Self {
        run_on(&CpuSet::from([HOUSEKEEPING, TICKLESS, OTHER_TICKLESS])).expect("the CPUs are there");
        Self
    }
}

impl Drop for Everywhere {
    fn drop(&mut self) {
        run_on(&CpuSet::from([HOUSEKEEPING])).expect("the CPU is there");
    }
}

/// Every thread of the process, by its name, with the CPUs that it may run on as the kernel lists them.
fn affinities(vm: &Vm) -> Vec<(String, String)> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", vm.process.id())).expect("procfs");
    let read = |task: std::fs::DirEntry| {
        // One that has ended meanwhile has no affinity.
        let text = std::fs::read_to_string(task.path().join("status")).ok()?;
        let line = |name: &str| {
            text.lines()
                .find_map(|l| l.strip_prefix(name))
                .map(|l| l.trim().to_owned())
        };
        line("Name:").zip(line("Cpus_allowed_list:"))
    };
    tasks.filter_map(|task| read(task.expect("a thread"))).collect()
}

#[test]
fn everything_else_keeps_off_the_cpus_that_vcpus_are_put_on() {
    require_bed!(nohz_full);
    let folder = Folder::new();
    let path = folder.join("disk");
    File::create(&path)
        .and_then(|file| file.set_len(64 << 20))
        .expect("an image");
    let drive = json!({
        "drive_id": "disk", "path_on_host": path, "is_root_device": false, "io_engine": "Async", "cache_type": "Writeback",
    });
    // As a process is on a host whose CPUs are tickless, but not isolated: it starts with all of them.
    let everywhere = Everywhere::new();
    let mut vm = Vm::serve_debian("disk-verify:600000", json!({ "drives": [drive] }));
    drop(everywhere);
    vm.process.wait_for("chronovisor guest: disk-verify");
    let is_worker = |(name, _): &(String, String)| name.starts_with("iou-wrk");
    // vCPU 0 on the only one that keeps house: the others have the one that it left, and no other.
    for (place, vcpus, others) in [("1", ["1", "2"], "0"), ("0", ["0", "2"], "1"), ("1", ["1", "2"], "0")] {
        assert_eq!(put(&vm, 0, place).status, 204);
        let at_once = affinities(&vm);
        vm.wait_until("the disk is flushed", |vm| affinities(vm).iter().any(is_worker));
        let later = affinities(&vm);
        println!("vCPU 0 on {place}: {later:?}");
        for (name, cpus) in at_once.iter().chain(&later) {
            let expected = match name.as_str() {
                "vcpu0" => vcpus[0],
                "vcpu1" => vcpus[1],
                _ => others,
            };
            assert_eq!(
                cpus, expected,
                "{name} with vCPU 0 on {place}: {at_once:?}, then {later:?}"
            );
        }
        for expected in ["chronovisor", "signals", "console", "api", "vmm", "vcpu0", "vcpu1"] {
            assert!(
                later.iter().any(|(name, _)| name == expected),
                "{expected} of {later:?}"
            );
        }
    }
    // Unpinned, it has what is left of the process's CPUs.
    assert_eq!(put(&vm, 0, r#""none""#).status, 204);
    let now = affinities(&vm);
    let of = |name: &str| now.iter().find(|(n, _)| n == name).expect("the thread").1.clone();
    assert_eq!(
        (of("vcpu0"), of("vcpu1"), of("vmm")),
        ("0-1".into(), "2".into(), "0".into())
    );
}

/// A guest of this process, moved back and forth while others read it.
fn no_law_is_broken_by_moves(program: &Program, source: Source) {
    let gtime = Gtime::prepare(GtimeSource::From(source));
    assert_eq!(gtime.refused(), None);
    let guest = Guest::by(program, Some(TICKLESS), gtime).unwrap_or_else(|error| panic!("{error:#}"));
    guest.vcpu.resume();
    let (account, over) = (guest.vcpu.account(), AtomicBool::new(false));
    let reader = || {
        let (mut last, mut readings, mut broken) = (account.read(), 0_u64, Vec::new());
        while !over.load(Ordering::Relaxed) {
            let reading = account.read();
            if let Err(why) = laws::check_pair(&last, &reading) {
                broken.push(format!("{why}: {last:?} {reading:?}"));
            }
            (last, readings) = (reading, readings + 1);
        }
        (readings, broken)
    };
    let (mut moves, mut widths) = (0_u64, Vec::new());
    let (readings, broken) = scope(|scope| {
        let reader = scope.spawn(reader);
        let over_ = SetWhenDropped(&over);
        for round in 0..40 {
            for cpu in [HOUSEKEEPING, TICKLESS, OTHER_TICKLESS] {
                guest.vcpu.pin(cpu).expect("the CPU is there");
                let reading = account.read();
                assert_eq!((reading.host_cpu.cpu, reading.host_cpu.pinned), (cpu, true));
                if source == Source::Bpf {
                    assert_eq!(reading.source, source);
                } else {
                    assert_on(&reading, cpu);
                }
                moves += 1;
                sleep(Duration::from_millis(3 + round % 7));
            }
            widths.push(width(&account.read()));
        }
        drop(over_);
        reader.join().expect("a reader")
    });
    let last = account.read();
    println!(
        "source {}: {moves} moves, {readings} readings meanwhile, {} of which broke a law; bounds {} us apart after the first round, \
         {} us after the last, of {} ms of guest time",
        source.name(),
        broken.len(),
        widths[0] / 1_000,
        width(&last) / 1_000,
        last.modes.guest_ns / 1_000_000,
    );
    assert!(broken.is_empty(), "{}, the first: {}", broken.len(), broken[0]);
    assert!(readings > 100, "{readings}");
    // Telescoping (law 5): what is told of the time since is as exact as ever, however often it was moved before.
    if source == Source::Vtime {
        sleep(Duration::from_millis(200));
        let first = account.read();
        sleep(Duration::from_millis(500));
        let later = account.read();
        let grown = |of: fn(&Reading) -> u64| of(&later) - of(&first);
        let (lower, upper) = (grown(|r| r.gtime_bounds_ns.lower), grown(|r| r.gtime_bounds_ns.upper));
        // Each end moves in steps of the stat file's unit and of a tick. Not held against gtime: what was misplaced while nothing
        // could be proved is put right meanwhile.
        let slack = STAT_UNIT_NS + 2 * tick_ns();
        println!("since: lower end {lower} ns, upper end {upper} ns");
        assert!(lower > 0 && lower.abs_diff(upper) <= slack, "{lower} {upper}");
    }
}

#[test]
fn no_law_is_broken_by_vcpus_put_elsewhere_of_a_guest_that_spins() {
    require_bed!(nohz_full);
    no_law_is_broken_by_moves(&Program::spin_forever(), Source::Vtime);
}

#[test]
fn no_law_is_broken_by_vcpus_put_elsewhere_of_an_exit_storm() {
    require_bed!(nohz_full);
    no_law_is_broken_by_moves(&Program::exit_storm(0), Source::Vtime);
}

#[test]
fn no_law_is_broken_by_vcpus_put_elsewhere_by_bpf() {
    require_bed!(nohz_full);
    no_law_is_broken_by_moves(&Program::exit_storm(0), Source::Bpf);
}
