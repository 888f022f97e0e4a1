//! Whole screens, against those kept in `golden/`: after a change that is meant, look at what differs, and have them written
//! anew by `CHRONOVISOR_BLESS=1 cargo test -p api top`.

use std::path::PathBuf;
use std::time::Duration;

use accounting::Reading;
use accounting::reading::{ExitTotals, VcpuState};
use ratatui::Terminal;
use ratatui::backend::TestBackend;

use super::*;
use crate::backend::fake;
use crate::top::keys::Command;
use crate::top::state::Answer;

const PLAIN: Look = Look {
    colour: false,
    unicode: false,
};
const FULL: Look = Look {
    colour: true,
    unicode: true,
};

/// A vCPU of many ways, at second `seconds` of its life.
fn reading(index: u32, seconds: u64) -> Reading {
    let mut reading = fake::reading(index);
    let each = [[60, 5, 10, 20, 3, 1, 1], [5, 1, 1, 90, 2, 1, 0], [99, 0, 1, 0, 0, 0, 0]][index as usize % 3];
    reading.modes = Modes::from_array(each.map(|percent| percent * seconds * 10_000_000));
    reading.elapsed_ns = reading.modes.sum_ns();
    reading.gtime_ns = reading.modes.guest_ns;
    reading.gtime_bounds_ns.lower = reading.gtime_ns - 1_000_000;
    reading.gtime_bounds_ns.upper = reading.gtime_ns + 2_000_000;
    reading.stime_ns = reading.modes.host_kernel_ns;
    reading.utime_ns = reading.modes.guest_ns + reading.modes.host_user_ns;
    if index == 1 {
        reading.state = VcpuState::Halted;
        reading.host_cpu.tick_stopped = Some(false);
    }
    reading.host_cpu.pinned = index != 2;
    reading.host_cpu.cpu = index + 2;
    for (reason, rate, vmm_ns) in [("io", 1_500, 4_000), ("mmio", 20, 12_000), ("intr", 250, 700)] {
        let count = rate * seconds;
        let vmm_ns = count * vmm_ns;
        reading
            .exits
            .by_reason
            .insert(reason.to_owned(), ExitTotals { count, vmm_ns });
    }
    let once = ExitTotals { count: 7, vmm_ns: 7 };
    reading.exits.by_reason.insert("hypercall".to_owned(), once);
    reading.exits.total = reading.exits.by_reason.values().map(|totals| totals.count).sum();
    reading
}

/// Some microVMs in all conditions, and when that is.
fn some() -> (State, Instant) {
    let mut state = State::new("/run/vms".to_owned(), Duration::from_secs(1));
    let names = ["db", "gone", "hung", "new", "stopped", "web-with-a-long-name"];
    let sockets = names.map(|name| PathBuf::from(format!("/run/vms/{name}.socket")));
    let begun = Instant::now();
    state.found(&sockets, begun);
    let mut tell = |index: usize, seconds, vcpus: u32| {
        let answer = Answer::Readings {
            id: names[index].to_owned(),
            readings: (0..vcpus).map(|index| reading(index, seconds)).collect(),
        };
        state.answer(&sockets[index], answer, begun + Duration::from_secs(seconds));
    };
    for seconds in 1..10 {
        tell(0, seconds, 3);
        tell(5, seconds, 1);
        tell(4, seconds, 0);
        if seconds < 4 {
            tell(2, seconds, 1);
        }
    }
    let refused = Answer::Nothing("nobody serves its API (Connection refused)".to_owned());
    state.answer(&sockets[1], refused, begun);
    (state, begun + Duration::from_secs(9))
}

/// What a screen shows, line by line, and the same as a buffer.
fn screen(state: &mut State, now: Instant, (width, height): (u16, u16), look: Look) -> (String, Buffer) {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    let drawn = terminal.draw(|frame| {
        let area = frame.area();
        let first = state.scroll(room(area));
        draw(state, first, look, now, area, frame.buffer_mut());
    });
    let buffer = drawn.unwrap().buffer.clone();
    let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
    let lines: Vec<String> = (0..height).map(|y| line(y).trim_end().to_owned()).collect();
    (lines.join("\n") + "\n", buffer)
}

/// A screen that is kept in `golden/`.
macro_rules! assert_golden {
    ($name:literal, $screen:expr) => {
        let (golden, screen) = (include_str!(concat!("../golden/", $name)), $screen);
        if std::env::var_os("CHRONOVISOR_BLESS").is_some() {
            let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/top/golden");
            std::fs::write(folder.join($name), screen).unwrap();
        } else {
            assert!(screen == golden, "{} was\n{golden}\nand is\n{screen}", $name);
        }
    };
}

#[test]
fn screens_are_as_they_were_looked_at() {
    let (mut state, now) = some();
    assert_golden!("80x24.txt", screen(&mut state, now, (80, 24), FULL).0);
    assert_golden!("80x24-plain.txt", screen(&mut state, now, (80, 24), PLAIN).0);
    assert_golden!("200x50.txt", screen(&mut state, now, (200, 50), FULL).0);
    state.obey(Command::Help);
    assert_golden!("80x24-help.txt", screen(&mut state, now, (80, 24), PLAIN).0);
    assert_golden!("once.txt", crate::top::plain::text(&state, now).0);
}

