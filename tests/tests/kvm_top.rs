//! `chronovisor top` on a terminal, beside guests that run, stop and end.

use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use tests::bed::{self, Folder};
use tests::failure::fails;
use tests::flat::Program;
use tests::require_bed;
use tests::terminal::Terminal;
use tests::vm::{Process, Vm};

/// Draws all of it anew, so that what is waited for is not only what has changed.
const REDRAW: &str = "\x0c";
/// xterm's other screen, and back.
const TAKEN: &str = "\x1b[?1049h";
const GIVEN_BACK: &str = "\x1b[?1049l";

/// `chronovisor top` of these sockets, on a terminal of 80 by 24.
fn top(sockets: &[&str], environment: &[(&str, &str)]) -> Terminal {
    let mut command = Command::new(bed::file("chronovisor"));
    command.args(["top", "--interval=100"]);
    command.args(sockets.iter().map(|socket| format!("--api-sock={socket}")));
    command
        .env("TERM", "xterm-256color")
        .env("LANG", "C.UTF-8")
        .env_remove("NO_COLOR");
    command.envs(environment.iter().copied());
    Terminal::spawn(command)
}

fn socket(vm: &Vm) -> String {
    vm.socket().display().to_string()
}

/// Waits until it has ended with this status, and the terminal is as it was.
fn ends(mut top: Terminal, status: i32) {
    top.wait_for(GIVEN_BACK);
    assert_eq!(top.wait().code(), Some(status));
    assert!(top.is_cooked());
}

#[test]
fn it_draws_obeys_keys_and_gives_the_terminal_back() {
    require_bed!(kvm);
    let vm = Vm::flat(&Program::exit_storm(0), ["--id=storm"]);
    let mut top = top(&[&socket(&vm)], &[]);
    top.wait_for(TAKEN);
    assert!(!top.is_cooked());
    top.wait_for("storm");
    top.wait_for("VMM EACH");
    top.wait_for("io");
    top.type_in("?");
    top.wait_for("this help");
    top.type_in(" +");
    top.type_in(REDRAW);
    top.wait_for("every 0.2 s");
    top.type_in("G");
    top.type_in(REDRAW);
    top.wait_for("sorted by guest");
    top.resize(132, 40);
    top.wait_for("SOURCE");
    // No shell is there to stop it for: it goes on.
    top.type_in("\x1a");
    top.wait_for(GIVEN_BACK);
    top.wait_for(TAKEN);
    top.wait_for("sorted by guest");
    top.type_in("q");
    ends(top, 0);
}

#[test]
fn whatever_ends_it_the_terminal_is_given_back() {
    require_bed!(kvm);
    let vm = Vm::flat(&Program::halt(), []);
    for (keys, status) in [("\x03", 0), ("\x1b[21~", 0)] {
        let mut top = top(&[&socket(&vm)], &[]);
        top.wait_for("VMM EACH");
        top.type_in(keys);
        ends(top, status);
    }
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        let mut top = top(&[&socket(&vm)], &[]);
        top.wait_for("VMM EACH");
        top.signal(signal);
        ends(top, 128 + signal.as_raw());
    }
}

#[test]
fn a_microvm_that_hangs_or_vanishes_holds_up_neither_screen_nor_keys() {
    require_bed!(kvm);
    let well = Vm::flat(&Program::spin_forever(), ["--id=well"]);
    let mut hung = Vm::flat(&Program::halt(), ["--id=hung"]);
    let mut top = top(&[&socket(&well), &socket(&hung)], &[]);
    top.wait_for("hung");
    hung.process.signal(Signal::STOP);
    top.wait_for("silent");
    top.type_in("?");
    top.wait_for("this help");
    top.type_in(" ");
    top.wait_for("well");
    // Its socket is left behind, with nobody at it.
    hung.process.signal(Signal::KILL);
    hung.process.wait();
    top.wait_for("failed");
    std::fs::remove_file(hung.socket()).expect("it is left behind");
    top.wait_for("ended");
    top.type_in(REDRAW);
    top.wait_for("well");
    top.type_in("q");
    ends(top, 0);
}

#[test]
fn microvms_are_found_as_they_come() {
    require_bed!(kvm);
    let folder = Folder::new();
    let mut top = top(&[&folder.path().display().to_string()], &[]);
    top.wait_for("no microVM yet");
    let _server = Process::chronovisor(["--api-sock", &folder.join("later").display().to_string(), "--id=later"]);
    top.wait_for("later");
    top.wait_for("not started");
    top.type_in("q");
    ends(top, 0);
}

#[test]
fn without_colour_there_is_none_and_a_terminal_that_cannot_be_drawn_on_is_refused() {
    require_bed!(kvm);
    let vm = Vm::flat(&Program::spin_forever(), []);
    for (environment, coloured) in [(&[][..], true), (&[("NO_COLOR", "1")], false)] {
        let mut top = top(&[&socket(&vm)], environment);
        top.wait_for(TAKEN);
        // Held still, it draws nothing new.
        top.type_in(" ");
        let shown = top.shown(Duration::from_secs(2));
        assert!(shown.contains("VMM EACH"), "{shown}");
        // Select Graphic Rendition with a colour of foreground or background (ECMA-48, 8.3.117).
        let has = ["\x1b[38;", "\x1b[48;"].iter().any(|colour| shown.contains(colour));
        assert_eq!(has, coloured, "{shown:?}");
        top.type_in("q");
        ends(top, 0);
    }
    for term in ["dumb", ""] {
        let mut top = top(&[&socket(&vm)], &[("TERM", term)]);
        top.wait_for("--once");
        assert_eq!(top.wait().code(), Some(1));
        assert!(top.is_cooked());
    }
}

#[test]
fn once_is_plain_text_with_the_rates_of_one_interval() {
    require_bed!(kvm);
    let [storm, still] = [(Program::exit_storm(0), "--id=storm"), (Program::halt(), "--id=still")]
        .map(|(program, id)| Vm::flat(&program, [id]));
    let flags = [&storm, &still].map(|vm| format!("--api-sock={}", socket(vm)));
    let mut once = Process::chronovisor(["top", "--once", "--interval=200", &flags[0], &flags[1]]);
    let (status, text, errors) = once.wait();
    assert_eq!((status.code(), &*errors), (Some(0), ""));
    assert!(!text.contains('\x1b'), "{text}");
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines.len(), 3, "{text}");
    let column = |name: &str, line: usize| {
        let at = lines[0].iter().position(|&head| head == name).expect(name);
        lines[line][at]
    };
    assert_eq!((column("MICROVM", 1), column("MICROVM", 2)), ("still", "storm"));
    assert_eq!((column("HALTED%", 1), column("EXITS/S", 1)), ("100.0", "0.0"), "{text}");
    assert!(column("MOST", 2).starts_with("io:"), "{text}");

    fails(&["top"], 1, &["--once"]);
    let nowhere = ["top", "--once", "--api-sock=/nowhere/*.socket"];
    fails(&nowhere, 1, &["/nowhere/*.socket", "--api-sock"]);
}
