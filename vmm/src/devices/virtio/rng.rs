//! The entropy device (5.4): fills what the driver offers with the host's randomness, `getrandom(2)`.
//!
//! A host that has just booted may have none yet. Then the driver waits, as a process on the host would, and the VMM
//! thread does not: it tries again by a timer.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use event_manager::EventSet;
use rustix::rand::{GetRandomFlags, getrandom};
use serde::Serialize;

use super::queue::{Buffers, QueueError};
use super::rate_limiter::RateLimiter;
use super::timer::Timer;
use super::{Active, F_EVENT_IDX, F_INDIRECT_DESC, VirtioDevice, count};
use crate::config::{self, Entropy};

/// Chains at once.
const QUEUE_SIZE: u16 = 256;
/// Bytes that one chain gets at most, as from Firecracker: a chain may name the same memory many times over.
const CHAIN_MAX: usize = 64 << 10;
/// Bytes of one turn, after which others have theirs: a millisecond or so.
const TURN_MAX: usize = 4 * CHAIN_MAX;
/// When to ask a host again that has no randomness yet.
const RETRY: Duration = Duration::from_millis(100);

/// Why there is no entropy device.
#[derive(Debug, thiserror::Error)]
#[error("cannot make the entropy device's timers: {0}; raise the limit on open files (ulimit -n)")]
pub struct RngError(#[from] io::Error);

/// What the device did, since its start.
#[derive(Debug, Default, Serialize)]
pub struct RngMetrics {
    /// Chains that were answered.
    pub entropy_event_count: AtomicU64,
    /// Chains that got nothing: they had no room, or the host gave none.
    pub entropy_event_fails: AtomicU64,
    /// Bytes given.
    pub entropy_bytes: AtomicU64,
    /// How often the host gave none.
    pub host_rng_fails: AtomicU64,
    /// How often the rate limiter made the driver wait.
    pub entropy_rate_limiter_throttled: AtomicU64,
    /// How often a wait for the rate limiter ended.
    pub rate_limiter_event_count: AtomicU64,
}

/// Fills the front of a buffer, without waiting; how much of it.
pub(super) type Source = fn(&mut [u8]) -> io::Result<usize>;

fn host(bytes: &mut [u8]) -> io::Result<usize> {
    Ok(getrandom(bytes, GetRandomFlags::NONBLOCK)?)
}

/// An entropy device.
#[derive(Debug)]
pub struct Rng {
    pub(super) source: Source,
    /// The source gave something once. From then on it always does.
    seeded: bool,
    retry: Timer,
    limiter: RateLimiter,
    metrics: Arc<RngMetrics>,
    active: Option<Active>,
}

impl Rng {
    /// The device that `config` describes.
    ///
    /// # Errors
    /// There are no descriptors left for its timers.
    pub fn new(config: &Entropy) -> Result<Self, RngError> {
        Ok(Self {
            source: host,
            seeded: false,
            retry: Timer::new()?,
            limiter: RateLimiter::new(config.rate_limiter)?,
            metrics: Arc::default(),
            active: None,
        })
    }

    /// What it did so far.
    #[must_use]
    pub fn metrics(&self) -> &Arc<RngMetrics> {
        &self.metrics
    }

    /// Other limits; what waits for the old ones is tried anew.
    pub fn set_rate_limiter(&mut self, config: config::RateLimiter) {
        self.limiter.update(config, Instant::now());
    }

    /// Whether the source gives anything; where it does not the timer is set.
    fn is_seeded(&mut self) -> bool {
        if !self.seeded {
            match (self.source)(&mut [0; 1]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    count(&self.metrics.host_rng_fails, 1);
                    self.retry.after(RETRY);
                }
                // Any other error is that of the chain that meets it.
                _ => self.seeded = true,
            }
        }
        self.seeded
    }

    /// Answers chains, as many as make a turn. True if there may be more.
    fn take(&mut self) -> Result<bool, QueueError> {
        if self.active.is_none() || !self.is_seeded() {
            return Ok(false);
        }
        let Some(active) = &mut self.active else {
            return Ok(false);
        };
        let queue = &mut active.queues[0];
        let memory = active.memory.view();
        let mut given = 0;
        for _ in 0..queue.size() {
            if given >= TURN_MAX {
                break;
            }
            let Some(mut chain) = queue.pop(memory)? else {
                return queue.listen(memory);
            };
            let mut room = chain.writable.take_front(CHAIN_MAX);
            // A buffer to read is none of this device's (5.4.6.1).
            let len = if chain.readable.is_empty() { room.len() } else { 0 };
            if len > 0 && !self.limiter.take(1, len as u64, Instant::now()) {
                queue.unpop();
                count(&self.metrics.entropy_rate_limiter_throttled, 1);
                return Ok(false);
            }
            let filled = if len > 0 { fill(&mut room, self.source) } else { Ok(0) };
            if let Err(error) = &filled {
                tracing::warn!("entropy device: the host gives no randomness: {error}");
                count(&self.metrics.host_rng_fails, 1);
            }
            let filled = filled.unwrap_or(0);
            count(&self.metrics.entropy_event_count, 1);
            count(&self.metrics.entropy_bytes, filled as u64);
            if filled == 0 {
                count(&self.metrics.entropy_event_fails, 1);
            }
            queue.give_back(memory, chain.head, u32::try_from(filled).unwrap_or(u32::MAX))?;
            given += len;
        }
        Ok(true)
    }

    /// As [`Rng::take`], and what belongs around it.
    fn serve(&mut self) -> Result<(), QueueError> {
        if self.limiter.is_waiting() {
            return Ok(());
        }
        let more = self.take()?;
        let Some(active) = &mut self.active else { return Ok(()) };
        if active.queues[0].wants_signal(active.memory.view())? {
            active.interrupt.signal_used();
        }
        if more {
            active.again(0);
        }
        Ok(())
    }
}

