//! Bed: nohz-full. That this is the host the other suites of this bed take it for: tickless CPUs, and a KVM.

use std::fs;
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_setaffinity};
use tests::interrupts;
use tests::require_bed;

/// The CPU that the suites of this bed use.
const CPU: u32 = 1;

#[test]
fn cpus_1_and_2_are_tickless_and_isolated() {
    require_bed!(nohz_full);
    for mask in ["nohz_full", "isolated"] {
        let cpus = fs::read_to_string(format!("/sys/devices/system/cpu/{mask}")).unwrap();
        assert_eq!(cpus.trim(), "1-2", "{mask}");
    }
}

#[test]
fn kvm_makes_a_vm() {
    require_bed!(nohz_full);
    let kvm = kvm_ioctls::Kvm::new().expect("/dev/kvm");
    kvm.create_vm()
        .expect("KVM_CREATE_VM")
        .create_vcpu(0)
        .expect("KVM_CREATE_VCPU");
}

#[test]
fn the_tick_stops_while_a_thread_spins() {
    require_bed!(nohz_full);
    let spin = |time| {
        let start = Instant::now();
        while start.elapsed() < time {}
    };
    let mut cpus = CpuSet::new();
    cpus.set(CPU as usize);
    let ticks = std::thread::spawn(move || {
        sched_setaffinity(None, &cpus).unwrap();
        // The tick stops once the kernel has seen that this thread is alone.
        spin(Duration::from_millis(100));
        let before = interrupts::count("LOC", CPU);
        spin(Duration::from_secs(1));
        interrupts::count("LOC", CPU) - before
    });
    let ticks = ticks.join().unwrap();
    // HZ is at least 100: with a tick there would be 100 or more. Without, the residual one a second and the odd timer.
    assert!(
        ticks <= 5,
        "{ticks} local timer interrupts on CPU {CPU} in one second of spinning"
    );
}
