//! The ledger: what is published sums, and never steps back.
//!
//! Raw totals are the best figures of one instant, and so they may step back: the kernel's own clocks do, and a halt
//! still going on may turn out to have been a wait. What has been published cannot. At each reading the elapsed time
//! has grown by D; the raw totals ask for increments, raw total - published total, of which some may be negative; the
//! ledger grants the nearest increments that are not, and that sum to D. Both laws then hold by construction.
//!
//! Because an increment is asked for as raw total - *published* total, not as the raw totals' own growth, what one
//! reading misplaced is asked back by the next: the published totals converge on the raw ones, and errors never add up.
//!
//! Some raw totals are exact: `paused` always, `guest` where it was stamped. Those are granted first, in full; only
//! the others make room for one another. An estimate that must be taken back is never taken out of an exact figure.

use std::ops::{Add, Mul, Sub};

use crate::reading::{Bounds, Mode, Modes};

/// Which raw totals are exact whatever the source, in the order of [`Modes::ALL`].
pub const EXACT: [bool; Modes::COUNT] = exact(false);
/// Those of a source that stamps guest time.
pub const EXACT_WITH_GUEST: [bool; Modes::COUNT] = exact(true);

const fn exact(guest: bool) -> [bool; Modes::COUNT] {
    let mut exact = [false; Modes::COUNT];
    exact[Mode::Paused as usize] = true;
    exact[Mode::Guest as usize] = guest;
    exact
}

/// The published totals of one vCPU.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    modes: [u64; Modes::COUNT],
    elapsed_ns: u64,
    lower_ns: u64,
    upper_ns: u64,
}

impl Ledger {
    /// Publishes the totals nearest to `raw`, which sums to `elapsed_ns`; those that are `exact` first.
    pub fn publish(&mut self, elapsed_ns: u64, raw: Modes, exact: [bool; Modes::COUNT]) -> Modes {
        debug_assert_eq!(raw.sum_ns(), elapsed_ns, "the split sums to the elapsed time");
        let grown = elapsed_ns.saturating_sub(self.elapsed_ns);
        let raw = raw.to_array();
        // In the first 4.5 years no sum or product of figures leaves 64 bits, which takes half the time.
        let granted = if elapsed_ns.max(self.elapsed_ns) < 1 << 57 {
            grant::<i64, _>(raw, self.modes, exact, grown)
        } else {
            grant::<i128, _>(raw, self.modes, exact, grown)
        };
        for (published, granted) in self.modes.iter_mut().zip(granted) {
            *published += granted;
        }
        self.elapsed_ns += grown;
        Modes::from_array(self.modes)
    }

    /// Publishes an interval for the true guest time, given that it was `raw` at the instant of the last
    /// [`Ledger::publish`]. Neither end steps back, and the published guest time is inside; both only widen `raw`, or
    /// keep an end that was true earlier and so is true still: the true time does not shrink.
    pub fn publish_bounds(&mut self, raw: Bounds) -> Bounds {
        let guest = self.modes[0];
        self.lower_ns = self.lower_ns.max(raw.lower.min(guest));
        self.upper_ns = self.upper_ns.max(raw.upper).max(guest);
        Bounds {
            lower: self.lower_ns,
            upper: self.upper_ns,
        }
    }

    /// The totals as published.
    #[must_use]
    pub fn modes(&self) -> Modes {
        Modes::from_array(self.modes)
    }

    /// Elapsed time as published: the sum of the modes.
    #[must_use]
    pub fn elapsed_ns(&self) -> u64 {
        self.elapsed_ns
    }
}

/// What the published totals grow by, in all `sum`.
fn grant<T: Whole, const N: usize>(raw: [u64; N], published: [u64; N], exact: [bool; N], sum: u64) -> [u64; N] {
    let mut asked = [T::default(); N];
    for ((asked, raw), published) in asked.iter_mut().zip(raw).zip(published) {
        *asked = T::of(raw) - T::of(published);
    }
    exact_first(asked, exact, T::of(sum)).map(T::to_u64)
}

