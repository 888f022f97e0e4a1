//! `cargo xtask streams`: what crowds that read a microVM cost those who do not belong to them, a minute for each row.
//!
//! tests/src/bin/streams.rs measures; the tables go to docs/streams.md. What a row shall show is said below its table;
//! what it does not show is marked in it, and ends the command with an error once all is written: limits are what a
//! quiet machine is held to, and who runs this wants to know.

use std::fmt::Write;
use std::fs;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::layout::Layout;
use crate::machine::Machine;
use crate::measured;

/// How long each row's crowd lasts.
const SECONDS: &str = "60";

/// The slowest of a hundred readings shall take no longer.
const P99_US: f64 = 5_000.0;

/// How much more of the time the vCPU may wait for its CPU than without the crowd: half of what the alert on it
/// (resources/prometheus/alerts.yml) takes for a disturbance.
const WAITING_SHARE: f64 = 0.005;

/// How much memory may come to be resident in a minute, of what an allocator does by itself: a page for each ten
/// clients.
const GROWTH_KIB: u64 = 400;

/// The exporter's second half-minute against its first, in KiB, by their medians: a tenth of what it would be if one
/// answer, of 11 KiB, were kept at each of 60 scrapes.
const EXPORTER_GROWTH_KIB: u64 = 32;

/// As tests/src/bin/streams.rs prints it.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Row {
    Listened(Listened),
    Scraped(Scraped),
}

/// Clients of the stream.
#[derive(Debug, Deserialize)]
struct Listened {
    reading: u64,
    deaf: u64,
    interval_ms: u64,
    alone_kib: u64,
    first_kib: u64,
    most_kib: u64,
    looks: Looks,
    api_share: f64,
    bytes_per_client: f64,
    unread_bytes: u64,
}

/// An exporter.
#[derive(Debug, Deserialize)]
struct Scraped {
    sockets: u64,
    scrapes: u64,
    least_up: u64,
    most_up: u64,
    first_kib: u64,
    last_kib: u64,
    most_kib: u64,
    looks: Looks,
}

/// What a bystander saw before, with and after the crowd.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Looks {
    before: Look,
    with: Look,
    after: Look,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Look {
    p50_us: f64,
    p99_us: f64,
    waiting_share: f64,
}

/// A figure, and whether it is over its limit.
struct Figure {
    text: String,
    over: bool,
}

impl std::fmt::Display for Figure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)?;
        f.write_str(if self.over { " (over)" } else { "" })
    }
}

fn figure(value: impl ToString, over: bool) -> Figure {
    let text = value.to_string();
    Figure { text, over }
}

impl Looks {
    /// The slower of the two without the crowd.
    fn alone_p99_us(&self) -> f64 {
        self.before.p99_us.max(self.after.p99_us)
    }

    fn p99(&self) -> Figure {
        let us = self.with.p99_us;
        figure(format!("{us:.0}"), us > P99_US)
    }

    fn alone_waiting(&self) -> f64 {
        self.before.waiting_share.max(self.after.waiting_share)
    }

    fn waiting(&self) -> Figure {
        let share = self.with.waiting_share;
        let over = share > self.alone_waiting() + WAITING_SHARE;
        figure(format!("{:.2}", share * 100.0), over)
    }
}

/// Measures and writes.
///
/// # Errors
/// It could not be measured; or, once it is written, a figure is over its limit.
pub fn streams(layout: &Layout) -> Result<()> {
    let rows = measured::rows(layout, "streams", SECONDS, |row: &Row| Some(row.line()))?;
    let path = layout.root.join("docs/streams.md");
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
        match self {
            Self::Listened(row) => row.line(),
            Self::Scraped(row) => row.line(),
        }
    }

    fn is_over(&self) -> bool {
        self.line().contains("(over)")
    }
}

impl Listened {
    fn line(&self) -> String {
        let grown = self.most_kib.saturating_sub(self.first_kib);
        let clients = (self.reading + self.deaf).max(1);
        format!(
            "| {} | {} | {} | {:.0} | {:.0} | {:.0} | {} | {:.0} | {:.1} | {} | {} | {:.2} | {} | {:.1} |",
            self.reading,
            self.deaf,
            self.interval_ms,
            self.looks.before.p50_us,
            self.looks.alone_p99_us(),
            self.looks.with.p50_us,
            self.looks.p99(),
            self.bytes_per_client,
            self.first_kib.saturating_sub(self.alone_kib) as f64 / clients as f64,
            figure(grown, grown > GROWTH_KIB),
            self.unread_bytes,
            self.looks.alone_waiting() * 100.0,
            self.looks.waiting(),
            self.api_share * 100.0,
        )
    }
}

impl Scraped {
    fn line(&self) -> String {
        let over = self.last_kib > self.first_kib + EXPORTER_GROWTH_KIB;
        format!(
            "| {} | {} | {} to {} | {:.0} | {:.0} | {:.0} | {} | {} | {} | {} | {:.2} | {} |",
            self.sockets,
            self.scrapes,
            self.least_up,
            self.most_up,
            self.looks.before.p50_us,
            self.looks.alone_p99_us(),
            self.looks.with.p50_us,
            self.looks.p99(),
            self.first_kib,
            figure(self.last_kib, over),
            self.most_kib,
            self.looks.alone_waiting() * 100.0,
            self.looks.waiting(),
        )
    }
}

