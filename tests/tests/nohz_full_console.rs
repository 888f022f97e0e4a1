//! The guest's console on a terminal, in the emulated `nohz_full` host.

use std::process::Command;

use rustix::process::Signal;
use tests::bed;
use tests::require_bed;
use tests::terminal::Terminal;
use tests::vm::debian_arguments;

fn run(what: &str) -> Terminal {
    let mut command = Command::new(bed::file("chronovisor"));
    command.arg("run").args(debian_arguments(what));
    Terminal::spawn(command)
}

#[test]
fn a_command_typed_into_the_guests_shell_is_answered() {
    require_bed!(nohz_full);
    let mut terminal = run("shell");
    terminal.wait_for("# ");
    assert!(!terminal.is_cooked(), "the guest's terminal edits and echoes, not ours");
    terminal.type_in("echo $((6 * 7)) is the answer\r");
    terminal.wait_for("42 is the answer");
    // Ctrl-C goes to the guest, not to us.
    terminal.type_in("echo going; sleep 1000\r");
    terminal.wait_for("\r\ngoing");
    terminal.type_in("\x03");
    terminal.wait_for("# ");
    terminal.type_in("echo back\r");
    terminal.wait_for("\r\nback");
    terminal.type_in("exit\r");
    assert_eq!(terminal.wait().code(), Some(0));
    assert!(terminal.is_cooked(), "the terminal is as it was");
}

#[test]
fn the_terminal_is_as_it_was_on_every_way_out() {
    require_bed!(nohz_full);
    type Leave = fn(&mut Terminal);
    let ways: [(&str, Leave, Option<i32>); 4] = [
        ("Ctrl-A x", |t| t.type_in("\x01x"), Some(0)),
        // The guest is asked, and shuts down.
        ("SIGTERM", |t| t.signal(Signal::TERM), Some(0)),
        ("SIGHUP", |t| t.signal(Signal::HUP), Some(128 + 1)),
        ("SIGINT", |t| t.signal(Signal::INT), Some(128 + 2)),
    ];
    for (way, leave, code) in ways {
        let mut terminal = run("sleep:100000");
        let before = terminal.modes();
        assert!(terminal.is_cooked(), "{way}");
        terminal.wait_for("chronovisor guest: sleep");
        assert!(!terminal.is_cooked(), "{way}");
        leave(&mut terminal);
        assert_eq!(terminal.wait().code(), code, "{way}");
        let after = terminal.modes();
        assert_eq!(
            (
                after.input_modes,
                after.output_modes,
                after.control_modes,
                after.local_modes
            ),
            (
                before.input_modes,
                before.output_modes,
                before.control_modes,
                before.local_modes
            ),
            "{way}"
        );
    }
}

#[test]
fn the_escape_key_helps_and_can_be_typed_itself() {
    require_bed!(nohz_full);
    let mut terminal = run("shell");
    terminal.wait_for("# ");
    terminal.type_in("\x01h");
    terminal.wait_for("Ctrl-A x");
    // The shell takes a Ctrl-A as "to the start of the line".
    terminal.type_in("one two\x01\x01echo \r");
    terminal.wait_for("\r\none two");
    terminal.type_in("\x01x");
    assert_eq!(terminal.wait().code(), Some(0));
}
