//! `chronovisor top`: where the time of several microVMs' vCPUs goes, live, on the whole screen.
//!
//! ```text
//!  finder ── which sockets there are ──┐
//!  a watcher for each of them, which   │
//!  asks, and may hang ── answers ──────┼──► events ──► State ──► view ──► the terminal
//!  keys, signals ──────────────────────┘              (pure)    (pure)
//! ```
//!
//! One thread draws; it never asks anybody anything, so nothing that a microVM does or leaves holds the screen up. The terminal
//! is given back on every way out: see [`screen`].

mod keys;
mod plain;
mod screen;
mod state;
mod view;
mod watch;

use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cli::Top;
use crate::fleet::Fleet;
use crate::{exit, signals};
use keys::Command;
use screen::Screen;
use state::State;
use view::Look;
use watch::{Event, Watchers};

pub use screen::restore;

/// The screen is not drawn more often, unless a key was pressed: answers of many microVMs come one by one.
const REST: Duration = Duration::from_millis(50);
/// It is drawn this often though nothing has happened: time has.
const IDLE: Duration = Duration::from_millis(500);

/// Shows what there is until the user has had enough.
///
/// # Errors
/// There is no terminal that can be drawn on; or, with `--once`, no microVM.
pub fn top(args: Top) -> Result<u8> {
    let fleet = Fleet::new(args.api_sock);
    let interval = Duration::from_millis(args.interval);
    let places: Vec<_> = fleet.patterns().iter().map(ToString::to_string).collect();
    let mut state = State::new(places.join(" "), interval);
    if args.once {
        return once(&fleet, &mut state);
    }
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        bail!("standard input and output are no terminal: use --once");
    }
    let term = std::env::var("TERM").unwrap_or_default();
    if matches!(&*term, "" | "dumb") {
        bail!("this terminal cannot be drawn on (TERM is {term:?}): use --once, or chronovisor times --watch");
    }
    let blocked = signals::block().context("the signals that end it cannot be blocked")?;
    let (tell, events) = channel();
    let mut watchers = Watchers::new(tell.clone());
    watchers.find(fleet)?;
    signals::watch(blocked, {
        let tell = tell.clone();
        move |signal| drop(tell.send(Event::Signal(signal)))
    })?;
    let screen = Screen::enter()?;
    watch::keys(tell)?;
    show(&mut state, screen, &mut watchers, &events)
}

/// What the terminal can show: <https://no-color.org>, and the locale's character set as in setlocale(3).
fn look() -> Look {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
        .into_iter()
        .find_map(set)
        .unwrap_or_default();
    let locale = locale.to_ascii_lowercase();
    Look {
        colour: set("NO_COLOR").is_none(),
        unicode: locale.contains("utf-8") || locale.contains("utf8"),
    }
}

fn show(state: &mut State, mut screen: Screen, watchers: &mut Watchers, events: &Receiver<Event>) -> Result<u8> {
    let look = look();
    let mut due = Instant::now();
    loop {
        let now = Instant::now();
        if now >= due {
            state.pass(now);
            screen.draw(state, look, now)?;
            due = now + IDLE;
        }
        let mut event = match events.recv_timeout(due.saturating_duration_since(now)) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => bail!("nobody tells what happens"),
        };
        let now = Instant::now();
        while let Some(happened) = event {
            match happened {
                Event::Key(key) => {
                    match keys::command(key) {
                        Some(Command::Suspend) => screen.suspend()?,
                        Some(Command::Redraw) => screen.clear(),
                        _ => {}
                    }
                    keys::command(key).into_iter().for_each(|command| state.obey(command));
                    watchers.ask_every(state.interval);
                    due = now;
                }
                Event::Resized => due = now,
                Event::Found { sockets, unreadable } => {
                    watchers.watch(&sockets, state.interval)?;
                    state.found(&sockets, now);
                    state.unreadable = unreadable;
                    due = due.min(now + REST);
                }
                Event::Answer { socket, answer } => {
                    state.answer(&socket, answer, now);
                    due = due.min(now + REST);
                }
                Event::Signal(signal) => return Ok(exit::by_signal(signal)),
                Event::KeyboardGone => return Ok(exit::by_signal(libc::SIGHUP)),
            }
            event = events.try_recv().ok();
        }
        if state.over {
            return Ok(0);
        }
        if !screen::is_active() {
            // Another thread has panicked, and said so on a terminal that it gave back.
            return Ok(exit::INTERNAL);
        }
    }
}

/// Asks each microVM twice, and prints what it answered. One that does not answer is waited for as long as a request may take.
fn once(fleet: &Fleet, state: &mut State) -> Result<u8> {
    let found = fleet.find();
    if let Some((path, error)) = found.unreadable.first() {
        bail!("{}: {error}", path.display());
    }
    if found.sockets.is_empty() {
        bail!(
            "no microVM serves its API at {}: give its socket with --api-sock",
            state.places
        );
    }
    let (tell, events) = channel();
    let mut watchers = Watchers::new(tell);
    watchers.watch(&found.sockets, state.interval)?;
    let begun = Instant::now();
    state.found(&found.sockets, begun);
    let until = begun + state.interval + crate::client::PATIENCE;
    let mut missing = vec![2; found.sockets.len()];
    while missing.iter().any(|&missing| missing > 0) {
        match events.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(Event::Answer { socket, answer }) => {
                if let Ok(at) = found.sockets.binary_search(&socket) {
                    let failed = matches!(answer, state::Answer::Nothing(_));
                    missing[at] = if failed {
                        0
                    } else {
                        usize::saturating_sub(missing[at], 1)
                    };
                }
                state.answer(&socket, answer, Instant::now());
            }
            Ok(_) => {}
            Err(_) => break,
        }
    }
    let (text, any) = plain::text(state, Instant::now());
    io::stdout().lock().write_all(text.as_bytes())?;
    Ok(if any { 0 } else { exit::FAILED })
}
