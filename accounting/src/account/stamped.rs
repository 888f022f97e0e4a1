//! Guest time by the BPF programs' stamps, in a reading's own clock.
//!
//! The programs stamp in `CLOCK_MONOTONIC`, which NTP steers; a reading is told in `CLOCK_MONOTONIC_RAW`, which nobody
//! does. By how much the one has been steered against the other since the first stamp is known, S, but not when: all of
//! it may have been while the guest ran, or none. So the true guest time is within S of the stamped one; the point
//! is at the guest's share of S. Where nobody steers, S is 0.

use crate::clock::{self, Instant};
use crate::probe::bpf::{GuestTime, Tracked};
use crate::reading::{Bounds, Source};
use crate::split::Claim;

/// How far `CLOCK_MONOTONIC` is ahead of `CLOCK_MONOTONIC_RAW`, in nanoseconds: from `low` to `high`, for the two cannot
/// be read at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lead {
    low: i128,
    high: i128,
}

/// One instant, bracketed by reads of `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bracket {
    pub now: Instant,
    /// `CLOCK_MONOTONIC` before it, in nanoseconds.
    pub before_ns: u64,
    /// And after it.
    pub after_ns: u64,
}

impl Bracket {
    /// Now, with nothing to be read inside.
    pub(super) fn now() -> Self {
        let before_ns = clock::monotonic_ns();
        let now = Instant::now();
        Self {
            now,
            before_ns,
            after_ns: clock::monotonic_ns(),
        }
    }

    /// Now, where there are no stamps to be held against the other clock.
    pub(super) fn without() -> Self {
        Self {
            now: Instant::now(),
            before_ns: 0,
            after_ns: 0,
        }
    }

    /// Now, and the stamps read inside of the bracket: the closest of a few tries, since bounds are as far apart.
    pub(super) fn around(tracked: &Tracked) -> (Self, Option<GuestTime>) {
        /// Some ten times what it takes.
        const CLOSE_NS: u64 = 2_000;
        const TRIES: usize = 4;
        let take = || {
            let before_ns = clock::monotonic_ns();
            let time = tracked.read();
            let inner = Self::now();
            (Self { before_ns, ..inner }, time)
        };
        let mut best = take();
        for _ in 1..TRIES {
            if best.0.width_ns() <= CLOSE_NS {
                break;
            }
            let next = take();
            if next.0.width_ns() < best.0.width_ns() {
                best = next;
            }
        }
        best
    }

    fn width_ns(&self) -> u64 {
        self.after_ns.saturating_sub(self.before_ns)
    }

    pub(super) fn lead(&self) -> Lead {
        let ahead = |mono_ns: u64| i128::from(mono_ns) - i128::from(self.now.ns);
        Lead {
            low: ahead(self.before_ns),
            high: ahead(self.after_ns),
        }
    }
}

impl Lead {
    /// By how much it has grown, and shrunk, since it was `earlier`: the least that explains both, in nanoseconds.
    fn changed_since(self, earlier: Self) -> (u64, u64) {
        let ns = |change: i128| u64::try_from(change.max(0)).unwrap_or(u64::MAX);
        (ns(self.low - earlier.high), ns(earlier.low - self.high))
    }
}

/// Guest time by stamps: a point and what holds the truth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamped {
    pub point_ns: u64,
    pub bounds: Bounds,
}

impl From<Stamped> for Claim {
    fn from(Stamped { point_ns, bounds }: Stamped) -> Self {
        Self {
            source: Source::Bpf,
            point_ns,
            bounds,
        }
    }
}

/// Makes nanoseconds of guest time, at the bracket's instant, of the stamps read inside of it. `opened` is the lead of the
/// clocks at the first stamp, `elapsed_ns` the time since.
pub(super) fn stamped(time: GuestTime, at: &Bracket, opened: Lead, elapsed_ns: u64) -> Stamped {
    // In the guest when the stamps were read: it has been there at least until the bracket began, at most until it ended.
    // Else it may have entered right after.
    let (lower, upper) = match time.began_ns {
        Some(_) => (time.at(at.before_ns), time.at(at.after_ns)),
        None => (time.sum_ns, time.sum_ns.saturating_add(at.width_ns())),
    };
    let point = if time.began_ns.is_some() {
        lower.midpoint(upper)
    } else {
        lower
    };
    let (ahead, behind) = at.lead().changed_since(opened);
    let share = |of: u64| {
        let part = u128::from(of) * u128::from(point.min(elapsed_ns)) / u128::from(elapsed_ns.max(1));
        u64::try_from(part).unwrap_or(of)
    };
    let bounds = Bounds {
        lower: lower.saturating_sub(ahead),
        upper: upper.saturating_add(behind),
    };
    let point = point.saturating_sub(share(ahead)).saturating_add(share(behind));
    Stamped {
        point_ns: point.clamp(bounds.lower, bounds.upper),
        bounds,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bracket(raw_ns: u64, before_ns: u64, after_ns: u64) -> Bracket {
        Bracket {
            now: Instant { ticks: 0, ns: raw_ns },
            before_ns,
            after_ns,
        }
    }

    fn time(sum_ns: u64, began_ns: Option<u64>) -> GuestTime {
        GuestTime {
            sequence: 2,
            sum_ns,
            began_ns,
        }
    }

    #[test]
    fn a_guest_that_runs_is_between_both_ends_of_the_bracket_and_one_that_does_not_may_have_begun() {
        let at = bracket(1_000, 1_000, 1_040);
        let lead = bracket(0, 0, 0).lead();
        let running = stamped(time(500, Some(900)), &at, lead, 1_000);
        assert_eq!(
            (running.point_ns, running.bounds),
            (620, Bounds { lower: 600, upper: 640 })
        );
        let out = stamped(time(500, None), &at, lead, 1_000);
        assert_eq!((out.point_ns, out.bounds), (500, Bounds { lower: 500, upper: 540 }));
    }

    #[test]
    fn a_steered_clock_widens_the_bounds_by_as_much_and_moves_the_point_by_the_guests_share() {
        // MONOTONIC was 10 ahead at first and is 110 ahead now, 1,000 ns later.
        let opened = bracket(0, 10, 10).lead();
        let fast = stamped(time(500, None), &bracket(1_000, 1_110, 1_110), opened, 1_000);
        assert_eq!((fast.point_ns, fast.bounds), (450, Bounds { lower: 400, upper: 500 }));
        let slow = stamped(time(500, None), &bracket(1_000, 910, 910), opened, 1_000);
        assert_eq!((slow.point_ns, slow.bounds), (550, Bounds { lower: 500, upper: 600 }));
    }

    #[test]
    fn what_two_brackets_leave_open_is_no_steering() {
        let opened = bracket(0, 10, 60).lead();
        let later = stamped(time(500, None), &bracket(1_000, 1_000, 1_055), opened, 1_000);
        assert_eq!(later.bounds, Bounds { lower: 500, upper: 555 });
    }

    #[test]
    fn no_figure_overflows() {
        let lead = bracket(u64::MAX, 0, 0).lead();
        let all = stamped(time(u64::MAX, Some(0)), &bracket(0, u64::MAX, u64::MAX), lead, 0);
        assert!((all.bounds.lower..=all.bounds.upper).contains(&all.point_ns));
    }
}
