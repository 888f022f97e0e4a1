//! The clock that readings are stamped with.

use rustix::time::{ClockId, clock_gettime};

/// `CLOCK_MONOTONIC_RAW` in nanoseconds: what a reading's `at_ns` is of, the same in every process.
///
/// # Panics
/// Never: the clock does not run backwards past the boot.
#[must_use]
pub fn raw_ns() -> u64 {
    let now = clock_gettime(ClockId::MonotonicRaw);
    let part = |value: i64| u64::try_from(value).expect("time since the boot");
    part(now.tv_sec) * 1_000_000_000 + part(now.tv_nsec)
}
