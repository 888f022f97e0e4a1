//! The state, drawn: a title, a row for each vCPU, what there is to say of the chosen one, and the keys. From nothing but the
//! state and the size of the screen, so that it can be looked at without a terminal.
//!
//! Nothing is told by colour alone: without it, each mode has a letter of its own in the bars.

mod columns;
mod detail;

use std::time::Instant;

use accounting::reading::{Mode, Modes};
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};

use super::keys;
use super::state::{Health, Row, State};
use crate::figures::{Grown, name};
use columns::Column;
pub use columns::tick;

/// What the terminal can show.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    /// Colours.
    pub colour: bool,
    /// Blocks and lines, which are not ASCII.
    pub unicode: bool,
}

impl Look {
    /// In this colour, if there is any.
    fn fg(self, colour: Color) -> Style {
        if self.colour {
            Style::new().fg(colour)
        } else {
            Style::new()
        }
    }

    /// What a mode's part of a bar consists of.
    fn mode(self, mode: Mode) -> (&'static str, Style) {
        let (letter, colour) = match mode {
            Mode::Guest => ("#", Color::Green),
            Mode::HostUser => ("u", Color::Yellow),
            Mode::HostKernel => ("k", Color::Red),
            Mode::Halted => (".", Color::DarkGray),
            Mode::Waiting => ("w", Color::Magenta),
            Mode::Blocked => ("b", Color::Blue),
            Mode::Paused => ("p", Color::Cyan),
        };
        let block = self.colour && self.unicode;
        (if block { "█" } else { letter }, self.fg(colour))
    }

    /// One column of a trend, for a share in per cent.
    fn level(self, share: u8) -> &'static str {
        let levels = if self.unicode {
            ["▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"]
        } else {
            [" ", ".", ":", "-", "=", "+", "*", "#"]
        };
        levels[usize::from(share.min(99)) * levels.len() / 100]
    }

    const fn line(self) -> &'static str {
        if self.unicode { "─" } else { "-" }
    }
}

/// How many lines the rows get, and how many what is below them, on a screen of so many.
fn heights(all: u16) -> (u16, u16) {
    let below = match all {
        0..12 => 0,
        12..20 => 6,
        20..36 => 10,
        _ => 16,
    };
    // The title, the columns' heads, and the keys.
    (all.saturating_sub(below + 3), below)
}

/// How many rows there is room for.
#[must_use]
pub fn room(area: Rect) -> usize {
    heights(area.height).0.into()
}

/// Draws all of it: `first` is the row that the screen begins with.
pub fn draw(state: &State, first: usize, look: Look, now: Instant, area: Rect, buffer: &mut Buffer) {
    let rows = state.rows();
    let chosen = state.chosen(&rows);
    let mut lines = area.rows();
    let mut next = || lines.next().unwrap_or_default();
    title(state, look, next(), buffer);
    let columns = columns::fitting(area.width);
    if state.help {
        help(
            state,
            look,
            Rect {
                y: area.y + 1,
                height: area.height.saturating_sub(2),
                ..area
            },
            buffer,
        );
    } else {
        heads(state, &columns, look, next(), buffer);
        let (height, below) = heights(area.height);
        for at in first..first + usize::from(height) {
            let line = next();
            if let Some(row) = rows.get(at) {
                one(state, row, &columns, look, now, line, buffer);
                if at == chosen {
                    mark(&columns, line, buffer);
                }
            }
        }
        if rows.is_empty() {
            let line = Rect {
                y: area.y + 2,
                height: 1,
                ..area
            };
            put(
                buffer,
                line,
                1,
                &format!("no microVM yet: looking for {}", state.places),
                Style::new(),
            );
        }
        if let Some(row) = rows.get(chosen) {
            let y = area.bottom().saturating_sub(below + 1);
            detail::draw(
                state,
                row,
                look,
                now,
                Rect {
                    y,
                    height: below,
                    ..area
                },
                buffer,
            );
        }
    }
    if area.height > 1 {
        foot(
            look,
            Rect {
                y: area.bottom() - 1,
                height: 1,
                ..area
            },
            buffer,
        );
    }
}

