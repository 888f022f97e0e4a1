//! Bed: nohz-full. In a jail a reading is what it is outside: of the same source, and it tells of the tick.

use std::fs;
use std::time::{Duration, Instant};

use accounting::reading::Source;
use accounting::{Reading, laws};
use serde_json::Value;
use tests::bed;
use tests::flat::Program;
use tests::jail::Jail;
use tests::require_bed;
use tests::vm::{PATIENCE, Process};

/// Readings of vCPU 0, each held to the laws, until `enough`.
fn read_until(jail: &Jail, process: &mut Process, enough: impl Fn(&Reading) -> bool) -> Reading {
    let begun = Instant::now();
    let mut last: Option<Reading> = None;
    loop {
        if let Ok(answer) = jail.ask("GET", "/vcpus", None)
            && let Ok(mut readings) = serde_json::from_value::<Vec<Reading>>(answer.body)
            && !readings.is_empty()
        {
            let reading = readings.swap_remove(0);
            let held = last
                .as_ref()
                .map_or_else(|| laws::check(&reading), |last| laws::check_pair(last, &reading));
            assert_eq!(held, Ok(()));
            if enough(&reading) {
                return reading;
            }
            last = Some(reading);
        }
        assert!(
            begun.elapsed() < PATIENCE && !process.has_ended(),
            "{last:#?}\n{}",
            process.stderr()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_guest_that_spins_in_a_jail_is_accounted_by_vtime_on_a_cpu_whose_tick_is_seen_to_stop() {
    require_bed!(nohz_full);
    let jail = Jail::new(&Program::spin_forever());
    let mut command = jail.guest(&["--new-net-ns"]);
    command.args(["--pin", "1"]);
    let mut process = Process::spawn(command);
    let reading = read_until(&jail, &mut process, |reading| {
        reading.host_cpu.tick_stopped.is_some() && reading.elapsed_ns > 3_000_000_000
    });
    assert_eq!(
        (reading.source, reading.host_cpu.tick_stopped),
        (Source::Vtime, Some(true)),
        "{reading:#?}"
    );
    assert!(
        reading.host_cpu.nohz_full && reading.host_cpu.isolated && reading.host_cpu.pinned,
        "{reading:#?}"
    );
    // What else there is on a vCPU's CPU is next to nothing: a guest that spins has 9 tenths of it, as outside.
    assert!(
        reading.gtime_bounds_ns.upper > reading.elapsed_ns / 10 * 9,
        "{reading:#?}"
    );
    let host = jail.ask("GET", "/host", None).expect("it serves").body;
    assert_eq!(host["disturbances"], Value::Array(Vec::new()), "{host}");
}

/// Its own timer is as busy as a tick would be, so that /proc/timer_list has to be asked, which is root's.
#[test]
fn a_linux_guest_in_a_jail_boots_and_its_tick_is_told_from_the_hosts() {
    require_bed!(nohz_full);
    let jail = Jail::new(&Program::spin_forever());
    let binds = ["vmlinux", "guest.cpio"].map(|name| format!("{}:/{name}:ro", bed::file(name).display()));
    let flags = [
        "--bind",
        &*binds[0],
        "--bind",
        &*binds[1],
        "--new-pid-ns",
        "--daemonize",
    ];
    let cmdline = "console=ttyS0 reboot=k panic=-1 quiet noxsave chronovisor.do=spin:60000";
    let arguments = [
        "run",
        "--kernel",
        "/vmlinux",
        "--initrd",
        "/guest.cpio",
        "--cmdline",
        cmdline,
        "--mem",
        "256M",
        "--pin",
        "1",
        "--api-sock",
        "/run/chronovisor.socket",
    ];
    let mut process = Process::spawn(jail.command(&flags, &arguments));
    let (status, ..) = process.wait();
    assert_eq!(status.code(), Some(0));
    let behind = tests::jail::Behind { pid: jail.pid() };
    let begun = Instant::now();
    loop {
        assert!(
            begun.elapsed() < PATIENCE && behind.is_there(),
            "it never told of the tick"
        );
        let readings = jail.ask("GET", "/vcpus", None).map(|answer| answer.body);
        if let Ok(readings) = readings
            && readings[0]["elapsed_ns"].as_u64() > Some(8_000_000_000)
            && !readings[0]["host_cpu"]["tick_stopped"].is_null()
        {
            assert_eq!(readings[0]["host_cpu"]["tick_stopped"], true, "{readings}");
            assert_eq!(readings[0]["source"], "vtime", "{readings}");
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_quota_on_a_jails_cgroup_or_above_is_named_in_it() {
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
    require_bed!(nohz_full);
    const MOUNT: &str = "/run/cgroup-of-jails";
    fs::create_dir_all(MOUNT).expect("a mount point");
    mount("none", MOUNT, "cgroup2", MountFlags::empty(), None).expect("cgroup2");
    // More than all CPUs can use, so that nobody is ever held back.
    let jail = Jail::new(&Program::spin_forever());
    let flags = [
        "--cgroup-version",
        "2",
        "--parent-cgroup",
        "above",
        "--cgroup",
        "cpu.max=1000000000 1000000",
    ];
    let process = jail.start(&flags);
    let begun = Instant::now();
    loop {
        let host = jail.ask("GET", "/host", None).expect("it serves").body;
        let text = host["disturbances"].to_string();
        if text.contains(&format!("/sys/fs/cgroup/above/{}/cpu.max", jail.id())) && text.contains("1000000000") {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "{host}");
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(process);
    for cgroup in [format!("{MOUNT}/above/{}", jail.id()), format!("{MOUNT}/above")] {
        let _ = fs::remove_dir(cgroup);
    }
    let _ = unmount(MOUNT, UnmountFlags::DETACH);
}