#[test]
fn without_colour_there_is_none_and_what_is_shown_is_ascii() {
    let (mut state, now) = some();
    for help in [false, true] {
        state.help = help;
        let (text, buffer) = screen(&mut state, now, (120, 40), PLAIN);
        assert!(text.is_ascii(), "{text}");
        let plain = buffer
            .content
            .iter()
            .all(|cell| (cell.fg, cell.bg) == (Color::Reset, Color::Reset));
        assert!(plain, "something has a colour");
    }
}

#[test]
fn with_colour_a_bar_has_each_mode_in_its_own() {
    let (mut state, now) = some();
    let (_, buffer) = screen(&mut state, now, (200, 50), FULL);
    // The first row, which begins below the title and the heads: 60, 5, 10, 20, 3, 1 and 1 per cent of 80 cells.
    let cells: Vec<_> = (0..200).map(|x| &buffer[(x, 2)]).collect();
    let from = cells.iter().position(|cell| cell.symbol() == "[").unwrap() + 1;
    let count = |mode| {
        let colour = FULL.mode(mode).1.fg;
        cells[from..].iter().filter(|cell| colour == Some(cell.fg)).count()
    };
    assert_eq!(Modes::ALL.map(count), [48, 4, 8, 16, 2, 1, 1]);
}

#[test]
fn each_mode_has_a_letter_of_its_own() {
    let letters: std::collections::BTreeSet<_> = Modes::ALL.map(|mode| PLAIN.mode(mode).0).into();
    assert_eq!(letters.len(), Modes::COUNT);
}

#[test]
fn the_chosen_row_is_told_apart_and_its_exits_are_below() {
    let (mut state, now) = some();
    state.obey(Command::Down);
    let (text, buffer) = screen(&mut state, now, (80, 24), PLAIN);
    let reversed = |y: u16| buffer[(0, y)].modifier.contains(Modifier::REVERSED);
    assert_eq!((2..13).filter(|&y| reversed(y)).collect::<Vec<_>>(), [3]);
    assert!(text.contains("db, vCPU 1"), "{text}");
    let exits = text.lines().skip_while(|line| !line.contains("VMM EACH")).skip(1);
    let cells: Vec<Vec<&str>> = exits.take(4).map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(cells[0], ["io", "1500", "13500", "4us", "0.6"]);
    assert_eq!(cells[3], ["hypercall", "0.0", "7", "-", "0.0"]);
}

#[test]
fn no_size_of_a_screen_is_too_small() {
    let (mut state, now) = some();
    for help in [false, true] {
        state.help = help;
        for width in [1, 2, 5, 10, 20, 33, 49, 64, 66, 79, 101, 300] {
            for height in [1, 2, 3, 4, 5, 11, 12, 13, 19, 20, 36, 80] {
                screen(&mut state, now, (width, height), FULL);
            }
        }
    }
}

#[test]
fn a_bar_is_full_whatever_is_rounded() {
    for [guest, halted, waiting] in [
        [1, 1, 1],
        [0, 0, 1],
        [999, 1, 0],
        [u64::MAX / 3; 3],
        [1, 0, u64::MAX / 2],
    ] {
        let mut reading = fake::reading(0);
        reading.modes = Modes {
            guest_ns: guest,
            halted_ns: halted,
            waiting_ns: waiting,
            ..Modes::default()
        };
        let grown = Grown::between(None, &reading);
        for width in 0..200 {
            let cells = cells(&grown, width);
            assert_eq!(cells.iter().sum::<u16>(), width, "{cells:?}");
            for (cells, ns) in cells.into_iter().zip(reading.modes.to_array()) {
                let exact = ns as f64 * f64::from(width) / grown.elapsed_ns() as f64;
                // Each end of its part is rounded to half a cell.
                assert!((f64::from(cells) - exact).abs() <= 1.001, "{cells} for {exact}");
            }
        }
    }
    assert_eq!(cells(&Grown::default(), 10), [0; Modes::COUNT]);
}

#[test]
fn names_and_messages_cannot_play_with_the_terminal() {
    let (mut state, now) = some();
    let socket = PathBuf::from("/run/vms/a\x1b[2J\n.socket");
    state.found(std::slice::from_ref(&socket), now);
    state.answer(&socket, Answer::Nothing("\x1b]0;x\x07".to_owned()), now);
    let (text, _) = screen(&mut state, now, (80, 24), FULL);
    let (once, _) = crate::top::plain::text(&state, now);
    for text in [text, once] {
        assert!(!text.contains('\x1b') && !text.contains('\x07'), "{text:?}");
    }
}

#[test]
fn nothing_there_says_where_it_is_looked_for() {
    let mut state = State::new("/run/vms".to_owned(), Duration::from_secs(1));
    let (text, _) = screen(&mut state, Instant::now(), (80, 24), PLAIN);
    assert!(text.contains("no microVM yet: looking for /run/vms"), "{text}");
}
