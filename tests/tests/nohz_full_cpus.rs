//! How many CPUs Debian's kernel sees as a guest, and which of them share cores, in the emulated `nohz_full` host.

use serde_json::json;
use tests::bed::{self, Folder};
use tests::require_bed;
use tests::vm::Process;

/// Boots it with `vcpus`, and gives what its init told.
fn told(vcpus: u8, smt: bool) -> String {
    let folder = Folder::new();
    let path = |name| bed::file(name).display().to_string();
    let config = json!({
        "machine-config": { "vcpu_count": vcpus, "mem_size_mib": 256, "smt": smt, "track_dirty_pages": smt },
        "boot-source": {
            "kernel_image_path": path("vmlinux"), "initrd_path": path("guest.cpio"),
            "boot_args": "console=ttyS0 reboot=k panic=-1 quiet noxsave chronovisor.do=topology,poweroff",
        },
    });
    let file = folder.write("vm.json", config.to_string()).display().to_string();
    let begun = std::time::Instant::now();
    let (status, stdout, stderr) = Process::chronovisor(["--no-api", "--config-file", &file]).wait();
    println!("{vcpus} vCPUs, smt {smt}: {:.1} s", begun.elapsed().as_secs_f64());
    assert_eq!(status.code(), Some(0), "{stderr}\n{stdout}");
    stdout
}

#[test]
fn vcpus_with_smt_share_cores_by_twos_and_without_it_share_none() {
    require_bed!(nohz_full);
    for (smt, siblings) in [(true, ["0-1", "0-1", "2-3", "2-3"]), (false, ["0", "1", "2", "3"])] {
        let told = told(4, smt);
        for (cpu, siblings) in siblings.iter().enumerate() {
            let line = format!("cpu{cpu} shares its core with {siblings}");
            assert!(told.lines().any(|told| told == line), "{line}: {told}");
        }
    }
}

#[test]
fn thirty_two_vcpus_are_thirty_two_cpus() {
    require_bed!(nohz_full);
    let told = told(32, false);
    assert!(told.contains("init, 32 CPUs"), "{told}");
}
