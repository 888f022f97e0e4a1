//! A client that asks for a reading again and again, while a crowd asks for something else: how long it waits for its answers, and
//! how long the vCPU waits for its CPU.
//!
//! Times say little on a machine that others use too. So a look at a crowd is compared with looks before and after it, and held
//! against it only where those were quiet: [`unnoticed`].

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use accounting::Reading;
use anyhow::{Result, ensure};

use crate::client;
use crate::connection::Connection;
use crate::vm::grown;

/// How often it asks.
const ASK: Duration = Duration::from_millis(5);

/// What was seen in one look.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// How long half of the answers took at most, in microseconds.
    pub p50_us: f64,
    /// And 99 of 100.
    pub p99_us: f64,
    /// And the slowest.
    pub most_us: f64,
    /// The share of the time for which the vCPU waited for its CPU, by its own ledger.
    pub waiting_share: f64,
    /// The share of the time for which its guest ran.
    pub guest_share: f64,
}

/// What a crowd may do to those who have no part in it.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// [`Seen::p99_us`] at most.
    pub p99_us: f64,
    /// How much more [`Seen::waiting_share`] may be than without it.
    pub waiting_share: f64,
    /// And how much less [`Seen::guest_share`].
    pub guest_share: f64,
}

/// What a crowd that only reads may do: 5 ms for 99 of 100 readings, and half of what the alert on a vCPU that waits
/// (resources/prometheus/alerts.yml) takes for a disturbance.
pub const READERS: Limits = Limits {
    p99_us: 5_000.0,
    waiting_share: 0.005,
    guest_share: 0.01,
};

impl Limits {
    /// Whether `with` the crowd is as it shall be, by what was seen `without` it.
    #[must_use]
    pub fn hold(&self, with: &Seen, without: [&Seen; 2]) -> bool {
        let waiting = without[0].waiting_share.max(without[1].waiting_share);
        let guest = without[0].guest_share.min(without[1].guest_share);
        with.p99_us <= self.p99_us
            && with.waiting_share <= waiting + self.waiting_share
            && with.guest_share >= guest - self.guest_share
    }

    /// Whether shares can be compared at all: a vCPU that is kept from its CPU by others has no time that could be taken from it.
    fn can_tell(alone: &Seen) -> bool {
        alone.waiting_share < 0.1
    }

    /// Whether the machine let itself be measured: alone, a tenth of what is allowed is never used up.
    fn are_far_off(&self, alone: &Seen) -> bool {
        alone.p99_us < self.p99_us / 10.0 && alone.waiting_share < self.waiting_share / 10.0
    }
}

/// The client, on a connection that it keeps.
#[derive(Debug)]
pub struct Bystander {
    connection: Connection,
    socket: PathBuf,
}

impl Bystander {
    /// Connects to the API's socket.
    ///
    /// # Errors
    /// What the socket says.
    pub fn open(socket: &Path) -> Result<Self> {
        let mut connection = Connection::open(socket)?;
        connection.get("/vcpus/0/cputime")?;
        Ok(Self {
            connection,
            socket: socket.to_owned(),
        })
    }

    /// Looks for so long; `between` is called after each hundred answers.
    ///
    /// # Errors
    /// What the socket says.
    pub fn look(&mut self, lasts: Duration, mut between: impl FnMut() -> Result<()>) -> Result<Seen> {
        let (begun, before) = (Instant::now(), self.reading()?);
        let mut times = Vec::new();
        while begun.elapsed() < lasts {
            let asked = Instant::now();
            self.connection.get("/vcpus/0/cputime")?;
            times.push(asked.elapsed().as_secs_f64() * 1e6);
            if times.len() % 100 == 0 {
                between()?;
            }
            std::thread::sleep(ASK);
        }
        let after = self.reading()?;
        ensure!(!times.is_empty(), "there was no time for a question");
        times.sort_by(f64::total_cmp);
        let at = |thousandths: usize| times[(times.len() * thousandths / 1000).min(times.len() - 1)];
        let modes = grown(&before, &after);
        let share = |ns: u64| ns as f64 / (after.elapsed_ns - before.elapsed_ns) as f64;
        Ok(Seen {
            p50_us: at(500),
            p99_us: at(990),
            most_us: at(1000),
            waiting_share: share(modes.waiting_ns),
            guest_share: share(modes.guest_ns),
        })
    }

    fn reading(&self) -> Result<Reading> {
        let answer = client::request(&self.socket, "GET", "/vcpus/0/cputime", None)?;
        ensure!(answer.status == 200, "{}", answer.fault());
        Ok(serde_json::from_value(answer.body)?)
    }
}

/// Whether a crowd goes unnoticed: three looks of a second at a time, with a crowd that `gather` gathers in the middle one.
///
/// What the machine does by itself is told apart by trying again: it passes, and what the crowd does does not. One look at it within
/// `limits`, while the vCPU has its CPU, is proof; that it is over them, only three that lie between quiet ones are.
///
/// # Errors
/// There was neither proof nor disproof: the machine was never quiet.
///
/// # Panics
/// When it is noticed, or the API does not answer.
pub fn unnoticed<C>(bystander: &mut Bystander, limits: Limits, mut gather: impl FnMut() -> C) -> Result<Seen, String> {
    const LOOK: Duration = Duration::from_secs(1);
    const TRIES: usize = 6;
    let mut look = || bystander.look(LOOK, || Ok(())).expect("the API");
    let (mut looks, mut over) = (Vec::new(), 0);
    for _ in 0..TRIES {
        let before = look();
        let crowd = gather();
        let with = look();
        drop(crowd);
        let after = look();
        if limits.hold(&with, [&before, &after]) {
            if Limits::can_tell(&before) && Limits::can_tell(&after) {
                return Ok(with);
            }
            looks.push([before, with, after]);
            continue;
        }
        over += usize::from([before, after].iter().all(|alone| limits.are_far_off(alone)));
        looks.push([before, with, after]);
        assert!(
            over < 3,
            "noticed three times on a quiet machine, {limits:?}: {looks:#?}"
        );
    }
    println!("{looks:#?}");
    let alone = || looks.iter().flat_map(|[before, _, after]| [before, after]);
    let waited = alone().map(|seen| seen.waiting_share * 100.0).fold(0.0, f64::max);
    let p99_us = alone().map(|seen| seen.p99_us).fold(0.0, f64::max);
    Err(format!(
        "the machine was never quiet: alone the vCPU waited for its CPU for {waited:.0} % of a look, and a reading took {p99_us:.0} us"
    ))
}
