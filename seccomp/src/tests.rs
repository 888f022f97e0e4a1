//! The policy that ships, tried for each role in a process of its own.

#![expect(unsafe_code, reason = "system calls by number, to see what becomes of them")]

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

use serde_json::Value;

use super::*;

const SHIPPED: &str = include_str!("../../resources/seccomp/x86_64.json");

type Call = (&'static str, &'static str, [u64; 6]);

/// What no role may do: its name in the test, the system call's name, and arguments. Those that matter to the kernel are null or no
/// descriptors, so that one that got through would do nothing.
fn forbidden() -> Vec<Call> {
    // time.h, resource.h, fcntl.h and others: what the arguments mean.
    const CPU_PROCESS: u64 = 2;
    const CPU_THREAD: u64 = 3;
    const RLIMIT_CPU: u64 = 0;
    const SIGCHLD: u64 = 17;
    const SOMEWHERE: u64 = 0x1000;
    let none = [0; 6];
    vec![
        // What would bring the tick back.
        (
            "a timer on the process's CPU clock",
            "timer_create",
            [CPU_PROCESS, 0, 0, 0, 0, 0],
        ),
        (
            "a timer on the thread's CPU clock",
            "timer_create",
            [CPU_THREAD, 0, 0, 0, 0, 0],
        ),
        ("ITIMER_VIRTUAL", "setitimer", [1, 0, 0, 0, 0, 0]),
        ("ITIMER_PROF", "setitimer", [2, 0, 0, 0, 0, 0]),
        ("RLIMIT_CPU", "setrlimit", [RLIMIT_CPU, 0, 0, 0, 0, 0]),
        ("RLIMIT_CPU anew", "prlimit64", [0, RLIMIT_CPU, SOMEWHERE, 0, 0, 0]),
        ("a performance event", "perf_event_open", none),
        // Other programs and processes.
        ("another program", "execve", none),
        ("another program by descriptor", "execveat", [u64::MAX, 0, 0, 0, 0, 0]),
        ("a process", "fork", none),
        ("a process that shares", "vfork", none),
        ("a process by clone", "clone", [SIGCHLD, 0, 0, 0, 0, 0]),
        ("another process's memory", "ptrace", [16, 0, 0, 0, 0, 0]),
        (
            "another process's memory, written",
            "process_vm_writev",
            [1, 0, 0, 0, 0, 0],
        ),
        ("a signal to others", "kill", [u64::MAX, 0, 0, 0, 0, 0]),
        // The system.
        ("a mount", "mount", none),
        ("another root", "pivot_root", none),
        ("another root, the old way", "chroot", none),
        ("a namespace of its own", "unshare", none),
        ("another's namespace", "setns", [u64::MAX, 0, 0, 0, 0, 0]),
        ("another user", "setuid", [u64::MAX, 0, 0, 0, 0, 0]),
        ("a module", "init_module", none),
        ("another kernel", "kexec_load", none),
        ("a BPF program", "bpf", [5, 0, 0, 0, 0, 0]),
        ("another filter", "seccomp", [9, 0, 0, 0, 0, 0]),
        ("keys", "keyctl", [u64::MAX, 0, 0, 0, 0, 0]),
        ("faults by descriptor", "userfaultfd", [u64::MAX, 0, 0, 0, 0, 0]),
        ("the kernel's ports", "iopl", none),
        // Networks and files.
        ("a socket to the kernel", "socket", [16, 3, 0, 0, 0, 0]),
        ("a socket to the internet", "socket", [2, 1, 0, 0, 0, 0]),
        ("packets", "socket", [17, 3, 0, 0, 0, 0]),
        ("a socket that listens", "bind", [u64::MAX, 0, 0, 0, 0, 0]),
        ("another mode", "chmod", none),
        ("another name", "rename", none),
        ("a file by handle", "open_by_handle_at", [u64::MAX, 0, 0, 0, 0, 0]),
        // Of a descriptor that is there.
        ("typing for the operator", "ioctl", [u64::MAX, 0x5412, 0, 0, 0, 0]),
        ("another microVM", "ioctl", [u64::MAX, 0xae01, 0, 0, 0, 0]),
        ("memory that is executed", "mmap", [0, 4096, 7, 0x22, u64::MAX, 0]),
        ("memory that is executed after all", "mprotect", [0, 0, 5, 0, 0, 0]),
        ("the thread's other attributes", "prctl", [4, 0, 0, 0, 0, 0]),
        // x32's numbers begin here: the same calls by another name.
        ("a call of x32", "unknown", none),
    ]
}

