//! How long one exit's handling and one stay in `KVM_RUN` took, by powers of two.
//!
//! The edges are fixed in nanoseconds, not in ticks, so that the figures of two hosts, or of one host before and after a
//! restart, can be added up: 64 ns, 128 ns, ... 2^36 ns (69 s). Nothing that enters and leaves the kernel takes less
//! than the first; beyond the last is the bucket of all that is longer, the stays of a guest that spins on a tickless CPU.
//! That makes 32 buckets, four cache lines.
//!
//! A slice is in ticks, so the writer converts: the high half of one 64 by 64 bit product is the slice in units of 32
//! ns, and the bucket is the place of its highest bit. The factor comes from a measurement that is good
//! to a thousandth ([`crate::clock::Scale::of_this_host`]), so an edge may lie that far off its place; the counts are exact.

use crate::clock::Scale;

/// Buckets of a histogram. Bucket 0 holds what took less than 64 ns, bucket *i* what took from 2^(*i* + 5) to less than
/// 2^(*i* + 6) ns, and the last all that took 2^36 ns or more.
pub const BUCKETS: usize = 32;

/// log2 of the first edge, in nanoseconds.
const FIRST: u32 = 6;

/// The upper edge of bucket `index`, in nanoseconds; `None` for the last bucket, which has none.
#[must_use]
pub const fn upper_edge_ns(index: usize) -> Option<u64> {
    if index + 1 < BUCKETS {
        Some(1 << (FIRST as usize + index))
    } else {
        None
    }
}

/// What a slice counts as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// Neither histogram counts it.
    #[default]
    Neither,
    /// A stay in `KVM_RUN`.
    Run,
    /// The VMM's handling of an exit.
    Vmm,
}

impl Kind {
    pub(super) fn from_word(word: u64) -> Self {
        match word {
            1 => Self::Run,
            2 => Self::Vmm,
            _ => Self::Neither,
        }
    }
}

/// The slice that ended last. It is counted when the next one ends: see [`super::writer`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) kind: Kind,
    pub(super) ticks: u64,
}

/// The counts of both histograms: of stays in `KVM_RUN`, then of the VMM's handling of exits.
pub(super) type Counts<T> = [[T; BUCKETS]; 2];

/// A bucket of either histogram, by its place in the two of them laid end to end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Place(usize);

impl Place {
    /// Its count.
    #[inline(always)]
    pub(super) fn of<T>(self, counts: &Counts<T>) -> &T {
        // The remainder is the place itself, and spares the check for it.
        &counts.as_flattened()[self.0 % (2 * BUCKETS)]
    }

    /// As [`Place::of`].
    #[inline(always)]
    pub(super) fn of_mut<T>(self, counts: &mut Counts<T>) -> &mut T {
        &mut counts.as_flattened_mut()[self.0 % (2 * BUCKETS)]
    }
}

/// Finds a slice's bucket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Edges {
    /// Halves of the first edge in one tick, times 2^64.
    per_tick: u64,
}

impl Edges {
    pub(super) fn new(scale: Scale) -> Self {
        Self {
            per_tick: scale.ns_per_tick(u64::BITS + 1 - FIRST),
        }
    }

    /// Where a slice is counted, if it is.
    #[inline(always)]
    pub(super) fn place(self, ended: Ended) -> Option<Place> {
        let first = match ended.kind {
            Kind::Neither => return None,
            Kind::Run => 0,
            Kind::Vmm => BUCKETS,
        };
        Some(Place(first + self.bucket(ended.ticks)))
    }

    #[inline(always)]
    fn bucket(self, ticks: u64) -> usize {
        let halves = ((u128::from(ticks) * u128::from(self.per_tick)) >> u64::BITS) as u64;
        // The lowest bit is beneath the first edge; set, it makes what is below that edge 0.
        ((halves | 1).ilog2() as usize).min(BUCKETS - 1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::clock::Instant;

    fn at(ticks: u64, ns: u64) -> Edges {
        Edges::new(Scale::of(Instant::default(), Instant { ticks, ns }))
    }

    #[test]
    fn the_edges_are_powers_of_two_nanoseconds() {
        assert_eq!(upper_edge_ns(0), Some(64));
        assert_eq!(upper_edge_ns(BUCKETS - 2), Some(1 << 36));
        assert_eq!(upper_edge_ns(BUCKETS - 1), None);
    }

    #[test]
    fn no_slice_of_any_clock_is_out_of_range() {
        for clock in [
            at(1, 1),
            at(5, 1),
            at(1, 63),
            at(1, u64::MAX),
            at(u64::MAX, 1),
            at(0, 0),
            at(1, 0),
        ] {
            for ticks in [0, 1, 1 << 32, 1 << 63, u64::MAX] {
                assert!(clock.bucket(ticks) < BUCKETS, "{ticks} by {clock:?}");
            }
        }
        assert_eq!(at(1, 1).bucket(u64::MAX), BUCKETS - 1);
        assert_eq!(at(0, 0).bucket(u64::MAX), 0, "a clock that stands still");
    }

    proptest! {
        #[test]
        fn a_slice_is_in_the_bucket_whose_edges_hold_it(
            // 32 MHz to 5 GHz: all TSCs there are and were.
            per_us in 32u64..=5_000, ticks in prop_oneof![0u64..1 << 20, 0u64..1 << 40, 0u64..1 << 60],
        ) {
            let index = at(per_us, 1_000).bucket(ticks);
            let ns = u128::from(ticks) * 1_000 / u128::from(per_us);
            // The factor is cut to 64 bits, so the product may fall short by 2^-64 halves for each tick: less than 1 ns.
            let (lower, upper) = (index.checked_sub(1).and_then(upper_edge_ns).unwrap_or(0), upper_edge_ns(index));
            prop_assert!(ns >= u128::from(lower), "{} ns is below {}", ns, lower);
            prop_assert!(upper.is_none_or(|upper| ns <= u128::from(upper)), "{} ns is beyond {:?}", ns, upper);
        }
    }
}
