//! `cargo xtask kill`: kill -9 at random moments of boot and I/O. tests/src/bin/kill.rs does; the report goes to docs/kill.md.

use std::fs;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::build;
use crate::layout::Layout;
use crate::machine::Machine;
use crate::process::follow;

/// How often, and with which dice.
#[derive(clap::Args)]
pub struct Kill {
    /// So many microVMs
    #[arg(long, default_value_t = 200)]
    times: u32,
    /// Moments by this seed; by the clock if not given
    #[arg(long)]
    seed: Option<u64>,
}

/// As tests/src/bin/kill.rs prints it.
#[derive(Deserialize)]
struct Tally {
    times: u32,
    seed: u64,
    unanswered: u32,
    booting: u32,
    writing: u32,
    flushed: u32,
}

/// Kills, and writes the report.
pub fn kill(layout: &Layout, kill: &Kill) -> Result<()> {
    let program = build::of_tests(layout, "kill")?;
    let clock = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let seed = kill.seed.unwrap_or(clock);
    println!("seed {seed}");
    let mut command = Command::new(&program);
    command.args([kill.times.to_string(), seed.to_string()]);
    command.env("CHRONOVISOR_BED", layout.bed());
    let (mut tally, mut said) = (None, String::new());
    let well = follow(&mut command, |line| match serde_json::from_str::<Tally>(line) {
        Ok(told) => tally = Some(told),
        Err(_) => said += line,
    })?;
    ensure!(well, "with seed {seed} it failed: {said}");
    let report = render(&tally.context("it told nothing")?, &Machine::look());
    let path = layout.root.join("docs/kill.md");
    fs::write(&path, &report).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{report}\n{}", path.display());
    Ok(())
}

fn render(tally: &Tally, machine: &Machine) -> String {
    let Machine { date, cpus, kernel } = machine;
    let Tally {
        times,
        seed,
        unanswered,
        booting,
        writing,
        flushed,
    } = tally;
    format!(
        "# kill -9, at any moment

By `cargo xtask kill --times {times} --seed {seed}`, {date}, on {cpus}, Linux {kernel}.

Of {times} microVMs {unanswered} were killed before their API answered, {booting} after that and before the guest had said a word, \
{writing} while it wrote.

* Every second one was let come to its guest's first word, and all of these did: with the API socket, vsock socket, tap and disk \
that the two before had left, the one killed while it wrote, the other while it booted. Nobody cleaned up in between.
* The disk's image had each of the {flushed} records that a guest was told are flushed: after the kill that followed, and all of \
them in the end.

The guest writes a record of one sector, flushes, waits for both, tells the record's number on its console, and goes on with the next; \
the engines Sync and Async take turns. What this shows: nothing of a flushed write is kept in the process, no request is told before it is \
done, and no lock or socket of who was killed holds up who comes next. The host's page cache outlives a process, so it does not show \
what becomes of the writes when the host itself fails: for that a flush calls fdatasync(2).
"
    )
}
