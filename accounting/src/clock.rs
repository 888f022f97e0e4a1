//! The two clocks of a reading: raw TSC ticks, which stamps are made of, and `CLOCK_MONOTONIC_RAW`, which a
//! reading is told in.
//!
//! No figure of a reading rests on a calibration or a TSC frequency. A vCPU's life is measured by both clocks, so the life
//! so far is its own calibration: `elapsed_ns / elapsed_ticks` converts every other figure of that reading
//! ([`Scale`]). The elapsed time is then exactly what `CLOCK_MONOTONIC_RAW` says, however old the vCPU, and the
//! error in a figure is at most the error of reading the two clocks together, some tens of nanoseconds, once.
//!
//! Only where a slice must be told to be long or short as it ends, on the exit path, is a rate needed before there is a
//! life to take it from: [`Scale::of_this_host`], good to a thousandth.

use std::sync::OnceLock;

use rustix::time::{ClockId, clock_gettime};

/// Reads the time stamp counter, in ticks.
///
/// Not ordered against earlier loads (Intel SDM vol. 2, RDTSC): a reader may see a stamp some nanoseconds ahead of
/// its own clock, and subtracts with saturation.
#[inline(always)]
#[must_use]
#[expect(unsafe_code, reason = "RDTSC is an intrinsic")]
pub fn ticks() -> u64 {
    // SAFETY: RDTSC is in every x86-64 processor; Linux does not set CR4.TSD unless the process asked for it by
    // prctl(PR_SET_TSC), and then this is a SIGSEGV, not undefined behaviour.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// `CLOCK_MONOTONIC_RAW` in nanoseconds, through the vDSO.
#[must_use]
pub fn monotonic_raw_ns() -> u64 {
    let t = clock_gettime(ClockId::MonotonicRaw);
    // Both parts are non-negative: the clock counts from boot. It reaches 2^64 ns after 584 years.
    t.tv_sec.unsigned_abs() * 1_000_000_000 + t.tv_nsec.unsigned_abs()
}

/// `CLOCK_MONOTONIC` in nanoseconds, through the vDSO. NTP steers its rate.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let t = clock_gettime(ClockId::Monotonic);
    t.tv_sec.unsigned_abs() * 1_000_000_000 + t.tv_nsec.unsigned_abs()
}

/// CPU time of the calling thread in nanoseconds, by a system call.
#[must_use]
pub fn thread_cpu_ns() -> u64 {
    let t = clock_gettime(ClockId::ThreadCPUTime);
    t.tv_sec.unsigned_abs() * 1_000_000_000 + t.tv_nsec.unsigned_abs()
}

/// One instant on both clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Instant {
    /// TSC ticks.
    pub ticks: u64,
    /// `CLOCK_MONOTONIC_RAW`, in nanoseconds.
    pub ns: u64,
}

impl Instant {
    /// Reads both clocks together: the nanoseconds between two reads of the TSC, the closest of a few tries, so that
    /// an interrupt between the two does not part them.
    #[must_use]
    pub fn now() -> Self {
        Self::with_gap().0
    }

    /// As [`Instant::now`], and how many ticks the reads of the TSC were apart: `ticks` is right to half of it.
    fn with_gap() -> (Self, u64) {
        /// Three tries leave an interrupted pair only where three in a row were.
        const TRIES: usize = 3;
        /// Some 300 ns on any processor of this century: nothing came between.
        const CLOSE_TICKS: u64 = 1_000;

        let mut best = (Self::default(), u64::MAX);
        for _ in 0..TRIES {
            let before = ticks();
            let ns = monotonic_raw_ns();
            let gap = ticks().saturating_sub(before);
            if gap < best.1 {
                let ticks = before + gap / 2;
                best = (Self { ticks, ns }, gap);
            }
            if gap <= CLOSE_TICKS {
                break;
            }
        }
        best
    }
}

/// Converts ticks to nanoseconds by a span that both clocks measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scale {
    ticks: u64,
    ns: u64,
    /// Nanoseconds per tick, times 2^64, rounded up: one division for all conversions of a reading.
    ratio: u128,
}

impl Scale {
    /// The scale of the span `from..to`; an empty one converts everything to 0.
    #[must_use]
    pub fn of(from: Instant, to: Instant) -> Self {
        let (ticks, ns) = (to.ticks.saturating_sub(from.ticks), to.ns.saturating_sub(from.ns));
        let ratio = match u128::from(ticks) {
            0 => 0,
            ticks => (u128::from(ns) << 64).div_ceil(ticks),
        };
        Self { ticks, ns, ratio }
    }

    /// The scale of a span long enough to be right to a thousandth, made by waiting for that long, once a process: some
    /// 50 us, for a thousand times what reading the two clocks together leaves open; no longer than 5 ms.
    #[must_use]
    pub fn of_this_host() -> Self {
        const PARTS: u64 = 1_000;
        const LONGEST_NS: u64 = 5_000_000;
        static SCALE: OnceLock<Scale> = OnceLock::new();

        *SCALE.get_or_init(|| {
            let (from, first_gap) = Instant::with_gap();
            loop {
                let (to, last_gap) = Instant::with_gap();
                let scale = Self::of(from, to);
                let open = first_gap / 2 + last_gap / 2;
                if scale.ticks / PARTS >= open || scale.ns >= LONGEST_NS {
                    return scale;
                }
            }
        })
    }

    /// Nanoseconds in one tick, times 2^`fraction_bits`; what does not fit is `u64::MAX`, and of a span without ticks, 0.
    pub(crate) fn ns_per_tick(self, fraction_bits: u32) -> u64 {
        let ns = u128::from(self.ns) << fraction_bits;
        u64::try_from(ns.checked_div(u128::from(self.ticks)).unwrap_or(0)).unwrap_or(u64::MAX)
    }

    /// Nanoseconds of the whole span.
    #[must_use]
    pub fn span_ns(self) -> u64 {
        self.ns
    }

    /// `ticks` in nanoseconds, rounded down; never more than the span's, so parts of the span never exceed it: what
    /// rounding the ratio up adds to all of them together is far less than the nanosecond that would show.
    #[must_use]
    pub fn to_ns(self, ticks: u64) -> u64 {
        let ticks = u128::from(ticks);
        let (whole, fraction) = (self.ratio >> 64, self.ratio & u128::from(u64::MAX));
        let ns = (ticks * whole).saturating_add((ticks * fraction) >> 64);
        u64::try_from(ns).unwrap_or(u64::MAX).min(self.ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_advance_on_one_cpu() {
        let first = ticks();
        assert!((0..1_000).map(|_| ticks()).all(|t| t >= first));
    }

    #[test]
    fn parts_of_a_span_never_sum_to_more_than_the_span() {
        let scale = Scale::of(
            Instant { ticks: 7, ns: 100 },
            Instant {
                ticks: 10_007,
                ns: 3_433,
            },
        );
        let parts = [1, 3_333, 3_333, 3_333];
        assert!(parts.iter().map(|&p| scale.to_ns(p)).sum::<u64>() <= scale.span_ns());
        assert_eq!(scale.to_ns(10_000), scale.span_ns());
    }

    #[test]
    fn centuries_at_5_ghz_do_not_overflow() {
        let scale = Scale::of(
            Instant::default(),
            Instant {
                ticks: u64::MAX,
                ns: 1 << 62,
            },
        );
        assert_eq!(scale.to_ns(u64::MAX), 1 << 62);
    }

    #[test]
    fn a_clock_that_stands_still_converts_to_nothing() {
        let now = Instant::now();
        assert_eq!(Scale::of(now, now).to_ns(12_345), 0);
    }
}
