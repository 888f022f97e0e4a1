//! `cargo xtask bench`: what stamps, snapshots and readings cost, each as a ratio to what it cannot do without, both measured in
//! this run. A time by itself says little on a machine that is shared; a ratio from one run does.
//!
//! Prints a table, and writes it to bench.json in the target directory.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::layout::Layout;
use crate::process::follow;
use crate::{build, instructions};

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

#[derive(Debug, Default, Serialize)]
struct Table {
    rows: Vec<Row>,
}

/// Measures and reports.
pub fn bench(layout: &Layout) -> Result<()> {
    let program = build::bench(layout)?;

    println!(
        "{:<20} {:>10} {:>10} {:<4} {:>6} {:>6}",
        "row", "ours", "against", "unit", "ratio", "limit"
    );
    let mut table = Table::default();
    let mut on_line = |line: &str| match serde_json::from_str::<Row>(line) {
        Ok(row) => {
            let over = if row.ratio > row.limit { "  over" } else { "" };
            let Row {
                key,
                ours,
                against,
                unit,
                ratio,
                limit,
            } = &row;
            println!("{key:<20} {ours:>10.1} {against:>10.1} {unit:<4} {ratio:>6.2} {limit:>6.2}{over}");
            table.rows.push(row);
        }
        Err(_) => println!("{line}"),
    };
    ensure!(
        follow(&mut Command::new(&program), &mut on_line)?,
        "{} failed",
        program.display()
    );
    on_line(&instructions::row(layout).unwrap_or_else(|error| format!("no row stamps_instructions: {error:#}")));

    let path = layout.target.join("bench.json");
    let json = serde_json::to_string_pretty(&table)?;
    fs::write(&path, json + "\n").with_context(|| format!("cannot write {}", path.display()))
}
