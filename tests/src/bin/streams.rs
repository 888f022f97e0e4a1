//! What crowds cost the microVM that they read: `streams SECONDS`, by `cargo xtask streams`.
//!
//! A thousand clients of a stream, in several ways, and an exporter over 200 sockets and this microVM's. The guest spins on a CPU of
//! its own; the crowd, and who measures, are on the others, beside the API. Each row has its own microVM, and looks at it alone, then
//! with the crowd for so many seconds, then alone again, for a quarter of them each. Prints one line of JSON for each row.

use std::fs;
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use accounting::host::{HostCpus, run_on};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use tests::bystander::{Bystander, Seen};
use tests::crowd::{Crowd, Listener, raise_open_files};
use tests::flat::Program;
use tests::fleet::{Fleet, SOCKETS, value};
use tests::memory::resident_kib;
use tests::prometheus::Exporter;
use tests::vm::Vm;

/// Rows: how many read, how many do not, and how often all are told.
const ROWS: [(usize, usize, u64); 4] = [(1000, 0, 1000), (1000, 0, 100), (1000, 0, 10), (0, 1000, 10)];

/// How often the exporter is scraped: fifteen times as often as Prometheus does unless told otherwise.
const SCRAPE: Duration = Duration::from_secs(1);

fn main() -> Result<()> {
    let seconds = std::env::args().nth(1).context("usage: streams SECONDS")?.parse()?;
    let lasts = Duration::from_secs(seconds);
    // A thousand clients, and what else a process has open.
    raise_open_files(2000)?;
    for (reading, deaf, interval_ms) in ROWS {
        println!(
            "{}",
            on_its_own_cpus(move || listened_to(reading, deaf, interval_ms, lasts))?
        );
    }
    println!("{}", on_its_own_cpus(move || scraped(lasts))?);
    Ok(())
}

/// On a thread of its own: the CPUs that it keeps to are not those of the next row's microVM.
fn on_its_own_cpus(measure: impl FnOnce() -> Result<Value> + Send + 'static) -> Result<Value> {
    thread::spawn(measure).join().expect("told by the panic hook")
}

/// A guest that spins on a CPU of its own, which this thread, and what it starts, then keeps off.
fn spinning() -> Result<Vm> {
    let mut vm = Vm::flat(&Program::spin_forever(), ["--pin=auto"]);
    let own = [vm.reading().host_cpu.cpu].into_iter().collect();
    run_on(&HostCpus::read()?.housekeeping(&own))?;
    Ok(vm)
}

fn listened_to(reading: usize, deaf: usize, interval_ms: u64, lasts: Duration) -> Result<Value> {
    let vm = spinning()?;
    let (pid, socket) = (vm.process.id(), vm.socket());
    let mut bystander = Bystander::open(socket)?;
    let before = bystander.look(lasts / 4, || Ok(()))?;
    let alone_kib = resident_kib(pid);

    let crowd = Crowd::gather(socket, reading, interval_ms)?;
    let listen = |_| Listener::open(socket, interval_ms);
    let deaf: Vec<Listener> = (0..deaf).map(listen).collect::<Result<_, _>>()?;
    // Until everybody has been told twice, and who does not read is told no more.
    sleep(Duration::from_millis(2 * interval_ms).max(Duration::from_secs(2)));

    let (begun, first_kib) = (Instant::now(), resident_kib(pid));
    let (api_before, bytes) = (api_ns(pid)?, crowd.bytes());
    let mut most_kib = first_kib;
    let with = bystander.look(lasts, || {
        most_kib = most_kib.max(resident_kib(pid));
        Ok(())
    })?;
    let api_share = (api_ns(pid)? - api_before) as f64 / begun.elapsed().as_nanos() as f64;
    let bytes_per_client = (crowd.bytes() - bytes) as f64 / (reading.max(1) as f64);
    let unread_bytes = deaf.iter().map(Listener::waiting_bytes).max().unwrap_or(0);
    let deaf_clients = deaf.len();
    drop((crowd, deaf));
    let after = bystander.look(lasts / 4, || Ok(()))?;
    Ok(json!({
        "reading": reading, "deaf": deaf_clients, "interval_ms": interval_ms,
        "alone_kib": alone_kib, "first_kib": first_kib, "most_kib": most_kib,
        "looks": looks(&before, &with, &after),
        "api_share": api_share, "bytes_per_client": bytes_per_client, "unread_bytes": unread_bytes,
    }))
}

fn scraped(lasts: Duration) -> Result<Value> {
    let vm = spinning()?;
    let mut bystander = Bystander::open(vm.socket())?;
    let before = bystander.look(lasts / 4, || Ok(()))?;

    let fleet = Fleet::serve();
    let exporter = Exporter::start([fleet.flag(), format!("--sockets={}", vm.socket().display())]);
    let address = exporter.address;
    let scraper = thread::spawn(move || {
        let begun = Instant::now();
        let (mut resident, mut up) = (Vec::new(), Vec::new());
        while begun.elapsed() < lasts {
            let due = Instant::now() + SCRAPE;
            // What is silent has a deadline, four fifths of this.
            let page = tests::prometheus::page(address, "X-Prometheus-Scrape-Timeout-Seconds: 0.5\r\n");
            resident.push(value(&page, "process_resident_memory_bytes") / 1024);
            up.push(value(&page, "chronovisor_exporter_sockets{state=\"up\"}"));
            sleep(due.saturating_duration_since(Instant::now()));
        }
        (resident, up)
    });
    let with = bystander.look(lasts, || Ok(()))?;
    let (resident, up) = scraper.join().expect("told by the panic hook");
    drop(exporter);
    let after = bystander.look(lasts / 4, || Ok(()))?;
    // The first pages are the first of their size.
    let settled = &resident[resident.len().min(5)..];
    let (first, last) = settled.split_at(settled.len() / 2);
    Ok(json!({
        "sockets": SOCKETS + 1, "scrapes": resident.len(), "least_up": up.iter().min(), "most_up": up.iter().max(),
        "first_kib": median(first), "last_kib": median(last), "most_kib": resident.iter().max(),
        "looks": looks(&before, &with, &after),
    }))
}

fn median(values: &[u64]) -> u64 {
    let mut values = values.to_vec();
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

fn looks(before: &Seen, with: &Seen, after: &Seen) -> Value {
    let look = |seen: &Seen| json!({"p50_us": seen.p50_us, "p99_us": seen.p99_us, "waiting_share": seen.waiting_share});
    json!({ "before": look(before), "with": look(with), "after": look(after) })
}

/// How long the API's thread has been on a CPU, in nanoseconds.
fn api_ns(pid: u32) -> Result<u64> {
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = task?.path();
        if fs::read_to_string(path.join("comm"))?.trim() == "api" {
            let text = fs::read_to_string(path.join("schedstat"))?;
            return Ok(text
                .split_whitespace()
                .next()
                .context("schedstat has three figures")?
                .parse()?);
        }
    }
    anyhow::bail!("process {pid} has no thread named api")
}
