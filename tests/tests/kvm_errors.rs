//! Bad input: one line that says what failed, on which input, and what to do; a status that is not 0; nothing left
//! behind. With `/dev/kvm`, so that what comes after opening it is tried too.

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::Command;

use tests::bed::{self, Folder};
use tests::client;
use tests::failure::{command_fails, fails};
use tests::require_bed;
use tests::vm::{Process, debian_arguments};

/// A program that would be a kernel if nothing else were wrong: spins in 64-bit mode.
fn kernel() -> Vec<u8> {
    tests::flat::elf(&tests::flat::Program::spin_forever())
}

#[test]
fn a_bad_kernel_or_initrd_is_named() {
    require_bed!(kvm);
    let folder = Folder::new();
    let good = kernel();
    let missing = folder.join("missing").display().to_string();
    let file = |name: &str, bytes: &[u8]| folder.write(name, bytes).display().to_string();
    let empty = file("empty", b"");
    let cut = file("cut", &good[..good.len() / 2]);
    let head = file("head", &good[..40]);
    let text = file("text", b"#!/bin/sh\necho no kernel\n".repeat(100).as_slice());
    let directory = folder.path().display().to_string();
    for (path, says) in [
        (&missing, "No such file"),
        (&empty, "empty"),
        (&cut, "truncated"),
        (&head, "truncated"),
        (&text, "not a kernel"),
        (&directory, "not a regular file"),
    ] {
        fails(&["run", "--kernel", path], 1, &[path, says]);
    }
    let kernel = file("kernel", &good);
    fails(
        &["run", "--kernel", &kernel, "--initrd", &missing],
        1,
        &[&missing, "No such file"],
    );
    let large = folder.join("large");
    std::fs::File::create(&large)
        .and_then(|f| f.set_len(200 << 20))
        .expect("a sparse file");
    let large = large.display().to_string();
    fails(
        &["run", "--kernel", &kernel, "--initrd", &large, "--mem", "128M"],
        1,
        &[&large, "memory"],
    );
}

#[test]
fn a_machine_that_cannot_be_is_refused_by_its_figure() {
    require_bed!(kvm);
    let folder = Folder::new();
    let kernel = folder.write("kernel", kernel()).display().to_string();
    for (option, value, code, says) in [
        ("--mem", "0", 2, "0"),
        ("--mem", "much", 2, "much"),
        ("--mem", "-1", 2, "-1"),
        ("--mem", "64T", 1, "lower --mem"),
        ("--cpus", "0", 2, "0"),
        ("--cpus", "33", 2, "33"),
        ("--cpus", "two", 2, "two"),
        ("--pin", "4095", 1, "4095"),
        ("--pin", "x", 2, "x"),
        ("--pin", "0,1", 1, "1 vCPU"),
    ] {
        let argument = format!("{option}={value}");
        fails(&["run", "--kernel", &kernel, &argument], code, &[says]);
    }
    fails(
        &["run", "--kernel", &kernel, "--cpus", "2", "--pin", "0,0"],
        1,
        &["0", "twice"],
    );
}

#[test]
fn a_socket_path_that_cannot_be_is_refused_and_what_is_there_is_left_alone() {
    require_bed!(kvm);
    let folder = Folder::new();
    let kernel = folder.write("kernel", kernel()).display().to_string();
    let socket = folder.join("in-use");
    let listener = UnixListener::bind(&socket).expect("a socket");
    let in_use = socket.display().to_string();
    let file = folder.write("file", "precious").display().to_string();
    let long = folder.join(&"x".repeat(108)).display().to_string();
    let lost = folder.join("no/such/folder.sock").display().to_string();
    let before = folder.names();
    for (path, says) in [
        (&in_use, "another process is listening"),
        (&file, "exists"),
        (&long, "at most 107"),
        (&lost, "does not exist"),
    ] {
        fails(&["run", "--kernel", &kernel, "--api-sock", path], 1, &[path, says]);
        fails(&["--api-sock", path], 1, &[path, says]);
    }
    assert_eq!(folder.names(), before);
    assert_eq!(std::fs::read_to_string(&file).expect("it is there"), "precious");
    drop(listener);
}

#[test]
fn a_socket_that_no_microvm_answers_on_is_named_by_check() {
    require_bed!(kvm);
    let folder = Folder::new();
    let missing = folder.join("missing").display().to_string();
    fails(
        &["check", "--api-sock", &missing],
        1,
        &[&missing, "nobody serves the API there"],
    );
    let socket = folder.join("silent");
    let listener = UnixListener::bind(&socket).expect("a socket");
    let silent = socket.display().to_string();
    fails(
        &["check", "--api-sock", &silent],
        1,
        &[&silent, "GET /host was not answered in 5 s"],
    );
    drop(listener);
}

#[test]
fn what_fails_after_the_socket_is_there_takes_it_away_again() {
    require_bed!(kvm);
    let folder = Folder::new();
    let kernel = folder.write("kernel", kernel()).display().to_string();
    let socket = folder.join("api.sock").display().to_string();
    let missing = folder.join("missing").display().to_string();
    fails(&["run", "--kernel", &missing, "--api-sock", &socket], 1, &[&missing]);
    fails(
        &["run", "--kernel", &kernel, "--mem", "64T", "--api-sock", &socket],
        1,
        &["host"],
    );
    let config = folder.write("config.json", "{ not JSON").display().to_string();
    fails(&["--api-sock", &socket, "--config-file", &config], 1, &[&config]);
    assert_eq!(folder.names(), ["config.json", "kernel"]);
}