/// Non-negative integers that sum to `sum`: what the exact ones ask for, and of what is left the nearest to what the
/// others ask for. Should the exact ones ask for more than there is, they share it and the others get nothing.
fn exact_first<T: Whole, const N: usize>(asked: [T; N], exact: [bool; N], sum: T) -> [T; N] {
    let zero = T::default();
    let (mut all, mut first, mut gives_back) = (zero, zero, false);
    for (&asked, &exact) in asked.iter().zip(&exact) {
        all = all + asked;
        gives_back |= asked < zero;
        if exact {
            first = first + asked.max(zero);
        }
    }
    // As a rule nobody has anything to give back: then everybody gets what it asks for.
    if !gives_back && all == sum {
        return asked;
    }
    if first > sum || !exact.contains(&false) {
        return nearest(asked, exact, sum);
    }
    let mut granted = nearest(asked, exact.map(|exact| !exact), sum - first);
    for ((granted, &asked), exact) in granted.iter_mut().zip(&asked).zip(exact) {
        if exact {
            *granted = asked.max(zero);
        }
    }
    granted
}

/// The non-negative integers nearest to `asked`, in the Euclidean sense, that sum to `sum`: the projection onto a
/// simplex (Michelot, "A finite algorithm for finding the projection of a point onto the canonical simplex of R^n",
/// 1986). All that remain positive give up the same, and what cannot give it is 0 and drops out; each round drops at
/// least one, so there are at most as many rounds as entries. A mode that asks for nothing is granted nothing as long
/// as the rest ask for at least `sum`. Who does not take part, at least one does, is granted nothing.
fn nearest<T: Whole, const N: usize>(asked: [T; N], mut takes_part: [bool; N], sum: T) -> [T; N] {
    let zero = T::default();
    loop {
        let (mut n, mut all) = (zero, zero);
        for (&asked, &takes_part) in asked.iter().zip(&takes_part) {
            if takes_part {
                (n, all) = (n + T::of(1), all + asked);
            }
        }
        // At least one takes part: not all can be below their own mean, and excess / n <= mean as sum >= 0.
        let excess = all - sum;
        let mut dropped = false;
        for (&asked, takes_part) in asked.iter().zip(&mut takes_part) {
            let drops = *takes_part && asked * n < excess;
            *takes_part &= !drops;
            dropped |= drops;
        }
        if dropped {
            continue;
        }
        // Each gives excess / n; the remainder, one each, is given by the first few. None goes below 0: with a
        // remainder, asked >= excess / n > quotient.
        let quotient = excess.div_floor(n);
        let mut remainder = excess - quotient * n;
        let mut granted = [zero; N];
        for ((granted, &asked), takes_part) in granted.iter_mut().zip(&asked).zip(takes_part) {
            if takes_part {
                let more = remainder.min(T::of(1));
                remainder = remainder - more;
                *granted = asked - quotient - more;
            }
        }
        return granted;
    }
}

/// Integers with a sign, of the width that the figures want.
trait Whole: Copy + Default + Ord + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> {
    fn of(figure: u64) -> Self;
    fn to_u64(self) -> u64;
    fn div_floor(self, by: Self) -> Self;
}

macro_rules! whole {
    ($t:ty) => {
        impl Whole for $t {
            fn of(figure: u64) -> Self {
                Self::try_from(figure).unwrap_or(Self::MAX)
            }

            fn to_u64(self) -> u64 {
                u64::try_from(self).unwrap_or(0)
            }

            fn div_floor(self, by: Self) -> Self {
                self.div_euclid(by)
            }
        }
    };
}

