//! What a run leaves in the target directory: bench.json for programs, bench.md for people.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Serialize;

use super::{Row, Table};
use crate::layout::Layout;

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
* `api`: `GET /vcpus/0/cputime`, against `GET /version` on the same connection; client and server on one CPU.
* `start`, `boot`: from exec to the first `KVM_RUN`, and to the guest init's first line, against the shortest loop that
  boots the same kernel and initrd (`tests/src/bin/floor.rs`).
* `memory`: what is resident beside the guest's memory after a boot, against the budget.
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

/// What a figure depends on, beside the program.
struct Machine {
    date: String,
    cpus: String,
    kernel: String,
}

impl Machine {
    fn look() -> Self {
        let first_line = |text: String| text.lines().next().unwrap_or_default().trim().to_owned();
        let model = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let mut lines = model.lines().filter_map(|line| line.split_once(':'));
            lines.find_map(|(key, value)| (key.trim() == name).then(|| value.trim().to_owned()))
        };
        // The kernel sets the bit aside for hypervisors to say that they are there.
        let is_guest = field("flags").is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor"));
        let count = std::thread::available_parallelism().map_or(1, usize::from);
        let kind = if is_guest { "a virtual machine" } else { "hardware" };
        let date = Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]).output();
        Self {
            date: date.map_or_else(
                |_| "at an unknown time".to_owned(),
                |output| first_line(String::from_utf8_lossy(&output.stdout).into_owned()),
            ),
            cpus: format!("{count} CPUs ({}), {kind}", field("model name").unwrap_or_default()),
            // Without what a distribution put behind it.
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
                .map(|release| release.trim().split('-').next().unwrap_or_default().to_owned())
                .unwrap_or_default(),
        }
    }
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
