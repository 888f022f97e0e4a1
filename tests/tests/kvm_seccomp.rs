//! Confinement, seen from outside: every thread of a microVM has its filter, and a call that its role may not make ends the
//! process, by name. To have each role make one, the policy is given without a call that the role is known to make.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::bed::Folder;
use tests::client;
use tests::failure::fails;
use tests::flat::{Program, elf};
use tests::require_bed;
use tests::vm::{PATIENCE, Process, Vm};

const SHIPPED: &str = include_str!("../../resources/seccomp/x86_64.json");
/// What the process ends with, as Firecracker does.
const BAD_SYSCALL: i32 = 148;

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Each thread's name, and what /proc says of its confinement; but for the kernel's own threads in the process, which make no system
/// calls: KVM's, that looks for huge pages to split, and io_uring's workers.
fn threads(pid: u32) -> BTreeMap<String, (String, String)> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it is there");
    let one = |task: &Path| {
        let status = std::fs::read_to_string(task.join("status")).ok()?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.trim().to_owned())
        };
        let name = field("Name:").filter(|name| !name.starts_with("kvm-nx-") && !name.starts_with("iou-"))?;
        Some((name, (field("Seccomp:")?, field("NoNewPrivs:")?)))
    };
    tasks.filter_map(|task| one(&task.ok()?.path())).collect()
}

/// The policy that ships, without what `drop` says of a rule of `role`.
fn without(folder: &Folder, role: &str, drop: impl Fn(&Value) -> bool) -> PathBuf {
    let mut policy: Value = serde_json::from_str(SHIPPED).expect("it is JSON");
    let rules = policy[role]["filter"].as_array_mut().expect("rules");
    let before = rules.len();
    rules.retain(|rule| !drop(rule));
    assert!(rules.len() < before, "the policy allows it otherwise");
    folder.write("policy.json", policy.to_string())
}

/// A running flat guest on two vCPUs with a disk, over the API's start, its console a pipe.
struct Served {
    process: Process,
    socket: PathBuf,
    folder: Folder,
}

impl Served {
    fn new(flags: &[&str]) -> Self {
        let folder = Folder::new();
        Self::in_folder(folder, flags)
    }

    fn in_folder(folder: Folder, flags: &[&str]) -> Self {
        let socket = folder.join("api.sock");
        let path = socket.display().to_string();
        let arguments = ["--api-sock", &path].into_iter().chain(flags.iter().copied());
        let log = folder.join("log").display().to_string();
        let process = Process::chronovisor(arguments.chain(["--log-path", &log]));
        Self {
            process,
            socket,
            folder,
        }
    }

    fn wait_for_api(&self) {
        wait_until("the API answers", || {
            client::request(&self.socket, "GET", "/", None).is_ok()
        });
    }

    fn put(&self, path: &str, body: Value) {
        let answer = client::request(&self.socket, "PUT", path, Some(&body.to_string())).expect("it answers");
        assert_eq!(answer.status, 204, "{path}: {answer:?}; {}", self.process.stderr());
    }

    fn start(&self) {
        let kernel = self.folder.write("kernel", elf(&Program::spin_forever()));
        let disk = self.folder.write("disk", [0; 4096]);
        self.put(
            "/machine-config",
            serde_json::json!({ "vcpu_count": 2, "mem_size_mib": 16 }),
        );
        self.put("/boot-source", serde_json::json!({ "kernel_image_path": kernel }));
        self.put(
            "/drives/d",
            serde_json::json!({ "drive_id": "d", "path_on_host": disk, "is_root_device": false, "io_engine": "Async" }),
        );
        self.put("/actions", serde_json::json!({ "action_type": "InstanceStart" }));
    }

    /// Waits for its end, by a call that it may not make.
    fn ends_by(mut self, thread: &str, role: &str, call: &str) -> (Folder, PathBuf) {
        let (status, _, said) = self.process.wait();
        assert_eq!(status.code(), Some(BAD_SYSCALL), "{status:?}: {said}");
        let names = format!("seccomp: thread {thread} made a system call that {role} threads may not make: {call} (");
        let lines: Vec<_> = said.lines().filter(|line| line.contains("seccomp:")).collect();
        assert!(
            !lines.is_empty() && lines.iter().all(|line| line.contains(&names)),
            "{said}"
        );
        let log = std::fs::read_to_string(self.folder.join("log")).expect("a log");
        assert!(log.lines().last().is_some_and(|line| line.contains(&names)), "{log}");
        (self.folder, self.socket)
    }
}

#[test]
fn every_thread_of_a_microvm_has_a_filter_unless_it_was_not_wanted() {
    require_bed!(kvm);
    for (flags, expected) in [(&[][..], ("2", "1")), (&["--no-seccomp"], ("0", "0"))] {
        let served = Served::new(flags);
        served.wait_for_api();
        served.start();
        let named = ["chronovisor", "api", "signals", "vmm", "vcpu0", "vcpu1", "console"];
        let mut found = BTreeMap::new();
        wait_until("all its threads are there", || {
            found = threads(served.process.id());
            named.iter().all(|name| found.contains_key(*name))
        });
        let same = |(seccomp, privileges): &(String, String)| (seccomp.as_str(), privileges.as_str()) == expected;
        assert!(found.values().all(same), "{flags:?}: {found:?}");
    }
}

