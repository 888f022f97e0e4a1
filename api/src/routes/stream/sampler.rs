//! Who reads for the streams: one task for each interval in use, which ends once nobody listens at that interval.
//!
//! It tells its clients in groups, and lets everything else that is ready run in between: a thousand messages take some
//! milliseconds to send, which no request shall wait for.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use axum::body::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, MissedTickBehavior};

use super::{NONE_YET, lock, render};
use crate::backend::Backend;
use crate::routes::Fault;

/// Clients that may listen at once.
const STREAMS: usize = 1024;

/// Clients told at once: sending them their messages takes a fraction of a millisecond.
pub(super) const GROUP: usize = 32;

/// All streams.
#[derive(Debug, Default)]
pub(in crate::routes) struct Streams {
    room: OnceLock<Arc<Semaphore>>,
    samplers: Mutex<Samplers>,
}

/// The samplers at work.
#[derive(Debug, Default)]
struct Samplers {
    /// The groups of clients that each of them tells, by its interval in milliseconds.
    at: BTreeMap<u64, Vec<watch::Sender<Bytes>>>,
    ended: bool,
}

/// How many clients there may be: half the files this process may have open belong to others, whatever there are.
pub(super) fn room() -> usize {
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    files.map_or(STREAMS, |files| {
        STREAMS.min(usize::try_from(files / 2).unwrap_or(STREAMS))
    })
}

impl Streams {
    /// A place for one more client.
    pub(super) fn place(&self) -> Result<OwnedSemaphorePermit, Fault> {
        let room = self.room.get_or_init(|| Arc::new(Semaphore::new(room())));
        room.clone()
            .try_acquire_owned()
            .map_err(|_| Fault::too_many("Too many clients listen to the stream."))
    }

    /// What the sampler of that interval says from now on; it is started if need be.
    pub(super) fn join(self: Arc<Self>, backend: &Arc<dyn Backend>, interval_ms: u64) -> watch::Receiver<Bytes> {
        let mut samplers = lock(&self.samplers);
        if samplers.ended {
            return watch::Sender::default().subscribe();
        }
        let idle = !samplers.at.contains_key(&interval_ms);
        let groups = samplers.at.entry(interval_ms).or_default();
        let client = match groups.iter().find(|group| group.receiver_count() < GROUP) {
            Some(group) => group.subscribe(),
            None => {
                let (group, client) = watch::channel(Bytes::new());
                groups.push(group);
                client
            }
        };
        drop(samplers);
        if idle {
            tokio::spawn(self.sample(backend.clone(), interval_ms));
        }
        client
    }

    async fn sample(self: Arc<Self>, backend: Arc<dyn Backend>, interval_ms: u64) {
        let interval = Duration::from_millis(interval_ms);
        let mut ticks = tokio::time::interval_at(Instant::now() + interval, interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut capacity = 0;
        loop {
            ticks.tick().await;
            if !self.has_clients(interval_ms) {
                return;
            }
            let readings = render(&*backend, capacity);
            if readings == NONE_YET {
                continue;
            }
            capacity = readings.len();
            let mut group = 0;
            while self.tell(interval_ms, group, &readings) {
                group += 1;
                tokio::task::yield_now().await;
            }
        }
    }

    /// Whether anybody listens at that interval; if not, there is no such sampler any more.
    fn has_clients(&self, interval_ms: u64) -> bool {
        let mut samplers = lock(&self.samplers);
        let Some(groups) = samplers.at.get_mut(&interval_ms) else {
            return false;
        };
        groups.retain(|group| group.receiver_count() > 0);
        let some = !groups.is_empty();
        if !some {
            samplers.at.remove(&interval_ms);
        }
        some
    }

    /// Tells one group; false where there is none of that number.
    fn tell(&self, interval_ms: u64, group: usize, readings: &Bytes) -> bool {
        let samplers = lock(&self.samplers);
        let group = samplers.at.get(&interval_ms).and_then(|groups| groups.get(group));
        group.map(|group| group.send_replace(readings.clone())).is_some()
    }

    /// Ends all streams, and those still to come.
    pub(in crate::routes) fn end(&self) {
        let mut samplers = lock(&self.samplers);
        samplers.ended = true;
        samplers.at.clear();
    }

    #[cfg(test)]
    pub(super) fn are_idle(&self) -> bool {
        lock(&self.samplers).at.is_empty()
    }
}
