//! A microVM that is read, streamed and scraped without a pause: `soak MINUTES`, by `cargo xtask soak`. Prints a line of JSON a
//! minute, and one for the whole.
//!
//! Its guest computes and exits by turns on one vCPU and never starts the other. Two clients read at full speed and hold each
//! reading to the laws, against the one before; ten listen to a stream, five more do not read theirs; `/metrics` is scraped once a
//! second, by us and by an exporter.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use accounting::clock::monotonic_raw_ns;
use accounting::{Reading, laws};
use anyhow::{Context, Result, anyhow, ensure};
use serde_json::json;
use tests::client;
use tests::connection::Connection;
use tests::crowd::{Crowd, Listener};
use tests::flat::Program;
use tests::footprint::Footprint;
use tests::over::SetWhenDropped;
use tests::vm::{Process, Vm};

const MINUTE: Duration = Duration::from_secs(60);
/// How long a reader rests between two readings: it shall not take the CPUs from all others.
const REST: Duration = Duration::from_micros(500);

fn main() -> Result<()> {
    let minutes: u32 = std::env::args().nth(1).context("usage: soak MINUTES")?.parse()?;
    let vm = Vm::flat(&Program::by_turns(), ["--pin=auto", "--cpus=2", "--id=soak"]);
    let socket = vm.socket().to_owned();
    let exporter = Process::chronovisor([
        "exporter".to_owned(),
        "--listen=127.0.0.1:0".into(),
        format!("--sockets={}", socket.display()),
    ]);
    let _crowd = Crowd::gather(&socket, 10, 100)?;
    let _deaf: Vec<Listener> = (0..5).map(|_| Listener::open(&socket, 100)).collect::<Result<_, _>>()?;
    let (over, readings, scrapes) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| -> Result<()> {
        let _over = SetWhenDropped(&over);
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    let mut last: Vec<Reading> = Vec::new();
                    while !over.load(Ordering::Relaxed) {
                        let body = client::request(&socket, "GET", "/vcpus", None)?.body;
                        let now: Vec<Reading> = serde_json::from_value(body)?;
                        for reading in &now {
                            let held = match last.get(reading.index as usize) {
                                Some(last) => laws::check_pair(last, reading),
                                None => laws::check(reading),
                            };
                            held.map_err(|broken| anyhow!("{broken}\nbefore: {last:?}\nafter: {reading:?}"))?;
                            readings.fetch_add(1, Ordering::Relaxed);
                        }
                        last = now;
                        sleep(REST);
                    }
                    Ok(())
                })
            })
            .collect();
        let scraper = scope.spawn(|| -> Result<()> {
            let mut connection = Connection::open(&socket)?;
            while !over.load(Ordering::Relaxed) {
                connection.get("/metrics")?;
                scrapes.fetch_add(1, Ordering::Relaxed);
                sleep(Duration::from_secs(1));
            }
            Ok(())
        });
        let first = instant(&vm)?;
        let begun = Instant::now();
        for minute in 1..=minutes {
            sleep((minute * MINUTE).saturating_sub(begun.elapsed()));
            ensure!(
                !readers.iter().any(thread::ScopedJoinHandle::is_finished),
                "a reader gave up"
            );
            ensure!(!scraper.is_finished(), "the scraper gave up");
            let (microvm, exporter) = (Footprint::of(vm.process.id())?, Footprint::of(exporter.id())?);
            println!(
                "{}",
                json!({ "minute": minute, "microvm": microvm.json(), "exporter": exporter.json() })
            );
        }
        let last = instant(&vm)?;
        over.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().expect("told by the panic hook")?;
        }
        scraper.join().expect("told by the panic hook")?;
        // By the two clocks: from one instant to the other, each of which is known to the width of its bracket.
        let (ours, theirs) = (last.elapsed - first.elapsed, last.raw - first.raw);
        println!(
            "{}",
            json!({
                "seconds": theirs as f64 / 1e9,
                "readings": readings.load(Ordering::Relaxed), "scrapes": scrapes.load(Ordering::Relaxed),
                "drift_ppm": (ours as f64 - theirs as f64) / theirs as f64 * 1e6,
                "known_to_ppm": (first.width + last.width) as f64 / theirs as f64 * 1e6,
            })
        );
        Ok(())
    })
}

/// What the ledger of vCPU 0 and `CLOCK_MONOTONIC_RAW` say at once, in nanoseconds.
struct At {
    elapsed: u64,
    /// In the middle of the two instants between which it was read.
    raw: u64,
    /// Half of what is between them.
    width: u64,
}

/// The best known of a hundred.
fn instant(vm: &Vm) -> Result<At> {
    let mut best: Option<At> = None;
    for _ in 0..100 {
        let before = monotonic_raw_ns();
        let body = client::request(vm.socket(), "GET", "/vcpus/0/cputime", None)?.body;
        let after = monotonic_raw_ns();
        let reading: Reading = serde_json::from_value(body)?;
        let width = (after - before) / 2;
        if best.as_ref().is_none_or(|best| width < best.width) {
            best = Some(At {
                elapsed: reading.elapsed_ns,
                raw: before + width,
                width,
            });
        }
    }
    best.context("never asked")
}
