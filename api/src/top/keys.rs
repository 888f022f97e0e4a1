//! What each key does: as in htop, where that has it.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::state::Sort;

/// What is wanted of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Leave.
    Quit,
    /// Show the keys.
    Help,
    /// The row above, and so on.
    Up,
    /// The row below.
    Down,
    /// As many rows up as there are on the screen.
    PageUp,
    /// As many down.
    PageDown,
    /// The first row.
    First,
    /// The last row.
    Last,
    /// Sort the rows by this.
    Sort(Sort),
    /// By what is next.
    NextSort,
    /// By what was before.
    PreviousSort,
    /// The other way round.
    Invert,
    /// Show nothing new, or go on.
    Freeze,
    /// A longer interval.
    Slower,
    /// A shorter one.
    Faster,
    /// Stop, as a shell's job.
    Suspend,
    /// Draw all of it anew.
    Redraw,
}

/// What the help says, a line for each.
pub const HELP: [(&str, &str); 13] = [
    ("Up Down  k j", "choose a vCPU: what it exited for is below the rows"),
    ("PgUp PgDn Home End", "the same, in larger steps"),
    ("F6  > <", "sort by the next figure, or by the one before"),
    ("N G H W E", "sort by name, guest, host, waiting, exits"),
    ("I", "sort the other way round"),
    ("+ -", "a longer or a shorter interval between readings"),
    ("Space  Z", "hold the figures still, and let them go on"),
    ("^L", "draw the screen anew"),
    ("^Z", "stop, until the shell's fg"),
    ("F1 h ?", "this help; any key leaves it"),
    ("F10 q ^C", "leave"),
    ("", ""),
    ("TICK", "off: the timer tick of the host CPU is stopped"),
];

/// What `key` asks for, if anything.
#[must_use]
pub fn command(key: KeyEvent) -> Option<Command> {
    if key.modifiers.contains(KeyModifiers::CONTROL) {
        return match key.code {
            KeyCode::Char('c') => Some(Command::Quit),
            KeyCode::Char('z') => Some(Command::Suspend),
            KeyCode::Char('l') => Some(Command::Redraw),
            _ => None,
        };
    }
    Some(match key.code {
        KeyCode::F(10) | KeyCode::Char('q') => Command::Quit,
        KeyCode::F(1) | KeyCode::Char('h' | '?') => Command::Help,
        KeyCode::Up | KeyCode::Char('k') => Command::Up,
        KeyCode::Down | KeyCode::Char('j') => Command::Down,
        KeyCode::PageUp => Command::PageUp,
        KeyCode::PageDown => Command::PageDown,
        KeyCode::Home => Command::First,
        KeyCode::End => Command::Last,
        KeyCode::F(6) | KeyCode::Char('>' | '.') => Command::NextSort,
        KeyCode::Char('<' | ',') => Command::PreviousSort,
        KeyCode::Char('N') => Command::Sort(Sort::Name),
        KeyCode::Char('G') => Command::Sort(Sort::Guest),
        KeyCode::Char('H') => Command::Sort(Sort::Host),
        KeyCode::Char('W') => Command::Sort(Sort::Waiting),
        KeyCode::Char('E') => Command::Sort(Sort::Exits),
        KeyCode::Char('I') => Command::Invert,
        KeyCode::Char(' ' | 'Z') => Command::Freeze,
        KeyCode::Char('+' | '=') => Command::Slower,
        KeyCode::Char('-') => Command::Faster,
        // Out of the help, and nothing else.
        KeyCode::Esc => Command::Redraw,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_htops() {
        let plain = |code| command(KeyEvent::new(code, KeyModifiers::NONE));
        let shifted = |code| command(KeyEvent::new(code, KeyModifiers::SHIFT));
        let held = |code| command(KeyEvent::new(code, KeyModifiers::CONTROL));
        for code in [KeyCode::F(10), KeyCode::Char('q')] {
            assert_eq!(plain(code), Some(Command::Quit));
        }
        for code in [KeyCode::F(1), KeyCode::Char('h'), KeyCode::Char('?')] {
            assert_eq!(plain(code), Some(Command::Help));
        }
        assert_eq!(plain(KeyCode::F(6)), Some(Command::NextSort));
        assert_eq!(shifted(KeyCode::Char('I')), Some(Command::Invert));
        assert_eq!(shifted(KeyCode::Char('H')), Some(Command::Sort(Sort::Host)));
        assert_eq!(held(KeyCode::Char('c')), Some(Command::Quit));
        assert_eq!(plain(KeyCode::Char('c')), None);
        assert_eq!(held(KeyCode::Char('q')), None);
    }
}
