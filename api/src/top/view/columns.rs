//! Which columns there are, and which of them fit.

use accounting::reading::Mode;

use super::state_of;
use crate::figures::{name, per_second};
use crate::top::state::{Health, Sort, Vcpu, Vm};

/// What a column shows.
#[derive(Clone, Copy)]
pub enum Kind {
    /// A few words.
    Text(fn(&Vm, &Vcpu, &Health) -> String),
    /// The guest's share over the last intervals.
    Trend,
    /// The modes, stacked.
    Bar,
}

/// One column, in its place.
#[derive(Clone, Copy)]
pub struct Column {
    pub head: &'static str,
    pub x: u16,
    pub width: u16,
    pub kind: Kind,
    /// What it is sorted by.
    pub sort: Option<Sort>,
    left: bool,
    /// The narrowest screen that has it.
    least: u16,
}

impl Column {
    /// `text`, cut and filled to the column's width.
    pub fn aligned(&self, text: &str) -> String {
        let width = usize::from(self.width);
        let text: String = text.chars().take(width).collect();
        if self.left {
            format!("{text:<width$}")
        } else {
            format!("{text:>width$}")
        }
    }
}

const fn text(head: &'static str, width: u16, least: u16, show: fn(&Vm, &Vcpu, &Health) -> String) -> Column {
    Column {
        head,
        x: 0,
        width,
        kind: Kind::Text(show),
        sort: None,
        left: false,
        least,
    }
}

const fn left(column: Column) -> Column {
    Column { left: true, ..column }
}

const fn sorted(sort: Sort, column: Column) -> Column {
    Column {
        sort: Some(sort),
        ..column
    }
}

/// Those that fit on a screen so wide, the bar taking what the others leave.
pub fn fitting(screen: u16) -> Vec<Column> {
    let (vm, trend) = match screen {
        0..100 => (10, 6),
        100..150 => (16, 16),
        _ => (24, 32),
    };
    let mut columns = vec![
        left(sorted(Sort::Name, text("MICROVM", vm, 0, |vm, _, _| vm.name.clone()))),
        text("#", 2, 0, |_, vcpu, _| vcpu.reading.index.to_string()),
        left(text("STATE", 7, 0, |_, vcpu, health| state_of(vcpu, health))),
        text("CPU", 4, 50, |_, vcpu, _| {
            let host = vcpu.reading.host_cpu;
            format!("{}{}", if host.pinned { "" } else { "~" }, host.cpu)
        }),
        left(text("TICK", 4, 56, |_, vcpu, _| {
            tick(vcpu.reading.host_cpu.tick_stopped).to_owned()
        })),
        sorted(
            Sort::Guest,
            text("GUEST%", 6, 0, |_, vcpu, _| vcpu.grown.percent(Mode::Guest)),
        ),
        sorted(
            Sort::Host,
            text("HOST%", 5, 62, |_, vcpu, _| {
                let host_ns = vcpu.grown.mode_ns(Mode::HostUser) + vcpu.grown.mode_ns(Mode::HostKernel);
                crate::figures::percent(host_ns, vcpu.grown.elapsed_ns())
            }),
        ),
        text("HALT%", 5, 100, |_, vcpu, _| vcpu.grown.percent(Mode::Halted)),
        sorted(
            Sort::Waiting,
            text("WAIT%", 5, 40, |_, vcpu, _| vcpu.grown.percent(Mode::Waiting)),
        ),
        sorted(
            Sort::Exits,
            text("EXIT/S", 6, 48, |_, vcpu, _| {
                if vcpu.from_start {
                    return "-".to_owned();
                }
                per_second(vcpu.grown.exits, vcpu.grown.elapsed_ns())
            }),
        ),
        left(text("SOURCE", 6, 130, |_, vcpu, _| name(&vcpu.reading.source))),
        left(Column {
            kind: Kind::Trend,
            ..text("GUEST", trend, 78, |_, _, _| String::new())
        }),
        left(Column {
            kind: Kind::Bar,
            ..text("WHERE THE TIME GOES", 0, 66, |_, _, _| String::new())
        }),
    ];
    columns.retain(|column| column.least <= screen);
    let mut x = 0;
    for column in &mut columns {
        column.x = x;
        if matches!(column.kind, Kind::Bar) {
            column.width = screen.saturating_sub(x).max(2);
        }
        x += column.width + 1;
    }
    columns
}

/// The host's timer tick on the vCPU's CPU.
pub const fn tick(stopped: Option<bool>) -> &'static str {
    match stopped {
        Some(true) => "off",
        Some(false) => "on",
        None => "?",
    }
}
