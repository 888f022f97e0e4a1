//! `api`: `GET /vcpus/0/cputime` against `GET /version`, a constant, from the same server over one connection, by turns;
//! medians. The guest does nothing.
//!
//! Client and server share one CPU, so nothing but work is between a question and its answer: with two, most of both
//! figures would be how long an idle CPU takes to wake, and their ratio nearer to 1.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tests::bed::Folder;
use tests::connection::Connection;
use tests::flat::{Program, elf};
use tests::row;
use tests::vm::Vm;

/// How long questions are asked, and at least how many.
const ASKING: Duration = Duration::from_secs(4);
const QUESTIONS: usize = 500;

/// Prints the row.
pub fn measure() -> Result<()> {
    let allowed = sched_getaffinity(None)?;
    let mut one = CpuSet::new();
    one.set(
        (0..CpuSet::MAX_CPU)
            .rfind(|&cpu| allowed.is_set(cpu))
            .context("no CPU")?,
    );
    sched_setaffinity(None, &one)?;

    let folder = Folder::new();
    let kernel = folder.write("halt", elf(&Program::halt())).display().to_string();
    let vm = Vm::run(["--kernel", &kernel, "--mem", "16M"]);
    let mut connection = Connection::open(vm.socket())?;
    let mut times = [Vec::new(), Vec::new()];
    let begun = Instant::now();
    while begun.elapsed() < ASKING || times[0].len() < QUESTIONS {
        for (times, path) in times.iter_mut().zip(["/vcpus/0/cputime", "/version"]) {
            let asked = Instant::now();
            connection.get(path)?;
            times.push(asked.elapsed().as_secs_f64() * 1e6);
        }
    }
    let [ours, against] = times.map(row::median);
    row::print("api", ours, against, "us", 1.5);
    Ok(())
}