/// Fills `room` from `source`; how many bytes.
fn fill(room: &mut Buffers<'_>, source: Source) -> io::Result<usize> {
    let mut chunk = [0; 4096];
    let mut filled = 0;
    while !room.is_empty() {
        let len = room.len().min(chunk.len());
        match source(&mut chunk[..len]) {
            Ok(len) => filled += room.write(&chunk[..len]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        4
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        F_EVENT_IDX | F_INDIRECT_DESC
    }

    /// There is none.
    fn read_config(&self, _offset: usize, _data: &mut [u8]) {}

    fn activate(&mut self, active: Active) {
        self.active = Some(active);
    }

    fn reset(&mut self) {
        self.retry.stop();
        self.active = None;
    }

    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        vec![
            (self.limiter.as_raw_fd(), EventSet::IN),
            (self.retry.as_raw_fd(), EventSet::IN),
        ]
    }

    fn notified(&mut self, _queue: usize) -> Result<(), QueueError> {
        self.serve()
    }

    fn ready(&mut self, source: usize) -> Result<(), QueueError> {
        if source == 0 {
            self.limiter.expired();
            count(&self.metrics.rate_limiter_event_count, 1);
        } else {
            self.retry.expired();
        }
        self.serve()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::super::hostile;
    use super::super::testing::{BUFFERS, Driver, for_driver, from_driver};
    use super::*;
    use crate::config::{RateLimiter as Limits, TokenBucket};

    struct Setup {
        rng: Arc<Mutex<Rng>>,
        driver: Driver,
    }

    impl Setup {
        fn with(limits: Option<Limits>, source: Source) -> Self {
            let mut rng = Rng::new(&Entropy { rate_limiter: limits }).unwrap();
            rng.source = source;
            let rng = Arc::new(Mutex::new(rng));
            let driver = Driver::start(rng.clone(), u64::MAX);
            Self { rng, driver }
        }

        fn metric(&self, which: impl Fn(&RngMetrics) -> &AtomicU64) -> u64 {
            which(self.rng.lock().unwrap().metrics()).load(Ordering::Relaxed)
        }
    }

    /// Not random, and told from memory that nobody wrote.
    fn ones(bytes: &mut [u8]) -> io::Result<usize> {
        bytes.fill(1);
        Ok(bytes.len())
    }

    #[test]
    fn each_chain_gets_what_it_has_room_for_up_to_64_kib() {
        const MAX: u32 = 64 << 10;
        let at = BUFFERS;
        let table = [
            (vec![for_driver(at, 1)], 1),
            (vec![for_driver(at, 64)], 64),
            (vec![for_driver(at, 5000), for_driver(at + 5000, 3)], 5003),
            (vec![for_driver(at, MAX)], MAX),
            (vec![for_driver(at, MAX - 1), for_driver(at + 0x2_0000, 2)], MAX),
            (vec![for_driver(at, 4 << 20)], MAX),
            (vec![for_driver(at, 0)], 0),
            (vec![from_driver(at, 16)], 0),
            (vec![from_driver(at, 16), for_driver(at, 16)], 0),
        ];
        let mut setup = Setup::with(None, ones);
        for (chain, expected) in table {
            let driver = &mut setup.driver;
            driver.write(at, &vec![0; 8 << 20]);
            let head = driver.put(0, &chain);
            driver.notify(0);
            driver.turn(10);
            assert_eq!(driver.used(0), [(head.into(), expected)], "{chain:?}");
            let ones = driver.read(at, 8 << 20).iter().filter(|&&byte| byte == 1).count();
            assert_eq!(ones, expected as usize, "{chain:?}");
        }
        assert_eq!(setup.metric(|metrics| &metrics.entropy_event_count), 9);
        assert_eq!(setup.metric(|metrics| &metrics.entropy_event_fails), 3);
        assert_eq!(
            setup.metric(|metrics| &metrics.entropy_bytes),
            1 + 64 + 5003 + 3 * u64::from(MAX)
        );
    }

    #[test]
    fn the_host_gives_something_else_each_time() {
        let mut setup = Setup::with(None, host);
        let mut read = || {
            setup.driver.put(0, &[for_driver(BUFFERS, 64)]);
            setup.driver.notify(0);
            setup.driver.turn(10);
            setup.driver.read(BUFFERS, 64)
        };
        let first = read();
        // 2^-512 is as good as never.
        assert!(first != [0; 64] && first != read());
    }

    #[test]
    fn a_host_without_randomness_is_asked_again_and_nobody_waits_for_it_meanwhile() {
        static SEEDED: AtomicBool = AtomicBool::new(false);
        fn source(bytes: &mut [u8]) -> io::Result<usize> {
            if SEEDED.load(Ordering::Relaxed) {
                ones(bytes)
            } else {
                Err(io::ErrorKind::WouldBlock.into())
            }
        }
        let mut setup = Setup::with(None, source);
        setup.driver.put(0, &[for_driver(BUFFERS, 64)]);
        setup.driver.notify(0);
        setup.driver.turn(10);
        assert_eq!(setup.driver.used(0), []);
        assert!(setup.metric(|metrics| &metrics.host_rng_fails) > 0);
        SEEDED.store(true, Ordering::Relaxed);
        while setup.driver.used(0).is_empty() {
            assert!(
                setup.driver.turn_for(1, Duration::from_secs(60)) > 0,
                "the timer never came"
            );
        }
        assert_eq!(setup.driver.read(BUFFERS, 64), [1; 64]);
    }

    #[test]
    fn a_source_that_fails_gives_nothing_and_the_driver_its_chain_back() {
        let mut setup = Setup::with(None, |_| Err(io::ErrorKind::Other.into()));
        let head = setup.driver.put(0, &[for_driver(BUFFERS, 64)]);
        setup.driver.notify(0);
        setup.driver.turn(10);
        assert_eq!(setup.driver.used(0), [(head.into(), 0)]);
        assert_eq!(setup.metric(|metrics| &metrics.host_rng_fails), 1);
    }

    #[test]
    fn what_the_limit_does_not_allow_comes_later() {
        let bandwidth = Some(TokenBucket {
            size: 64,
            one_time_burst: None,
            refill_time: 50,
        });
        let mut setup = Setup::with(Some(Limits { bandwidth, ops: None }), ones);
        for _ in 0..2 {
            setup.driver.put(0, &[for_driver(BUFFERS, 64)]);
        }
        setup.driver.notify(0);
        let mut used = 0;
        while used < 2 {
            assert!(
                setup.driver.turn_for(1, Duration::from_secs(60)) > 0,
                "the timer never came"
            );
            used += setup.driver.used(0).len();
        }
        assert!(setup.metric(|metrics| &metrics.entropy_rate_limiter_throttled) > 0);
        assert!(setup.metric(|metrics| &metrics.rate_limiter_event_count) > 0);
    }

    #[test]
    fn a_queue_full_of_the_largest_chains_is_served_in_turns() {
        let mut setup = Setup::with(None, ones);
        setup.driver.turn(10);
        for _ in 0..256 {
            setup.driver.put(0, &[for_driver(BUFFERS, 1 << 20)]);
        }
        setup.driver.notify(0);
        // Four chains a turn; the last turn finds the queue empty.
        assert_eq!(setup.driver.turn(1000), 256 / 4 + 1);
        assert_eq!(setup.driver.used(0).len(), 256);
    }

    #[test]
    fn a_hostile_driver_harms_nobody() {
        let rng = || -> super::super::Shared {
            let mut rng = Rng::new(&Entropy::default()).unwrap();
            // The cases are to be the same each time.
            rng.source = ones;
            Arc::new(Mutex::new(rng))
        };
        hostile::survives(rng);
        hostile::survives_registers(rng);
    }
}
