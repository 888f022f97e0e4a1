//! What holds of any reading, and of any two readings of one vCPU: for tests, and for a biller that trusts nobody.

use crate::reading::Reading;

/// Which promise a reading breaks, and by what figures.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Broken {
    /// Conservation.
    #[error("the modes sum to {sum_ns} ns, not to the elapsed {elapsed_ns} ns")]
    Sum {
        /// Sum of the modes.
        sum_ns: u64,
        /// Time since the first stamp.
        elapsed_ns: u64,
    },
    /// utime, stime, gtime and the exits' total are of the modes and the reasons.
    #[error("{name} is {value}, but its parts make {parts}")]
    Derived {
        /// The field.
        name: &'static str,
        /// What it says.
        value: u64,
        /// What its parts say.
        parts: u64,
    },
    /// The bounds hold the point.
    #[error("guest time {gtime_ns} ns is outside of its bounds, {lower} to {upper} ns")]
    Bounds {
        /// The point.
        gtime_ns: u64,
        /// The lower bound.
        lower: u64,
        /// The upper bound.
        upper: u64,
    },
    /// Monotony.
    #[error("{name} stepped back from {earlier} to {later}")]
    Back {
        /// The field.
        name: String,
        /// In the earlier reading.
        earlier: u64,
        /// In the later one.
        later: u64,
    },
}

/// Checks one reading by itself.
///
/// # Errors
/// The first promise it breaks.
pub fn check(r: &Reading) -> Result<(), Broken> {
    let sum_ns = r.modes.sum_ns();
    if sum_ns != r.elapsed_ns {
        return Err(Broken::Sum {
            sum_ns,
            elapsed_ns: r.elapsed_ns,
        });
    }
    for (name, value, parts) in [
        ("utime_ns", r.utime_ns, r.modes.host_user_ns + r.modes.guest_ns),
        ("stime_ns", r.stime_ns, r.modes.host_kernel_ns),
        ("gtime_ns", r.gtime_ns, r.modes.guest_ns),
        (
            "exits.total",
            r.exits.total,
            r.exits.by_reason.values().map(|e| e.count).sum(),
        ),
    ] {
        if value != parts {
            return Err(Broken::Derived { name, value, parts });
        }
    }
    let (lower, upper) = (r.gtime_bounds_ns.lower, r.gtime_bounds_ns.upper);
    if !(lower..=upper).contains(&r.gtime_ns) {
        return Err(Broken::Bounds {
            gtime_ns: r.gtime_ns,
            lower,
            upper,
        });
    }
    Ok(())
}

/// Checks two readings of one vCPU, the second made after the first was answered.
///
/// # Errors
/// The first promise either breaks, or the two together.
pub fn check_pair(earlier: &Reading, later: &Reading) -> Result<(), Broken> {
    check(earlier)?;
    check(later)?;
    let later_totals = totals(later);
    for (name, earlier) in totals(earlier) {
        // A reason once reported goes on being reported.
        let later = later_totals
            .iter()
            .find(|(n, _)| *n == name)
            .map_or(0, |(_, value)| *value);
        if later < earlier {
            return Err(Broken::Back { name, earlier, later });
        }
    }
    Ok(())
}

/// Every total of a reading by name: all its numbers but `pending`, which is not one.
fn totals(r: &Reading) -> Vec<(String, u64)> {
    let m = &r.modes;
    let plain = [
        ("at_ns", r.at_ns),
        ("elapsed_ns", r.elapsed_ns),
        ("utime_ns", r.utime_ns),
        ("stime_ns", r.stime_ns),
        ("gtime_ns", r.gtime_ns),
        ("modes.guest_ns", m.guest_ns),
        ("modes.host_user_ns", m.host_user_ns),
        ("modes.host_kernel_ns", m.host_kernel_ns),
        ("modes.halted_ns", m.halted_ns),
        ("modes.waiting_ns", m.waiting_ns),
        ("modes.blocked_ns", m.blocked_ns),
        ("modes.paused_ns", m.paused_ns),
        ("gtime_bounds_ns.lower", r.gtime_bounds_ns.lower),
        ("gtime_bounds_ns.upper", r.gtime_bounds_ns.upper),
        ("exits.total", r.exits.total),
    ];
    let by_reason = r.exits.by_reason.iter().flat_map(|(reason, exit)| {
        [
            (format!("exits.{reason}.count"), exit.count),
            (format!("exits.{reason}.vmm_ns"), exit.vmm_ns),
        ]
    });
    plain
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .chain(by_reason)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const READING: &str = r#"{ "index": 0, "tid": 4242, "state": "guest", "at_ns": 9, "elapsed_ns": 100,
        "utime_ns": 75, "stime_ns": 5, "gtime_ns": 70,
        "modes": { "guest_ns": 70, "host_user_ns": 5, "host_kernel_ns": 5, "halted_ns": 10, "waiting_ns": 4,
                   "blocked_ns": 3, "paused_ns": 3 },
        "pending": { "mode": "guest", "delta_ns": 2 }, "gtime_bounds_ns": { "lower": 69, "upper": 71 },
        "source": "vtime", "exits": { "total": 2, "by_reason": { "io": { "count": 2, "vmm_ns": 4 } } },
        "host_cpu": { "cpu": 3, "pinned": true, "nohz_full": true, "isolated": true, "tick_stopped": null } }"#;

    fn reading() -> Reading {
        serde_json::from_str(READING).expect("the documented shape")
    }

    #[test]
    fn a_lawful_pair_passes() {
        assert_eq!(check_pair(&reading(), &reading()), Ok(()));
    }

    #[test]
    fn each_broken_promise_is_named() {
        type Spoil = fn(&mut Reading);
        let spoilers: [(Spoil, &str); 7] = [
            (
                |r| r.modes.halted_ns += 1,
                "the modes sum to 101 ns, not to the elapsed 100 ns",
            ),
            (|r| r.utime_ns += 1, "utime_ns is 76, but its parts make 75"),
            (|r| r.exits.total += 1, "exits.total is 3, but its parts make 2"),
            (
                |r| r.gtime_bounds_ns.lower = 71,
                "guest time 70 ns is outside of its bounds, 71 to 71 ns",
            ),
            (
                |r| r.gtime_bounds_ns.upper = 70,
                "gtime_bounds_ns.upper stepped back from 71 to 70",
            ),
            (
                |r| (r.modes.paused_ns, r.modes.blocked_ns) = (4, 2),
                "modes.blocked_ns stepped back from 3 to 2",
            ),
            (
                |r| r.exits = crate::reading::Exits::default(),
                "exits.total stepped back from 2 to 0",
            ),
        ];
        for (spoil, message) in spoilers {
            let mut later = reading();
            spoil(&mut later);
            assert_eq!(check_pair(&reading(), &later).expect_err(message).to_string(), message);
        }
    }
}
