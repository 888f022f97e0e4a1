//! Bad input that only a host of one's own can be made to give, in the emulated `nohz_full` host.

use std::fs;

use tests::bed::Folder;
use tests::failure::fails;
use tests::flat::{Program, elf};
use tests::require_bed;
use tests::vm::Vm;

/// A CPU switched off; on again when dropped, also by a test that fails.
struct Offline(String);

impl Offline {
    fn new(cpu: u32) -> Self {
        let switch = format!("/sys/devices/system/cpu/cpu{cpu}/online");
        fs::write(&switch, "0").expect("the kernel switches the CPU off");
        Self(switch)
    }
}

impl Drop for Offline {
    fn drop(&mut self) {
        fs::write(&self.0, "1").expect("the kernel switches the CPU on");
    }
}

#[test]
fn a_pin_to_a_cpu_that_is_switched_off_is_refused_with_how_to_switch_it_on() {
    require_bed!(nohz_full);
    let folder = Folder::new();
    let kernel = folder
        .write("kernel", elf(&Program::spin_forever()))
        .display()
        .to_string();
    let run = ["run", "--kernel", &kernel, "--mem", "16M", "--pin", "2"];
    let off = Offline::new(2);
    fails(
        &run,
        1,
        &[
            "host CPU 2",
            "offline",
            "write 1 to /sys/devices/system/cpu/cpu2/online",
        ],
    );
    // Nor is it chosen: there is one tickless CPU left.
    let mut vm = Vm::flat(&Program::spin_forever(), []);
    assert_eq!(vm.reading().host_cpu.cpu, 1);
    drop(off);
    // Done as told, it works; and the CPU is as tickless as it was.
    let mut vm = Vm::flat(&Program::spin_forever(), ["--pin", "2"]);
    let host_cpu = vm.reading().host_cpu;
    assert!(
        host_cpu.cpu == 2 && host_cpu.nohz_full && host_cpu.isolated,
        "{host_cpu:?}"
    );
}
