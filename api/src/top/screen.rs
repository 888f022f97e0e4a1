//! The terminal: taken over while something is shown on it, and given back as it was on every way out.
//!
//! On its way out is a process that returns from here, that panics in any thread (the panic hook calls [`restore`] before it says
//! anything), or that a signal ends (which is an event, not a death: see `signals.rs`).

use std::io::{self, Stdout};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::terminal::{disable_raw_mode, enable_raw_mode};
use rustix::process::{Signal, kill_current_process_group};

use super::state::State;
use super::view::{self, Look};

/// The other screen, without a cursor; and back (xterm's control sequences, DECSET 1049 and DECTCEM).
const TAKE: &[u8] = b"\x1b[?1049h\x1b[?25l";
const GIVE_BACK: &[u8] = b"\x1b[0m\x1b[?25h\x1b[?1049l";

/// Whether the terminal is taken over.
static ACTIVE: AtomicBool = AtomicBool::new(false);

/// Gives the terminal back, if it is taken over. May be called from anywhere, any number of times; it takes no lock of
/// standard output's, which a thread that panics may hold.
pub fn restore() {
    if ACTIVE.swap(false, Ordering::SeqCst) {
        // A terminal that has gone has nothing left to restore.
        let _ = say(GIVE_BACK);
        let _ = disable_raw_mode();
    }
}

/// Whether the terminal is still taken over.
pub fn is_active() -> bool {
    ACTIVE.load(Ordering::SeqCst)
}

fn say(mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let written = rustix::io::write(rustix::stdio::stdout(), bytes)?;
        bytes = &bytes[written..];
    }
    Ok(())
}

fn take() -> io::Result<()> {
    ACTIVE.store(true, Ordering::SeqCst);
    enable_raw_mode()?;
    say(TAKE)
}

/// The terminal, taken over. Dropping it gives it back.
#[derive(Debug)]
pub struct Screen {
    terminal: Terminal<CrosstermBackend<Stdout>>,
}

impl Screen {
    /// Takes the terminal over.
    ///
    /// # Errors
    /// What the system says; the terminal is then as it was.
    pub fn enter() -> Result<Self> {
        let begin = || {
            take()?;
            Terminal::new(CrosstermBackend::new(io::stdout()))
        };
        match begin() {
            Ok(terminal) => Ok(Self { terminal }),
            Err(error) => {
                restore();
                Err(error).context("the terminal cannot be drawn on")
            }
        }
    }

    /// Draws what has changed.
    ///
    /// # Errors
    /// The terminal has gone.
    pub fn draw(&mut self, state: &mut State, look: Look, now: Instant) -> io::Result<()> {
        let draw = |frame: &mut ratatui::Frame<'_>| {
            let area = frame.area();
            let first = state.scroll(view::room(area));
            view::draw(state, first, look, now, area, frame.buffer_mut());
        };
        self.terminal.draw(draw).map(drop)
    }

    /// Has all of it drawn anew.
    ///
    /// # Errors
    /// The terminal has gone.
    pub fn clear(&mut self) -> io::Result<()> {
        self.terminal.clear()
    }

    /// Gives the terminal to the shell until the shell gives it back.
    ///
    /// # Errors
    /// The terminal has gone.
    pub fn suspend(&mut self) -> io::Result<()> {
        restore();
        kill_current_process_group(Signal::TSTP)?;
        take()?;
        self.terminal.clear()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        restore();
    }
}
