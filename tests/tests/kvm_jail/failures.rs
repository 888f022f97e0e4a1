//! A jail that is refused, or whose set-up fails at any step, says so and leaves nothing.

use super::cgroups::Hierarchy;
use super::*;

#[test]
fn what_is_wrong_is_told_in_one_line_and_nothing_is_left() {
    require_jail!();
    let jail = Jail::new(&Program::spin_forever());
    let text = jail.base().with_file_name("text");
    fs::write(&text, "no program").expect("a file");
    fs::set_permissions(&text, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("its mode");
    let text = text.display().to_string();
    let absent = jail.base().with_file_name("absent").display().to_string();
    for (flags, says) in [
        (&["--exec-file", &text][..], "Failed to exec into"),
        (&["--exec-file", &absent], "Failed to canonicalize path"),
        (&["--netns", &absent], &*absent),
        (&["--netns", &text], "join network namespace"),
        (&["--bind", &absent], "Failed to canonicalize path"),
        (&["--cgroup-version", "2", "--cgroup", "nosuch.file=1"], "nosuch"),
        (
            &["--cgroup-version", "2", "--cgroup", "cgroup.nosuch=1"],
            "cgroup.nosuch",
        ),
        (&["--cgroup-version", "2", "--cgroup", "cgroup.max.depth=deep"], "deep"),
        (&["--resource-limit", "cpu=1"], "Invalid resource argument: cpu"),
    ] {
        let unified = Hierarchy::of("cgroup2", "");
        for more in [
            &[][..],
            &["--daemonize"],
            &["--new-pid-ns"],
            &["--daemonize", "--new-pid-ns"],
        ] {
            command_fails(jail.guest(&[flags, more].concat()), 1, &[says]);
            assert_eq!(names(&jail.base()), set(&[]), "{flags:?} {more:?}");
            wait_for_no_other(jail.id());
        }
        if let Some(unified) = unified {
            assert!(!unified.path.join("chronovisor").exists(), "{flags:?}");
        }
    }
    let mut without_uid = Command::new(bed::file("chronovisor"));
    without_uid.args(["jail", "--id", "a", "--gid", "1"]);
    command_fails(without_uid, 2, &["--uid"]);
    let mut by_another = jail.guest(&[]);
    std::os::unix::process::CommandExt::uid(&mut by_another, UID);
    if Command::new(bed::file("chronovisor")).arg("--version").output().is_ok() {
        let outcome = by_another.output();
        if let Ok(output) = outcome {
            assert_eq!(output.status.code(), Some(1), "{output:?}");
            assert!(String::from_utf8_lossy(&output.stderr).contains("root"), "{output:?}");
        }
    }
}

fn wait_for_no_other(id: &str) {
    let begun = std::time::Instant::now();
    while processes_with(id) > 0 {
        assert!(begun.elapsed() < tests::vm::PATIENCE, "a process is left");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// Each system call that a jail is made by says EIO, one at a time.
#[test]
fn whichever_step_of_it_fails_it_says_so_and_leaves_no_directory_cgroup_mount_or_process() {
    require_jail!();
    let Some(unified) = Hierarchy::of("cgroup2", "") else {
        return bed::skipped("kvm", "this host has no cgroups of version 2");
    };
    let before = fs::read_to_string("/proc/self/mountinfo").expect("procfs");
    let netns = "/proc/self/ns/net";
    let background = ["--daemonize", "--new-pid-ns"];
    for (calls, flags, says) in [
        (&[libc::SYS_close_range][..], &[][..], "close what it inherited"),
        (&[libc::SYS_flock], &[], "lock"),
        (&[libc::SYS_mkdirat], &[], "make the directory"),
        (&[libc::SYS_fchmod], &[], "set the mode"),
        (&[libc::SYS_setns], &["--netns", netns], "join network namespace"),
        (&[libc::SYS_unshare], &["--new-net-ns"], "make a network namespace"),
        (&[libc::SYS_unshare], &[], "make a mount namespace"),
        (&[libc::SYS_unshare], &["--new-pid-ns"], "make a PID namespace"),
        (&[libc::SYS_unshare], &background, "make a PID namespace"),
        (&[libc::SYS_pipe2], &background, "make a pipe"),
        (&[libc::SYS_clone], &background, "fork"),
        (&[libc::SYS_setsid], &background, "make a session"),
        (&[libc::SYS_mount], &[], "keep its mounts"),
        (&[libc::SYS_mount], &background, "keep its mounts"),
        (&[libc::SYS_open_tree], &[], "show"),
        (&[libc::SYS_pivot_root], &[], "make it the root"),
        (&[libc::SYS_pivot_root], &background, "make it the root"),
        (&[libc::SYS_umount2], &[], "let go of the host's root"),
        (&[libc::SYS_mknodat], &[], "make /dev/"),
        (&[libc::SYS_fchown], &[], "give / to its user"),
        (&[libc::SYS_fchownat], &[], "make /dev/"),
        (&[libc::SYS_move_mount], &[], "show something as"),
        (&[libc::SYS_renameat, libc::SYS_renameat2], &[], "write /chronovisor"),
        (
            &[libc::SYS_prlimit64, libc::SYS_setrlimit],
            &[],
            "set limit for resource",
        ),
        (&[libc::SYS_prctl], &[], "give up capabilities"),
        (&[libc::SYS_setgroups], &[], "leave its groups"),
        (&[libc::SYS_setresgid], &[], "become group"),
        (&[libc::SYS_setresuid], &[], "become user"),
        (&[libc::SYS_setresuid], &background, "become user"),
        (&[libc::SYS_dup2, libc::SYS_dup3], &background, "/dev/null"),
    ] {
        let jail = Jail::new(&Program::spin_forever());
        let cgroup = [
            "--cgroup-version",
            "2",
            "--parent-cgroup",
            "chronovisor-test",
            "--cgroup",
            "cgroup.max.depth=3",
        ];
        let mut command = jail.guest(&[&cgroup, flags].concat());
        without(&mut command, calls);
        println!("{says} {flags:?}");
        command_fails(command, 1, &[says]);
        wait_for_no_other(jail.id());
        assert_eq!(names(&jail.base()), set(&[]), "{says} {flags:?}");
        assert!(!unified.path.join("chronovisor-test").exists(), "{says} {flags:?}");
        assert_eq!(
            fs::read_to_string("/proc/self/mountinfo").expect("procfs"),
            before,
            "{says} {flags:?}"
        );
    }
}
