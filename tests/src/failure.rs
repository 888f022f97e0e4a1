//! How `chronovisor` is to fail: with one line that says what failed, on which input and what to do, and a status of its own.

use std::process::Command;

use crate::bed;
use crate::vm::Process;

/// Runs `chronovisor` to its end: it must fail with `code`, in one line that holds each of `says`.
///
/// # Panics
/// When it does anything else.
#[track_caller]
pub fn fails(arguments: &[&str], code: i32, says: &[&str]) {
    let mut command = Command::new(bed::file("chronovisor"));
    command.args(arguments);
    command_fails(command, code, says);
}

/// Runs `command`, which is `chronovisor` in some surroundings, likewise.
///
/// # Panics
/// When it does anything else.
#[track_caller]
pub fn command_fails(command: Command, code: i32, says: &[&str]) {
    let what = format!("{command:?}");
    let (status, stdout, stderr) = Process::spawn(command).wait();
    assert_eq!(status.code(), Some(code), "{what}: {stderr}");
    assert_eq!(stdout, "", "{what}");
    // Warnings, of a host without nohz_full for one, may come before it.
    let lines: Vec<_> = stderr
        .lines()
        .filter(|line| !line.starts_with("chronovisor: warning: "))
        .collect();
    let [line] = lines[..] else {
        panic!("{what}: not one line of error: {stderr}")
    };
    assert!(line.starts_with("chronovisor: "), "{what}: {line}");
    for wanted in says {
        assert!(line.contains(wanted), "{what}: {wanted:?} is not in: {line}");
    }
    assert!(
        !stderr.contains("panicked") && !stderr.contains("RUST_BACKTRACE"),
        "{what}: {stderr}"
    );
}
