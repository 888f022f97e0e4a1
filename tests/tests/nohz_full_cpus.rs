//! What CPUs Debian's kernel sees as a guest in the emulated `nohz_full` host: how many, which of them share cores, what they can
//! do; and the huge pages behind its memory.

use serde_json::json;
use tests::bed::{self, Folder};
use tests::require_bed;
use tests::vm::{Process, Vm, debian_arguments};

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

/// What the guest's first CPU can do, with `cpu_config` in its configuration.
fn flags(cpu_config: &serde_json::Value) -> String {
    let folder = Folder::new();
    let file = folder.write("cpu.json", cpu_config.to_string());
    let mut vm = Vm::serve_debian("cpu-flags,poweroff", json!({ "cpu-config": file }));
    let (status, stdout, stderr) = vm.process.wait();
    assert_eq!(status.code(), Some(0), "{stderr}\n{stdout}");
    let line = stdout.lines().find(|line| line.contains("cpu-flags: flags"));
    format!("{} ", line.unwrap_or_else(|| panic!("no flags in {stdout}")))
}

#[test]
fn a_bit_that_cpu_config_clears_is_not_there_for_the_guest() {
    require_bed!(nohz_full);
    // Leaf 1, ECX, bit 0: SSE3, "pni" to Linux.
    let cleared = json!({ "cpuid_modifiers": [{ "leaf": "0x1", "subleaf": "0x0", "flags": 0,
        "modifiers": [{ "register": "ecx", "bitmap": "0b0" }] }] });
    assert!(flags(&json!({})).contains(" pni "), "{}", flags(&json!({})));
    let without = flags(&cleared);
    assert!(!without.contains(" pni ") && without.contains(" sse2 "), "{without}");
}

#[test]
fn a_processor_that_this_host_does_not_have_is_refused_in_words() {
    require_bed!(nohz_full);
    let leaf = json!({ "cpuid_modifiers": [{ "leaf": "0x77", "subleaf": "0x0", "flags": 0, "modifiers": [] }] });
    let msr = json!({ "msr_modifiers": [{ "addr": "0x77777777", "bitmap": "0b1" }] });
    let capability = json!({ "kvm_capabilities": ["123456"] });
    let table = [
        (
            leaf,
            "CPUID leaf 0x77, subleaf 0x0, flags 0 is not among those of this host",
        ),
        (msr, "MSR 0x77777777 of vCPU 0 cannot be read"),
        (capability, "this host's KVM lacks capability 123456"),
    ];
    for (cpu_config, says) in table {
        let folder = Folder::new();
        let cpu = folder.write("cpu.json", cpu_config.to_string());
        let path = |name| bed::file(name).display().to_string();
        let config = json!({
            "cpu-config": cpu,
            "boot-source": { "kernel_image_path": path("vmlinux"), "boot_args": "panic=-1" },
        });
        let file = folder.write("vm.json", config.to_string()).display().to_string();
        let (status, _, stderr) = Process::chronovisor(["--no-api", "--config-file", &file]).wait();
        assert_eq!(status.code(), Some(1), "{stderr}");
        assert!(stderr.contains(says), "{says}: {stderr}");
    }
}

/// A line of /proc/meminfo.
fn meminfo(name: &str) -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").expect("/proc/meminfo");
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.unwrap_or_else(|| panic!("no {name} in {meminfo}"))
}

#[test]
fn huge_pages_of_2_mib_come_from_the_pool_and_a_pool_too_small_is_told() {
    require_bed!(nohz_full);
    const POOL: &str = "/proc/sys/vm/nr_hugepages";
    let huge = json!({ "machine-config": { "vcpu_count": 1, "mem_size_mib": 256, "huge_pages": "2M" } });
    let folder = Folder::new();
    let path = |name| bed::file(name).display().to_string();
    let mut config = huge.clone();
    config["boot-source"] = json!({ "kernel_image_path": path("vmlinux") });
    let file = folder.write("vm.json", config.to_string()).display().to_string();
    let (status, _, stderr) = Process::chronovisor(["--no-api", "--config-file", &file]).wait();
    assert_eq!(status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("`sysctl vm.nr_hugepages=128`"), "{stderr}");

    std::fs::write(POOL, "130").expect("root in the emulated host");
    let free = meminfo("HugePages_Free");
    assert_eq!(free, 130, "the emulated host has memory enough");
    let mut vm = Vm::serve_debian("sleep:60000", huge);
    vm.process.wait_for("chronovisor guest: sleep");
    // The guest has touched some of its memory; all of it is reserved.
    assert!(meminfo("HugePages_Free") < free && meminfo("HugePages_Rsvd") <= 128);
    assert!(free - meminfo("HugePages_Free") + meminfo("HugePages_Rsvd") == 128);
    drop(vm);
    std::fs::write(POOL, "0").expect("root in the emulated host");
}

#[test]
fn transparent_huge_pages_are_behind_a_guest_where_the_host_gives_them() {
    require_bed!(nohz_full);
    let enabled = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    if !enabled.contains("[madvise]") && !enabled.contains("[always]") {
        bed::skipped(
            "nohz-full",
            &format!("this host gives no transparent huge pages: {enabled}"),
        );
        return;
    }
    let mut vm = Vm::run(debian_arguments("touch:64,sleep:60000"));
    vm.process.wait_for("chronovisor guest: sleep");
    let path = format!("/proc/{}/smaps_rollup", vm.process.id());
    let rollup = std::fs::read_to_string(&path).expect("its memory");
    let kib = rollup.lines().find_map(|line| line.strip_prefix("AnonHugePages:"));
    let kib: u64 = kib
        .and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse().ok())
        .expect("a number");
    assert!(kib >= 64 << 10, "{rollup}");
}