/// What one role may not do, though another may.
fn forbidden_to(role: Role) -> Vec<Call> {
    const HERE: u64 = (-100_i64).cast_unsigned();
    let files = [
        ("a file to be written", "openat", [HERE, 0, 1, 0, 0, 0]),
        ("a file to be made", "openat", [HERE, 0, 0o100, 0, 0, 0]),
    ];
    let others = [
        ("a socket", "socket", [1, 1, 0, 0, 0, 0]),
        ("a ring of io_uring", "io_uring_setup", [0; 6]),
        ("a signal to a process, by its thread", "tgkill", [1, 1, 9, 0, 0, 0]),
    ];
    match role {
        Role::Vmm => others[2..].to_vec(),
        Role::Api => [&files[..], &others[..]].concat(),
        Role::Vcpu => [
            &files[..],
            &others[..],
            &[
                ("a file to be read", "openat", [HERE, 0, 0, 0, 0, 0]),
                ("a thread", "clone", [0x003d_0f00, 0, 0, 0, 0, 0]),
                ("a file's end", "unlinkat", [HERE, 0, 0, 0, 0, 0]),
                ("a connection", "accept4", [u64::MAX, 0, 0, 0, 0, 0]),
                ("its own CPUs", "sched_setaffinity", [0; 6]),
            ],
        ]
        .concat(),
    }
}

fn number(call: &str) -> i64 {
    if call == "unknown" {
        return 0x4000_0000;
    }
    call.parse::<syscalls::Sysno>()
        .unwrap_or_else(|_| panic!("{call}"))
        .id()
        .into()
}

const CHILD: &str = "CHRONOVISOR_TEST_CALL";
const SURVIVED: &str = "it survived";

/// In the child: enters the role, and makes the call.
#[test]
fn a_child() {
    let Ok(what) = std::env::var(CHILD) else { return };
    let words: Vec<_> = what.split(' ').collect();
    let role = Role::ALL.into_iter().find(|role| role.name() == words[0]).unwrap();
    let numbers: Vec<i64> = words[1..].iter().map(|word| word.parse().unwrap()).collect();
    choose(Policy::Shipped);
    let call = move || {
        enter(role).unwrap();
        // SAFETY: the arguments are null, or no descriptors, or such that nothing happens where it is allowed: see `forbidden`.
        let result = unsafe {
            libc::syscall(
                numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6],
            )
        };
        println!("{SURVIVED}: {result} {:?}", io::Error::last_os_error().raw_os_error());
    };
    std::thread::Builder::new()
        .name("culprit".into())
        .spawn(call)
        .unwrap()
        .join()
        .unwrap();
}

fn child(role: Role, number: i64, arguments: [u64; 6]) -> Output {
    let words: Vec<_> = arguments
        .iter()
        .map(|argument| argument.cast_signed().to_string())
        .collect();
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "tests::a_child", "--nocapture"])
        .env(CHILD, format!("{} {number} {}", role.name(), words.join(" ")))
        .output()
        .unwrap()
}

#[test]
fn in_each_role_a_forbidden_call_ends_the_process_and_is_named() {
    for role in Role::ALL {
        for (what, call, arguments) in forbidden().into_iter().chain(forbidden_to(role)) {
            let number = number(call);
            let output = child(role, number, arguments);
            let said = String::from_utf8_lossy(&output.stderr);
            let role = role.name();
            assert_eq!(output.status.code(), Some(STATUS.into()), "{role}, {what}: {output:?}");
            let names = format!(
                "seccomp: thread culprit made a system call that {role} threads may not make: {call} ({number}), arguments {:#x} {:#x} ",
                arguments[0], arguments[1]
            );
            assert!(said.contains(&names) && said.ends_with('\n'), "{role}, {what}: {said}");
        }
    }
}

