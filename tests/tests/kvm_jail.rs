//! `chronovisor jail`: what the program in it may do and see, as the host sees it; and that a start that fails leaves
//! nothing.
//!
//! The program is chronovisor itself, with a guest that spins.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{Mode, OFlags, Uid, openat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::Signal;
use rustix::thread::{UnshareFlags, gettid, set_thread_res_uid, unshare_unsafe};
use tests::bed::{self, Folder};
use tests::failure::command_fails;
use tests::flat::Program;
use tests::jail::{GID, Jail, UID, processes_with, without};
use tests::require_bed;
use tests::vm::Process;

/// Ends the calling test, in one line that is counted, unless a jail can be made here.
macro_rules! require_jail {
    () => {
        require_bed!(kvm);
        if let Err(why) = lacking() {
            return bed::skipped("kvm", &why);
        }
    };
}

/// Where it is placed.
#[path = "kvm_jail/cgroups.rs"]
mod cgroups;
/// What is refused, and what fails.
#[path = "kvm_jail/failures.rs"]
mod failures;

fn lacking() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("only root can make a jail".to_owned());
    }
    match Command::new("/proc/self/exe").arg("--list").in_new_mounts().output() {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("no mount namespace: {error}")),
    }
}

/// What a container may forbid.
trait InNewMounts {
    fn in_new_mounts(&mut self) -> &mut Self;
}

impl InNewMounts for Command {
    #[expect(unsafe_code, reason = "pre_exec")]
    fn in_new_mounts(&mut self) -> &mut Self {
        use std::os::unix::process::CommandExt;
        // SAFETY: one system call, in a child that shares nothing that it takes away.
        unsafe { self.pre_exec(|| Ok(unshare_unsafe(UnshareFlags::NEWNS)?)) }
    }
}

/// The field `name` of `/proc/PID/status`.
fn status(pid: u32, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.expect("a field").split_whitespace().collect::<Vec<_>>().join(" ")
}

fn namespace(pid: &str, which: &str) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/{which}")).expect("it runs")
}

fn names(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
    entries
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

#[test]
fn the_program_is_the_given_user_with_no_capability_and_no_way_to_gain_one() {
    require_jail!();
    let jail = Jail::new(&Program::spin_forever());
    let process = jail.start(&[]);
    let pid = process.id();
    assert_eq!(status(pid, "Uid"), [UID; 4].map(|uid| uid.to_string()).join(" "));
    assert_eq!(status(pid, "Gid"), [GID; 4].map(|gid| gid.to_string()).join(" "));
    assert_eq!(status(pid, "Groups"), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(pid, set), "0".repeat(16), "{set}");
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    assert_eq!(pid, jail.pid(), "it is the process that was started");
    // And readings are made.
    let readings = jail.ask("GET", "/vcpus", None).expect("it serves").body;
    assert!(readings[0]["modes"].is_object(), "{readings}");
}

#[test]
fn even_root_has_no_capability_in_it() {
    require_jail!();
    let jail = Jail::new(&Program::spin_forever());
    let mut command = jail.guest(&[]);
    let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
    let mut as_root = Command::new(command.get_program());
    let user = UID.to_string();
    as_root.args(arguments.iter().map(|argument| {
        if *argument == *user {
            "0".into()
        } else {
            argument.clone()
        }
    }));
    command = as_root;
    let mut process = Process::spawn(command);
    while jail.ask("GET", "/", None).is_err() {
        assert!(!process.has_ended(), "{}", process.stderr());
    }
    assert_eq!(status(process.id(), "Uid"), "0 0 0 0");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(process.id(), set), "0".repeat(16), "{set}");
    }
}

