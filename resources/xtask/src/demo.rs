//! `cargo xtask demo`: a Debian guest on a tickless CPU, and where its vCPU's time goes, live.
//!
//! Runs resources/demo.sh on this machine if its /dev/kvm can boot a stock kernel, else in the emulated host.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::layout::Layout;
use crate::process::{bound_to_us, follow};
use crate::{bed, build, debian, setup};

/// Booting the host, booting the guest in it, and twelve seconds of readings take half a minute.
const LIMIT: Duration = Duration::from_secs(110);

/// Sets everything up, shows it, and prints the last reading, one line of JSON, last.
pub fn demo(layout: &Layout) -> Result<()> {
    debian::install_missing()?;
    let kit = setup::setup(layout)?;
    let chronovisor = build::chronovisor(layout)?;

    let script = layout.root.join("resources/demo.sh");
    let mut last_reading = None;
    let mut on_line = |line: &str| {
        if line.starts_with('[') {
            last_reading = Some(line.to_owned());
        } else {
            println!("{line}");
        }
    };
    match obstacle(&chronovisor)? {
        None => {
            println!("This machine's /dev/kvm boots stock kernels: the guest runs here.");
            let mut command = bound_to_us("TERM", "sh");
            command.arg(&script).env("CHRONOVISOR_BED", layout.bed());
            ensure!(follow(&mut command, &mut on_line)?, "{} failed", script.display());
        }
        Some(why) => {
            println!("The guest runs in the emulated host, whose CPUs 1 and 2 are tickless: {why}.");
            let script =
                std::fs::read_to_string(&script).with_context(|| format!("cannot read {}", script.display()))?;
            let job = bed::Job {
                script,
                chronovisor: &chronovisor,
                programs: Vec::new(),
                cpu: bed::Cpu::Any,
                disk: None,
                limit: LIMIT,
            };
            let outcome = bed::run(layout, &kit, &job, &mut on_line)?;
            ensure!(
                outcome.status == 0,
                "the demo ended with status {} in the emulated host",
                outcome.status
            );
        }
    }
    // `times --json` gives a list with a reading of each vCPU; the demo's guest has one.
    let last_reading: String = last_reading.context("the demo gave no reading")?;
    let [reading]: [&RawValue; 1] = serde_json::from_str(&last_reading)
        .with_context(|| format!("the demo's last reading is not one of one vCPU: {last_reading}"))?;
    println!("{reading}");
    Ok(())
}

/// What `chronovisor check --json` says, in part.
#[derive(Deserialize)]
struct Judgement {
    guests_run: bool,
    findings: Vec<Finding>,
}

#[derive(Deserialize)]
struct Finding {
    verdict: String,
    says: String,
}

/// Why this machine's /dev/kvm cannot run the guest, if so, as the program itself judges it.
pub fn obstacle(chronovisor: &Path) -> Result<Option<String>> {
    let output = Command::new(chronovisor)
        .args(["check", "--json"])
        .stdin(Stdio::null())
        .output();
    let output = output.with_context(|| format!("cannot run {}", chronovisor.display()))?;
    let judgement: Judgement = serde_json::from_slice(&output.stdout).with_context(|| {
        let said = String::from_utf8_lossy(&output.stderr);
        format!(
            "cannot read what chronovisor check --json says: {}: {}",
            output.status,
            said.trim()
        )
    })?;
    if judgement.guests_run {
        return Ok(None);
    }
    let errors = judgement
        .findings
        .into_iter()
        .filter(|finding| finding.verdict == "error");
    Ok(Some(errors.map(|finding| finding.says).collect::<Vec<_>>().join("; ")))
}
