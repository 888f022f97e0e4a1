//! `cargo xtask bench`: what Chronovisor costs, each figure as a ratio to what it cannot do without, both measured in this
//! run. A time by itself says little on a machine that is shared; a ratio from one run does.
//!
//! * tests/src/bin/bench.rs, on this machine: stamps, snapshots, readings.
//! * `bench_vm first-answer`, on this machine: it needs no KVM.
//! * `bench_vm api`, on this machine's /dev/kvm if there is one, else in the emulated host.
//! * `bench_vm boot` (starts, boots, memory), on this machine if its /dev/kvm boots a stock kernel, else in the emulated host.
//!
//! Rows are printed as they come. At the end they are written to the target directory: bench.json, and bench.md with what
//! they were measured on, which docs/bench.md is a copy of. A row over its limit is marked, here and there, and is no
//! failure: limits are what a quiet machine is held to, and whether this one is quiet nobody can tell. A row that cannot be
//! measured here is reported as skipped, by name; one whose measurement broke ends the run with an error.

mod report;

use std::fs::OpenOptions;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use crate::build::{self, Benches};
use crate::layout::Layout;
use crate::process::follow;
use crate::progress::Progress;
use crate::setup::Kit;
use crate::{bed, debian, demo, instructions, setup};

/// A run takes one to two minutes; in this time a hung one is given up.
const EMULATED_LIMIT: Duration = Duration::from_secs(600);
/// What `bench_vm` measures, by its argument.
const API: [&str; 1] = ["api"];
const BOOT: [&str; 5] = ["start", "start_no_api", "boot", "memory", "memory_bare"];

/// What the emulated host says when it has booted and measuring begins.
const BEGUN: &str = "measuring";

/// One row: `ratio` is `ours / against`, and should be at most `limit`.
#[derive(Debug, Serialize, Deserialize)]
struct Row {
    key: String,
    ours: f64,
    against: f64,
    unit: String,
    ratio: f64,
    limit: f64,
}

impl Row {
    fn is_over(&self) -> bool {
        self.ratio > self.limit
    }
}

/// Where rows were measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Here,
    EmulatedHost,
}

impl Place {
    const fn name(self) -> &'static str {
        match self {
            Self::Here => "this machine",
            Self::EmulatedHost => "the emulated host",
        }
    }
}

/// The rows so far.
#[derive(Debug, Default)]
struct Table {
    rows: Vec<(Row, Place)>,
    /// Those that could not be measured, and why.
    skipped: Vec<(&'static str, String)>,
}

/// Measures and reports.
pub fn bench(layout: &Layout) -> Result<()> {
    // What needs the guest, or QEMU, says so where it lacks: the other rows need neither.
    let kit = debian::install_missing().and_then(|()| setup::setup(layout));
    let programs = build::benches(layout)?;
    let mut run = Run {
        layout,
        programs: &programs,
        kit: kit.map_err(|error| format!("{error:#}")),
        table: Table::default(),
    };

    println!(
        "{:<20} {:>10} {:>10} {:<4} {:>6} {:>6}",
        "row", "ours", "against", "unit", "ratio", "limit"
    );
    run.here("readings", Command::new(&programs.bench))?;
    run.instructions();
    run.bench_vm("first-answer", &["first_answer"], None)?;
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => run.bench_vm("api", &API, None)?,
        Err(error) => run.bench_vm("api", &API, Some(format!("/dev/kvm: {error}")))?,
    }
    // Wherever a guest boots, its kernel is what the set-up gives.
    let obstacle = match &run.kit {
        Ok(_) => demo::obstacle(&programs.chronovisor)?,
        Err(_) => Some("there is no guest to boot".to_owned()),
    };
    run.bench_vm("boot", &BOOT, obstacle)?;

    report::write(layout, &run.table)
}

struct Run<'a> {
    layout: &'a Layout,
    programs: &'a Benches,
    kit: Result<Kit, String>,
    table: Table,
}