#[test]
fn it_sees_what_is_listed_and_nothing_else_and_the_host_sees_no_mount_of_it() {
    require_jail!();
    let jail = Jail::new(&Program::spin_forever());
    let before = fs::read_to_string("/proc/self/mountinfo").expect("procfs");
    let shown = Folder::new();
    shown.write("file", "seen");
    let bind = format!("{}:/a/b", shown.path().display());
    let process = jail.start(&["--bind", &bind, "--bind", "/dev/zero:/dev/zero:ro"]);
    let root = PathBuf::from(format!("/proc/{}/root", process.id()));
    assert_eq!(
        names(&root)
            .difference(&set(&["lib64", "usr"]))
            .cloned()
            .collect::<BTreeSet<_>>(),
        set(&[
            "a",
            "chronovisor",
            "chronovisor.pid",
            "dev",
            "kernel",
            "proc",
            "run",
            "sys"
        ])
    );
    assert_eq!(
        names(&root.join("dev")),
        set(&["kvm", "net", "null", "urandom", "zero"])
    );
    assert_eq!(names(&root.join("dev/net")), set(&["tun"]));
    assert_eq!(names(&root.join("run")), set(&["chronovisor.socket"]));
    let sys = names(&root.join("sys"));
    assert!(sys.is_subset(&set(&["devices", "fs", "kernel", "module"])), "{sys:?}");
    assert_eq!(names(&root.join("sys/devices/system")), set(&["cpu"]));
    // Of /proc its own processes only; of files that tell of the host none.
    for name in names(&root.join("proc")) {
        assert!(
            name.parse::<u32>().is_ok() || ["self", "thread-self"].contains(&&*name),
            "/proc/{name}"
        );
    }
    assert_eq!(fs::read_to_string(root.join("a/b/file")).expect("it was shown"), "seen");

    for (path, mode, uid) in [
        ("dev/kvm", 0o600, UID),
        ("dev/net/tun", 0o600, UID),
        ("", 0o700, UID),
        ("run", 0o700, UID),
        ("dev", 0o755, 0),
        ("chronovisor", 0o555, 0),
        ("chronovisor.pid", 0o444, 0),
    ] {
        let metadata = fs::metadata(root.join(path)).expect(path);
        assert_eq!((metadata.mode() & 0o7777, metadata.uid()), (mode, uid), "{path}");
    }

    // No mount of it may be written, but for its directory and what was shown to be; none has devices but /dev, and
    // what is one.
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", process.id())).expect("it runs");
    let mut points = BTreeSet::new();
    for line in mounts.lines() {
        let fields: Vec<_> = line.split(' ').collect();
        let (point, flags) = (fields[4], fields[5].split(',').collect::<Vec<_>>());
        points.insert(point.to_owned());
        assert!(flags.contains(&"nosuid"), "{line}");
        assert!(flags.contains(&"ro") || ["/", "/a/b"].contains(&point), "{line}");
        assert!(flags.contains(&"noexec") || point == "/", "{line}");
        assert!(
            flags.contains(&"nodev") || ["/", "/dev", "/dev/zero"].contains(&point),
            "{line}"
        );
    }
    let expected = ["/", "/dev", "/proc", "/sys", "/kernel", "/a/b", "/dev/zero"];
    points.retain(|point| !point.starts_with("/sys/"));
    assert_eq!(points, set(&expected), "{mounts}");
    assert_eq!(fs::read_to_string("/proc/self/mountinfo").expect("procfs"), before);
}

#[test]
fn what_the_caller_left_open_or_set_is_not_there() {
    require_jail!();
    let jail = Jail::new(&Program::spin_forever());
    let secret = jail.base().with_file_name("secret");
    fs::write(&secret, "secret").expect("a file");
    let guest = jail.guest(&[]);
    let mut leaky = Command::new("sh");
    leaky
        .args(["-c", "exec 3<\"$SECRET\" 9<\"$SECRET\" && exec \"$0\" \"$@\""])
        .env("SECRET", &secret);
    leaky.arg(guest.get_program()).args(guest.get_args());
    let mut process = Process::spawn(leaky);
    while jail.ask("GET", "/", None).is_err() {
        assert!(!process.has_ended(), "{}", process.stderr());
    }
    let descriptors = PathBuf::from(format!("/proc/{}/fd", process.id()));
    let identity = |path: &Path| path.metadata().map(|metadata| (metadata.dev(), metadata.ino())).ok();
    let mut of_the_host = BTreeSet::new();
    for number in names(&descriptors) {
        let descriptor = descriptors.join(&number);
        // Some come and go.
        let Ok(target) = fs::read_link(&descriptor) else {
            continue;
        };
        assert_ne!(target, secret, "{number}");
        // By a directory one can leave a root: it has none but the one, within, that its socket's file is to be removed
        // from.
        assert!(
            !descriptor.is_dir() || identity(&descriptor) == identity(&jail.root().join("run")),
            "{number}: {}",
            target.display()
        );
        if target.starts_with("/proc") && !target.starts_with("/proc/1") && target.components().count() == 3 {
            of_the_host.insert(target.display().to_string());
        }
    }
    assert!(
        of_the_host.is_subset(&set(&["/proc/interrupts", "/proc/timer_list"])),
        "{of_the_host:?}"
    );
    assert!(
        of_the_host.contains("/proc/timer_list"),
        "readings are as good as outside: {of_the_host:?}"
    );
    let environment = fs::read(format!("/proc/{}/environ", process.id())).expect("it runs");
    for variable in environment
        .split(|&byte| byte == 0)
        .filter(|variable| !variable.is_empty())
    {
        let variable = String::from_utf8_lossy(variable);
        assert!(
            variable.starts_with("LISTEN_") || variable.starts_with("LD_LIBRARY_PATH="),
            "{variable}"
        );
    }
}

