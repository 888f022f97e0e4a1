//! What vCPUs are before they run.

use accounting::clock::ticks;
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use tests::flat::{Machine, Program};
use tests::require_bed;

const IA32_TSC: u32 = 0x10;

/// The least and the most that the vCPU's TSC can be behind the host's.
fn tsc_behind(vcpu: &VcpuFd) -> (i128, i128) {
    let entry = kvm_msr_entry {
        index: IA32_TSC,
        ..Default::default()
    };
    let mut msrs = Msrs::from_entries(&[entry]).expect("one entry");
    let before = ticks();
    let read = vcpu.get_msrs(&mut msrs).expect("KVM reads the MSRs");
    let after = ticks();
    assert_eq!(read, 1);
    let behind = |host: u64| i128::from(host) - i128::from(msrs.as_slice()[0].data);
    (behind(before), behind(after))
}

#[test]
fn the_vcpus_of_a_machine_count_one_tsc() {
    require_bed!(kvm);
    let machine = Machine::new(&Program::halt(), 4).expect("a machine");
    // Each answer takes its time; of many, the tightest say what each vCPU's offset is within less than one takes.
    let behind: Vec<_> = machine
        .vcpus
        .iter()
        .map(|vcpu| {
            let answers = (0..100).map(|_| tsc_behind(vcpu));
            answers.fold((i128::MIN, i128::MAX), |(least, most), (l, m)| {
                (least.max(l), most.min(m))
            })
        })
        .collect();
    println!("{behind:?}");
    let least = behind.iter().map(|b| b.0).max();
    let most = behind.iter().map(|b| b.1).min();
    assert!(least <= most, "no one offset explains all: {behind:?}");
}
