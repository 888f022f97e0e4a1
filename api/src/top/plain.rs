//! `chronovisor top --once`: the rows as plain text, for people without a screen and for programs: one line a vCPU, columns
//! separated by spaces, no escape sequences.

use std::fmt::Write;
use std::time::Instant;

use accounting::reading::{ExitTotals, Mode};

use super::state::{Health, Row, State};
use crate::figures::per_second;

const HEAD: &str = "MICROVM              VCPU STATE     CPU TICK  GUEST%  USER% KERNEL% HALTED% WAITING% BLOCKED% PAUSED%  EXITS/S MOST";

/// The text, and whether any microVM answered.
pub fn text(state: &State, now: Instant) -> (String, bool) {
    let mut text = format!("{HEAD}\n");
    let mut any = false;
    for row in state.rows() {
        let health = row.vm.health(state.interval, now);
        any |= row.vcpu.is_some() || health == Health::Well;
        // A socket's name, and what a server says, may have anything in it.
        let line: String = line(&row, &health).chars().filter(|c| !c.is_control()).collect();
        let _ = writeln!(text, "{}", line.trim_end());
    }
    (text, any)
}

fn line(row: &Row<'_>, health: &Health) -> String {
    let vm = &row.vm.name;
    let Some(vcpu) = row.vcpu else {
        return format!("{vm:<20}    - {}", super::view::says(health));
    };
    let host = vcpu.reading.host_cpu;
    let share = |mode| vcpu.grown.percent(mode);
    let rate = |count| {
        if vcpu.from_start {
            "-".to_owned()
        } else {
            per_second(count, vcpu.grown.elapsed_ns())
        }
    };
    let most = vcpu.grown.by_reason.iter().max_by_key(|(_, totals)| totals.count);
    let most = most.map_or_else(String::new, |(reason, ExitTotals { count, .. })| {
        format!("{reason}:{}", rate(*count))
    });
    format!(
        "{vm:<20} {:>4} {:<7} {:>5} {:<4} {:>7} {:>6} {:>7} {:>7} {:>8} {:>8} {:>7} {:>8} {most}",
        vcpu.reading.index,
        super::view::state_of(vcpu, health),
        format!("{}{}", if host.pinned { "" } else { "~" }, host.cpu),
        super::view::tick(host.tick_stopped),
        share(Mode::Guest),
        share(Mode::HostUser),
        share(Mode::HostKernel),
        share(Mode::Halted),
        share(Mode::Waiting),
        share(Mode::Blocked),
        share(Mode::Paused),
        rate(vcpu.grown.exits),
    )
}
