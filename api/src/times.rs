//! `chronovisor times`: where the vCPUs' time goes, as a table or as JSON, once or until the microVM ends.
//!
//! Read over the API's socket, so it costs the vCPUs nothing. A table's shares are of all time in the first reading, and of
//! the time since the reading before it in later ones.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use accounting::Reading;
use accounting::reading::Mode;
use anyhow::{Context, Result, bail};

use crate::cli::Times;
use crate::client::{Client, ClientError};
use crate::figures::{Grown, error_ns, name, percent, seconds, short};

/// Prints readings until there are enough. Ends in good order with the microVM, if that was read at least once.
///
/// # Errors
/// No reading could be had, or none written.
pub fn times(args: &Times) -> Result<u8> {
    let mut wanted = if args.watch { args.count } else { Some(1) };
    let mut out = io::stdout().lock();
    let mut table = Table {
        redraw: out.is_terminal(),
        ..Table::default()
    };
    let mut source = Source {
        path: &args.api_sock,
        client: Client::connect(&args.api_sock)?,
    };
    let mut last: Vec<Reading> = Vec::new();
    loop {
        let body = match source.read() {
            Ok(body) => body,
            Err(ClientError::Connect { .. }) if !last.is_empty() => return Ok(0),
            Err(error) => return Err(error.into()),
        };
        let now: Vec<Reading> = serde_json::from_slice(&body).context("the answer is not a list of readings")?;
        if now.is_empty() && !args.watch {
            bail!(
                "{}: the microVM has not been started: there are no vCPUs to read yet",
                args.api_sock.display()
            );
        }
        if !now.is_empty() {
            if args.json {
                out.write_all(body.trim_ascii())?;
                writeln!(out)?;
            } else {
                out.write_all(table.draw(&last, &now).as_bytes())?;
            }
            out.flush()?;
            last = now;
            wanted = wanted.map(|wanted| wanted - 1);
        }
        if wanted == Some(0) {
            return Ok(0);
        }
        std::thread::sleep(Duration::from_millis(args.interval));
    }
}

/// Where readings come from.
struct Source<'a> {
    path: &'a Path,
    client: Client,
}

impl Source<'_> {
    /// `GET /vcpus`. A connection that the server closed, as it does with idle ones, is made again.
    fn read(&mut self) -> Result<Vec<u8>, ClientError> {
        match self.client.get("/vcpus") {
            Err(ClientError::Broken(_)) => {
                self.client = Client::connect(self.path)?;
                self.client.get("/vcpus")
            }
            answer => answer,
        }
    }
}

/// The table on the terminal, or the lines of it elsewhere.
#[derive(Default)]
struct Table {
    /// Each drawing replaces the one before it.
    redraw: bool,
    /// How many lines that one has.
    lines: usize,
}

impl Table {
    fn draw(&mut self, last: &[Reading], now: &[Reading]) -> String {
        let mut text = String::new();
        if self.redraw && self.lines > 0 {
            // Cursor up, and clear to the end of the screen (ECMA-48 CUU and ED).
            let _ = write!(text, "\x1b[{}A\x1b[J", self.lines);
        }
        if self.redraw || self.lines == 0 {
            text += HEAD;
            text.push('\n');
        }
        for reading in now {
            let before = last.iter().find(|before| before.index == reading.index);
            text += &row(before, reading);
            text.push('\n');
        }
        self.lines = now.len() + 1;
        text
    }
}

const HEAD: &str =
    "VCPU STATE     ELAPSED     GTIME    +/-   GUEST%  USER% KERNEL% HALTED% WAITING% OTHER%  SOURCE CPU";

fn row(before: Option<&Reading>, now: &Reading) -> String {
    let grown = Grown::between(before, now);
    let other = grown.mode_ns(Mode::Blocked) + grown.mode_ns(Mode::Paused);
    format!(
        "{:>4} {:<7} {:>9} {:>9} {:>6} {:>8} {:>6} {:>7} {:>7} {:>8} {:>6}  {:<6} {:>3}",
        now.index,
        name(&now.state),
        seconds(now.elapsed_ns),
        seconds(now.gtime_ns),
        short(error_ns(now)),
        grown.percent(Mode::Guest),
        grown.percent(Mode::HostUser),
        grown.percent(Mode::HostKernel),
        grown.percent(Mode::Halted),
        grown.percent(Mode::Waiting),
        percent(other, grown.elapsed_ns()),
        name(&now.source),
        now.host_cpu.cpu,
    )
}

#[cfg(test)]
mod tests {
    use accounting::reading::Modes;

    use super::*;
    use crate::backend::fake;

    #[test]
    fn a_row_shows_all_time_first_and_the_interval_after() {
        let mut first = fake::reading(0);
        first.modes = Modes {
            guest_ns: 500_000_000,
            halted_ns: 500_000_000,
            ..Modes::default()
        };
        first.elapsed_ns = 1_000_000_000;
        let mut second = first.clone();
        second.modes.guest_ns += 250_000_000;
        second.modes.waiting_ns += 750_000_000;
        second.elapsed_ns += 1_000_000_000;
        let cells = |row: String| row.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(
            cells(row(None, &first))[5..11],
            ["50.0", "0.0", "0.0", "50.0", "0.0", "0.0"]
        );
        assert_eq!(
            cells(row(Some(&first), &second))[5..11],
            ["25.0", "0.0", "0.0", "0.0", "75.0", "0.0"]
        );
        assert_eq!(cells(row(Some(&second), &second))[5], "-");
    }

    #[test]
    fn a_terminal_is_redrawn_and_a_file_appended_to() {
        let readings = [fake::reading(0), fake::reading(1)];
        let mut terminal = Table { redraw: true, lines: 0 };
        assert!(!terminal.draw(&[], &readings).contains('\x1b'));
        assert!(terminal.draw(&readings, &readings).starts_with("\x1b[3A\x1b[J"));
        let mut file = Table::default();
        assert!(file.draw(&[], &readings).starts_with(HEAD));
        let later = file.draw(&readings, &readings);
        assert!(!later.contains('\x1b') && !later.contains(HEAD), "{later}");
    }

    #[test]
    fn columns_stand_under_their_heads() {
        let text = row(None, &fake::reading(0));
        assert_eq!(text.len(), HEAD.len(), "\n{HEAD}\n{text}");
    }
}