whole!(i64);
whole!(i128);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Raw totals that sum to `elapsed`: cut at six places.
    fn cut(elapsed: u64, mut at: [u64; 6]) -> Modes {
        at.iter_mut()
            .for_each(|a| *a = if elapsed == 0 { 0 } else { *a % (elapsed + 1) });
        at.sort_unstable();
        let mut modes = [0; Modes::COUNT];
        let mut last = 0;
        for (mode, end) in modes.iter_mut().zip(at.into_iter().chain([elapsed])) {
            *mode = end - last;
            last = end;
        }
        Modes::from_array(modes)
    }

    fn distance<const N: usize>(granted: [u64; N], asked: [i128; N]) -> i128 {
        granted
            .iter()
            .zip(asked)
            .map(|(&g, a)| (i128::from(g) - a).pow(2))
            .sum()
    }

    proptest! {
        #[test]
        fn whatever_the_raw_totals_do_the_published_sum_and_never_step_back(
            history in proptest::collection::vec((0u64..1 << 40, any::<[u64; 6]>()), 1..40),
        ) {
            let mut ledger = Ledger::default();
            let (mut elapsed, mut last) = (0, Modes::default());
            for (grown, at) in history {
                elapsed += grown;
                let modes = ledger.publish(elapsed, cut(elapsed, at), EXACT);
                prop_assert_eq!(modes.sum_ns(), elapsed);
                for (new, old) in modes.to_array().into_iter().zip(last.to_array()) {
                    prop_assert!(new >= old);
                }
                last = modes;
            }
        }

        #[test]
        fn increments_are_the_nearest_there_are(asked in any::<[i8; 3]>(), sum in 0u64..60) {
            let asked = asked.map(i128::from);
            let ours = nearest(asked, [true; 3], i128::from(sum)).map(Whole::to_u64);
            prop_assert_eq!(ours.iter().sum::<u64>(), sum);
            // Every other way to share the sum out is at least as far.
            for a in 0..=sum {
                for b in 0..=sum - a {
                    let other = [a, b, sum - a - b];
                    prop_assert!(distance(ours, asked) <= distance(other, asked), "{:?} is nearer than {:?}", other, ours);
                }
            }
        }

        #[test]
        fn seven_modes_get_what_handing_out_one_nanosecond_at_a_time_would_give(
            asked in proptest::array::uniform7(-40i128..200), sum in 0u64..300,
        ) {
            // The slow way: each nanosecond to the mode that lacks most. That is the nearest there is, for by taking
            // another each step would come less near, and the distance is a sum over modes of convex functions.
            let mut slow = [0; Modes::COUNT];
            for _ in 0..sum {
                let lacks = |i: &usize| asked[*i] - i128::from(slow[*i]);
                let most = (0..slow.len()).max_by_key(lacks).expect("there are seven");
                slow[most] += 1;
            }
            let ours = nearest(asked, [true; 7], i128::from(sum)).map(Whole::to_u64);
            prop_assert_eq!(ours.iter().sum::<u64>(), sum);
            prop_assert_eq!(distance(ours, asked), distance(slow, asked), "{:?} and {:?}", ours, slow);
        }

        #[test]
        fn of_any_size_no_nanosecond_would_be_nearer_elsewhere(
            asked in any::<[i64; Modes::COUNT]>(), sum in prop_oneof![0u64..100, any::<u64>()],
        ) {
            let asked = asked.map(i128::from);
            let ours = nearest(asked, [true; 7], i128::from(sum)).map(Whole::to_u64);
            prop_assert_eq!(ours.iter().map(|&g| u128::from(g)).sum::<u128>(), u128::from(sum));
            let lacks: Vec<i128> = asked.iter().zip(ours).map(|(a, g)| a - i128::from(g)).collect();
            let most = lacks.iter().max().expect("there are seven");
            for (lacks, granted) in lacks.iter().zip(ours) {
                // Moving one from here to there changes the distance by 2 * (1 - (most - lacks)).
                prop_assert!(granted == 0 || most - lacks <= 1, "{:?} of {:?}", ours, asked);
            }
        }

        #[test]
        fn what_was_misplaced_is_put_right_once_the_totals_have_grown_by_as_much(
            first in any::<[u64; 6]>(), truth in any::<[u64; 6]>(), elapsed in 0u64..1 << 40,
        ) {
            let mut ledger = Ledger::default();
            ledger.publish(elapsed, cut(elapsed, first), EXACT);
            // From here on the raw totals are right, and every mode grows by all that could have been misplaced.
            let right = cut(elapsed, truth).to_array().map(|m| m + elapsed);
            let later = Modes::from_array(right);
            prop_assert_eq!(ledger.publish(later.sum_ns(), later, EXACT), later);
        }

        #[test]
        fn bounds_never_step_back_and_hold_what_is_published(
            history in proptest::collection::vec((0u64..1 << 40, any::<[u64; 6]>(), any::<[u32; 2]>()), 1..40),
        ) {
            let mut ledger = Ledger::default();
            let (mut elapsed, mut last) = (0, Bounds { lower: 0, upper: 0 });
            for (grown, at, [below, above]) in history {
                elapsed += grown;
                let guest = ledger.publish(elapsed, cut(elapsed, at), EXACT).guest_ns;
                let raw = Bounds {
                    lower: guest.saturating_sub(u64::from(below)),
                    upper: guest + u64::from(above),
                };
                let bounds = ledger.publish_bounds(raw);
                prop_assert!(bounds.lower <= guest && guest <= bounds.upper);
                prop_assert!(bounds.lower >= last.lower && bounds.upper >= last.upper);
                last = bounds;
            }
        }
    }

    #[test]
    fn a_mode_that_never_asked_is_never_granted() {
        let mut ledger = Ledger::default();
        ledger.publish(
            100,
            Modes {
                guest_ns: 100,
                ..Modes::default()
            },
            EXACT,
        );
        let back = Modes {
            guest_ns: 90,
            host_user_ns: 20,
            ..Modes::default()
        };
        assert_eq!(
            ledger.publish(110, back, EXACT),
            Modes {
                guest_ns: 100,
                host_user_ns: 10,
                ..Modes::default()
            }
        );
    }
    #[test]
    fn an_estimate_that_is_taken_back_is_not_taken_out_of_an_exact_figure() {
        let mut ledger = Ledger::default();
        let first = Modes {
            guest_ns: 60,
            host_kernel_ns: 40,
            ..Modes::default()
        };
        ledger.publish(100, first, EXACT_WITH_GUEST);
        // 30 of the kernel's 40 turn out to be the VMM's, and the guest has run for 10 more.
        let second = Modes {
            guest_ns: 70,
            host_user_ns: 30,
            host_kernel_ns: 10,
            ..Modes::default()
        };
        let published = ledger.publish(110, second, EXACT_WITH_GUEST);
        assert_eq!(
            (published.guest_ns, published.host_user_ns, published.host_kernel_ns),
            (70, 0, 40)
        );
    }

    proptest! {
        #[test]
        fn an_exact_total_that_does_not_step_back_is_published_as_it_is(
            history in proptest::collection::vec((0u64..1 << 40, 0u64..=100, any::<[u64; 6]>()), 1..40),
        ) {
            let mut ledger = Ledger::default();
            let (mut elapsed, mut guest) = (0, 0);
            for (grown, per_cent, at) in history {
                elapsed += grown;
                guest += grown / 100 * per_cent;
                let mut raw = cut(elapsed - guest, at);
                // All else is made of estimates.
                (raw.blocked_ns, raw.paused_ns, raw.guest_ns) = (raw.blocked_ns + raw.paused_ns + raw.guest_ns, 0, guest);
                let published = ledger.publish(elapsed, raw, EXACT_WITH_GUEST);
                prop_assert_eq!((published.guest_ns, published.sum_ns()), (guest, elapsed));
            }
        }
    }
}
