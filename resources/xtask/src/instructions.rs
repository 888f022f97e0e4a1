//! How many instructions the two stamps of an exit are, by valgrind: a count is the same on a noisy machine as on a quiet
//! one, so it shows a regression that a time would hide.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::layout::Layout;
use crate::{build, debian};

const TIMES: u32 = 1_000;
/// Two bare reads of the clock are 12 instructions with the loop around them, two stamps 204: 17 times as many, and room
/// for what another compiler makes of it.
const LIMIT: f64 = 20.0;

/// The row `stamps_instructions`, as the bench program prints its own.
pub fn row(layout: &Layout) -> Result<String> {
    debian::install(&[("valgrind", "valgrind")])?;
    let program = build::stamps(layout)?;
    let [ours, bare] = [count(&program, "ours")?, count(&program, "bare")?];
    Ok(json!({
        "key": "stamps_instructions", "ours": ours, "against": bare, "unit": "ins", "ratio": ours / bare, "limit": LIMIT
    })
    .to_string())
}

/// Instructions of one turn of the loop in `counted`.
fn count(program: &Path, what: &str) -> Result<f64> {
    let once = |times: u32| -> Result<u32> {
        let mut command = Command::new("valgrind");
        command
            .args([
                "--tool=callgrind",
                "--callgrind-out-file=/dev/null",
                "--toggle-collect=stamps::counted*",
            ])
            .arg(program)
            .args([what, &times.to_string()]);
        let output = command.stdin(Stdio::null()).output().context("cannot run valgrind")?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.success(),
            "valgrind {}: {}: {said}",
            program.display(),
            output.status
        );
        let collected = said.lines().find_map(|line| line.split_once("Collected : "));
        let (_, count) = collected.with_context(|| format!("valgrind does not say what it collected: {said}"))?;
        count
            .trim()
            .parse()
            .with_context(|| format!("valgrind collected '{count}'"))
    };
    // Entering and leaving the function is in both.
    let (many, none) = (once(TIMES)?, once(0)?);
    ensure!(many > none, "valgrind saw nothing of {}", program.display());
    Ok(f64::from(many - none) / f64::from(TIMES))
}