const LISTENED_LEGEND: &str = "
* *Reading*, *deaf*: clients of the stream that read all they are sent, and that read nothing; each is told of the one vCPU
  every so many *ms*. The guest spins, on a host CPU of its own; the clients share the other CPUs with the API.
* *p50*, *p99*: how long another client waits for `GET /vcpus/0/cputime`, on a connection that it keeps, in microseconds; *alone*,
  in a quarter of a minute before the clients come, or, where that is slower, after they have gone, and with them. At most 5,000.
* *Bytes* that each of those that read got in the minute.
* *KiB each*: what a client's connection takes of the process's memory, HTTP's buffers included.
* *Grown*: how many KiB more were resident at any time of the minute than at its begin. At most 400: nothing is queued for
  those that do not read.
* *Unread*: the most bytes that waited in the socket of a deaf client.
* *Waiting*: the share of the time, in per cent, for which the vCPU waited for its CPU, by its own ledger: alone, where it is more
  before or after, and with the clients. At most half a per cent more: who sends and who listens is on other CPUs.
* *API*: the share of one CPU, in per cent, that the API's thread took.
";

const SCRAPED_LEGEND: &str = "
* *Up*: how many of the sockets were on a page, at least and at most: 140 made-up microVMs, and the one that is looked at. The others
  hang, drip and babble.
* *First*, *last*: the exporter's resident memory, in KiB, scrape by scrape; the medians of the first and of the second half, but for the
  first five scrapes. At most 32 KiB apart; were one answer kept at each scrape, it would be ten times that. *Most*: the most at any time.
* The others as above: of the one microVM that is none of the made-up ones.
";

fn render(rows: &[Row], machine: &Machine) -> Result<String> {
    let Machine { date, cpus, kernel } = machine;
    let mut text = String::new();
    writeln!(
        text,
        "# A thousand clients of the stream, and an exporter over 200 sockets\n"
    )?;
    writeln!(
        text,
        "By `cargo xtask streams`, {date}, on {cpus}, Linux {kernel}. Each row is a microVM of its own, for a minute and a half.\n"
    )?;
    let (listened, scraped): (Vec<_>, Vec<_>) = rows.iter().partition(|row| matches!(row, Row::Listened(_)));
    writeln!(
        text,
        "| reading | deaf | ms | p50 us alone | p99 us alone | p50 us | p99 us | bytes | KiB each | grown | unread | waiting % alone | \
         waiting % | API % |"
    )?;
    writeln!(text, "|{}", "---:|".repeat(14))?;
    for row in listened {
        writeln!(text, "{}", row.line())?;
    }
    text += LISTENED_LEGEND;
    writeln!(text, "\n## An exporter, scraped every second\n")?;
    writeln!(
        text,
        "| sockets | scrapes | up | p50 us alone | p99 us alone | p50 us | p99 us | first | last | most | waiting % alone | waiting % |"
    )?;
    writeln!(text, "|{}", "---:|".repeat(12))?;
    for row in scraped {
        writeln!(text, "{}", row.line())?;
    }
    text += SCRAPED_LEGEND;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looks(p99_us: f64, waiting_share: f64) -> Looks {
        let look = |p99_us, waiting_share| Look {
            p50_us: 100.0,
            p99_us,
            waiting_share,
        };
        Looks {
            before: look(200.0, 0.001),
            with: look(p99_us, waiting_share),
            after: look(250.0, 0.002),
        }
    }

    #[test]
    fn what_is_over_its_limit_is_marked_and_fails() {
        let row = |p99_us, waiting_share, most_kib| {
            Row::Listened(Listened {
                reading: 900,
                deaf: 100,
                interval_ms: 10,
                alone_kib: 4_000,
                first_kib: 14_000,
                most_kib,
                looks: looks(p99_us, waiting_share),
                api_share: 0.5,
                bytes_per_client: 1e6,
                unread_bytes: 4_000,
            })
        };
        let well = row(4_999.0, 0.006_9, 14_400);
        assert_eq!(
            well.line(),
            "| 900 | 100 | 10 | 100 | 250 | 100 | 4999 | 1000000 | 10.0 | 400 | 4000 | 0.20 | 0.69 | 50.0 |"
        );
        assert!(!well.is_over());
        for (over, mark) in [
            (row(5_001.0, 0.0, 14_000), "| 5001 (over) |"),
            (row(0.0, 0.007_1, 14_000), "| 0.71 (over) |"),
            (row(0.0, 0.0, 14_401), "| 401 (over) |"),
        ] {
            assert!(over.line().contains(mark) && over.is_over(), "{}", over.line());
        }
    }

    #[test]
    fn an_exporter_that_keeps_answers_is_marked() {
        let row = |p99_us, last_kib| {
            Row::Scraped(Scraped {
                sockets: 201,
                scrapes: 60,
                least_up: 141,
                most_up: 141,
                first_kib: 13_000,
                last_kib,
                most_kib: 14_000,
                looks: looks(p99_us, 0.0),
            })
        };
        let well = row(1_000.0, 13_032);
        assert_eq!(
            well.line(),
            "| 201 | 60 | 141 to 141 | 100 | 250 | 100 | 1000 | 13000 | 13032 | 14000 | 0.20 | 0.00 |"
        );
        assert!(!well.is_over() && row(1_000.0, 13_033).is_over() && row(5_001.0, 13_000).is_over());
    }
}
