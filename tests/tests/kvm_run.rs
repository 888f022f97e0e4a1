//! `chronovisor run` of flat guests: how it ends, what it leaves behind, and what those who watch it see of that.

use rustix::process::Signal;
use tests::bed::Folder;
use tests::failure::fails;
use tests::flat::{Program, elf};
use tests::require_bed;
use tests::vm::{Process, Vm};

#[test]
fn a_triple_fault_has_its_word_and_its_status() {
    require_bed!(kvm);
    let folder = Folder::new();
    let kernel = folder
        .write("kernel", elf(&Program::triple_fault()))
        .display()
        .to_string();
    fails(&["run", "--kernel", &kernel, "--mem", "16M"], 4, &["triple-faulted"]);
}

/// Its serial port says what it found; the command line is all that it looks at.
#[test]
fn a_guest_finds_its_devices_by_its_command_line_alone() {
    require_bed!(kvm);
    let folder = Folder::new();
    let path = |name: &str, bytes: &[u8]| folder.write(name, bytes).display().to_string();
    let kernel = path("kernel", &elf(&Program::find_virtio()));
    let disk = path("disk", &[0; 4096]);
    let run = |devices: &[&str]| {
        let machine = ["run", "--kernel", &kernel, "--mem", "16M", "--cmdline", "quiet"];
        let (status, output, stderr) = Process::chronovisor(machine.iter().chain(devices)).wait();
        // As a kernel that reboots.
        assert_eq!(status.code(), Some(3), "{stderr}");
        output
    };
    assert_eq!(run(&[]), "");
    // A block device and an entropy device (virtio 1.2, 5), in their windows and with their interrupts.
    assert_eq!(run(&["--disk", &disk, "--rng"]), "virt 2:5\nvirt 4:6\n");
}

#[test]
fn who_watches_a_guest_ends_in_good_order_with_it() {
    require_bed!(kvm);
    for flags in [&["--watch"][..], &["--watch", "--json"]] {
        let vm = Vm::flat(&Program::spin_forever(), []);
        let socket = vm.socket().display().to_string();
        let watch = ["times", "--api-sock", &socket, "--interval", "20"];
        let mut watch = Process::chronovisor(watch.iter().chain(flags));
        watch.wait_for("guest");
        vm.process.signal(Signal::TERM);
        let (status, _, stderr) = watch.wait();
        assert_eq!((status.code(), &*stderr), (Some(0), ""), "{flags:?}");
    }
}

