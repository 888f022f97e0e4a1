//! Debian's kernel as a guest, in the emulated `nohz_full` host: it boots by every protocol, sees its CPUs, ends in every
//! way with that way's word and status, and is read live.

use accounting::reading::{Modes, Source, VcpuState};
use tests::bed::{self, Folder};
use tests::require_bed;
use tests::vm::{Process, Vm, debian_arguments, grown};

/// What our init prints when a phase begins.
fn phase(what: &str) -> String {
    format!("chronovisor guest: {what}")
}

#[test]
fn a_guest_that_spins_and_then_sleeps_is_read_as_guest_and_then_as_halted() {
    require_bed!(nohz_full);
    let mut vm = Vm::debian("spin:3000,sleep:3000,poweroff", ["--pin", "auto"]);
    vm.process.wait_for(&phase("spin"));
    let spin = grown_over(&mut vm, 1_000);
    assert!(leads(spin, spin.guest_ns), "while it spins: {spin:?}");
    vm.process.wait_for(&phase("sleep"));
    let reading = vm.reading();
    let sleep = grown_over(&mut vm, 1_000);
    assert!(leads(sleep, sleep.halted_ns), "while it sleeps: {sleep:?}");
    assert_eq!((reading.source, reading.host_cpu.pinned), (Source::Vtime, true));
    assert!(reading.host_cpu.nohz_full && reading.host_cpu.isolated);
    let (status, _, stderr) = vm.process.wait();
    assert_eq!(status.code(), Some(0), "{stderr}");
}

/// What the modes grew by over so many milliseconds of the readings' own time, read all the while.
fn grown_over(vm: &mut Vm, ms: u64) -> Modes {
    let first = vm.reading();
    let mut last = first.clone();
    while last.elapsed_ns - first.elapsed_ns < ms * 1_000_000 {
        std::thread::sleep(std::time::Duration::from_millis(10));
        last = vm.reading();
    }
    grown(&first, &last)
}

fn leads(grown: Modes, mode: u64) -> bool {
    grown.to_array().into_iter().all(|other| other <= mode)
}

#[test]
fn a_guest_of_two_vcpus_sees_two_cpus_and_has_two_rows() {
    require_bed!(nohz_full);
    let mut vm = Vm::debian("sleep:3000,poweroff", ["--cpus", "2", "--pin", "1,2"]);
    vm.process.wait_for(&phase("init, 2 CPUs"));
    let readings = vm.readings();
    assert_eq!(
        readings.iter().map(|r| (r.index, r.host_cpu.cpu)).collect::<Vec<_>>(),
        [(0, 1), (1, 2)]
    );
    assert!(readings.iter().all(|r| r.modes.guest_ns > 0), "{readings:?}");
    for reading in readings {
        let one = vm.ask("GET", &format!("/vcpus/{}/cputime", reading.index), None);
        assert_eq!((one.status, &one.body["tid"]), (200, &reading.tid.into()));
    }
    assert_eq!(vm.process.wait().0.code(), Some(0));
}

#[test]
fn each_way_a_guest_can_end_has_its_word_and_its_status() {
    require_bed!(nohz_full);
    for (what, code, word) in [
        ("poweroff", 0, "the guest powered off"),
        ("reboot", 3, "the guest asked for a reboot"),
        // reboot=k and panic=-1: a panic ends in a reset through the keyboard controller.
        ("panic", 3, "the guest asked for a reboot"),
    ] {
        let mut process = Process::chronovisor([vec!["run".into()], debian_arguments(what)].concat());
        let (status, stdout, stderr) = process.wait();
        assert_eq!(status.code(), Some(code), "{what}: {stderr}\n{stdout}");
        assert!(stderr.contains(word), "{what}: {stderr}");
    }
}

#[test]
fn a_bzimage_boots_by_the_64_bit_protocol() {
    require_bed!(nohz_full);
    let mut arguments = debian_arguments("poweroff");
    arguments[1] = bed::file("bzImage").display().to_string();
    let mut process = Process::chronovisor([vec!["run".into()], arguments].concat());
    let (status, stdout, stderr) = process.wait();
    assert_eq!(status.code(), Some(0), "{stderr}");
    assert!(stdout.contains(&phase("init, 1 CPU")), "{stdout}");
}