#[test]
fn clone3_is_answered_as_by_a_kernel_that_has_none() {
    for role in Role::ALL {
        let output = child(role, number("clone3"), [0; 6]);
        let said = String::from_utf8_lossy(&output.stdout);
        let expected = format!("{SURVIVED}: -1 {:?}", Some(libc::ENOSYS));
        assert!(output.status.success() && said.contains(&expected), "{output:?}");
    }
}

#[test]
fn a_call_by_another_architectures_numbers_ends_the_process() {
    const WHAT: &str = "CHRONOVISOR_TEST_I386";
    if std::env::var_os(WHAT).is_some() {
        choose(Policy::Shipped);
        enter(Role::Vcpu).unwrap();
        // SAFETY: getpid(2) by i386's number, which changes nothing but eax.
        unsafe { std::arch::asm!("int 0x80", inout("eax") 20 => _) };
        println!("{SURVIVED}");
        return;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "tests::a_call_by_another_architectures_numbers_ends_the_process",
            "--nocapture",
        ])
        .env(WHAT, "")
        .output()
        .unwrap();
    // seccompiler's own check, which comes first: the kernel ends it.
    let ended = output.status.signal();
    assert!(
        ended == Some(libc::SIGSYS) || ended == Some(libc::SIGSEGV),
        "{output:?}"
    );
    assert!(
        !String::from_utf8_lossy(&output.stdout).contains(SURVIVED),
        "{output:?}"
    );
}

#[test]
fn what_was_compiled_in_is_the_policy_of_the_source() {
    let given = Given::from_json(SHIPPED.as_bytes()).unwrap();
    for role in Role::ALL {
        let built_in = Policy::Shipped.program(role).unwrap();
        assert_eq!(built_in, &given.programs[role as usize][..], "{}", role.name());
    }
}

/// What the kernel makes of a program: the instructions that seccompiler's are made of (Documentation/networking/filter.rst).
fn run(program: &[sock_filter], number: u32, arguments: [u64; 6]) -> u32 {
    const X86_64: u32 = 0xc000_003e;
    let mut data = [number, X86_64, 0, 0].to_vec();
    for argument in arguments {
        data.extend([
            u32::try_from(argument & 0xffff_ffff).unwrap(),
            u32::try_from(argument >> 32).unwrap(),
        ]);
    }
    let (mut at, mut accumulator) = (0, 0);
    loop {
        let sock_filter { code, jt, jf, k } = program[at];
        at += 1;
        let mut jump = |holds: bool| at += usize::from(if holds { jt } else { jf });
        match code {
            0x20 => accumulator = data[k as usize / 4],
            0x54 => accumulator &= k,
            0x05 => at += k as usize,
            0x15 => jump(accumulator == k),
            0x25 => jump(accumulator > k),
            0x35 => jump(accumulator >= k),
            0x06 => return k,
            _ => panic!("{code:#x}"),
        }
    }
}

#[test]
fn a_shorter_program_decides_as_the_longer_one_does() {
    let chains = seccompiler::compile_from_json(SHIPPED.as_bytes(), seccompiler::TargetArch::x86_64).unwrap();
    for role in ROLES {
        let chain = &chains[role];
        let shorter = compile::shorten::shorten(chain).expect("it is in seccompiler's shape");
        assert!(
            shorter.len() * 2 < chain.len(),
            "{role}: {} of {}",
            shorter.len(),
            chain.len()
        );
        // Whatever the policy compares with, in each argument, and what is near it.
        let of_rules: Vec<u64> = rules(role)
            .iter()
            .flat_map(|rule| rule["args"].as_array().cloned().unwrap_or_default())
            .filter_map(|argument| argument["val"].as_u64())
            .collect();
        let near = of_rules
            .iter()
            .flat_map(|value| [value.wrapping_sub(1), *value, value + 1, value | 1 << 32]);
        let values: BTreeSet<u64> = near.chain([0, 1, 4, 0o100, u64::MAX]).collect();
        for number in (0..600).chain([0x4000_0000, u32::MAX]) {
            for &value in &values {
                for at in 0..6 {
                    let mut arguments = [0; 6];
                    arguments[at] = value;
                    let (decided, expected) = (run(&shorter, number, arguments), run(chain, number, arguments));
                    assert_eq!(decided, expected, "{role}: {number} {arguments:?}");
                }
            }
        }
    }
}

