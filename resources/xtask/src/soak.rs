//! `cargo xtask soak`: a microVM that is read, streamed and scraped for twenty minutes; `cargo xtask churn`: two dozen that pause, come
//! and go fifty times. What they shall show is said in their reports, docs/soak.md and docs/churn.md; a figure over its limit is marked
//! there, and is an error once all is written.

use std::fmt::Write;
use std::fs;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::layout::Layout;
use crate::machine::Machine;
use crate::measured;

/// How much of the time is warming up, in minutes: until each allocator has what it keeps.
const WARM: u64 = 5;
/// How much the microVM's resident memory may grow after that, in per cent.
const GROWTH_PERCENT: f64 = 1.0;
/// Connections that may be there at one look and not at another: each reader's and the exporter's.
const AT_ONCE: u64 = 3;
/// How far the ledger and `CLOCK_MONOTONIC_RAW` may part, in millionths.
const DRIFT_PPM: f64 = 1.0;

/// A process, as tests/src/footprint.rs tells it.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Footprint {
    descriptors: u64,
    threads: u64,
    resident_kib: u64,
}

/// A line of tests/src/bin/soak.rs.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Line {
    Minute {
        minute: u64,
        microvm: Footprint,
        exporter: Footprint,
    },
    Whole {
        seconds: f64,
        readings: u64,
        scrapes: u64,
        drift_ppm: f64,
        known_to_ppm: f64,
    },
}

/// A line of tests/src/bin/churn.rs.
#[derive(Debug, Deserialize)]
struct Churn {
    what: String,
    rounds: u64,
    readings: u64,
    first: Counts,
    last: Counts,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(untagged)]
enum Counts {
    Process(Footprint),
    Host {
        files: u64,
        threads: u64,
        kvm: Option<u64>,
        mounts: u64,
        kernel_kib: u64,
    },
}

/// Measures for so many minutes, and writes.
///
/// # Errors
/// It could not be measured; or, once it is written, a figure is over its limit.
pub fn soak(layout: &Layout, minutes: u64) -> Result<()> {
    ensure!(
        minutes > WARM,
        "--minutes {minutes}: the first {WARM} are for warming up"
    );
    let lines: Vec<Line> = measured::rows(layout, "soak", &minutes.to_string(), |_| None)?;
    let mut table = String::new();
    let mut over = Vec::new();
    let (mut warm, mut last) = (None, None);
    let mut whole = String::new();
    for line in &lines {
        match *line {
            Line::Minute {
                minute,
                microvm,
                exporter,
            } => {
                if minute == WARM {
                    warm = Some(microvm);
                }
                last = Some(microvm);
                let Footprint {
                    descriptors,
                    threads,
                    resident_kib,
                } = microvm;
                writeln!(
                    table,
                    "| {minute} | {resident_kib} | {threads} | {descriptors} | {} |",
                    exporter.resident_kib
                )?;
            }
            Line::Whole {
                seconds,
                readings,
                scrapes,
                drift_ppm,
                known_to_ppm,
            } => {
                if drift_ppm.abs() + known_to_ppm > DRIFT_PPM {
                    over.push(format!("drift of {drift_ppm:.4} ppm"));
                }
                writeln!(
                    whole,
                    "* **{readings} readings** by the two clients in {seconds:.0} s, {scrapes} scrapes; no law broken: one would have ended \
                     it.\n* **Drift** of vCPU 0's `elapsed_ns` against CLOCK_MONOTONIC_RAW: {drift_ppm:.4} ppm, known to \
                     {known_to_ppm:.4}. Limit 1."
                )?;
            }
        }
    }
    let (warm, last) = warm.zip(last).context("it told of no minute")?;
    let grown = last.resident_kib as f64 / warm.resident_kib as f64 * 100.0 - 100.0;
    if grown > GROWTH_PERCENT {
        over.push(format!("resident memory grew by {grown:.2} %"));
    }
    if last.descriptors > warm.descriptors + AT_ONCE || last.threads != warm.threads {
        over.push(format!("{warm:?} became {last:?}"));
    }
    let mut text = head("A soak", &format!("cargo xtask soak --minutes {minutes}"))?;
    writeln!(
        text,
        "A microVM whose guest computes and exits by turns; two clients that read both vCPUs without a pause and hold each reading to\n\
         the laws against the one before; ten that listen to a stream at 100 ms, five that do not read theirs; scrapes once a second, and an\n\
         exporter.\n\n{whole}* **Resident memory** of the microVM from minute {WARM} on: {grown:+.2} %. Limit {GROWTH_PERCENT:.0} %.\n"
    )?;
    writeln!(
        text,
        "| minute | microVM, KiB | threads | descriptors | exporter, KiB |"
    )?;
    writeln!(text, "|---:|---:|---:|---:|---:|")?;
    text += &table;
    write(layout, "soak", &text, &over)
}

