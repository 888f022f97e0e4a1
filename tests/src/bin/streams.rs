//! What a thousand clients of a stream cost the microVM that they listen to: `streams SECONDS`, by `cargo xtask streams`.
//!
//! The guest spins on a CPU of its own; clients, and who measures, are on the others, beside the API. Prints one line of JSON
//! for each row.

use std::fs;
use std::path::Path;
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use accounting::Reading;
use accounting::host::{HostCpus, run_on};
use anyhow::{Context, Result};
use serde_json::json;
use tests::connection::Connection;
use tests::crowd::{Crowd, Listener, raise_open_files};
use tests::flat::Program;
use tests::vm::{Vm, grown};

/// How often the reading that is measured is asked for.
const ASK: Duration = Duration::from_millis(5);

/// Rows: how many read, how many do not, and how often all are told.
const ROWS: [(usize, usize, u64); 5] = [
    (0, 0, 1000),
    (1000, 0, 1000),
    (1000, 0, 100),
    (1000, 0, 10),
    (0, 1000, 10),
];

fn main() -> Result<()> {
    let seconds = std::env::args().nth(1).context("usage: streams SECONDS")?.parse()?;
    // A thousand clients, and what else a process has open.
    raise_open_files(2000)?;
    for (reading, deaf, interval_ms) in ROWS {
        // On a thread of its own: the CPUs that it keeps to are not those of the next row's microVM.
        let row = thread::spawn(move || measure(reading, deaf, interval_ms, Duration::from_secs(seconds)));
        println!("{}", row.join().expect("told by the panic hook")?);
    }
    Ok(())
}

fn measure(reading: usize, deaf: usize, interval_ms: u64, lasts: Duration) -> Result<serde_json::Value> {
    let mut vm = Vm::flat(&Program::spin_forever(), ["--pin=auto"]);
    let pid = vm.process.id();
    let own = [vm.reading().host_cpu.cpu].into_iter().collect();
    run_on(&HostCpus::read()?.housekeeping(&own))?;
    let socket = vm.socket().to_owned();
    let mut connection = Connection::open(&socket)?;
    connection.get("/vcpus/0/cputime")?;
    let alone_kib = resident_kib(pid)?;

    let crowd = Crowd::gather(&socket, reading, interval_ms)?;
    let listen = |_| Listener::open(&socket, interval_ms);
    let deaf: Vec<Listener> = (0..deaf).map(listen).collect::<Result<_, _>>()?;
    // Until everybody has been told twice, and who does not read is told no more.
    sleep(Duration::from_millis(2 * interval_ms).max(Duration::from_secs(2)));

    let (begun, before, first_kib) = (Instant::now(), vm.reading(), resident_kib(pid)?);
    let (api_before, bytes) = (api_thread(pid)?, crowd.bytes());
    let (mut times, mut most_kib) = (Vec::new(), first_kib);
    while begun.elapsed() < lasts {
        let asked = Instant::now();
        connection.get("/vcpus/0/cputime")?;
        times.push(asked.elapsed().as_secs_f64() * 1e6);
        if times.len() % 100 == 0 {
            most_kib = most_kib.max(resident_kib(pid)?);
        }
        sleep(ASK);
    }
    let (after, api_after, elapsed) = (vm.reading(), api_thread(pid)?, begun.elapsed());
    times.sort_by(f64::total_cmp);
    let at = |share: usize| times[times.len() * share / 1000];
    let share = |ns: u64| ns as f64 / elapsed.as_nanos() as f64;
    Ok(json!({
        "reading": reading, "deaf": deaf.len(), "interval_ms": interval_ms, "seconds": elapsed.as_secs(),
        "alone_kib": alone_kib, "first_kib": first_kib, "most_kib": most_kib, "last_kib": resident_kib(pid)?,
        "p50_us": at(500), "p99_us": at(990), "most_us": at(999),
        "waiting_share": share(waited(&before, &after)),
        "api_share": share(api_after.0 - api_before.0), "api_waiting_share": share(api_after.1 - api_before.1),
        "bytes_per_client": (crowd.bytes() - bytes) as f64 / (reading.max(1) as f64),
        "unread_bytes": deaf.iter().map(Listener::waiting_bytes).max().unwrap_or(0),
    }))
}

fn waited(before: &Reading, after: &Reading) -> u64 {
    grown(before, after).waiting_ns
}

/// How long the API's thread has been on a CPU, and has waited for one, in nanoseconds.
fn api_thread(pid: u32) -> Result<(u64, u64)> {
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = task?.path();
        if fs::read_to_string(path.join("comm"))?.trim() == "api" {
            let text = fs::read_to_string(path.join("schedstat"))?;
            let mut words = text.split_whitespace().map(str::parse::<u64>);
            let mut word = || words.next().context("schedstat has three figures");
            return Ok((word()??, word()??));
        }
    }
    anyhow::bail!("process {pid} has no thread named api")
}

/// What is resident of the process, its guest's memory included, which does not change.
fn resident_kib(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(Path::new(&path)).with_context(|| path.clone())?;
    let rss = text.lines().find_map(|line| line.strip_prefix("Rss:"));
    let kib = rss.and_then(|rss| rss.trim().strip_suffix(" kB"));
    Ok(kib.with_context(|| format!("no Rss in {path}"))?.parse()?)
}
