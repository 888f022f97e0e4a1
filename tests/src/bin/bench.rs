//! The budgets that one thread can measure: what a stamp, a snapshot and a reading cost, each as a ratio to the bare
//! thing it cannot do without, both measured in this run, turn by turn. Prints one row of JSON a line; `cargo xtask
//! bench` makes the table.

use std::fs;
use std::hint::black_box;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Instant;

use accounting::clock::ticks;
use accounting::host::HostCpus;
use accounting::probe::{Depth, Probes, parse_stat};
use accounting::vtime::{ExitReason, vtime};
use accounting::{Account, Gtime, Open};
use tests::row;

/// Rounds of one row. Each times both sides, one after the other; the ratio is of their medians, which a few rounds
/// that something interrupted do not move.
const ROUNDS: usize = 301;

fn main() {
    let (mut writer, reader) = vtime(ticks(), 0);
    writer.resume();
    writer.guest_enter(None);
    row(
        "stamps",
        1_000,
        2.0,
        || {
            writer.guest_exit();
            writer.guest_enter(Some(ExitReason::Io));
        },
        || {
            black_box(ticks());
            black_box(ticks());
        },
    );
    row(
        "snapshot",
        1_000,
        2.0,
        || {
            black_box(reader.snapshot());
        },
        || {
            black_box(ticks());
        },
    );

    // A thread to be read: in the guest, as far as vtime knows, and spinning.
    let (tell, told) = channel();
    let (stop, stopped) = channel::<()>();
    let vcpu = std::thread::spawn(move || {
        let host = Arc::new(HostCpus::read().expect("sysfs can be read"));
        let (mut writer, account) = Account::open(Open {
            index: 0,
            kvm_stats: None,
            pinned: None,
            host,
            gtime: Gtime::default(),
        })
        .expect("the probes can be read");
        writer.resume();
        writer.guest_enter(None);
        tell.send(account.clone()).expect("the bench listens");
        while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {}
        writer.guest_exit();
        account.close(writer);
    });
    let account = told.recv().expect("the thread tells");
    let tid = account.read().tid;
    let mut probes = Probes::open(tid, None).expect("the probes can be read");
    row(
        "reading_vs_probes",
        30,
        1.2,
        || {
            black_box(account.read());
        },
        || {
            black_box(probes.read(Depth::Lean).expect("the thread is there"));
        },
    );
    let stat = format!("/proc/{}/task/{tid}/stat", std::process::id());
    row(
        "reading_vs_proc",
        30,
        0.5,
        || {
            black_box(account.read());
        },
        || {
            let text = fs::read(&stat).expect("the thread is there");
            black_box(parse_stat(&text).expect("the kernel's text"));
        },
    );
    drop(stop);
    vcpu.join().expect("it ends");
}

/// Times `ours` and `bare` by turns, `times` calls each, and prints the row.
fn row(key: &str, times: u32, limit: f64, mut ours: impl FnMut(), mut bare: impl FnMut()) {
    let mut rounds = [Vec::with_capacity(ROUNDS), Vec::with_capacity(ROUNDS)];
    for _ in 0..ROUNDS {
        let [ours_ns, bare_ns] = &mut rounds;
        ours_ns.push(timed(times, &mut ours));
        bare_ns.push(timed(times, &mut bare));
    }
    let [ours, against] = rounds.map(row::median);
    row::print(key, ours, against, "ns", limit);
}

fn timed(times: u32, work: &mut impl FnMut()) -> f64 {
    let begun = Instant::now();
    for _ in 0..times {
        work();
    }
    begun.elapsed().as_secs_f64() * 1e9 / f64::from(times)
}