#[test]
fn a_vmlinux_without_a_pvh_note_boots_by_the_64_bit_protocol() {
    require_bed!(nohz_full);
    // The note's name, "Xen\0" with its type 18 (XEN_ELFNOTE_PHYS32_ENTRY) before it: another type is another note.
    let mut kernel = std::fs::read(bed::file("vmlinux")).expect("the bed's kernel");
    let note = [18, 0, 0, 0, b'X', b'e', b'n', 0];
    let at = kernel
        .windows(note.len())
        .position(|bytes| bytes == note)
        .expect("Debian's kernel has the note");
    kernel[at] = 0xff;
    let folder = Folder::new();
    let mut arguments = debian_arguments("poweroff");
    arguments[1] = folder.write("vmlinux", kernel).display().to_string();
    let mut process = Process::chronovisor([vec!["run".into()], arguments].concat());
    let (status, stdout, stderr) = process.wait();
    assert_eq!(status.code(), Some(0), "{stderr}");
    assert!(stdout.contains(&phase("init, 1 CPU")), "{stdout}");
}

#[test]
fn ctrl_alt_del_reaches_the_guest() {
    require_bed!(nohz_full);
    // The kernel answers Ctrl-Alt-Del with a restart of its own while no init has claimed the keys.
    let mut vm = Vm::debian("sleep:60000,poweroff", []);
    vm.process.wait_for(&phase("sleep"));
    let response = vm.ask("PUT", "/actions", Some(r#"{"action_type": "SendCtrlAltDel"}"#));
    assert_eq!(response.status, 204, "{}", response.fault());
    let (status, _, stderr) = vm.process.wait();
    assert_eq!(status.code(), Some(3), "{stderr}");
}

#[test]
fn a_pause_through_the_api_is_paused_time_and_a_resume_ends_it() {
    require_bed!(nohz_full);
    let mut vm = Vm::debian("spin:60000", ["--pin", "auto"]);
    vm.process.wait_for(&phase("spin"));
    for _ in 0..2 {
        assert_eq!(vm.ask("PATCH", "/vm", Some(r#"{"state": "Paused"}"#)).status, 204);
    }
    assert_eq!(vm.ask("GET", "/", None).body["state"], "Paused");
    let first = vm.reading();
    std::thread::sleep(std::time::Duration::from_millis(300));
    let last = vm.reading();
    assert_eq!((first.state, last.state), (VcpuState::Paused, VcpuState::Paused));
    assert_eq!(
        grown(&first, &last),
        Modes {
            paused_ns: last.elapsed_ns - first.elapsed_ns,
            ..Modes::default()
        }
    );
    assert_eq!(vm.ask("PATCH", "/vm", Some(r#"{"state": "Resumed"}"#)).status, 204);
    let run = grown_over(&mut vm, 500);
    assert!(leads(run, run.guest_ns), "after the pause: {run:?}");
}

#[test]
fn the_api_boots_what_firecrackers_clients_would_boot() {
    require_bed!(nohz_full);
    let folder = Folder::new();
    let socket = folder.join("api.sock");
    let path = |name: &str| bed::file(name).display().to_string();
    let mut process = Process::chronovisor([
        "--api-sock",
        &socket.display().to_string(),
        "--id",
        "firecracker-client",
    ]);
    let begun = std::time::Instant::now();
    let ask = |method: &str, path: &str, body: Option<String>| loop {
        match tests::client::request(&socket, method, path, body.as_deref()) {
            Ok(response) => return response,
            // The server is still on its way.
            Err(_) if begun.elapsed() < tests::vm::PATIENCE => std::thread::sleep(std::time::Duration::from_millis(10)),
            Err(error) => panic!("{method} {path}: {error}"),
        }
    };
    assert_eq!(ask("GET", "/machine-config", None).body["vcpu_count"], 1);
    let machine = serde_json::json!({ "vcpu_count": 2, "mem_size_mib": 256 });
    assert_eq!(ask("PUT", "/machine-config", Some(machine.to_string())).status, 204);
    let boot = serde_json::json!({
        "kernel_image_path": path("vmlinux"), "initrd_path": path("guest.cpio"),
        "boot_args": "console=ttyS0 reboot=k panic=-1 quiet noxsave chronovisor.do=reboot",
    });
    assert_eq!(ask("PUT", "/boot-source", Some(boot.to_string())).status, 204);
    let start = serde_json::json!({ "action_type": "InstanceStart" });
    assert_eq!(ask("PUT", "/actions", Some(start.to_string())).status, 204);
    process.wait_for(&phase("init, 2 CPUs"));
    // A guest's reboot is how it shuts down where there is no other way: Firecracker's clients take it for success.
    let (status, _, stderr) = process.wait();
    assert_eq!(status.code(), Some(0), "{stderr}");
    assert_eq!(folder.names(), [""; 0], "the socket is gone with the server");
}
