//! `cargo xtask accuracy`: what each way of telling a vCPU's guest time is worth.
//!
//! Guests that know what they burned run in the emulated host, on a CPU whose tick samples and on one whose tick is
//! stopped, and on this machine if it has a /dev/kvm. What they know, what the tracer saw, what the kernel says and what each
//! source of a reading says makes the table of docs/accuracy.md, and the plot in docs/accuracy.svg.

mod plot;
mod row;
mod table;

use std::fs::{self, OpenOptions};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::layout::Layout;
use crate::machine::Machine;
use crate::process::follow;
use crate::{bed, build, debian, setup};
use row::{Place, Row};

/// Two CPUs, five workloads, three runs of some five seconds each with the reading of what was recorded, and the boot; and as
/// much again.
const LIMIT: Duration = Duration::from_secs(600);

/// Measures and writes.
pub fn accuracy(layout: &Layout) -> Result<()> {
    debian::install_missing()?;
    let kit = setup::setup(layout)?;
    let (chronovisor, program) = build::accuracy(layout)?;

    let mut rows = Vec::new();
    let job = bed::Job {
        script: "/tests/accuracy".to_owned(),
        chronovisor: &chronovisor,
        programs: vec![("tests/accuracy".to_owned(), program.clone())],
        cpu: bed::Cpu::Any,
        disk: None,
        limit: LIMIT,
    };
    println!("in the emulated host:");
    let mut other = Vec::new();
    let outcome = bed::run(layout, &kit, &job, |line| {
        take(line, Place::Emulated, &mut rows, &mut other)
    })?;
    ensure!(
        outcome.status == 0,
        "the workloads ended with status {} in the emulated host:\n{}",
        outcome.status,
        other.join("\n")
    );

    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => {
            println!("on this machine:");
            let mut other = Vec::new();
            let ended_well = follow(&mut Command::new(&program), |line| {
                take(line, Place::Here, &mut rows, &mut other);
            })?;
            ensure!(ended_well, "{} failed:\n{}", program.display(), other.join("\n"));
        }
        Err(error) => println!("not on this machine: cannot open /dev/kvm: {error}"),
    }

    let docs = layout.root.join("docs");
    fs::create_dir_all(&docs).with_context(|| format!("cannot make {}", docs.display()))?;
    for (name, content) in [
        ("accuracy.md", table::render(&rows, &Machine::look())),
        ("accuracy.svg", plot::render(&rows)),
    ] {
        let path = docs.join(name);
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
        println!("wrote {}", path.display());
    }
    Ok(())
}

/// Takes a line of the measuring program: a row, or something it says.
fn take(line: &str, place: Place, rows: &mut Vec<Row>, other: &mut Vec<String>) {
    match serde_json::from_str(line) {
        Ok(measured) => {
            let row = Row { place, measured };
            println!("  {}", row.in_one_line());
            rows.push(row);
        }
        Err(_) => {
            println!("{line}");
            other.push(line.to_owned());
        }
    }
}