/// The rules of a role.
fn rules(role: &str) -> Vec<Value> {
    let policy: Value = serde_json::from_str(SHIPPED).unwrap();
    policy[role]["filter"].as_array().unwrap().clone()
}

#[test]
fn each_rule_says_why_and_each_value_what_it_is() {
    for role in ROLES {
        for rule in rules(role) {
            let said = |value: &Value| value["comment"].as_str().is_some_and(|comment| !comment.is_empty());
            let arguments = rule["args"].as_array().cloned().unwrap_or_default();
            assert!(said(&rule) && arguments.iter().all(said), "{role}: {rule}");
        }
    }
}

/// docs/seccomp.md has a row for each call: its name, then a cell for each role.
#[test]
fn the_documentation_lists_what_the_policy_allows() {
    let mut allowed = BTreeMap::<String, BTreeSet<&str>>::new();
    for role in ROLES {
        for rule in rules(role) {
            let call = rule["syscall"].as_str().unwrap().to_owned();
            allowed.entry(call).or_default().insert(role);
        }
    }
    let (_, table) = include_str!("../../docs/seccomp.md")
        .split_once("<!-- the table -->")
        .unwrap();
    let documented: BTreeMap<_, _> = table
        .lines()
        .filter_map(|line| {
            let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
            let call = cells.first()?.strip_prefix('`')?.strip_suffix('`')?;
            let roles = ROLES.iter().zip(&cells[1..]).filter(|(_, cell)| !cell.is_empty());
            Some((call.to_owned(), roles.map(|(role, _)| *role).collect::<BTreeSet<_>>()))
        })
        .collect();
    assert_eq!(documented, allowed);
}

#[test]
fn a_policy_that_is_none_is_refused_with_what_is_wrong() {
    let role = r#"{"default_action": "trap", "filter_action": "allow", "filter": []}"#;
    let rule = |rule: &str| {
        format!(r#"{{"vmm": {{"default_action": "trap", "filter_action": "allow", "filter": [{rule}]}}}}"#)
    };
    let deep = "[".repeat(1000);
    for (json, says) in [
        (String::new(), "is not JSON"),
        ("\x7fELF".to_owned(), "is not JSON"),
        (
            "\x03\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0vmm".to_owned(),
            "binary filters are not taken",
        ),
        ("[]".to_owned(), "is not JSON"),
        ("{".to_owned(), "EOF"),
        (format!("{{\"vmm\": {deep}"), "line 1"),
        (rule(&deep), "line 1"),
        (r#"{"vmm": 1}"#.to_owned(), "invalid type"),
        (format!(r#"{{"vmm": {role}, "vmm": {role}}}"#), "duplicate filter key"),
        (rule(r#"{"syscall": "frobnicate"}"#), "frobnicate"),
        (rule(r#"{"syscall": "read", "args": []}"#), "mpty"),
        (
            rule(r#"{"syscall": "read", "args": [{"index": 6, "type": "dword", "op": "eq", "val": 1}]}"#),
            "rgument",
        ),
        (
            rule(r#"{"syscall": "read", "args": [{"index": 0, "type": "dword", "op": "eq", "val": -1}]}"#),
            "invalid value",
        ),
        (
            format!(r#"{{"vmm": {role}, "api": {role}}}"#),
            "Missing thread category: vcpu",
        ),
        (
            format!(r#"{{"vmm": {role}, "api": {role}, "vcpu": {role}, "b": {role}, "a": {role}}}"#),
            "Invalid thread categories: a,b",
        ),
        ("{}".to_owned(), "Missing thread category: vmm"),
    ] {
        let refused = Given::from_json(json.as_bytes()).expect_err(&json).to_string();
        assert!(refused.contains(says) && !refused.contains('\n'), "{json}: {refused}");
    }
    assert!(Given::from_json(format!(r#" {{"vmm": {role}, "api": {role}, "vcpu": {role}}}"#).as_bytes()).is_ok());
    let long =
        vec![r#"{"syscall": "read", "args": [{"index": 0, "type": "qword", "op": "eq", "val": 1}]}"#; 2000].join(",");
    let refused = Given::from_json(rule(&long).as_bytes()).unwrap_err().to_string();
    assert!(refused.contains("too") || refused.contains("large"), "{refused}");
}
