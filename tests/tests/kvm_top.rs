//! `chronovisor top` on a terminal, beside guests that run, stop and end.

use std::process::Command;
use std::time::Instant;

use rustix::process::Signal;
use tests::bed::{self, Folder};
use tests::failure::fails;
use tests::flat::Program;
use tests::require_bed;
use tests::screen::Screen;
use tests::terminal::{SIZE, Terminal};
use tests::vm::{PATIENCE, Process, Vm};

/// `chronovisor top` on a terminal, and what that shows.
struct Top {
    terminal: Terminal,
    screen: Screen,
    /// All that was written to it.
    written: Vec<u8>,
}

impl Top {
    /// Of these sockets.
    fn of(sockets: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut command = Command::new(bed::file("chronovisor"));
        command.args(["top", "--interval=100"]);
        command.args(sockets.iter().map(|socket| format!("--api-sock={socket}")));
        command
            .env("TERM", "xterm-256color")
            .env("LANG", "C.UTF-8")
            .env_remove("NO_COLOR");
        command.envs(environment.iter().copied());
        Self {
            terminal: Terminal::spawn(command),
            screen: Screen::new(SIZE.ws_col.into(), SIZE.ws_row.into()),
            written: Vec::new(),
        }
    }

    fn type_in(&mut self, keys: &str) {
        self.terminal.type_in(keys);
    }

    fn wait_until(&mut self, what: &str, is: impl Fn(&Screen) -> bool) {
        let begun = Instant::now();
        while !is(&self.screen) {
            assert!(
                begun.elapsed() < PATIENCE,
                "{what} never came; the screen:\n{}",
                self.screen.text()
            );
            let bytes = self.terminal.some();
            self.screen.write(&bytes);
            self.written.extend(bytes);
        }
    }

    /// Waits until the screen shows `text`.
    fn shows(&mut self, text: &str) {
        self.wait_until(text, |screen| screen.text().contains(text));
    }

    /// Waits until it has ended with this status, and the terminal is as it was.
    fn ends(mut self, status: i32) {
        self.wait_until("the shell's screen", |screen| !screen.is_other);
        assert_eq!(self.terminal.wait().code(), Some(status));
        assert!(self.terminal.is_cooked());
    }
}

fn socket(vm: &Vm) -> String {
    vm.socket().display().to_string()
}

#[test]
fn it_draws_obeys_keys_and_gives_the_terminal_back() {
    require_bed!(kvm);
    let vm = Vm::flat(&Program::exit_storm(0), ["--id=storm"]);
    let mut top = Top::of(&[&socket(&vm)], &[]);
    top.shows("storm       0");
    assert!(top.screen.is_other && !top.terminal.is_cooked());
    top.shows("EXIT                      PER S");
    top.shows("\n io ");
    top.type_in("?");
    top.shows("any key leaves it");
    top.type_in(" +");
    top.shows("every 0.2 s");
    top.type_in("G");
    top.shows("sorted by guest");
    top.terminal.resize(132, 40);
    top.screen = Screen::new(132, 40);
    top.shows("SOURCE");
    // No shell is there to stop it for: it gives the terminal back, and goes on.
    top.written.clear();
    top.type_in("\x1a");
    top.wait_until("the shell's screen", |screen| !screen.is_other);
    top.wait_until("its own screen", |screen| screen.is_other);
    top.shows("sorted by guest");
    top.type_in("q");
    top.ends(0);
}

/// Whether this process, and so those that it starts, ignores `signal` (proc(5), SigIgn).
fn is_ignored(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .expect("a mask");
    mask & (1 << (signal.as_raw() - 1)) != 0
}

#[test]
fn whichever_key_ends_it_the_terminal_is_given_back() {
    require_bed!(kvm);
    let vm = Vm::flat(&Program::halt(), []);
    for keys in ["\x03", "\x1b[21~"] {
        let mut top = Top::of(&[&socket(&vm)], &[]);
        top.shows("VMM EACH");
        top.type_in(keys);
        top.ends(0);
    }
}

