use accounting::reading::{ExitTotals, Modes};

use super::*;
use crate::backend::fake;

const SECOND: Duration = Duration::from_secs(1);

fn at(seconds: u64) -> Instant {
    use std::sync::LazyLock;
    static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
    *BEGIN + Duration::from_secs(seconds)
}

/// A reading at `seconds` of a vCPU that spends `guest` per cent of its time in the guest, and waits otherwise.
fn reading(index: u32, seconds: u64, guest: u64) -> Reading {
    let percent_ns = seconds * 10_000_000;
    let mut reading = fake::reading(index);
    reading.elapsed_ns = 100 * percent_ns;
    reading.modes = Modes {
        guest_ns: guest * percent_ns,
        waiting_ns: (100 - guest) * percent_ns,
        ..Modes::default()
    };
    let count = seconds * guest;
    reading.exits.total = count;
    reading
        .exits
        .by_reason
        .insert("io".to_owned(), ExitTotals { count, vmm_ns: count });
    reading
}

fn readings(id: &str, readings: Vec<Reading>) -> Answer {
    Answer::Readings {
        id: id.to_owned(),
        readings,
    }
}

fn paths(names: &[&str]) -> Vec<PathBuf> {
    names
        .iter()
        .map(|name| PathBuf::from(format!("/run/{name}.socket")))
        .collect()
}

/// Three microVMs with one, two and no vCPUs, seen twice.
fn busy() -> State {
    let mut state = State::new("/run/*.socket".to_owned(), SECOND);
    let sockets = paths(&["a", "b", "c"]);
    state.found(&sockets, at(0));
    for seconds in [1, 2] {
        state.answer(
            &sockets[0],
            readings("zebra", vec![reading(0, seconds, 50)]),
            at(seconds),
        );
        let two = vec![reading(0, seconds, 10), reading(1, seconds, 90)];
        state.answer(&sockets[1], readings("ant", two), at(seconds));
        state.answer(&sockets[2], readings(crate::cli::DEFAULT_ID, vec![]), at(seconds));
    }
    state
}

/// Name and vCPU of each row.
fn names(state: &State) -> Vec<String> {
    let name = |row: &Row<'_>| match row.vcpu {
        Some(vcpu) => format!("{}{}", row.vm.name, vcpu.reading.index),
        None => row.vm.name.clone(),
    };
    state.rows().iter().map(name).collect()
}

fn chosen(state: &State) -> String {
    names(state)[state.chosen(&state.rows())].clone()
}

#[test]
fn figures_are_those_of_the_last_interval() {
    let mut state = State::new(String::new(), SECOND);
    let sockets = paths(&["a"]);
    state.found(&sockets, at(0));
    state.answer(&sockets[0], readings("a", vec![reading(0, 10, 100)]), at(10));
    let vcpu = |state: &State| state.vms()[0].vcpus[0].clone();
    assert!(
        vcpu(&state).from_start && vcpu(&state).trend.is_empty(),
        "one reading makes no rate"
    );
    let mut next = reading(0, 10, 100);
    next.modes.guest_ns += 250_000_000;
    next.modes.halted_ns += 750_000_000;
    next.elapsed_ns += 1_000_000_000;
    state.answer(&sockets[0], readings("a", vec![next]), at(11));
    let seen = vcpu(&state);
    assert!(!seen.from_start);
    assert_eq!(
        (&*seen.grown.percent(Mode::Guest), &*seen.grown.percent(Mode::Halted)),
        ("25.0", "75.0")
    );
    assert_eq!((seen.trend, seen.grown.exits), (VecDeque::from([25]), 0));
}

#[test]
fn another_microvm_at_the_same_socket_begins_anew() {
    let mut state = busy();
    let mut other = reading(0, 1, 20);
    other.tid += 1;
    state.answer(&paths(&["a"])[0], readings("zebra", vec![other]), at(3));
    let vcpu = &state.vms()[0].vcpus[0];
    assert!(vcpu.from_start && vcpu.trend.is_empty());
    assert_eq!(vcpu.grown.percent(Mode::Guest), "20.0");
}

#[test]
fn a_trend_is_kept_only_as_long_as_it_can_be_wide() {
    let mut state = busy();
    for seconds in 3..200 {
        state.answer(
            &paths(&["a"])[0],
            readings("a", vec![reading(0, seconds, 50)]),
            at(seconds),
        );
    }
    assert_eq!(state.vms()[0].vcpus[0].trend.len(), TREND);
}

#[test]
fn rows_are_sorted_by_what_was_asked_for() {
    let mut state = busy();
    let table = [
        (Sort::Name, ["ant0", "ant1", "c", "zebra0"]),
        (Sort::Guest, ["ant1", "zebra0", "ant0", "c"]),
        (Sort::Waiting, ["ant0", "zebra0", "ant1", "c"]),
        (Sort::Exits, ["ant1", "zebra0", "ant0", "c"]),
    ];
    for (sort, rows) in table {
        state.obey(Command::Sort(sort));
        assert_eq!(names(&state), rows, "{sort:?}");
        state.obey(Command::Invert);
        assert_eq!(
            names(&state),
            rows.iter().rev().copied().collect::<Vec<_>>(),
            "{sort:?}, inverted"
        );
        state.obey(Command::Invert);
    }
    let before = state.sort;
    for _ in Sort::ALL {
        state.obey(Command::NextSort);
    }
    assert_eq!(state.sort, before);
    state.obey(Command::NextSort);
    state.obey(Command::PreviousSort);
    assert_eq!(state.sort, before);
}