impl Run<'_> {
    /// `bench_vm what`: here, or, where `obstacle` says why not, in the emulated host.
    fn bench_vm(&mut self, what: &str, keys: &[&'static str], obstacle: Option<String>) -> Result<()> {
        let Some(why) = obstacle else {
            let mut command = Command::new(&self.programs.bench_vm);
            command.arg(what).env("CHRONOVISOR_BED", self.layout.bed());
            return self.here(what, command);
        };
        match &self.kit {
            Ok(kit) => {
                println!("({} in the emulated host: {why})", keys.join(", "));
                let job = job(self.programs, what);
                let mut rows = Rows::new(&mut self.table, Place::EmulatedHost, what);
                let outcome = bed::run(self.layout, kit, &job, |line| rows.line(line))?;
                ensure!(outcome.status == 0, "bench_vm {what} failed: status {}", outcome.status);
            }
            Err(error) => {
                let why = format!("{why}; the set-up failed: {error}");
                for &key in keys {
                    println!("{key:<20} skipped: {why}");
                    self.table.skipped.push((key, why.clone()));
                }
            }
        }
        Ok(())
    }

    /// `stamps_instructions`, counted by valgrind.
    fn instructions(&mut self) {
        match instructions::row(self.layout) {
            Ok(row) => Rows::new(&mut self.table, Place::Here, "instructions").line(&row),
            Err(error) => {
                println!("stamps_instructions skipped: {error:#}");
                self.table.skipped.push(("stamps_instructions", format!("{error:#}")));
            }
        }
    }

    fn here(&mut self, what: &str, mut command: Command) -> Result<()> {
        let mut rows = Rows::new(&mut self.table, Place::Here, what);
        let ended_well = follow(&mut command, |line| rows.line(line))?;
        ensure!(ended_well, "{} failed", command.get_program().to_string_lossy());
        Ok(())
    }
}

/// `bench_vm what` in the emulated host.
fn job<'a>(programs: &'a Benches, what: &str) -> bed::Job<'a> {
    let program = |name: &str, path: &Path| (format!("bed/{name}"), path.to_owned());
    bed::Job {
        script: format!("echo {BEGUN}; /bed/bench_vm {what} --emulated\n"),
        chronovisor: &programs.chronovisor,
        programs: vec![
            program("bench_vm", &programs.bench_vm),
            program("floor", &programs.floor),
        ],
        cpu: bed::Cpu::Any,
        disk: None,
        limit: EMULATED_LIMIT,
    }
}

/// Takes what a measuring program prints.
struct Rows<'a> {
    table: &'a mut Table,
    place: Place,
    what: String,
    progress: Option<Progress>,
}

impl<'a> Rows<'a> {
    fn new(table: &'a mut Table, place: Place, what: &str) -> Self {
        let mut rows = Self {
            table,
            place,
            what: format!("measuring: {what}"),
            progress: None,
        };
        // The emulated host's boot has a line of its own.
        if place == Place::Here {
            rows.wait();
        }
        rows
    }

    fn wait(&mut self) {
        self.progress = Some(Progress::new(self.what.as_str()));
    }

    fn line(&mut self, line: &str) {
        // Its line is cleared before another is printed.
        self.progress = None;
        match serde_json::from_str::<Row>(line) {
            Ok(row) => {
                print(&row);
                self.table.rows.push((row, self.place));
            }
            Err(_) if line == BEGUN => {}
            Err(_) => println!("{line}"),
        }
        self.wait();
    }
}

fn print(row: &Row) {
    let over = if row.is_over() { "  over" } else { "" };
    let Row {
        key,
        ours,
        against,
        unit,
        ratio,
        limit,
    } = row;
    println!("{key:<20} {ours:>10.1} {against:>10.1} {unit:<4} {ratio:>6.2} {limit:>6.2}{over}");
}
