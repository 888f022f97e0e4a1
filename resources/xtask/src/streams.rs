//! `cargo xtask streams`: what a crowd that listens to `GET /vcpus/stream` costs those who do not, a minute for each row.
//!
//! tests/src/bin/streams.rs measures; the table goes to docs/streams.md. What a row shall show is said below the table, and what
//! a row does not show is marked in it: no failure, as limits are what a quiet machine is held to.

use std::fmt::Write;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::build;
use crate::layout::Layout;
use crate::machine::Machine;
use crate::process::follow;

/// How long each row lasts.
const SECONDS: &str = "60";

/// The slowest of a hundred readings shall take no longer.
const P99_US: f64 = 5_000.0;

/// How much memory may come to be resident in a minute, of what an allocator does by itself: a page for each ten clients.
const GROWTH_KIB: u64 = 400;

/// As tests/src/bin/streams.rs prints it.
#[derive(Debug, Deserialize)]
struct Row {
    reading: u64,
    deaf: u64,
    interval_ms: u64,
    alone_kib: u64,
    first_kib: u64,
    most_kib: u64,
    p50_us: f64,
    p99_us: f64,
    waiting_share: f64,
    api_share: f64,
    bytes_per_client: f64,
    unread_bytes: u64,
}

/// Measures and writes.
pub fn streams(layout: &Layout) -> Result<()> {
    let program = build::streams(layout)?;
    let (mut rows, mut other) = (Vec::new(), Vec::new());
    let mut command = Command::new(&program);
    command.arg(SECONDS).env("CHRONOVISOR_BED", layout.bed());
    let ended_well = follow(&mut command, |line| match serde_json::from_str::<Row>(line) {
        Ok(row) => {
            println!("{}", row.line());
            rows.push(row);
        }
        Err(_) => other.push(line.to_owned()),
    })?;
    ensure!(ended_well, "{} failed:\n{}", program.display(), other.join("\n"));
    let path = layout.root.join("docs/streams.md");
    fs::write(&path, render(&rows, &Machine::look())?).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{}", path.display());
    Ok(())
}

impl Row {
    fn line(&self) -> String {
        let over = |is: bool| if is { " (over)" } else { "" };
        let grown = self.most_kib.saturating_sub(self.first_kib);
        let clients = (self.reading + self.deaf).max(1);
        format!(
            "| {} | {} | {} | {:.0} | {:.0}{} | {:.0} | {:.1} | {}{} | {} | {:.2} | {:.1} |",
            self.reading,
            self.deaf,
            self.interval_ms,
            self.p50_us,
            self.p99_us,
            over(self.p99_us > P99_US),
            self.bytes_per_client,
            self.first_kib.saturating_sub(self.alone_kib) as f64 / clients as f64,
            grown,
            over(grown > GROWTH_KIB),
            self.unread_bytes,
            self.waiting_share * 100.0,
            self.api_share * 100.0,
        )
    }
}

const LEGEND: &str = "
* *Reading*, *deaf*: clients of the stream that read all they are sent, and that read nothing; each is told of the one vCPU
  every so many *ms*. The guest spins, on a host CPU of its own; the clients share the other CPUs with the API.
* *p50*, *p99*: how long another client waits for `GET /vcpus/0/cputime`, on a connection that it keeps, in microseconds. At
  most 5,000.
* *Bytes* that each of those that read got in the minute.
* *KiB each*: what a client's connection takes of the process's memory, HTTP's buffers included.
* *Grown*: how many KiB more were resident at any time of the minute than at its begin. At most 400: nothing is queued for
  those that do not read.
* *Unread*: the most bytes that waited in the socket of a deaf client.
* *Waiting*: the share of the minute, in per cent, for which the vCPU waited for its CPU, by its own ledger. It shall be what it
  is in the first row, to which nobody listens: who sends and who listens is on other CPUs.
* *API*: the share of one CPU, in per cent, that the API's thread took.
";

fn render(rows: &[Row], machine: &Machine) -> Result<String> {
    let Machine { date, cpus, kernel } = machine;
    let mut text = String::new();
    writeln!(text, "# A thousand clients of the stream\n")?;
    writeln!(
        text,
        "By `cargo xtask streams`, {date}, on {cpus}, Linux {kernel}. Each row is a microVM of its own, for a minute.\n"
    )?;
    writeln!(
        text,
        "| reading | deaf | ms | p50 us | p99 us | bytes | KiB each | grown | unread | waiting % | API % |"
    )?;
    writeln!(text, "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")?;
    for row in rows {
        writeln!(text, "{}", row.line())?;
    }
    text += LEGEND;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_over_its_limit_is_marked() {
        let row = |p99_us, most_kib| Row {
            reading: 900,
            deaf: 100,
            interval_ms: 10,
            alone_kib: 4_000,
            first_kib: 14_000,
            most_kib,
            p50_us: 100.0,
            p99_us,
            waiting_share: 0.005,
            api_share: 0.5,
            bytes_per_client: 1e6,
            unread_bytes: 4_000,
        };
        assert_eq!(
            row(4_999.0, 14_400).line(),
            "| 900 | 100 | 10 | 100 | 4999 | 1000000 | 10.0 | 400 | 4000 | 0.50 | 50.0 |"
        );
        let over = row(5_001.0, 14_401).line();
        assert!(
            over.contains("| 5001 (over) |") && over.contains("| 401 (over) |"),
            "{over}"
        );
    }
}
