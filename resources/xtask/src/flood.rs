//! `cargo xtask flood`: ten thousand connections that abuse a microVM's API for half a minute, and what those have of
//! it who behave.
//!
//! tests/src/bin/flood.rs measures; the table goes to docs/flood.md. What is over its limit is marked, and ends the
//! command with an error once all is written.

use std::fmt::Write;
use std::fs;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::layout::Layout;
use crate::machine::Machine;
use crate::measured;

/// How long each flood lasts.
const SECONDS: &str = "30";

/// The slowest of a hundred readings shall take no longer.
const P99_US: f64 = 20_000.0;

/// How much less of the time the guest may run than without the flood.
const GUEST_SHARE: f64 = 0.01;

/// As tests/src/bin/flood.rs prints it.
#[derive(Debug, Deserialize)]
struct Row {
    connections: u64,
    nice: i32,
    before: Look,
    with: Look,
    after: Look,
    newcomers: u64,
    refused: u64,
    newcomer_p50_us: f64,
    newcomer_p99_us: f64,
    alone_kib: u64,
    peak_kib: u64,
    cap_kib: u64,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Look {
    p50_us: f64,
    p99_us: f64,
    guest_share: f64,
    waiting_share: f64,
}

/// Measures and writes.
///
/// # Errors
/// It could not be measured; or, once it is written, a figure is over its limit.
pub fn flood(layout: &Layout) -> Result<()> {
    let rows = measured::rows(layout, "flood", SECONDS, |row: &Row| Some(row.line()))?;
    let path = layout.root.join("docs/flood.md");
    fs::write(&path, render(&rows, &Machine::look())?).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{}", path.display());
    let over = rows.iter().filter(|row| row.is_over()).count();
    ensure!(
        over == 0,
        "{over} of {} rows are over a limit: those marked in it; is the machine quiet?",
        rows.len()
    );
    Ok(())
}

impl Row {
    fn line(&self) -> String {
        let over = |is: bool| if is { " (over)" } else { "" };
        let grown = self.peak_kib.saturating_sub(self.alone_kib);
        let alone = self.before.guest_share.min(self.after.guest_share);
        format!(
            "| {} | {} | {:.0} | {:.0} | {:.0} | {:.0}{} | {} | {}{} | {:.0} | {:.0} | {}{} | {:.2} | {:.2}{} | {:.2} |",
            self.connections,
            self.nice,
            self.before.p50_us,
            self.before.p99_us.max(self.after.p99_us),
            self.with.p50_us,
            self.with.p99_us,
            over(self.with.p99_us > P99_US),
            self.newcomers,
            self.refused,
            over(self.refused > 0),
            self.newcomer_p50_us,
            self.newcomer_p99_us,
            grown,
            over(grown > self.cap_kib),
            alone * 100.0,
            self.with.guest_share * 100.0,
            over(self.with.guest_share < alone - GUEST_SHARE),
            self.with.waiting_share * 100.0,
        )
    }

    fn is_over(&self) -> bool {
        self.line().contains("(over)")
    }
}

const LEGEND: &str = "
* *Connections* of the flood, all from one process, made again as soon as they are closed: a quarter each says a head and a body a byte
  a second, announces a body of 1 GiB and sends what is taken of it, and asks without end and reads no answer. *Nice*: how nice that
  process is. The guest spins, on a host CPU of its own; the flood shares the others with the API and with who measures, so at 0 it
  takes half of what CPU time there is for readings.
* *p50*, *p99*: how long a client that behaves waits for `GET /vcpus/0/cputime`, on a connection that it keeps, in microseconds; *alone*,
  in a quarter of the time before the flood, or, where that is slower, after it, and with it. At most 20,000.
* *Newcomers*: other clients, one after the other, each on a connection of its own; how many were answered, how many were *refused*,
  of which there shall be none, and how long they waited from connect(2) to the last byte of the answer.
* *KiB more*: the most that was resident of the process at any instant of the flood, beside what was before. At most 6,144: 64
  connections with a head, a body and an answer each (api-limits.md).
* *Guest*: the share of the time, in per cent, for which the guest ran, by its own ledger; alone, the less of the two, and with the
  flood, which shall take no more than one per cent. *Waiting*: for which its vCPU waited for its CPU.
";

fn render(rows: &[Row], machine: &Machine) -> Result<String> {
    let Machine { date, cpus, kernel } = machine;
    let mut text = String::new();
    writeln!(text, "# A flood of connections\n")?;
    writeln!(
        text,
        "By `cargo xtask flood`, {date}, on {cpus}, Linux {kernel}. Each row is a microVM of its own, flooded for {SECONDS} s.\n"
    )?;
    writeln!(
        text,
        "| connections | nice | p50 us alone | p99 us alone | p50 us | p99 us | newcomers | refused | their p50 us | their p99 us | \
         KiB more | guest % alone | guest % | waiting % |"
    )?;
    writeln!(text, "|{}", "---:|".repeat(14))?;
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
    fn what_is_over_its_limit_is_marked_and_fails() {
        let row = |p99_us, peak_kib, guest_share, refused| {
            let look = |p99_us, guest_share| Look {
                p50_us: 100.0,
                p99_us,
                guest_share,
                waiting_share: 0.001,
            };
            Row {
                connections: 10_000,
                nice: 19,
                before: look(200.0, 0.99),
                with: look(p99_us, guest_share),
                after: look(250.0, 0.98),
                newcomers: 300,
                refused,
                newcomer_p50_us: 500.0,
                newcomer_p99_us: 5_000.0,
                alone_kib: 20_000,
                peak_kib,
                cap_kib: 6_144,
            }
        };
        let well = row(20_000.0, 26_144, 0.971, 0);
        assert_eq!(
            well.line(),
            "| 10000 | 19 | 100 | 250 | 100 | 20000 | 300 | 0 | 500 | 5000 | 6144 | 98.00 | 97.10 | 0.10 |"
        );
        assert!(!well.is_over());
        for over in [
            row(20_001.0, 0, 1.0, 0),
            row(0.0, 26_145, 1.0, 0),
            row(0.0, 0, 0.969, 0),
            row(0.0, 0, 1.0, 1),
        ] {
            assert!(over.is_over(), "{}", over.line());
        }
    }
}
