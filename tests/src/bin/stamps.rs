//! Executes the two stamps of an exit, or two bare reads of the clock, so that a tool can count the instructions: those
//! that it executes inside of `counted`. See `cargo xtask bench`.
//!
//! Usage: `stamps ours|bare TIMES`

use std::hint::black_box;

use accounting::clock::{Instant, Scale, ticks};
use accounting::vtime::{ExitReason, VtimeWriter, vtime_at};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (ours, times) = match arguments.as_slice() {
        [what, times] if what == "ours" || what == "bare" => {
            (what == "ours", times.parse().expect("a number of times"))
        }
        _ => panic!("usage: stamps ours|bare TIMES"),
    };
    // Any rate will do, and none is measured: a tool that executes for us has clocks of its own.
    let scale = Scale::of(Instant::default(), Instant { ticks: 5, ns: 2 });
    let (mut writer, reader) = vtime_at(scale, ticks(), 0);
    writer.guest_enter(None);
    counted(&mut writer, ours, times);
    black_box(reader.snapshot());
}

#[inline(never)]
fn counted(writer: &mut VtimeWriter, ours: bool, times: u64) {
    if ours {
        for _ in 0..times {
            black_box(&mut *writer).guest_exit();
            black_box(&mut *writer).guest_enter(Some(black_box(ExitReason::Io)));
        }
    } else {
        for _ in 0..times {
            black_box(&mut *writer);
            black_box(ticks());
            black_box(&mut *writer);
            black_box(ticks());
        }
    }
}