#[test]
fn its_namespaces_are_those_asked_for() {
    require_jail!();
    let jail = Jail::new(&Program::spin_forever());
    let process = jail.start(&[]);
    let pid = process.id().to_string();
    assert_ne!(namespace(&pid, "mnt"), namespace("self", "mnt"));
    for which in ["net", "pid"] {
        assert_eq!(namespace(&pid, which), namespace("self", which));
    }
    drop(process);

    let jail = Jail::new(&Program::spin_forever());
    let process = jail.start(&["--new-net-ns"]);
    assert_ne!(namespace(&process.id().to_string(), "net"), namespace("self", "net"));
    drop(process);

    // One that a thread of this process is in.
    let (there, name) = std::sync::mpsc::channel();
    let (go, gone) = std::sync::mpsc::channel::<()>();
    let holder = std::thread::spawn(move || {
        // SAFETY: a network namespace of its own takes nothing from the thread that memory or descriptors rely on.
        #[expect(unsafe_code, reason = "unshare")]
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("a network namespace");
        let tid = gettid().as_raw_nonzero();
        there
            .send(format!("{}/task/{tid}", std::process::id()))
            .expect("it waits");
        let _ = gone.recv();
    });
    let name = name.recv().expect("it has one");
    let jail = Jail::new(&Program::spin_forever());
    let process = jail.start(&["--netns", &format!("/proc/{name}/ns/net")]);
    assert_eq!(namespace(&process.id().to_string(), "net"), namespace(&name, "net"));
    assert_ne!(namespace(&name, "net"), namespace("self", "net"));
    drop((process, go));
    holder.join().expect("it ends");

    let jail = Jail::new(&Program::spin_forever());
    let behind = jail.start_behind(&["--new-pid-ns"]);
    assert_ne!(namespace(&behind.pid.to_string(), "pid"), namespace("self", "pid"));
    assert_eq!(status(behind.pid, "NSpid"), format!("{} 1", behind.pid));
    // SIGTERM is heard, though process 1 of a namespace has no default for it.
    let vm = rustix::process::Pid::from_raw(i32::try_from(behind.pid).expect("a pid")).expect("a pid");
    for _ in 0..2 {
        let _ = rustix::process::kill_process(vm, Signal::TERM);
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    let begun = std::time::Instant::now();
    while behind.is_there() {
        assert!(begun.elapsed() < tests::vm::PATIENCE, "it does not end");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn a_daemon_is_in_a_session_of_its_own_with_nothing_to_say() {
    require_jail!();
    for flags in [&["--daemonize"][..], &["--daemonize", "--new-pid-ns"]] {
        let jail = Jail::new(&Program::spin_forever());
        let behind = jail.start_behind(flags);
        let stat = fs::read_to_string(format!("/proc/{}/stat", behind.pid)).expect("it runs");
        let (_, fields) = stat.rsplit_once(") ").expect("a name");
        let fields: Vec<&str> = fields.split(' ').collect();
        let this = fs::read_to_string("/proc/self/stat").expect("procfs");
        let this: Vec<&str> = this.rsplit_once(") ").expect("a name").1.split(' ').collect();
        // state ppid pgrp session tty_nr
        assert_ne!(fields[1], std::process::id().to_string(), "it is nobody's child");
        assert_ne!(fields[3], this[3], "{flags:?}");
        assert_ne!(
            fields[3],
            behind.pid.to_string(),
            "it leads no session, so no terminal becomes its own"
        );
        assert_eq!(fields[4], "0", "it has no terminal");
        for number in 0..3 {
            let path = fs::read_link(format!("/proc/{}/fd/{number}", behind.pid)).expect("it is open");
            assert_eq!(path, Path::new("/dev/null"), "{number}");
        }
        let pid = jail.id().to_owned();
        drop(behind);
        assert_eq!(processes_with(&pid), 0, "nobody else is left");
    }
}

#[test]
fn its_resources_are_limited_and_the_largest_file_ends_no_microvm() {
    require_jail!();
    let limit = |pid: u32, name: &str| {
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("it runs");
        let line = limits
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .expect("a limit");
        line.split_whitespace().take(2).collect::<Vec<_>>().join(" ")
    };
    let jail = Jail::new(&Program::spin_forever());
    let process = jail.start(&[]);
    assert_eq!(limit(process.id(), "Max open files"), "2048 2048");
    assert_eq!(limit(process.id(), "Max file size"), "unlimited unlimited");
    drop(process);

    let jail = Jail::new(&Program::spin_forever());
    let flags = ["--resource-limit", "fsize=64", "--resource-limit", "no-file=256"];
    let mut process = jail.start(&flags);
    assert_eq!(limit(process.id(), "Max open files"), "256 256");
    assert_eq!(limit(process.id(), "Max file size"), "64 64");
    drop(process);
    // A line of metrics is longer.
    let jail = Jail::new(&Program::spin_forever());
    let arguments = ["--api-sock", "/run/chronovisor.socket", "--metrics-path", "/metrics"];
    process = Process::spawn(jail.command(&flags, &arguments));
    while jail.ask("GET", "/", None).is_err() {
        assert!(!process.has_ended(), "{}", process.stderr());
    }
    let put = |path: &str, body: &str| jail.ask("PUT", path, Some(body)).expect("it answers");
    assert_eq!(put("/boot-source", r#"{"kernel_image_path": "/kernel"}"#).status, 204);
    assert_eq!(put("/actions", r#"{"action_type": "InstanceStart"}"#).status, 204);
    let flush = put("/actions", r#"{"action_type": "FlushMetrics"}"#);
    assert_eq!(
        jail.ask("GET", "/", None).expect("it answers").body["state"],
        "Running",
        "{flush:?}"
    );
    assert!(fs::metadata(jail.root().join("metrics")).expect("they are there").len() <= 64);
}

#[test]
fn a_jail_in_use_is_left_alone_and_one_that_was_is_used_again() {
    require_jail!();
    let jail = Jail::new(&Program::spin_forever());
    let mut process = jail.start(&[]);
    let pid = process.id().to_string();
    command_fails(jail.guest(&[]), 1, &["runs in this jail", &pid]);
    // The file in the root is in the inmate's hands.
    let its_own = jail.root().join("chronovisor.pid");
    fs::remove_file(&its_own).expect("it is there");
    command_fails(jail.guest(&[]), 1, &["runs in this jail", &pid]);
    let beside = jail.root().with_file_name("chronovisor.pid");
    let beside = fs::metadata(beside).expect("what the refusal goes by");
    assert_eq!((beside.uid(), beside.mode() & 0o777), (0, 0o444));
    assert_eq!(
        jail.ask("GET", "/", None).expect("it serves on").body["state"],
        "Running"
    );
    process.signal(Signal::KILL);
    process.wait();
    fs::remove_file(jail.root().join("run/chronovisor.socket")).expect("it was killed");
    drop(jail.start(&[]));
}

/// flock(2) takes a directory that is open, for reading is enough.
#[test]
fn nobody_but_root_can_open_what_a_start_locks() {
    require_jail!();
    for made_before in [false, true] {
        let jail = Jail::new(&Program::spin_forever());
        let place = jail.base().join("chronovisor").join(jail.id());
        if made_before {
            fs::create_dir_all(jail.root()).expect("a jail");
            fs::set_permissions(&place, fs::Permissions::from_mode(0o755)).expect("it is ours");
        }
        let process = jail.start(&[]);
        let jails = fs::File::open(jail.base().join("chronovisor")).expect("it is there");
        let id = jail.id().to_owned();
        let another = std::thread::spawn(move || {
            // This thread only.
            let nobody = Uid::from_raw(UID + 2);
            set_thread_res_uid(nobody, nobody, nobody).expect("root can");
            let open = |name: &str| openat(&jails, name, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).map(drop);
            (open("."), open(&id))
        });
        let tried = another.join().expect("it tries");
        assert_eq!(tried, (Ok(()), Err(Errno::ACCESS)), "made before: {made_before}");
        drop(process);
    }
}

#[test]
fn what_it_ran_into_in_its_jail_is_named_with_what_to_do() {
    require_jail!();
    let program = fs::read(bed::file("chronovisor")).expect("the program");
    let is_dynamic = program
        .windows(11)
        .any(|bytes| bytes == b"/ld-linux-x" || bytes == b"/ld-linux-a");
    for name in [
        "chronovisor",
        ".new-chronovisor",
        "chronovisor.pid",
        "etc/ld.so.preload",
    ] {
        let jail = Jail::new(&Program::spin_forever());
        let left = jail.root().join(name);
        fs::create_dir_all(left.join("full")).expect("a jail");
        if name.starts_with("etc") && !is_dynamic {
            drop(jail.start(&[]));
            continue;
        }
        command_fails(jail.guest(&[]), 1, &[&*left.to_string_lossy(), "remove it"]);
        fs::remove_dir_all(&left).expect("it is there still");
        drop(jail.start(&[]));
    }
}

/// A static program of the host's that does nothing but run.
fn spinning() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    // e_type ET_EXEC, e_machine EM_X86_64, e_version (elf(5)).
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for address in [BASE + HEADERS, 64, 0] {
        elf.extend(address.to_le_bytes());
    }
    // e_flags, e_ehsize, e_phentsize, e_phnum, and no sections.
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    // PT_LOAD, to be read and executed: all of it.
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for number in [0, BASE, BASE, HEADERS + 2, HEADERS + 2, 0x1000] {
        elf.extend(number.to_le_bytes());
    }
    // jmp to itself.
    elf.extend([0xeb, 0xfe]);
    elf
}

/// Rust's runtime ignores SIGPIPE, and what is ignored stays so over exec (signal(7)).
#[test]
fn the_program_does_not_find_sigpipe_ignored() {
    require_jail!();
    let jail = Jail::new(&Program::spin_forever());
    let program = jail.base().with_file_name("spinning");
    fs::write(&program, spinning()).expect("a file");
    let program = program.to_string_lossy();
    let mut process = Process::spawn(jail.command(&["--exec-file", &program], &[]));
    let itself = PathBuf::from(format!("/proc/{}/exe", process.id()));
    while !fs::read_link(&itself).is_ok_and(|path| path.file_name().is_some_and(|name| name == "spinning")) {
        assert!(!process.has_ended(), "{}", process.stderr());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    // A mask, signal 1 first; who started the test may ignore others.
    let ignored = u64::from_str_radix(&status(process.id(), "SigIgn"), 16).expect("a mask");
    assert_eq!(ignored >> (libc::SIGPIPE - 1) & 1, 0, "{ignored:x}");
    process.signal(Signal::KILL);
    process.wait();
}

/// Who has run in a jail owns its directory, and may have left anything there.
#[test]
fn what_a_microvm_left_in_its_jail_leads_nobody_out_of_it() {
    require_jail!();
    for name in ["dev", "proc", "sys", "run", "kernel", "chronovisor", "chronovisor.pid"] {
        let jail = Jail::new(&Program::spin_forever());
        let outside = Folder::new();
        outside.write("precious", "kept");
        fs::create_dir_all(jail.root()).expect("a jail");
        let target = if name.contains('.') || ["kernel", "chronovisor"].contains(&name) {
            outside.join("precious")
        } else {
            outside.path().to_owned()
        };
        symlink(&target, jail.root().join(name)).expect("a link");
        let before = outside.path().metadata().expect("it is there");
        let mut process = Process::spawn(jail.guest(&[]));
        // It is refused, or the link is replaced.
        while jail.ask("GET", "/", None).is_err() && !process.has_ended() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        drop(process);
        assert_eq!(outside.names(), ["precious"], "{name}");
        assert_eq!(
            fs::read_to_string(outside.join("precious")).expect("it is there"),
            "kept",
            "{name}"
        );
        let after = outside.path().metadata().expect("it is there");
        assert_eq!((before.mode(), before.uid()), (after.mode(), after.uid()), "{name}");
        let precious = outside.join("precious").metadata().expect("it is there");
        assert_eq!((precious.uid(), precious.mode() & 0o111), (0, 0), "{name}");
    }
}
