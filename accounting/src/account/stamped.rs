//! Guest time by the BPF programs' stamps, in a reading's own clock.
//!
//! The programs stamp in `CLOCK_MONOTONIC`, which NTP steers; a reading is told in `CLOCK_MONOTONIC_RAW`, which nobody
//! does. By how much the one has been steered ahead of the other since the first stamp, and behind it, is added up from
//! reading to reading ([`Steering`]); not known is while the guest did what. All of it may have been while the guest ran,
//! or none: the interval widens by both sums, and the point is moved by the guest's share of what is left of them. Where
//! nobody steers, both are 0. What is steered one way and back between two readings is not seen.

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

/// How far the clock has been steered, each way, as readings have seen it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Steering {
    /// The lead at first, and by how much it is certain to have changed since.
    anchor: Lead,
    steered: Steered,
}

/// Sums, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Steered {
    pub ahead_ns: u64,
    pub behind_ns: u64,
}

impl Steering {
    /// None so far.
    pub(super) fn since(anchor: Lead) -> Self {
        Self {
            anchor,
            steered: Steered::default(),
        }
    }

    /// Takes note of the lead `now`: what two leads leave open is no steering, and stays to be held against the next.
    pub(super) fn seen(&mut self, now: Lead) -> Steered {
        let ns = |change: i128| u64::try_from(change.max(0)).unwrap_or(u64::MAX);
        let (ahead_ns, behind_ns) = (ns(now.low - self.anchor.high), ns(self.anchor.low - now.high));
        self.steered.ahead_ns = self.steered.ahead_ns.saturating_add(ahead_ns);
        self.steered.behind_ns = self.steered.behind_ns.saturating_add(behind_ns);
        // Moved by what was certain only: were it put where the lead is seen now, a slow steering would be lost in what each
        // pair of leads leaves open.
        let moved = i128::from(ahead_ns) - i128::from(behind_ns);
        self.anchor = Lead {
            low: self.anchor.low + moved,
            high: self.anchor.high + moved,
        };
        self.steered
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

/// Makes nanoseconds of guest time, at the bracket's instant, of the stamps read inside of it. `elapsed_ns` is the time
/// since the first stamp, and `steered` how far the clock was meanwhile.
pub(super) fn stamped(time: GuestTime, at: &Bracket, steered: Steered, elapsed_ns: u64) -> Stamped {
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
    let Steered { ahead_ns, behind_ns } = steered;
    let share = |of: u64| {
        let part = u128::from(of) * u128::from(point.min(elapsed_ns)) / u128::from(elapsed_ns.max(1));
        u64::try_from(part).unwrap_or(of)
    };
    let bounds = Bounds {
        lower: lower.saturating_sub(ahead_ns),
        upper: upper.saturating_add(behind_ns),
    };
    let point = point.saturating_sub(share(ahead_ns)).saturating_add(share(behind_ns));
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
        let running = stamped(time(500, Some(900)), &at, Steered::default(), 1_000);
        let (lower, upper) = (600, 640);
        assert_eq!((running.point_ns, running.bounds), (620, Bounds { lower, upper }));
        let out = stamped(time(500, None), &at, Steered::default(), 1_000);
        let (lower, upper) = (500, 540);
        assert_eq!((out.point_ns, out.bounds), (500, Bounds { lower, upper }));
    }

    #[test]
    fn a_steered_clock_widens_the_bounds_by_as_much_and_moves_the_point_by_the_guests_share() {
        let at = bracket(1_000, 1_000, 1_000);
        for (ahead_ns, behind_ns, point_ns, lower, upper) in [
            (100, 0, 450, 400, 500),
            (0, 100, 550, 500, 600),
            (100, 100, 500, 400, 600),
        ] {
            let steered = Steered { ahead_ns, behind_ns };
            let by = stamped(time(500, None), &at, steered, 1_000);
            assert_eq!((by.point_ns, by.bounds), (point_ns, Bounds { lower, upper }));
        }
    }

    #[test]
    fn what_is_steered_ahead_and_back_is_steered_twice() {
        let lead = |ahead: u64| bracket(1_000, 1_000 + ahead, 1_005 + ahead).lead();
        let mut steering = Steering::since(lead(0));
        assert_eq!(steering.seen(lead(4)), Steered::default(), "two brackets leave it open");
        steering.seen(lead(105));
        let (ahead_ns, behind_ns) = (100, 95);
        assert_eq!(steering.seen(lead(0)), Steered { ahead_ns, behind_ns });
    }

    #[test]
    fn a_little_at_a_time_adds_up() {
        let lead = |ahead: u64| bracket(1_000, 1_000 + ahead, 1_050 + ahead).lead();
        let mut steering = Steering::since(lead(0));
        let last = (1..=1_000)
            .map(|ahead| steering.seen(lead(ahead)))
            .last()
            .expect("a thousand");
        assert_eq!(
            (last.ahead_ns, last.behind_ns),
            (950, 0),
            "all but what the first pair leaves open"
        );
    }

    #[test]
    fn no_figure_overflows() {
        let steered = Steered {
            ahead_ns: u64::MAX,
            behind_ns: u64::MAX,
        };
        let all = stamped(time(u64::MAX, Some(0)), &bracket(0, u64::MAX, u64::MAX), steered, 0);
        assert!((all.bounds.lower..=all.bounds.upper).contains(&all.point_ns));
    }
}