#[test]
fn whichever_signal_ends_it_the_terminal_is_given_back() {
    require_bed!(kvm);
    let vm = Vm::flat(&Program::halt(), []);
    let signals = [
        (Signal::TERM, "SIGTERM"),
        (Signal::INT, "SIGINT"),
        (Signal::HUP, "SIGHUP"),
        (Signal::QUIT, "SIGQUIT"),
    ];
    // As by nohup(1), or in a shell's background: what a program is started with ignored it leaves ignored.
    let (ignored, others): (Vec<_>, Vec<_>) = signals.into_iter().partition(|(signal, _)| is_ignored(*signal));
    for (signal, _) in others {
        let mut top = Top::of(&[&socket(&vm)], &[]);
        top.shows("VMM EACH");
        top.terminal.signal(signal);
        top.ends(128 + signal.as_raw());
    }
    if !ignored.is_empty() {
        let names: Vec<_> = ignored.iter().map(|(_, name)| *name).collect();
        bed::skipped(
            "kvm",
            &format!("ignored here, the others were tried: {}", names.join(", ")),
        );
    }
}

#[test]
fn a_microvm_that_hangs_or_vanishes_holds_up_neither_screen_nor_keys() {
    require_bed!(kvm);
    let well = Vm::flat(&Program::spin_forever(), ["--id=well"]);
    let mut hung = Vm::flat(&Program::halt(), ["--id=hung"]);
    let mut top = Top::of(&[&socket(&well), &socket(&hung)], &[]);
    top.shows("hung        0");
    hung.process.signal(Signal::STOP);
    top.shows("silent");
    top.type_in("?");
    top.shows("any key leaves it");
    top.type_in(" ");
    top.shows("well        0");
    // Its socket is left behind, with nobody at it.
    hung.process.signal(Signal::KILL);
    hung.process.wait();
    top.shows("failed");
    std::fs::remove_file(hung.socket()).expect("it is left behind");
    top.shows("ended");
    top.wait_until("the end of it", |screen| !screen.text().contains("hung"));
    top.shows("1 microVM, 1 vCPU");
    top.type_in("q");
    top.ends(0);
}

#[test]
fn microvms_are_found_as_they_come() {
    require_bed!(kvm);
    let folder = Folder::new();
    let mut top = Top::of(&[&folder.path().display().to_string()], &[]);
    top.shows("no microVM yet");
    let _server = Process::chronovisor(["--api-sock", &folder.join("s").display().to_string(), "--id=later"]);
    top.shows("later      not started");
    top.type_in("q");
    top.ends(0);
}

#[test]
fn without_colour_there_is_none_and_a_terminal_that_cannot_be_drawn_on_is_refused() {
    require_bed!(kvm);
    let vm = Vm::flat(&Program::spin_forever(), []);
    for (environment, coloured) in [(&[][..], true), (&[("NO_COLOR", "1")], false)] {
        let mut top = Top::of(&[&socket(&vm)], environment);
        top.shows("F10 Quit");
        top.shows("VMM EACH");
        // Select Graphic Rendition with a colour of foreground or background (ECMA-48, 8.3.117).
        let written = String::from_utf8_lossy(&top.written).into_owned();
        let has = ["\x1b[38;", "\x1b[48;"].iter().any(|colour| written.contains(colour));
        assert_eq!(has, coloured, "{written:?}");
        top.type_in("q");
        top.ends(0);
    }
    for term in ["dumb", ""] {
        let mut top = Top::of(&[&socket(&vm)], &[("TERM", term)]);
        top.shows("--once");
        top.ends(1);
    }
}

#[test]
fn once_is_plain_text_with_the_rates_of_one_interval() {
    require_bed!(kvm);
    let [storm, still] = [(Program::exit_storm(0), "--id=storm"), (Program::halt(), "--id=still")]
        .map(|(program, id)| Vm::flat(&program, [id]));
    let flags = [&storm, &still].map(|vm| format!("--api-sock={}", socket(vm)));
    let begun = Instant::now();
    loop {
        let mut once = Process::chronovisor(["top", "--once", "--interval=200", &flags[0], &flags[1]]);
        let (status, text, errors) = once.wait();
        assert_eq!((status.code(), &*errors), (Some(0), ""));
        assert!(!text.contains('\x1b'), "{text}");
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines.len(), 3, "{text}");
        let column = |name: &str, line: usize| {
            let at = lines[0].iter().position(|&head| head == name).expect(name);
            lines[line].get(at).copied().unwrap_or_default()
        };
        assert_eq!((column("MICROVM", 1), column("MICROVM", 2)), ("still", "storm"));
        assert_eq!(column("EXITS/S", 1), "0.0", "{text}");
        // A busy machine may leave the storm no time at all in so short an interval.
        if column("MOST", 2).starts_with("io:") {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "no exits: {text}");
    }
    fails(&["top"], 1, &["--once"]);
    let nowhere = ["top", "--once", "--api-sock=/nowhere/*.socket"];
    fails(&nowhere, 1, &["/nowhere/*.socket", "--api-sock"]);
}
