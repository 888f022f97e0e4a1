//! Faults, on purpose: at a start, one at a time; and while a guest runs.
//!
//! `cargo xtask faults` has every fault point of a start fail, and writes docs/faults.md. Here some of them do, others in each run.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};
use tests::bed::{self, Folder};
use tests::faults::calls::{Effect, of_name};
use tests::faults::notify::{self, Fault};
use tests::faults::start::{Outcome, Way, points, start};
use tests::flat::{Program, RECORD, elf, record};
use tests::full::Disk;
use tests::seed::seed;
use tests::vm::{PATIENCE, Process, Vm, piped};
use tests::{client, network, require_bed};

/// How many of a start's fault points are tried in a run of the tests.
const TRIED: usize = 40;

#[test]
fn a_start_that_meets_a_fault_is_refused_clearly_and_leaves_nothing_or_goes_on_as_if_there_were_none() {
    require_bed!(kvm);
    let tap = network::own()
        .inspect_err(|why| println!("without a tap: {why}"))
        .is_ok();
    let seed = seed();
    let mut broken = Vec::new();
    for way in Way::ALL {
        let (outcome, seen) = start(way, tap, None);
        assert_eq!(outcome, Outcome::WentOn, "{}: without a fault", way.name());
        let points = points(&seen);
        let step = points.len().div_ceil(TRIED / 2);
        let first = usize::try_from(seed % step as u64).expect("less than `step`");
        let (mut refused, mut went_on) = (0, 0);
        for &fault in points.iter().skip(first).step_by(step) {
            let (outcome, seen) = start(way, tap, Some(fault));
            match (outcome, seen.hit) {
                (_, None) => {}
                (Outcome::Refused(_), _) => refused += 1,
                (Outcome::WentOn, _) => went_on += 1,
                (Outcome::Broken(why), Some(hit)) => {
                    broken.push(format!(
                        "{}: {} of {hit} ({}): {why}",
                        way.name(),
                        fault.effect.name(),
                        fault.nth
                    ));
                }
            }
        }
        println!(
            "{}: {} points; {refused} refused, {went_on} went on",
            way.name(),
            points.len()
        );
        assert!(refused > 0 && went_on > 0, "no fault happened");
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn a_vcpu_that_kvm_does_not_run_ends_the_microvm_in_one_line() {
    require_bed!(kvm);
    let call = of_name("KVM_RUN");
    for nth in [0, 1, 3] {
        let fault = Fault {
            call,
            nth,
            effect: Effect::Error(libc::EIO),
        };
        for way in Way::ALL {
            let (outcome, seen) = start(way, false, Some(fault));
            assert!(seen.hit.is_some_and(|hit| hit.starts_with("vcpu0: ")));
            let said =
                "KVM_RUN failed on vCPU 0: Input/output error (os error 5); look at the host's kernel log (`dmesg`)";
            assert_eq!(outcome, Outcome::Refused(said.into()));
        }
    }
}

/// A flat guest's configuration: `program`, and more sections.
fn config(folder: &Folder, program: &Program, more: Value) -> Value {
    let kernel = folder.write("kernel", elf(program));
    let mut config = json!({
        "boot-source": { "kernel_image_path": kernel, "boot_args": "quiet" },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 16 },
    });
    let (Some(sections), Value::Object(more)) = (config.as_object_mut(), more) else {
        panic!("sections are an object");
    };
    sections.extend(more);
    config
}

/// How many records the guest was told are flushed, and how many failures.
fn told(output: &str) -> (u32, usize) {
    let lines: Vec<_> = output.lines().collect();
    let failures = lines.iter().filter(|line| **line == "E").count();
    // The last line may be half of one.
    (
        u32::try_from(lines.len().saturating_sub(failures + 1)).expect("some thousands"),
        failures,
    )
}

#[test]
fn a_disk_that_is_full_is_an_error_to_the_guest_and_nothing_else() {
    require_bed!(kvm);
    for engine in ["Sync", "Async"] {
        let disk = match Disk::new(1024) {
            Ok(disk) => disk,
            Err(why) => return bed::skipped("kvm", &why),
        };
        let folder = Folder::new();
        let (image, metrics) = (disk.sparse("image", 8 << 20), folder.join("metrics"));
        // Three quarters of it are gone.
        disk.fill();
        File::options()
            .write(true)
            .open(disk.join("ballast"))
            .and_then(|f| f.set_len(768 << 10))
            .expect("a file");
        let drive = json!({
            "drive_id": "disk", "path_on_host": image, "is_root_device": false, "io_engine": engine, "cache_type": "Writeback",
        });
        let more = json!({ "drives": [drive], "metrics": { "metrics_path": metrics } });
        let mut vm = Vm::serve(&config(&folder, &Program::write_records(0), more), []);
        vm.process.wait_for("E\n");
        let (full, _) = told(&vm.process.stdout());
        // Exact to the page: what fits is written, what does not is refused.
        println!("{engine}: full after {full} records");
        let counted = vm.metrics(&metrics);
        let counted = counted
            .last()
            .expect("a line")
            .pointer("/block_disk/invalid_reqs_count");
        assert!(
            counted.and_then(Value::as_u64).is_some_and(|count| count > 0),
            "{counted:?}"
        );
        for _ in 0..20 {
            vm.readings();
            assert_eq!(vm.ask("GET", "/", None).body["state"], "Running");
        }
        let failures = told(&vm.process.stdout()).1;
        vm.wait_until("another failure: it goes on trying", |vm| {
            told(&vm.process.stdout()).1 > failures
        });
        disk.free();
        vm.wait_until("more records, once there is space", |vm| {
            told(&vm.process.stdout()).0 > full + 100
        });
        vm.readings();
        vm.process.signal(Signal::TERM);
        let (status, output, stderr) = vm.process.wait();
        assert_eq!(status.code(), Some(128 + 15), "{stderr}");
        assert!(
            stderr.contains("No space left on device") && !stderr.contains("panicked"),
            "{stderr}"
        );
        check(&image, told(&output).0);
    }
}

/// That `image` has the first `count` records.
fn check(image: &Path, count: u32) {
    let image = File::open(image).expect("an image");
    let mut bytes = [0; RECORD];
    for number in 0..count {
        image
            .read_exact_at(&mut bytes, u64::from(number) * RECORD as u64)
            .expect("it is as long");
        assert!(
            bytes == record(number),
            "record {number} was told to be flushed: {bytes:x?}"
        );
    }
}

#[test]
fn a_full_disk_under_log_metrics_and_console_stops_nothing() {
    require_bed!(kvm);
    let disk = match Disk::new(256) {
        Ok(disk) => disk,
        Err(why) => return bed::skipped("kvm", &why),
    };
    let folder = Folder::new();
    let [log, metrics, serial] = ["log", "metrics", "serial"].map(|name| disk.sparse(name, 0));
    let more = json!({
        "logger": { "log_path": log, "level": "Trace" },
        "metrics": { "metrics_path": metrics },
        "serial": { "serial_out_path": serial },
    });
    // It talks all the time.
    let program = Program::write_records(0);
    let image = folder.write("image", vec![0; 1 << 20]);
    let mut config = config(&folder, &program, more);
    config["drives"] = json!([{
        "drive_id": "disk", "path_on_host": image, "is_root_device": false, "cache_type": "Writeback",
    }]);
    let mut vm = Vm::serve(&config, []);
    disk.fill();
    let flush = Some(r#"{"action_type": "FlushMetrics"}"#);
    // The file's last page has room for some more.
    vm.wait_until("no space for metrics", |vm| {
        vm.ask("PUT", "/actions", flush).status == 400
    });
    for _ in 0..20 {
        let answer = vm.ask("PUT", "/actions", flush);
        assert_eq!(answer.status, 400, "{answer:?}");
        assert!(answer.fault().contains("No space left on device"), "{answer:?}");
        vm.readings();
    }
    let before = vm.reading().exits.total;
    vm.wait_until("exits: its guest runs", |vm| vm.reading().exits.total > before + 1000);
    disk.free();
    vm.wait_until("metrics, once there is space", |vm| {
        vm.ask("PUT", "/actions", flush).status == 204
    });
    vm.process.signal(Signal::TERM);
    let (status, _, stderr) = vm.process.wait();
    assert_eq!(status.code(), Some(128 + 15), "{stderr}");
    assert!(!stderr.contains("panicked") && !stderr.contains("[tracing"), "{stderr}");
    let lines = std::fs::read_to_string(&metrics).expect("metrics");
    let last = lines.lines().last().expect("a line");
    serde_json::from_str::<Value>(last).unwrap_or_else(|error| panic!("{error}: {last}"));
}

#[test]
fn a_console_that_nobody_reads_any_more_stops_nothing_nor_does_a_standard_error() {
    require_bed!(kvm);
    let folder = Folder::new();
    let kernel = folder.write("kernel", elf(&Program::write_records(0)));
    // It fails at every record: what the log is told of goes to standard error.
    let disk = folder.write("disk", [0; RECORD]);
    let socket = folder.join("api.sock");
    let mut command = Command::new(bed::file("chronovisor"));
    command
        .args(["run", "--mem", "16M", "--kernel"])
        .arg(&kernel)
        .arg("--disk")
        .arg(&disk);
    command.arg("--api-sock").arg(&socket);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("chronovisor");
    // All three.
    drop((child.stdin.take(), child.stdout.take(), child.stderr.take()));
    let begun = std::time::Instant::now();
    let mut running_for = 0;
    let mut exits = 0;
    while running_for < 20 {
        assert!(begun.elapsed() < PATIENCE, "it does not answer");
        assert_eq!(child.try_wait().expect("it is ours"), None, "it ended by itself");
        let reading = client::request(&socket, "GET", "/vcpus/0/cputime", None);
        if let Ok(now) = reading.map(|reading| reading.body["exits"]["total"].as_u64().unwrap_or(0))
            && now > exits + 10
        {
            (exits, running_for) = (now, running_for + 1);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, Signal::TERM).expect("it is there");
    assert_eq!(child.wait().expect("it is ours").code(), Some(128 + 15));
    assert_eq!(folder.names(), ["disk", "kernel"]);
}

#[test]
fn a_tap_that_vanishes_stops_nothing() {
    require_bed!(kvm);
    if let Err(why) = network::own() {
        return bed::skipped("kvm", &why);
    }
    if Command::new("ip").arg("link").output().is_err() {
        return bed::skipped("kvm", "there is no ip here, which takes taps away");
    }
    let mut vm = Vm::flat(&Program::by_turns(), ["--net", "tap=gone0"]);
    let deleted = Command::new("ip")
        .args(["link", "delete", "gone0"])
        .output()
        .expect("ip");
    assert!(deleted.status.success(), "{deleted:?}");
    for _ in 0..20 {
        let before = vm.reading();
        vm.wait_until("its guest goes on", |vm| {
            vm.reading().modes.guest_ns > before.modes.guest_ns
        });
    }
    vm.process.signal(Signal::TERM);
    let (status, _, stderr) = vm.process.wait();
    assert_eq!(status.code(), Some(128 + 15), "{stderr}");
}

/// The Sync engine does its I/O on the VMM's thread: a disk that never answers takes all with it that this thread does, as in
/// Firecracker. What does not go through it goes on, and the way out is there.
#[test]
fn a_vmm_that_its_disk_holds_up_is_still_read_and_is_ended_by_a_third_sigterm_with_its_sockets() {
    require_bed!(kvm);
    let folder = Folder::new();
    let image = folder.write("image", [0; 1 << 16]);
    let more = json!({
        "drives": [{ "drive_id": "disk", "path_on_host": image, "is_root_device": false, "cache_type": "Writeback" }],
        "vsock": { "guest_cid": 3, "uds_path": folder.join("vsock") },
    });
    let config = folder.write("config", config(&folder, &Program::write_records(0), more).to_string());
    let socket = folder.join("api.sock");
    let mut command = Command::new(bed::file("chronovisor"));
    command.arg("--api-sock").arg(&socket).arg("--config-file").arg(config);
    piped(&mut command);
    let fault = Fault {
        call: of_name("pwritev"),
        nth: 3,
        effect: Effect::Hang,
    };
    let (child, watched) = notify::spawn(command, Some(fault)).expect("seccomp's user notification");
    let mut process = Process::of("chronovisor".into(), child);
    // Its third record is told.
    process.wait_for("00000002\n");
    let ask = |path: &str| client::request_within(Duration::from_secs(2), &socket, "GET", path, None);
    let begun = std::time::Instant::now();
    while ask("/").is_ok() {
        assert!(begun.elapsed() < PATIENCE, "it is not held up");
    }
    let mut last = None;
    for _ in 0..20 {
        let reading = ask("/vcpus/0/cputime")
            .expect("readings do not go through the VMM")
            .body;
        let reading: accounting::Reading = serde_json::from_value(reading).expect("a reading");
        if let Some(last) = last.replace(reading.clone()) {
            accounting::laws::check_pair(&last, &reading).expect("the laws");
        }
    }
    // Within a tenth of a second they would be one; asked to stop, it has a second.
    for _ in 0..2 {
        process.signal(Signal::TERM);
        std::thread::sleep(Duration::from_millis(1100));
    }
    assert!(!process.has_ended(), "{}", process.stderr());
    assert!(socket.exists() && folder.join("vsock").exists());
    process.signal(Signal::TERM);
    let (status, _, stderr) = process.wait();
    assert_eq!(status.code(), Some(128 + 15), "{stderr}");
    assert!(stderr.contains("ended without the VMM"), "{stderr}");
    assert_eq!(folder.names(), ["config", "image", "kernel"]);
    assert!(watched.seen().hit.is_some_and(|hit| hit.starts_with("vmm: pwritev")));
}

/// The kinds of call that a start makes, so that the table of them is no list of what there once was.
#[test]
fn what_can_fail_at_a_start_is_in_the_table() {
    require_bed!(kvm);
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for way in Way::ALL {
        let (outcome, seen) = start(way, false, None);
        assert_eq!(outcome, Outcome::WentOn);
        for (call, count) in seen.counts {
            *counts.entry(call).or_default() += count;
        }
    }
    println!("{counts:?}");
    for call in ["openat", "mmap", "ioctl", "write", "eventfd2", "KVM_RUN"] {
        assert!(counts.contains_key(call), "no {call} in {counts:?}");
    }
}