/// Measures so many rounds, and writes.
///
/// # Errors
/// As [`soak`].
pub fn churn(layout: &Layout, rounds: u64) -> Result<()> {
    let lines: Vec<Churn> = measured::rows(layout, "churn", &rounds.to_string(), |_| None)?;
    let mut over = Vec::new();
    let mut text = head("Coming and going", &format!("cargo xtask churn --rounds {rounds}"))?;
    text += "\
Twenty-four microVMs at a time, each round; what was in use after first rounds, which bring into being what is kept, and after\n\
the last. Readings between all steps are held to the laws: one broken would have ended it.\n\n\
* *pauses*: 24 processes that stay, paused and resumed each round; sums over them.\n\
* *starts*: 24 processes started, paused, resumed and ended each round; what the host has: open files, threads, KVM's own count of\n\
\x20 microVMs, mounts, and the kernel's memory that it cannot take back, which others on this host share.\n\
* *in one process*: 24 guests made, resumed, paused, resumed and dropped each round, in the process that is counted.\n\n\
| what | rounds | readings | in use | first | last |\n|---|---:|---:|---|---:|---:|\n";
    for Churn {
        what,
        rounds,
        readings,
        first,
        last,
    } in &lines
    {
        // What a limit is of, if there is one: half a unit a microVM that came and went.
        let share = |units: u64| Some(units * rounds * 24 / 2);
        let rows = match (*first, *last) {
            (Counts::Process(first), Counts::Process(last)) => vec![
                ("descriptors", first.descriptors, last.descriptors, Some(0)),
                ("threads", first.threads, last.threads, Some(0)),
                // Two pages for each of the 24.
                ("resident, KiB", first.resident_kib, last.resident_kib, Some(24 * 8)),
            ],
            (
                Counts::Host {
                    files: f0,
                    threads: t0,
                    kvm: k0,
                    mounts: m0,
                    kernel_kib: s0,
                },
                Counts::Host {
                    files: f1,
                    threads: t1,
                    kvm: k1,
                    mounts: m1,
                    kernel_kib: s1,
                },
            ) => vec![
                ("files", f0, f1, share(1)),
                ("threads", t0, t1, share(1)),
                ("KVM's microVMs", k0.unwrap_or(0), k1.unwrap_or(0), Some(0)),
                ("mounts", m0, m1, Some(0)),
                ("kernel, KiB", s0, s1, share(4)),
            ],
            _ => continue,
        };
        for (name, first, last, limit) in rows {
            let is_over = limit.is_some_and(|limit| last > first + limit);
            let mark = if is_over { " (over)" } else { "" };
            if is_over {
                over.push(format!("{what}: {name} {first} became {last}"));
            }
            writeln!(
                text,
                "| {what} | {rounds} | {readings} | {name} | {first} | {last}{mark} |"
            )?;
        }
    }
    write(layout, "churn", &text, &over)
}

fn head(title: &str, command: &str) -> Result<String> {
    let Machine { date, cpus, kernel } = Machine::look();
    let mut text = String::new();
    writeln!(
        text,
        "# {title}\n\nBy `{command}`, {date}, on {cpus}, Linux {kernel}.\n"
    )?;
    Ok(text)
}

fn write(layout: &Layout, name: &str, text: &str, over: &[String]) -> Result<()> {
    let path = layout.root.join("docs").join(format!("{name}.md"));
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    print!("{text}");
    println!("{}", path.display());
    ensure!(over.is_empty(), "over the limit: {}", over.join("; "));
    Ok(())
}
