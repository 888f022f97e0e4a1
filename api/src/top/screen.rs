//! The terminal: taken over while something is shown on it, and given back as it was on every way out.
//!
//! On its way out is a process that returns from here, that panics in any thread (the panic hook calls [`restore`] before it says
//! anything), or that a signal ends (which is an event, not a death: see `signals.rs`).

use std::io::{self, Stdout};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use ratatui::backend::{Backend, CrosstermBackend};
use ratatui::buffer::Buffer;
use ratatui::crossterm::terminal::{disable_raw_mode, enable_raw_mode};
use ratatui::layout::{Position, Rect};
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
///
/// Not ratatui's `Terminal`: that asks the terminal for its cursor's place whenever its size changes, and the answer would have
/// to come by way of the keys.
#[derive(Debug)]
pub struct Screen {
    backend: CrosstermBackend<Stdout>,
    /// What it shows.
    shown: Buffer,
}

impl Screen {
    /// Takes the terminal over.
    ///
    /// # Errors
    /// What the system says; the terminal is then as it was.
    pub fn enter() -> Result<Self> {
        if let Err(error) = take() {
            restore();
            return Err(error).context("the terminal cannot be drawn on");
        }
        Ok(Self {
            backend: CrosstermBackend::new(io::stdout()),
            shown: Buffer::default(),
        })
    }

    /// Draws what has changed.
    ///
    /// # Errors
    /// The terminal has gone.
    pub fn draw(&mut self, state: &mut State, look: Look, now: Instant) -> io::Result<()> {
        let area = Rect::from((Position::ORIGIN, self.backend.size()?));
        if area != self.shown.area {
            self.backend.clear()?;
            self.shown = Buffer::empty(area);
        }
        let mut next = Buffer::empty(area);
        let first = state.scroll(view::room(area));
        view::draw(state, first, look, now, area, &mut next);
        self.backend.draw(self.shown.diff(&next).into_iter())?;
        Backend::flush(&mut self.backend)?;
        self.shown = next;
        Ok(())
    }

    /// Has all of it drawn anew.
    pub fn clear(&mut self) {
        self.shown = Buffer::default();
    }

    /// Gives the terminal to the shell until the shell gives it back.
    ///
    /// # Errors
    /// The terminal has gone.
    pub fn suspend(&mut self) -> io::Result<()> {
        restore();
        kill_current_process_group(Signal::TSTP)?;
        self.clear();
        take()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        restore();
    }
}