/// Puts text on a line, from column `x` of it; gives the column behind it.
fn put(buffer: &mut Buffer, line: Rect, x: u16, text: &str, style: Style) -> u16 {
    if x >= line.width || line.height == 0 {
        return x;
    }
    let width = usize::from(line.width - x);
    buffer.set_stringn(line.x + x, line.y, text, width, style).0 - line.x
}

fn title(state: &State, look: Look, line: Rect, buffer: &mut Buffer) {
    let vcpus: usize = state.vms().iter().map(|vm| vm.vcpus.len()).sum();
    let many = |count: usize, what| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    let vms = many(state.vms().len(), "microVM");
    let every = state.interval.as_secs_f64();
    let text = format!(
        "{vms}, {}  every {every} s  sorted by {}",
        many(vcpus, "vCPU"),
        state.sort.name()
    );
    let bold = Style::new().add_modifier(Modifier::BOLD);
    let x = put(buffer, line, 0, "chronovisor top", bold.patch(look.fg(Color::Cyan)));
    let x = put(buffer, line, x + 2, &text, Style::new());
    let x = if state.inverted {
        put(buffer, line, x, ", inverted", Style::new())
    } else {
        x
    };
    let x = if state.frozen {
        put(buffer, line, x + 2, "HELD STILL", bold.add_modifier(Modifier::REVERSED))
    } else {
        x
    };
    if let Some(unreadable) = &state.unreadable {
        put(buffer, line, x + 2, unreadable, look.fg(Color::Red));
    }
}

fn heads(state: &State, columns: &[Column], look: Look, line: Rect, buffer: &mut Buffer) {
    let plain = look.fg(Color::Black).patch(if look.colour {
        Style::new().bg(Color::Green)
    } else {
        Style::new()
    });
    let plain = if look.colour {
        plain
    } else {
        plain.add_modifier(Modifier::REVERSED)
    };
    buffer.set_style(line, plain);
    for column in columns {
        let sorts = column.sort == Some(state.sort);
        let style = if sorts {
            plain.add_modifier(Modifier::BOLD | Modifier::UNDERLINED)
        } else {
            plain
        };
        put(buffer, line, column.x, &column.aligned(column.head), style);
    }
}

/// One row.
fn one(state: &State, row: &Row<'_>, columns: &[Column], look: Look, now: Instant, line: Rect, buffer: &mut Buffer) {
    let health = row.vm.health(state.interval, now);
    let style = if health == Health::Well {
        Style::new()
    } else {
        Style::new().add_modifier(Modifier::DIM)
    };
    let Some(vcpu) = row.vcpu else {
        let x = put(buffer, line, 0, &columns[0].aligned(&row.vm.name), style);
        put(buffer, line, x.max(columns[1].x), &says(&health), style);
        return;
    };
    for column in columns {
        match column.kind {
            columns::Kind::Bar => bar(&vcpu.grown, look, column, line, buffer),
            columns::Kind::Trend => {
                let width = usize::from(column.width);
                let from = vcpu.trend.len().saturating_sub(width);
                let text: String = vcpu.trend.iter().skip(from).map(|&share| look.level(share)).collect();
                put(
                    buffer,
                    line,
                    column.x,
                    &format!("{text:>width$}"),
                    look.fg(Color::Green),
                );
            }
            columns::Kind::Text(text) => {
                let x = column.x;
                put(buffer, line, x, &column.aligned(&text(row.vm, vcpu, &health)), style);
            }
        }
    }
}

/// Marks the chosen row by reversing it, but for its bars, whose colours say what they are of.
fn mark(columns: &[Column], line: Rect, buffer: &mut Buffer) {
    let bars = columns
        .iter()
        .filter(|column| matches!(column.kind, columns::Kind::Bar));
    let bars: Vec<_> = bars.map(|bar| line.x + bar.x..line.x + bar.x + bar.width).collect();
    for x in (line.x..line.right()).filter(|x| !bars.iter().any(|bar| bar.contains(x))) {
        if let Some(cell) = buffer.cell_mut((x, line.y)) {
            cell.set_style(Style::new().add_modifier(Modifier::REVERSED));
        }
    }
}

