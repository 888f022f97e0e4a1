//! What a flood of connections costs who behaves, and the guest: `flood SECONDS`, by `cargo xtask flood`.
//!
//! The guest spins on a CPU of its own; the API, the flood, and who measures share the others: a bystander on a connection that it
//! keeps, and newcomers, ten a second, each on one of its own. Looks at it alone, then flooded for so many seconds, then alone again,
//! for a quarter of them each. Prints one line of JSON for each row.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use accounting::host::{HostCpus, run_on};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use tests::bystander::{Bystander, Seen};
use tests::client;
use tests::flat::Program;
use tests::flood::{CAP_KIB, Flood, flood_if_asked};
use tests::memory::{peak_kib, resident_kib, start_peak};
use tests::vm::Vm;

const CONNECTIONS: usize = 10_000;

/// How nice the process that floods is. At 19 it has what CPU time others leave it, so that the API is what is tried, and not the
/// scheduler; at 0 as much as the API itself.
const NICE: [i32; 2] = [19, 0];

fn main() -> Result<()> {
    if flood_if_asked() {
        return Ok(());
    }
    let seconds = std::env::args().nth(1).context("usage: flood SECONDS")?.parse()?;
    for nice in NICE {
        // On a thread of its own: the CPUs that it keeps to are not those of the next row's microVM.
        let row = thread::spawn(move || flooded(nice, Duration::from_secs(seconds)));
        println!("{}", row.join().expect("told by the panic hook")?);
    }
    Ok(())
}

fn flooded(nice: i32, lasts: Duration) -> Result<Value> {
    let mut vm = Vm::flat(&Program::spin_forever(), ["--pin=auto"]);
    let own = [vm.reading().host_cpu.cpu].into_iter().collect();
    run_on(&HostCpus::read()?.housekeeping(&own))?;
    let (pid, socket) = (vm.process.id(), vm.socket().to_owned());
    let mut bystander = Bystander::open(&socket)?;
    let before = bystander.look(lasts / 4, || Ok(()))?;
    let alone_kib = resident_kib(pid);
    start_peak(pid);

    let flooder = Command::new(std::env::current_exe()?);
    let flood = Flood::start(flooder, &socket, CONNECTIONS, nice);
    let over = AtomicBool::new(false);
    let (with, newcomers) = thread::scope(|scope| {
        let newcomers = scope.spawn(|| {
            let (mut times, mut refused) = (Vec::new(), 0);
            while !over.load(Ordering::Relaxed) {
                let begun = Instant::now();
                match client::request(&socket, "GET", "/vcpus/0/cputime", None) {
                    Ok(answer) if answer.status == 200 => times.push(begun.elapsed().as_secs_f64() * 1e6),
                    _ => refused += 1,
                }
                thread::sleep(Duration::from_millis(100));
            }
            times.sort_by(f64::total_cmp);
            (times, refused)
        });
        let with = bystander.look(lasts, || Ok(()));
        over.store(true, Ordering::Relaxed);
        (with, newcomers.join().expect("told by the panic hook"))
    });
    let (with, (times, refused)) = (with?, newcomers);
    let peak = peak_kib(pid);
    drop(flood);
    let after = bystander.look(lasts / 4, || Ok(()))?;
    let at = |hundredths: usize| {
        times
            .get((times.len() * hundredths / 100).min(times.len().max(1) - 1))
            .copied()
    };
    Ok(json!({
        "connections": CONNECTIONS, "nice": nice,
        "before": look(&before), "with": look(&with), "after": look(&after),
        "newcomers": times.len(), "refused": refused, "newcomer_p50_us": at(50), "newcomer_p99_us": at(99),
        "alone_kib": alone_kib, "peak_kib": peak, "cap_kib": CAP_KIB,
    }))
}

fn look(seen: &Seen) -> Value {
    json!({"p50_us": seen.p50_us, "p99_us": seen.p99_us, "guest_share": seen.guest_share, "waiting_share": seen.waiting_share})
}
