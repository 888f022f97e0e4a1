//! CPU template T2A on a host that it is for: the emulated host, with the family and model of AMD's Milan. The Intel templates have no
//! such host here: the emulator has no VMX.

use serde_json::{Value, json};
use tests::require_bed;
use tests::vm::Vm;

/// What Debian's kernel finds that its first CPU is and can do, with `machine` in its configuration.
fn cpu(machine: &Value) -> String {
    let mut config = json!({ "vcpu_count": 2, "mem_size_mib": 256 });
    let sections = config.as_object_mut().expect("an object");
    sections.extend(machine.as_object().expect("an object").clone());
    let mut vm = Vm::serve_debian("cpu-flags,poweroff", json!({ "machine-config": config }));
    let (status, stdout, stderr) = vm.process.wait();
    assert_eq!(status.code(), Some(0), "{stderr}\n{stdout}");
    println!("{stderr}");
    let line = stdout.lines().find(|line| line.contains("cpu-flags: flags"));
    format!("{} ", line.unwrap_or_else(|| panic!("no flags in {stdout}")))
}

#[test]
fn debian_boots_with_t2a_and_finds_what_a_haswell_has_and_no_more() {
    require_bed!(milan);
    let host = cpu(&json!({}));
    let t2a = cpu(&json!({ "cpu_template": "T2A" }));
    println!("{host}\n{t2a}");
    // As Linux calls them; all of them are the emulated host's, and KVM's to offer.
    for taken in ["adx", "clflushopt", "clwb", "umip", "sse4a", "pdpe1gb", "svm"] {
        let taken = format!(" {taken} ");
        assert!(host.contains(&taken), "{taken}: {host}");
        assert!(!t2a.contains(&taken), "{taken}: {t2a}");
    }
    for left in [
        "sse2", "sse4_2", "popcnt", "bmi1", "bmi2", "abm", "lahf_lm", "fsgsbase", "syscall", "nx", "lm",
    ] {
        let left = format!(" {left} ");
        assert!(host.contains(&left) && t2a.contains(&left), "{left}: {host}\n{t2a}");
    }
}
