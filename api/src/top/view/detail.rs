//! What there is to say of the chosen vCPU, below the rows: its modes by name, where it runs, how exact its guest time is, and
//! what it exited for.

use std::time::Instant;

use accounting::Reading;
use accounting::reading::{ExitTotals, Mode, Modes};
use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};

use super::{Look, put, says};
use crate::figures::{error_ns, name, per_second, percent, seconds, short};
use crate::top::state::{Row, State, Vcpu};

/// What a mode means, in a few words.
pub const fn meaning(mode: Mode) -> &'static str {
    match mode {
        Mode::Guest => "on a CPU, in guest mode",
        Mode::HostUser => "on a CPU, in the VMM: it handles an exit",
        Mode::HostKernel => "on a CPU, in the host kernel",
        Mode::Halted => "off the CPU: the guest executed HLT",
        Mode::Waiting => "off the CPU: somebody else has it",
        Mode::Blocked => "off the CPU, inside the VMM or the host kernel",
        Mode::Paused => "held by request, or not started",
    }
}

const fn short_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Guest => "guest",
        Mode::HostUser => "user",
        Mode::HostKernel => "kernel",
        Mode::Halted => "halted",
        Mode::Waiting => "waiting",
        Mode::Blocked => "blocked",
        Mode::Paused => "paused",
    }
}

/// Draws it.
pub fn draw(state: &State, row: &Row<'_>, look: Look, now: Instant, area: Rect, buffer: &mut Buffer) {
    let mut lines = area.rows();
    let mut next = || lines.next().unwrap_or_default();
    let health = row.vm.health(state.interval, now);

    let line = next();
    put(
        buffer,
        line,
        0,
        &look.line().repeat(line.width.into()),
        look.fg(Color::DarkGray),
    );
    let who = match row.vcpu {
        Some(vcpu) => format!(" {}, vCPU {} ", row.vm.name, vcpu.reading.index),
        None => format!(" {} ", row.vm.name),
    };
    let x = put(buffer, line, 2, &who, Style::new().add_modifier(Modifier::BOLD));
    put(
        buffer,
        line,
        x,
        &format!("at {} ", row.vm.socket.display()),
        Style::new(),
    );

    let Some(vcpu) = row.vcpu else {
        put(buffer, next(), 1, &says(&health), Style::new());
        return;
    };
    let [first, second] = [&Modes::ALL[..4], &Modes::ALL[4..]];
    for modes in [first, second] {
        let (line, mut x) = (next(), 1);
        for &mode in modes {
            let (cell, style) = look.mode(mode);
            let after = put(buffer, line, x, cell, style);
            let figure = format!("{:<7} {:>5}%", short_name(mode), vcpu.grown.percent(mode));
            put(buffer, line, after + 1, &figure, Style::new());
            x += 20;
        }
    }
    put(buffer, next(), 1, &place(&vcpu.reading), Style::new());
    put(buffer, next(), 1, &totals(&vcpu.reading), Style::new());
    exits(vcpu, &mut next, buffer);
}

/// Where it runs.
fn place(reading: &Reading) -> String {
    let host = reading.host_cpu;
    let of = [
        (host.pinned, "pinned"),
        (host.nohz_full, "nohz_full"),
        (host.isolated, "isolated"),
    ];
    let is: String = of
        .iter()
        .filter(|(is, _)| *is)
        .map(|(_, what)| format!(", {what}"))
        .collect();
    let tick = match host.tick_stopped {
        Some(true) => "its tick is stopped",
        Some(false) => "its tick runs",
        None => "whether its tick runs cannot be told",
    };
    format!("thread {} on host CPU {}{is}; {tick}", reading.tid, host.cpu)
}

/// Since its first stamp.
fn totals(reading: &Reading) -> String {
    format!(
        "in all {} s: guest {} +/- {} ({}), utime {}, stime {}",
        seconds(reading.elapsed_ns),
        seconds(reading.gtime_ns),
        short(error_ns(reading)),
        name(&reading.source),
        seconds(reading.utime_ns),
        seconds(reading.stime_ns),
    )
}

/// What it exited for, the most frequent of the last interval first; then those that did not occur in it.
fn exits(vcpu: &Vcpu, next: &mut dyn FnMut() -> Rect, buffer: &mut Buffer) {
    let head = format!(
        "{:<22}{:>9}{:>14}{:>14}{:>14}",
        "EXIT", "PER S", "IN ALL", "VMM EACH", "VMM%"
    );
    put(buffer, next(), 1, &head, Style::new().add_modifier(Modifier::BOLD));
    let grown = |reason: &str| vcpu.grown.by_reason.get(reason).copied().unwrap_or_default();
    let mut reasons: Vec<(&String, &ExitTotals)> = vcpu.reading.exits.by_reason.iter().collect();
    reasons.sort_by_key(|(reason, totals)| std::cmp::Reverse((grown(reason).count, totals.count)));
    let elapsed_ns = vcpu.grown.elapsed_ns();
    for (reason, totals) in reasons {
        let line = next();
        if line.height == 0 {
            return;
        }
        let ExitTotals { count, vmm_ns } = grown(reason);
        let rate = if vcpu.from_start {
            "-".to_owned()
        } else {
            per_second(count, elapsed_ns)
        };
        let each = vmm_ns.checked_div(count).map_or_else(|| "-".to_owned(), short);
        let share = percent(vmm_ns, elapsed_ns);
        let text = format!("{reason:<22}{rate:>9}{:>14}{each:>14}{share:>14}", totals.count);
        put(buffer, line, 1, &text, Style::new());
    }
}