#[test]
fn the_chosen_vcpu_stays_chosen_wherever_its_row_goes() {
    let mut state = busy();
    assert_eq!(chosen(&state), "ant0");
    state.obey(Command::Down);
    assert_eq!(chosen(&state), "ant1");
    state.obey(Command::Sort(Sort::Waiting));
    assert_eq!((chosen(&state), state.chosen(&state.rows())), ("ant1".to_owned(), 2));
    state.obey(Command::Last);
    state.obey(Command::Down);
    assert_eq!(chosen(&state), "c", "there is none below the last");
    state.obey(Command::First);
    state.obey(Command::Up);
    assert_eq!(chosen(&state), "ant0");
    // It has gone: the first one is chosen, until another is.
    state.found(&paths(&["a"]), at(3));
    state.pass(at(60));
    assert_eq!(chosen(&state), "zebra0");
}

#[test]
fn the_chosen_row_is_always_among_those_shown() {
    let mut state = State::new(String::new(), SECOND);
    let sockets = paths(&["a"]);
    state.found(&sockets, at(0));
    let many = (0..32).map(|index| reading(index, 1, 50)).collect();
    state.answer(&sockets[0], readings("a", many), at(1));
    let commands = [
        Command::Down,
        Command::PageDown,
        Command::Last,
        Command::PageUp,
        Command::Up,
        Command::First,
    ];
    for rows in [1, 5, 31, 32, 100] {
        for command in commands.iter().cycle().take(40) {
            state.obey(*command);
            let first = state.scroll(rows);
            let at = state.chosen(&state.rows());
            assert!((first..first + rows).contains(&at), "{at} of {rows} from {first}");
            assert!(first + rows <= 32 || first == 0, "a gap at the end, from {first}");
        }
    }
}

#[test]
fn one_that_does_not_answer_is_silent_and_keeps_its_figures() {
    let mut state = busy();
    let health = |state: &State, seconds| state.vms()[0].health(state.interval, at(seconds));
    assert_eq!(health(&state, 3), Health::Well);
    assert_eq!(health(&state, 6), Health::Silent(4 * SECOND));
    assert_eq!(names(&state).len(), 4);
    // Asked less often, it has more time.
    state.obey(Command::Slower);
    state.obey(Command::Slower);
    assert_eq!(health(&state, 6), Health::Well);
    state.answer(&paths(&["a"])[0], Answer::Nothing("why".to_owned()), at(7));
    assert_eq!(health(&state, 7), Health::Failed("why".to_owned()));
    assert_eq!(names(&state).len(), 4);
}

#[test]
fn one_whose_socket_has_gone_is_shown_a_little_longer() {
    let mut state = busy();
    state.found(&paths(&["b", "c"]), at(3));
    state.pass(at(4));
    assert_eq!(state.vms()[0].health(SECOND, at(4)), Health::Ended);
    // Back again, it goes on.
    state.found(&paths(&["a", "b", "c"]), at(5));
    state.pass(at(60));
    assert_eq!(state.vms().len(), 3);
    state.found(&paths(&["b", "c"]), at(61));
    state.found(&paths(&["b", "c"]), at(65));
    state.pass(at(61) + FAREWELL);
    assert_eq!(state.vms().len(), 2);
}

#[test]
fn held_still_nothing_moves_and_nobody_is_silent() {
    let mut state = busy();
    state.obey(Command::Freeze);
    state.answer(&paths(&["a"])[0], readings("zebra", vec![reading(0, 30, 90)]), at(30));
    assert_eq!(state.vms()[0].vcpus[0].reading, reading(0, 2, 50));
    assert_eq!(state.vms()[0].health(SECOND, at(30)), Health::Well);
    state.obey(Command::Freeze);
    state.answer(&paths(&["a"])[0], readings("zebra", vec![reading(0, 31, 90)]), at(31));
    assert_eq!(state.vms()[0].vcpus[0].reading, reading(0, 31, 90));
}

#[test]
fn any_key_leaves_the_help_and_does_nothing_else_then() {
    let mut state = busy();
    state.obey(Command::Help);
    assert!(state.help);
    state.obey(Command::Invert);
    assert!(!state.help && !state.inverted);
    state.obey(Command::Help);
    state.obey(Command::Quit);
    assert!(state.over);
}

#[test]
fn intervals_have_ends() {
    let mut state = State::new(String::new(), Duration::from_millis(150));
    state.obey(Command::Slower);
    assert_eq!(state.interval, Duration::from_millis(200));
    for _ in 0..20 {
        state.obey(Command::Slower);
    }
    assert_eq!(state.interval, Duration::from_secs(60));
    for _ in 0..20 {
        state.obey(Command::Faster);
    }
    assert_eq!(state.interval, Duration::from_millis(100));
}
