//! A thousand clients of `GET /vcpus/stream`, on a guest that spins: what they are told, and what they cost. How long others
//! wait meanwhile is for a quiet machine: `cargo xtask streams`.

use std::path::Path;
use std::time::Instant;

use accounting::host::{HostCpus, run_on};
use accounting::laws;
use rustix::process::Signal;
use tests::bed::{self, Folder};
use tests::bystander::{self, Bystander, unnoticed};
use tests::client::request;
use tests::crowd::{Crowd, Listener, raise_open_files};
use tests::flat::{Program, elf};
use tests::memory::resident_kib;
use tests::require_bed;
use tests::vm::{PATIENCE, Process, Vm};

/// A guest that spins on a CPU of its own, which this thread then keeps off.
fn spinning() -> Vm {
    raise_open_files(2000).expect("as many files as there are clients");
    let mut vm = Vm::flat(&Program::spin_forever(), ["--pin=auto"]);
    let own = [vm.reading().host_cpu.cpu].into_iter().collect();
    run_on(&HostCpus::read().expect("sysfs").housekeeping(&own)).expect("a CPU beside the guest's");
    vm
}

/// The host CPU that the process's thread of that name was last on.
fn last_on(vm: &Vm, name: &str) -> u32 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", vm.process.id())).expect("procfs");
    let read = |path: &Path, file| std::fs::read_to_string(path.join(file)).expect("procfs");
    let mut tasks = tasks.map(|task| task.expect("a thread").path());
    let task = tasks.find(|path| read(path, "comm").trim() == name);
    let stat = read(&task.expect(name), "stat");
    let after_name = stat.rsplit_once(") ").expect("proc_pid_stat(5)").1;
    // Field 39; what follows the name begins with field 3.
    let cpu = after_name.split(' ').nth(36).expect("proc_pid_stat(5)");
    cpu.parse().expect("a CPU's number")
}

#[test]
fn a_thousand_clients_are_all_told_and_a_reading_is_answered_on() {
    require_bed!(kvm);
    let mut vm = spinning();
    let mut listener = Listener::open(vm.socket(), 10).expect("the API");
    let crowd = Crowd::gather(vm.socket(), 900, 10).expect("the API");
    let deaf = |_| Listener::open(vm.socket(), 10).expect("the API");
    let deaf: Vec<Listener> = (0..100).map(deaf).collect();
    let mut last = listener.reading().expect("it goes on");
    for _ in 0..3 {
        crowd.wait_for_all(900);
        vm.readings();
        let next = listener.reading().expect("it goes on");
        assert_eq!(laws::check_pair(&last, &next), Ok(()));
        last = next;
        let reading = vm.reading();
        assert_ne!(
            last_on(&vm, "api"),
            reading.host_cpu.cpu,
            "the API is on the vCPU's CPU"
        );
    }
    // The end comes to those that read and those that do not.
    vm.process.signal(Signal::TERM);
    while listener.reading().is_some() {}
    assert_eq!(vm.process.wait().0.code(), Some(128 + 15));
    drop(deaf);
}

#[test]
fn a_thousand_clients_keep_no_reading_waiting_and_no_vcpu_from_its_cpu() {
    require_bed!(kvm);
    let vm = spinning();
    let mut bystander = Bystander::open(vm.socket()).expect("the API");
    let gather = || {
        let crowd = Crowd::gather(vm.socket(), 900, 100).expect("the API");
        let deaf = |_| Listener::open(vm.socket(), 100).expect("the API");
        let deaf: Vec<Listener> = (0..100).map(deaf).collect();
        crowd.wait_for_all(900);
        (crowd, deaf)
    };
    match unnoticed(&mut bystander, bystander::READERS, gather) {
        Ok(seen) => println!("{seen:?}"),
        Err(why) => bed::skipped("kvm", &why),
    }
}

#[test]
fn a_client_that_never_reads_costs_its_connection_and_no_more_as_time_passes() {
    require_bed!(kvm);
    let vm = spinning();
    let deaf = |_| Listener::open(vm.socket(), 10).expect("the API");
    let deaf: Vec<Listener> = (0..1000).map(deaf).collect();
    let mut listener = Listener::open(vm.socket(), 10).expect("the API");
    let mut told = |times| (0..times).for_each(|_| drop(listener.reading().expect("it goes on")));
    // Some 100 KB: many times what a stream's socket holds. From now on each has readings waiting.
    told(100);
    let unread = || deaf.iter().map(Listener::waiting_bytes).sum::<u64>();
    // A reading kept for each would be a megabyte for each time that they were told, in every one of these looks. That something is
    // brought into being once, for the last of them where the API is slow, is over after a look or two.
    let mut looks = Vec::new();
    let bytes = loop {
        let (kib, bytes) = (resident_kib(vm.process.id()), unread());
        told(300);
        let grown = resident_kib(vm.process.id()).saturating_sub(kib);
        looks.push(format!(
            "{kib} KiB, {grown} KiB more after 300 readings; {bytes} bytes wait"
        ));
        if grown < 1024 && unread() == bytes {
            break bytes;
        }
        assert!(looks.len() < 4, "there is more for those that do not read: {looks:#?}");
    };
    println!("{looks:#?}");
    // One message of one vCPU is less than 2 KiB, and there is room for two or three.
    assert!(bytes < 1000 * 16 * 1024, "{bytes} bytes wait in the sockets");
}

#[test]
fn a_stream_that_is_open_before_the_start_goes_on_with_readings() {
    require_bed!(kvm);
    let folder = Folder::new();
    let (socket, kernel) = (folder.join("s"), folder.write("kernel", elf(&Program::spin_forever())));
    let server = Process::chronovisor(["--api-sock", &socket.display().to_string()]);
    let begun = Instant::now();
    let mut listener = loop {
        match Listener::open(&socket, 10) {
            Ok(listener) => break listener,
            Err(error) => assert!(begun.elapsed() < PATIENCE, "{error}: {}", server.stderr()),
        }
    };
    let boot = format!(r#"{{"kernel_image_path": {kernel:?}}}"#);
    let start = r#"{"action_type": "InstanceStart"}"#;
    for (path, body) in [("/boot-source", &*boot), ("/actions", start)] {
        let answer = request(&socket, "PUT", path, Some(body)).expect("the API");
        assert_eq!(answer.status, 204, "{path}: {}", answer.fault());
    }
    assert_eq!(listener.reading().expect("it goes on").index, 0);
}
