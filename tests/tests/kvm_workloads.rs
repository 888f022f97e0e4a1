//! Guests that know what they burned, each in its own way: whatever it is, what they burned is within what every source
//! claims, on a CPU whose tick samples as on one whose tick is stopped.

use accounting::host::HostCpus;
use accounting::laws;
use tests::require_bed;
use tests::workload::{ALL, Workload, run};

#[test]
fn what_a_guest_burned_is_inside_the_bounds_of_every_source() {
    require_bed!(kvm);
    let host = HostCpus::read().expect("sysfs");
    let (tickless, ticking): (Vec<u32>, Vec<u32>) = host.allowed.iter().partition(|&&cpu| host.is_nohz_full(cpu));
    for cpu in [ticking.last(), tickless.first()].into_iter().flatten() {
        for workload in ALL {
            let short = Workload {
                slices: workload.slices / 10,
                ..workload
            };
            for burned in run(&short, *cpu).expect("the guest runs") {
                assert_eq!(laws::check_pair(&burned.ready.reading, &burned.told.reading), Ok(()));
                let own = burned.own();
                for figure in burned.grown() {
                    println!(
                        "CPU {cpu}: {}: burned {} to {} ns; {}: {} ns in [{}, {}]",
                        workload.name,
                        own.lower,
                        own.upper,
                        figure.source.name(),
                        figure.point,
                        figure.lower,
                        figure.upper
                    );
                    // KVM tells the TSC's frequency in whole kHz, and within 0.5 ppm of the readings' clock.
                    let clocks = own.upper / 1_000_000 + 1_000;
                    assert!(
                        figure.lower <= own.upper + burned.exits_ns + clocks && own.lower <= figure.upper + clocks,
                        "{figure:?}: {burned:#?}"
                    );
                }
            }
        }
    }
}
