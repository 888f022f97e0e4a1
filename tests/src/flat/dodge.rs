//! The host's side of the tick dodger: it holds the guest across each tick, and watches whether it got away.
//!
//! A tick-sampling kernel looks at what runs on a CPU at each tick, every `TICK_NSEC` of `CLOCK_MONOTONIC`, and charges
//! the whole tick to it (Tsafrir, Etsion and Feitelson, "Secretly Monopolizing the CPU Without Superuser Privileges",
//! USENIX Security 2007). Who sleeps across each tick is never seen.

use accounting::clock::monotonic_ns;
use accounting::host::tick_ns;
use rustix::thread::clock_nanosleep_absolute;
use rustix::time::{ClockId, Timespec};

/// How long after a tick the guest is woken: the tick's own handling, and that of what it wakes, is over by then.
const AFTER_NS: u64 = 100_000;
/// A share of the tick, 1/12: a guest that is woken later than that yields across the next tick as well, for it would
/// not be done in time. 0.3 ms at HZ=250: with what is before and a slice of 3.4 ms, 0.2 ms are left to leave the guest.
const LATEST: u64 = 12;

/// How a dodger got along.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dodged {
    /// The slices it burned.
    pub slices: u64,
    /// Those that were not over before the next tick: something held them up.
    pub caught: u64,
}

/// One dodger's ticks.
#[derive(Debug)]
pub(super) struct Dodge {
    tick_ns: u64,
    /// When the slice that is going on began, on `CLOCK_MONOTONIC`.
    began_ns: Option<u64>,
    pub dodged: Dodged,
}

impl Dodge {
    pub fn new() -> Self {
        Self {
            tick_ns: tick_ns(),
            began_ns: None,
            dodged: Dodged::default(),
        }
    }

    /// The guest left its slice: was it in time?
    pub fn slice_ended(&mut self) {
        if let Some(began_ns) = self.began_ns.take() {
            self.dodged.slices += 1;
            self.dodged.caught += u64::from(began_ns / self.tick_ns != monotonic_ns() / self.tick_ns);
        }
    }

    /// Sleeps until shortly after the next tick.
    pub fn sleep_across_the_tick(&mut self) {
        self.slice_ended();
        let mut now = monotonic_ns();
        loop {
            let until = (now / self.tick_ns + 1) * self.tick_ns + AFTER_NS;
            sleep_until(until);
            now = monotonic_ns();
            if (until..until + self.tick_ns / LATEST).contains(&now) {
                break;
            }
        }
        self.began_ns = Some(now);
    }
}

fn sleep_until(ns: u64) {
    let until = Timespec {
        tv_sec: i64::try_from(ns / 1_000_000_000).expect("292 years"),
        tv_nsec: i64::try_from(ns % 1_000_000_000).expect("less than a second"),
    };
    // A signal may end it early: the caller looks at the clock.
    let _ = clock_nanosleep_absolute(ClockId::Monotonic, &until);
}
