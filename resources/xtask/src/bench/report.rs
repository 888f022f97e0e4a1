//! What a run leaves in the target directory: bench.json for programs, bench.md for people.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use super::{Row, Table};
use crate::layout::Layout;
use crate::machine::Machine;

/// bench.json.
#[derive(Serialize)]
struct Report<'a> {
    rows: Vec<&'a Row>,
}

/// What the rows are. One that is not here speaks for itself.
const LEGEND: &str = "
* `stamps`: the two stamps of one exit, against two bare `rdtsc`.
* `snapshot`: a reader's copy of what the vCPU thread published, against one bare `rdtsc`.
* `reading_vs_probes`: a full reading, against the probes of the kernel that it makes.
* `reading_vs_proc`: a full reading, against opening, reading and parsing `/proc/PID/task/TID/stat`.
* `stamps_instructions`: the two stamps of one exit, against two bare `rdtsc`, in instructions as callgrind counts them:
  the same on a noisy machine as on a quiet one.
* `api`: `GET /vcpus/0/cputime`, against `GET /version` on the same connection; client and server on one CPU.
* `first_answer`: from exec to the API's first answer, against a server of one constant on the same HTTP stack and socket
  (`tests/src/bin/bare_server.rs`).
* `start`, `boot`: from exec to the first `KVM_RUN`, and to the guest init's first line, against the shortest loop that
  boots the same kernel and initrd (`tests/src/bin/floor.rs`). `start_no_api` is without an API.
* `memory`: what is resident beside the guest's memory after a boot, with block, net and API up, against the budget;
  `memory_bare`: with none of them.
";

/// Writes both, and says where.
pub fn write(layout: &Layout, table: &Table) -> Result<()> {
    let report = Report {
        rows: table.rows.iter().map(|(row, _)| row).collect(),
    };
    let json = serde_json::to_string_pretty(&report)?;
    put(&layout.target.join("bench.json"), &(json + "\n"))?;
    put(&layout.target.join("bench.md"), &markdown(table, &Machine::look())?)
}

fn put(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{}", path.display());
    Ok(())
}

fn markdown(table: &Table, machine: &Machine) -> Result<String> {
    let Machine { date, cpus, kernel } = machine;
    let mut text = String::new();
    writeln!(text, "# What Chronovisor costs\n")?;
    writeln!(
        text,
        "By `cargo xtask bench`, {date}, on {cpus}, Linux {kernel}.\nEach row is a ratio of two things measured by turns in \
         one run: trust the ratio, not the times. The emulated\nhost is a Debian kernel in QEMU's emulator, with a KVM and \
         tickless CPUs of its own.\n"
    )?;
    writeln!(text, "| row | ours | against | unit | ratio | limit | | measured on |")?;
    writeln!(text, "|---|---:|---:|---|---:|---:|---|---|")?;
    for (row, place) in &table.rows {
        let over = if row.is_over() { "over" } else { "" };
        writeln!(
            text,
            "| `{}` | {:.1} | {:.1} | {} | {:.2} | {:.2} | {over} | {} |",
            row.key,
            row.ours,
            row.against,
            row.unit,
            row.ratio,
            row.limit,
            place.name()
        )?;
    }
    text += LEGEND;
    for (key, why) in &table.skipped {
        writeln!(text, "\n`{key}` was skipped: {why}.")?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::super::Place;
    use super::*;

    #[test]
    fn the_report_marks_what_is_over_and_names_what_was_skipped() {
        let row = |key: &str, ratio| Row {
            key: key.to_owned(),
            ours: ratio * 10.0,
            against: 10.0,
            unit: "ns".to_owned(),
            ratio,
            limit: 1.5,
        };
        let table = Table {
            rows: vec![(row("low", 1.4), Place::Here), (row("high", 1.6), Place::EmulatedHost)],
            skipped: vec![("boot", "no kernel".to_owned())],
        };
        let machine = Machine {
            date: "today".to_owned(),
            cpus: "2 CPUs".to_owned(),
            kernel: "6.1".to_owned(),
        };
        let text = markdown(&table, &machine).unwrap();
        for line in [
            "| `low` | 14.0 | 10.0 | ns | 1.40 | 1.50 |  | this machine |",
            "| `high` | 16.0 | 10.0 | ns | 1.60 | 1.50 | over | the emulated host |",
            "`boot` was skipped: no kernel.",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }
}