/// What a microVM without vCPUs has to show instead.
pub fn says(health: &Health) -> String {
    match health {
        Health::New => "no answer yet".to_owned(),
        Health::Well => "not started".to_owned(),
        Health::Silent(silent) => format!("no answer for {} s", silent.as_secs()),
        Health::Failed(why) => why.clone(),
        Health::Ended => "ended".to_owned(),
    }
}

/// What a vCPU's row says it does: what it did last, unless that is not known to be so any more.
pub fn state_of(vcpu: &super::state::Vcpu, health: &Health) -> String {
    match health {
        Health::New | Health::Well => name(&vcpu.reading.state),
        Health::Silent(_) => "silent".to_owned(),
        Health::Failed(_) => "failed".to_owned(),
        Health::Ended => "ended".to_owned(),
    }
}

/// How many of `width` cells each mode gets: as many as its share, and all of them together.
fn cells(grown: &Grown, width: u16) -> [u16; Modes::COUNT] {
    let all = u128::from(grown.elapsed_ns());
    let mut cells = [0; Modes::COUNT];
    if all == 0 {
        return cells;
    }
    // Up to where each reaches, so that what is rounded off adds up to nothing.
    let (mut reached_ns, mut reached) = (0, 0);
    for (cell, mode) in cells.iter_mut().zip(Modes::ALL) {
        reached_ns += u128::from(grown.mode_ns(mode));
        let to = u16::try_from((reached_ns * u128::from(width) + all / 2) / all).unwrap_or(width);
        *cell = to - reached;
        reached = to;
    }
    cells
}

fn bar(grown: &Grown, look: Look, column: &Column, line: Rect, buffer: &mut Buffer) {
    let x = put(buffer, line, column.x, "[", Style::new());
    let mut end = x;
    for (mode, count) in Modes::ALL.into_iter().zip(cells(grown, column.width.saturating_sub(2))) {
        let (cell, style) = look.mode(mode);
        end = put(buffer, line, end, &cell.repeat(count.into()), style);
    }
    put(buffer, line, column.x + column.width - 1, "]", Style::new());
}

/// The keys, and what the modes are.
fn help(state: &State, look: Look, area: Rect, buffer: &mut Buffer) {
    let mut lines = area.rows();
    let mut say = |key: &str, what: &str, style: Style| {
        let line = lines.next().unwrap_or_default();
        put(buffer, line, 1, key, style.add_modifier(Modifier::BOLD));
        put(buffer, line, 20, what, Style::new());
    };
    for (key, what) in keys::HELP {
        say(key, what, look.fg(Color::Cyan));
    }
    for mode in Modes::ALL {
        let (cell, style) = look.mode(mode);
        say(
            &format!("{}  {}", cell.repeat(2), name(&mode)),
            detail::meaning(mode),
            style,
        );
    }
    say("", "", Style::new());
    say("Read from", &state.places, Style::new());
}

/// The line of keys at the bottom.
fn foot(look: Look, line: Rect, buffer: &mut Buffer) {
    let keys = [
        ("F1", "Help"),
        ("F6", "Sort"),
        ("I", "Invert"),
        ("+/-", "Interval"),
        ("Space", "Hold"),
        ("F10", "Quit"),
    ];
    let label = match look.colour {
        true => Style::new().fg(Color::Black).bg(Color::Cyan),
        false => Style::new().add_modifier(Modifier::REVERSED),
    };
    let mut x = 0;
    for (key, what) in keys {
        x = put(buffer, line, x, key, Style::new());
        x = put(buffer, line, x, &format!(" {what} "), label) + 1;
    }
}

#[cfg(test)]
mod tests;