#[test]
fn run_confines_its_threads_too_and_takes_the_policy_that_ships_as_a_file() {
    require_bed!(kvm);
    let folder = Folder::new();
    let policy = folder.write("policy.json", SHIPPED).display().to_string();
    for flags in [vec![], vec!["--seccomp-filter", &policy]] {
        let mut vm = Vm::flat(&Program::spin_forever(), flags);
        let _ = vm.reading();
        let found = threads(vm.process.id());
        assert!(found.values().all(|(seccomp, _)| seccomp == "2"), "{found:?}");
        assert_eq!(vm.ask("GET", "/host", None).status, 200);
    }
}

#[test]
fn a_vcpu_thread_that_makes_a_forbidden_call_ends_the_process_and_the_log_names_it() {
    require_bed!(kvm);
    let folder = Folder::new();
    let log = folder.join("log");
    let policy = without(&folder, "vcpu", |rule| rule["syscall"] == "ioctl");
    let policy = policy.display().to_string();
    let served = Served::in_folder(folder, &["--seccomp-filter", &policy, "--id", "one"]);
    served.wait_for_api();
    let kernel = served.folder.write("kernel", elf(&Program::spin_forever()));
    served.put(
        "/machine-config",
        serde_json::json!({ "vcpu_count": 1, "mem_size_mib": 16 }),
    );
    served.put("/boot-source", serde_json::json!({ "kernel_image_path": kernel }));
    // Answered or not: the end may be quicker.
    let start = serde_json::json!({ "action_type": "InstanceStart" }).to_string();
    let _ = client::request(&served.socket, "PUT", "/actions", Some(&start));
    let (_folder, _) = served.ends_by("vcpu0", "vcpu", "ioctl");
    let text = std::fs::read_to_string(&log).expect("a log");
    let line = text.lines().last().expect("a line");
    assert!(
        line.contains("Z [one:vcpu0] seccomp: thread vcpu0 made")
            && line.contains("ioctl (16), arguments ")
            && line.contains(" 0xae80 "),
        "{text}"
    );
}

#[test]
fn an_api_thread_that_makes_a_forbidden_call_ends_the_process_and_the_log_names_it() {
    require_bed!(kvm);
    let folder = Folder::new();
    let policy = without(&folder, "api", |rule| rule["syscall"] == "accept4")
        .display()
        .to_string();
    let served = Served::in_folder(folder, &["--seccomp-filter", &policy]);
    wait_until("the socket is there", || {
        std::os::unix::net::UnixStream::connect(&served.socket).is_ok()
    });
    served.ends_by("api", "api", "accept4");
}

#[test]
fn a_vmm_thread_that_makes_a_forbidden_call_ends_the_process_and_what_it_leaves_stops_no_other() {
    require_bed!(kvm);
    let folder = Folder::new();
    let policy = without(&folder, "vmm", |rule| rule["syscall"] == "sched_setaffinity");
    let policy = policy.display().to_string();
    let served = Served::in_folder(folder, &["--seccomp-filter", &policy]);
    served.wait_for_api();
    served.start();
    let _ = client::request(&served.socket, "PUT", "/vcpus/0/affinity", Some(r#"{"cpu": "none"}"#));
    let (folder, socket) = served.ends_by("vmm", "vmm", "sched_setaffinity");
    assert!(socket.exists(), "nothing is cleaned up");
    // The same microVM starts again, with the same socket and disk.
    let again = Served::in_folder(folder, &[]);
    again.wait_for_api();
    again.start();
}

#[test]
fn a_policy_that_cannot_be_taken_is_named_with_what_is_wrong_with_it() {
    require_bed!(kvm);
    let folder = Folder::new();
    let file = |name: &str, bytes: &[u8]| folder.write(name, bytes).display().to_string();
    let missing = folder.join("missing").display().to_string();
    let rules = r#"{"default_action": "trap", "filter_action": "allow", "filter": []}"#;
    let lacks = file("lacks", format!(r#"{{"vmm": {rules}, "api": {rules}}}"#).as_bytes());
    let more = format!(r#"{{"vmm": {rules}, "api": {rules}, "vcpu": {rules}, "gpu": {rules}}}"#);
    let more = file("more", more.as_bytes());
    let binary = file("binary", b"\x03\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0vcpu");
    let kernel = file("kernel", &elf(&Program::spin_forever()));
    for (path, says) in [
        (&missing, "No such file"),
        (&binary, "not JSON"),
        (&lacks, "Missing thread category: vcpu"),
        (&more, "Invalid thread categories: gpu"),
        (&"/dev/zero".to_owned(), "larger than"),
    ] {
        fails(
            &["run", "--kernel", &kernel, "--seccomp-filter", path],
            1,
            &["--seccomp-filter", path, says],
        );
        let socket = folder.join("api.sock").display().to_string();
        fails(
            &["--api-sock", &socket, "--seccomp-filter", path],
            1,
            &["--seccomp-filter", path, says],
        );
    }
}
