//! Token buckets between a device and its driver: so many bytes, so many operations, as Firecracker's API has them.
//!
//! A bucket holds at most `size` tokens and fills evenly, from empty in `refill_time`; `one_time_burst` is on top of that, once.
//! A request that asks for more than a full bucket holds is let through when the bucket is full, and the bucket then
//! owes the rest: the next one waits until that is paid. So the rate over a long time is exact, whatever the sizes.
//!
//! The clock is the caller's. A limiter never sleeps: it says how long to wait, and its timer's descriptor becomes readable then.

use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use super::timer::Timer;
use crate::config;

/// One bucket, counted in tokens times nanoseconds to fill, so that no rounding adds up.
#[derive(Clone, Debug)]
struct Bucket {
    size: u64,
    refill_ns: u64,
    burst: u64,
    /// Tokens there are, times `refill_ns`; below zero where tokens are owed.
    level: i128,
    filled: Instant,
}

impl Bucket {
    /// [`None`] where `config` sets no limit.
    fn new(config: config::TokenBucket, now: Instant) -> Option<Self> {
        // 146 years: a full bucket of any size stays within 127 bits.
        let refill_ns = config.refill_time.saturating_mul(1_000_000).min(1 << 62);
        (config.size > 0 && refill_ns > 0).then(|| Self {
            size: config.size,
            refill_ns,
            burst: config.one_time_burst.unwrap_or(0),
            level: i128::from(config.size) * i128::from(refill_ns),
            filled: now,
        })
    }

    fn full(&self) -> i128 {
        i128::from(self.size) * i128::from(self.refill_ns)
    }

    fn fill(&mut self, now: Instant) {
        let ns = now.saturating_duration_since(self.filled).as_nanos();
        // In `ns` come ns / refill_ns * size tokens. Saturates after 580 years or so.
        let come = i128::try_from(ns).unwrap_or(i128::MAX).saturating_mul(self.size.into());
        self.level = self.level.saturating_add(come).min(self.full());
        self.filled = now;
    }

    /// How long until `tokens` may be taken.
    fn wait(&self, tokens: u64) -> Duration {
        // What is more than a full bucket may be taken from a full one.
        let needed = tokens.saturating_sub(self.burst).min(self.size);
        let lacking = (i128::from(needed) * i128::from(self.refill_ns)).saturating_sub(self.level);
        if lacking <= 0 {
            return Duration::ZERO;
        }
        let size = i128::from(self.size);
        Duration::from_nanos(u64::try_from(lacking.saturating_add(size - 1) / size).unwrap_or(u64::MAX))
    }

    fn take(&mut self, tokens: u64) {
        let from_burst = tokens.min(self.burst);
        self.burst -= from_burst;
        let taken = i128::from(tokens - from_burst) * i128::from(self.refill_ns);
        self.level = self.level.saturating_sub(taken);
    }
}

/// A limit on bytes and on operations.
#[derive(Debug)]
pub struct RateLimiter {
    bandwidth: Option<Bucket>,
    ops: Option<Bucket>,
    timer: Timer,
    waiting: bool,
}

impl RateLimiter {
    /// A limiter as `config` says, both buckets full; without a limit where there is none.
    ///
    /// # Errors
    /// There is no descriptor left for its timer.
    pub fn new(config: Option<config::RateLimiter>) -> std::io::Result<Self> {
        let mut limiter = Self {
            bandwidth: None,
            ops: None,
            timer: Timer::new()?,
            waiting: false,
        };
        limiter.update(config.unwrap_or_default(), Instant::now());
        Ok(limiter)
    }

    /// Replaces the buckets that `config` names, full; leaves the others. One of size 0 takes the limit away. What was refused
    /// may be tried again at once.
    pub fn update(&mut self, config: config::RateLimiter, now: Instant) {
        if let Some(bandwidth) = config.bandwidth {
            self.bandwidth = Bucket::new(bandwidth, now);
        }
        if let Some(ops) = config.ops {
            self.ops = Bucket::new(ops, now);
        }
        if self.waiting {
            self.set_timer(Duration::from_nanos(1));
        }
    }

    /// Takes `ops` operations of `bytes` bytes altogether, both or neither. Where they may not be had yet the timer is set.
    #[must_use]
    pub fn take(&mut self, ops: u64, bytes: u64, now: Instant) -> bool {
        let mut wait = Duration::ZERO;
        for (bucket, tokens) in [(&mut self.ops, ops), (&mut self.bandwidth, bytes)] {
            if let Some(bucket) = bucket {
                bucket.fill(now);
                wait = wait.max(bucket.wait(tokens));
            }
        }
        if !wait.is_zero() {
            self.set_timer(wait);
            return false;
        }
        for (bucket, tokens) in [(&mut self.ops, ops), (&mut self.bandwidth, bytes)] {
            if let Some(bucket) = bucket {
                bucket.take(tokens);
            }
        }
        true
    }

    /// Whether something was refused and its time has not come.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.waiting
    }

    fn set_timer(&mut self, wait: Duration) {
        self.waiting = true;
        self.timer.after(wait);
    }

    /// The timer's descriptor was readable: what was refused may be tried again.
    pub fn expired(&mut self) {
        self.timer.expired();
        self.waiting = false;
    }
}