#[test]
fn no_dev_kvm_and_no_permission_are_told_apart() {
    require_bed!(kvm);
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED kvm: no_dev_kvm_and_no_permission_are_told_apart: only root can take /dev/kvm away");
        return;
    }
    let folder = Folder::new();
    let kernel = folder.write("kernel", kernel()).display().to_string();
    let run = || {
        let mut command = Command::new(bed::file("chronovisor"));
        command.args(["run", "--kernel", &kernel]);
        command
    };
    let mut without = run();
    in_a_world_without_kvm(&mut without);
    command_fails(without, 1, &["/dev/kvm", "does not exist"]);

    tests::require_no_jail!("a jail is made by root, and nobody else meets the device's mode");
    // Somebody who may read the program and the kernel, but not open the device.
    std::fs::set_permissions("/dev/kvm", std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("it is root's");
    let mut nobody = run();
    nobody.uid(65534).gid(65534);
    if Command::new(bed::file("chronovisor"))
        .arg("--version")
        .uid(65534)
        .gid(65534)
        .output()
        .is_err()
    {
        println!("SKIPPED kvm: no_dev_kvm_and_no_permission_are_told_apart: another user cannot reach the program");
        return;
    }
    command_fails(nobody, 1, &["/dev/kvm", "ermission"]);
}

/// The child gets a mount namespace of its own, and an empty `/dev` in it.
#[expect(unsafe_code, reason = "pre_exec")]
fn in_a_world_without_kvm(command: &mut Command) {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    let enter = || {
        // SAFETY: the child is single-threaded after fork, so no thread shares what is unshared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS)? };
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        mount("none", "/dev", "tmpfs", MountFlags::empty(), None)?;
        Ok(())
    };
    // SAFETY: system calls only; no memory of the parent's is touched, nothing is allocated.
    unsafe { command.pre_exec(enter) };
}

#[test]
fn a_backend_that_cannot_run_stock_kernels_says_so_and_does_not_hang() {
    require_bed!(kvm);
    let (_, check, _) = Process::chronovisor(["check", "--json"]).wait();
    let check: serde_json::Value = serde_json::from_str(&check).expect("check --json is JSON");
    if check["guests_run"] == true {
        println!(
            "SKIPPED kvm: a_backend_that_cannot_run_stock_kernels_says_so_and_does_not_hang: this one can run them"
        );
        return;
    }
    let arguments = [vec!["run".into()], debian_arguments("poweroff")].concat();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    fails(&arguments, 1, &["cannot run the kernel", "vmlinux", "VMX or SVM"]);
}

#[test]
fn the_api_refuses_bad_requests_one_by_one_and_goes_on_serving() {
    require_bed!(kvm);
    let folder = Folder::new();
    let socket = folder.join("api.sock");
    let mut process = Process::chronovisor(["--api-sock", &socket.display().to_string()]);
    let begun = std::time::Instant::now();
    while UnixStream::connect(&socket).is_err() {
        assert!(begun.elapsed() < tests::vm::PATIENCE, "{}", process.stderr());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    // Held open through all that follows.
    let mut half = UnixStream::connect(&socket).expect("it listens");
    half.write_all(b"PUT /machine-config HTTP/1.1\r\nContent-Le")
        .expect("it listens");

    for (method, path, body, says) in [
        ("PUT", "/machine-config", "{ not JSON", ""),
        (
            "PUT",
            "/machine-config",
            r#"{"vcpu_count": 1, "mem_size_mib": 64, "colour": "red"}"#,
            "colour",
        ),
        (
            "PUT",
            "/machine-config",
            r#"{"vcpu_count": 33, "mem_size_mib": 64}"#,
            "",
        ),
        ("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#, ""),
        ("PATCH", "/vm", r#"{"state": "Paused"}"#, "before starting"),
        ("GET", "/vcpus/0/cputime", "", ""),
        ("GET", "/no/such/path", "", "path: GET no."),
        ("DELETE", "/machine-config", "", ""),
    ] {
        let response = client::request(&socket, method, path, Some(body)).expect("an answer");
        assert_eq!(response.status, 400, "{method} {path} {body}: {response:?}");
        assert!(
            !response.fault().is_empty() && response.fault().contains(says),
            "{method} {path} {body}: {response:?}"
        );
    }

    // The server may answer and close before it has read 10 MiB: then writing fails, and the answer is there to read.
    let mut large = UnixStream::connect(&socket).expect("it listens");
    write!(
        large,
        "PUT /boot-source HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        10 << 20
    )
    .expect("it listens");
    let _ = large.write_all(&vec![b' '; 10 << 20]);
    if let Ok(response) = client::read_response(&mut large) {
        assert!([400, 413].contains(&response.status), "{response:?}");
    }

    let info = client::request(&socket, "GET", "/", None).expect("it still serves");
    assert_eq!(info.body["state"], "Not started");
    process.signal(rustix::process::Signal::TERM);
    let (status, ..) = process.wait();
    assert_eq!(status.code(), Some(128 + 15));
    assert_eq!(
        folder.names(),
        [""; 0],
        "the socket is gone, though a request was held open"
    );
}
