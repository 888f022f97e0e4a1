//! A flood of connections: who behaves is answered on, newcomers included, memory stays under its cap, and the guest goes on.
//!
//! Two thousand connections here; ten thousand for half a minute, on a quiet machine, by `cargo xtask flood`.

use std::process::Command;

use accounting::host::{HostCpus, run_on};
use tests::bystander::{Bystander, unnoticed};
use tests::flat::Program;
use tests::flood::{CAP_KIB, FLOOD, Flood, flood_if_asked};
use tests::memory::{peak_kib, resident_kib, start_peak};
use tests::vm::Vm;
use tests::{bed, require_bed};

const CONNECTIONS: usize = 2000;

/// This program, as what floods: below.
fn flooder() -> Command {
    let mut program = Command::new(std::env::current_exe().expect("this program"));
    program.args(["--exact", "what_floods_floods", "--nocapture"]);
    program
}

/// The process that the other test starts; by itself it has nothing to do.
#[test]
fn what_floods_floods() {
    let _ = flood_if_asked();
}

#[test]
fn a_flood_keeps_no_reading_waiting_takes_no_memory_beyond_its_cap_and_no_time_of_the_guests() {
    require_bed!(kvm);
    let mut vm = Vm::flat(&Program::spin_forever(), ["--pin=auto"]);
    let own = [vm.reading().host_cpu.cpu].into_iter().collect();
    run_on(&HostCpus::read().expect("sysfs").housekeeping(&own)).expect("a CPU beside the guest's");
    let (pid, socket) = (vm.process.id(), vm.socket().to_owned());
    let files = || std::fs::read_dir(format!("/proc/{pid}/fd")).expect("procfs").count();
    let (alone_files, alone_kib) = (files(), resident_kib(pid));
    start_peak(pid);

    let mut bystander = Bystander::open(&socket).expect("the API");
    let gather = || {
        let flood = Flood::start(flooder(), &socket, CONNECTIONS, 19);
        // Newcomers, one after the other, each on a connection of its own.
        for _ in 0..20 {
            let answer = vm.ask("GET", "/vcpus/0/cputime", None);
            assert_eq!(answer.status, 200, "{}", answer.fault());
        }
        flood
    };
    let seen = unnoticed(&mut bystander, FLOOD, gather);
    let grown = peak_kib(pid).saturating_sub(alone_kib);
    println!("{seen:?}; {grown} KiB more at the peak");
    assert!(grown < CAP_KIB, "{grown} KiB more than without the flood");
    // Those of the flood are gone, and nothing is left of them. The bystander's stays.
    vm.wait_until("the flood's connections to be closed", |_| files() <= alone_files + 1);
    vm.reading();
    if let Err(why) = seen {
        bed::skipped("kvm", &why);
    }
}