impl AsRawFd for RateLimiter {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn bucket(size: u64, refill_time: u64, one_time_burst: Option<u64>) -> Option<config::TokenBucket> {
        Some(config::TokenBucket {
            size,
            one_time_burst,
            refill_time,
        })
    }

    fn limiter(bandwidth: Option<config::TokenBucket>, ops: Option<config::TokenBucket>) -> RateLimiter {
        RateLimiter::new(Some(config::RateLimiter { bandwidth, ops })).unwrap()
    }

    /// How much is let through in `time`, asking for `tokens` whenever it may be had.
    fn let_through(limiter: &mut RateLimiter, tokens: u64, time: Duration) -> u64 {
        let start = Instant::now();
        let (mut at, mut through) = (Duration::ZERO, 0);
        while at < time {
            if limiter.take(1, tokens, start + at) {
                through += tokens;
            } else {
                at += MS / 10;
            }
        }
        through
    }

    #[test]
    fn over_ten_seconds_the_rate_is_what_was_configured_whatever_the_size_of_a_request() {
        for tokens in [1, 512, 4096, 1 << 20, 10 << 20] {
            // A bucket of 1 MiB that fills in 100 ms: 10 MiB a second.
            let mut limiter = limiter(bucket(1 << 20, 100, None), None);
            let through = let_through(&mut limiter, tokens.max(256), Duration::from_secs(10));
            let (rate, full) = (100u64 << 20, 1u64 << 20);
            // The first bucket is given; the last request may be let through in part of its time only.
            let most = rate + full + tokens;
            assert!(
                (rate..=most).contains(&through) || through.abs_diff(rate) <= tokens,
                "{tokens}: {through}"
            );
        }
    }

    #[test]
    fn a_burst_is_given_once() {
        let mut limiter = limiter(bucket(100, 1000, Some(1000)), None);
        let now = Instant::now();
        assert!(limiter.take(1, 1000, now) && limiter.take(1, 100, now));
        assert!(!limiter.take(1, 1, now) && limiter.is_waiting());
        let later = now + Duration::from_secs(100);
        assert!(limiter.take(1, 100, later) && !limiter.take(1, 1, later));
    }

    #[test]
    fn what_is_larger_than_the_bucket_waits_for_a_full_one_and_is_paid_for_afterwards() {
        let mut limiter = limiter(bucket(100, 1000, None), None);
        let now = Instant::now();
        assert!(limiter.take(1, 300, now));
        assert!(!limiter.take(1, 1, now + 2000 * MS), "200 are owed");
        assert!(limiter.take(1, 1, now + 2011 * MS));
    }

    #[test]
    fn operations_and_bytes_are_taken_together_or_not_at_all() {
        let mut limiter = limiter(bucket(100, 1000, None), bucket(2, 1000, None));
        let now = Instant::now();
        assert!(limiter.take(1, 90, now));
        assert!(!limiter.take(1, 90, now), "no bytes");
        assert!(limiter.take(1, 10, now), "the operation was not taken then");
        assert!(!limiter.take(1, 0, now));
    }

    #[test]
    fn the_timer_is_set_for_the_moment_when_it_may_be_had() {
        let mut limiter = limiter(bucket(1000, 1000, None), None);
        let now = Instant::now();
        assert!(limiter.take(1, 1000, now) && !limiter.take(1, 20, now));
        let mut fds = [rustix::event::PollFd::new(&limiter.timer, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, None).unwrap();
        assert!(now.elapsed() >= 20 * MS);
        limiter.expired();
        assert!(!limiter.is_waiting() && limiter.take(1, 20, Instant::now()));
    }

    #[test]
    fn a_size_or_time_of_zero_sets_no_limit_and_an_update_changes_what_it_names() {
        let mut limiter = limiter(bucket(0, 100, None), bucket(1, 0, None));
        let now = Instant::now();
        assert!((0..1000).all(|_| limiter.take(1, u64::MAX, now)));
        let ops = bucket(1, 1000, None);
        limiter.update(config::RateLimiter { bandwidth: None, ops }, now);
        assert!(limiter.take(1, u64::MAX, now) && !limiter.take(1, 0, now));
        let ops = bucket(0, 0, None);
        limiter.update(config::RateLimiter { bandwidth: None, ops }, now);
        assert!((0..1000).all(|_| limiter.take(1, 1, now)));
    }

    #[test]
    fn an_update_ends_a_wait_for_what_was_refused_before_it() {
        let mut limiter = limiter(None, bucket(1, 3_600_000, None));
        let now = Instant::now();
        assert!(limiter.take(1, 0, now) && !limiter.take(1, 0, now));
        let ops = bucket(0, 0, None);
        limiter.update(config::RateLimiter { bandwidth: None, ops }, now);
        let mut fds = [rustix::event::PollFd::new(&limiter.timer, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, None).unwrap();
        limiter.expired();
        assert!(!limiter.is_waiting() && limiter.take(1, 0, Instant::now()));
    }

    #[test]
    fn the_largest_numbers_do_not_overflow() {
        let mut limiter = limiter(bucket(u64::MAX, u64::MAX, Some(u64::MAX)), None);
        let now = Instant::now();
        let later = now + Duration::from_secs(1 << 40);
        assert!(
            (0..2).all(|_| limiter.take(u64::MAX, u64::MAX, later)),
            "the burst, and the bucket"
        );
        assert!(!limiter.take(u64::MAX, u64::MAX, later));
    }
}