#[test]
fn a_guest_that_reads_no_keys_is_asked_by_the_first_sigterm_and_ended_by_the_second() {
    require_bed!(kvm);
    let mut vm = Vm::flat(&Program::deaf_driver(), []);
    vm.process.wait_for("up");
    // The keys that it has not read by then are these.
    let keys = vm.ask("PUT", "/actions", Some(r#"{"action_type": "SendCtrlAltDel"}"#));
    assert_eq!(keys.status, 204, "{}", keys.fault());
    vm.process.signal(Signal::TERM);
    vm.process.wait_for_error("the guest is asked to shut down");
    assert_eq!(vm.ask("GET", "/", None).body["state"], "Running");
    // Within a tenth of a second it would be taken for the first.
    std::thread::sleep(std::time::Duration::from_millis(200));
    vm.process.signal(Signal::TERM);
    let (status, _, stderr) = vm.process.wait();
    assert_eq!(status.code(), Some(128 + 15), "{stderr}");
}

#[test]
fn a_paused_guest_is_ended_by_the_first_sigterm() {
    require_bed!(kvm);
    let mut vm = Vm::flat(&Program::deaf_driver(), []);
    vm.process.wait_for("up");
    assert_eq!(vm.ask("PATCH", "/vm", Some(r#"{"state": "Paused"}"#)).status, 204);
    vm.process.signal(Signal::TERM);
    let (status, _, stderr) = vm.process.wait();
    assert_eq!(status.code(), Some(128 + 15), "{stderr}");
    assert!(!stderr.contains("the guest is asked"), "{stderr}");
}

/// It is there before the first of the steps by which a microVM comes to run, and is heard between any two of them.
#[test]
fn a_sigterm_while_it_is_configured_ends_it_in_good_order() {
    require_bed!(kvm);
    tests::require_no_jail!("the shell that starts the jail takes a signal that is blocked");
    // Essential on Debian; the emulated host has busybox only.
    if !std::path::Path::new("/usr/bin/perl").exists() {
        return tests::bed::skipped("kvm", "there is no Perl here, which blocks the signal");
    }
    let folder = Folder::new();
    let path = |name: &str, bytes: &[u8]| folder.write(name, bytes).display().to_string();
    let kernel = path("kernel", &elf(&Program::spin_forever()));
    let disks: Vec<_> = (0..12).map(|index| path(&format!("disk{index}"), &[0; 512])).collect();
    let drive = |index: usize| serde_json::json!({ "drive_id": format!("d{index}"), "path_on_host": disks[index], "is_root_device": false });
    let config = serde_json::json!({
        "boot-source": { "kernel_image_path": kernel },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 16 },
        "drives": (0..disks.len()).map(drive).collect::<Vec<_>>(),
    });
    let config = path("config", config.to_string().as_bytes());
    let mut run = vec!["run", "--kernel", &kernel, "--mem", "16M"];
    disks.iter().for_each(|disk| run.extend(["--disk", disk]));
    for arguments in [run, vec!["--no-api", "--config-file", &config]] {
        for _ in 0..5 {
            // A signal that is blocked stays pending across exec (signal(7)).
            let script = r#"sigprocmask(SIG_BLOCK, POSIX::SigSet->new(SIGTERM)); kill TERM => $$; exec @ARGV"#;
            let mut command = std::process::Command::new("perl");
            command.args(["-MPOSIX=:signal_h", "-e", script]);
            command.arg(tests::bed::file("chronovisor")).args(&arguments);
            let (status, _, stderr) = Process::spawn(command).wait();
            assert_eq!(status.code(), Some(128 + 15), "{stderr}");
            assert!(stderr.contains("ended by SIGTERM"), "{stderr}");
        }
    }
}

/// How many processes have `word` on their command line. A child forked off has its parent's.
fn processes_with(word: &str) -> usize {
    let processes = std::fs::read_dir("/proc").expect("procfs").flatten();
    let command_lines = processes.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    command_lines
        .filter(|line| String::from_utf8_lossy(line).contains(word))
        .count()
}

#[test]
fn what_a_killed_one_leaves_behind_is_a_socket_which_the_next_one_takes() {
    require_bed!(kvm);
    let mut vm = Vm::flat(&Program::spin_forever(), []);
    let socket = vm.socket().display().to_string();
    assert_eq!(processes_with(&socket), 1, "it has no children");
    // Nobody takes it from one that is there.
    fails(&["--api-sock", &socket], 1, &[&socket, "another process is listening"]);
    vm.process.signal(Signal::KILL);
    assert_eq!(vm.process.wait().0.code(), None, "killed");
    assert_eq!(processes_with(&socket), 0);
    assert!(vm.socket().exists());

    // One that fails leaves none.
    fails(&["run", "--kernel", "/none", "--api-sock", &socket], 1, &["/none"]);
    assert!(!vm.socket().exists());
    drop(std::os::unix::net::UnixListener::bind(&socket).expect("another is left behind"));
    let mut server = Process::chronovisor(["--api-sock", &socket]);
    let begun = std::time::Instant::now();
    while tests::client::request(vm.socket(), "GET", "/", None).is_err() {
        assert!(begun.elapsed() < tests::vm::PATIENCE, "{}", server.stderr());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    server.signal(Signal::TERM);
    assert_eq!(server.wait().0.code(), Some(128 + 15));
}
