//! Has every fault point of a start fail, one at a time: `faults [EVERY]`, by `cargo xtask faults`. Of the points, every EVERYth.
//!
//! Prints the report, as Markdown; ends with status 1 if one was broken.

use std::collections::BTreeMap;
use std::process::ExitCode;

use tests::faults::start::{Outcome, Way, points, start};
use tests::network;

/// What became of the points of one kind of call and one effect.
#[derive(Default)]
struct Row {
    refused: usize,
    went_on: usize,
    /// Where the child made fewer calls than the one that was counted.
    missed: usize,
}

fn main() -> ExitCode {
    let every = std::env::args()
        .nth(1)
        .and_then(|every| every.parse().ok())
        .unwrap_or(1);
    let tap = network::own()
        .inspect_err(|why| println!("Without a tap: {why}.\n"))
        .is_ok();
    let mut broken = Vec::new();
    for way in Way::ALL {
        let (outcome, seen) = start(way, tap, None);
        assert_eq!(outcome, Outcome::WentOn, "{}: without a fault", way.name());
        let points = points(&seen);
        let mut rows: BTreeMap<(&str, String), Row> = BTreeMap::new();
        let mut lines: BTreeMap<String, usize> = BTreeMap::new();
        for &fault in points.iter().step_by(every) {
            let (outcome, seen) = start(way, tap, Some(fault));
            let row = rows.entry((fault.call.name, fault.effect.name())).or_default();
            match (outcome, seen.hit) {
                (Outcome::Broken(why), Some(hit)) => {
                    eprintln!(
                        "{}: {} of {hit} ({}): {why}",
                        way.name(),
                        fault.effect.name(),
                        fault.nth
                    );
                    broken.push(format!("{}: {} of {hit}: {why}", way.name(), fault.effect.name()));
                }
                (Outcome::Broken(why), None) => {
                    eprintln!("{}: no fault: {why}", way.name());
                    broken.push(format!("{}: no fault: {why}", way.name()));
                }
                (Outcome::Refused(line), _) => {
                    row.refused += 1;
                    *lines.entry(line).or_default() += 1;
                }
                (Outcome::WentOn, Some(_)) => row.went_on += 1,
                (Outcome::WentOn, None) => row.missed += 1,
            }
        }
        println!(
            "## {}\n\n| call | fails with | refused | went on | not reached |\n|---|---|---:|---:|---:|",
            way.name()
        );
        for ((call, effect), row) in &rows {
            println!(
                "| `{call}` | {effect} | {} | {} | {} |",
                row.refused, row.went_on, row.missed
            );
        }
        println!("\nThe words of its refusals, and how often each:\n");
        for (line, times) in &lines {
            println!("* {times}: {line}");
        }
        println!();
    }
    println!("{} points did not keep the promise.", broken.len());
    for broken in &broken {
        println!("* {}", broken.replace('\n', " "));
    }
    if broken.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
