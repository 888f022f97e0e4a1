//! What the API's thread tells the metrics: how many requests of each kind there were, and how long the process took to serve.

use std::sync::{Mutex, MutexGuard};

use serde_json::{Map, Value, json};

use crate::metrics::Counters;

/// See the module. Shared by the API's thread, which counts, and the VMM thread, which writes metrics.
#[derive(Debug, Default)]
pub struct Requests(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    counts: Counters,
    startup_us: (u64, u64),
}

impl Requests {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no holder of this lock panics")
    }

    /// Adds `by` to counter `name` of `section`; 0 has it shown though there was nothing to count.
    pub fn count(&self, section: &str, name: &str, by: u64) {
        let mut state = self.state();
        let section = state.counts.entry(section).or_insert_with(|| Value::Object(Map::new()));
        let so_far = section[name].as_u64().unwrap_or(0);
        section[name] = so_far.saturating_add(by).into();
    }

    /// The API is served, so many microseconds after the process was started; and of CPU time.
    pub fn served_after(&self, wall_us: u64, cpu_us: u64) {
        self.state().startup_us = (wall_us, cpu_us);
    }

    /// The counters, by Firecracker's names.
    pub(crate) fn counters(&self) -> Counters {
        self.state().counts.clone()
    }

    /// `api_server`: no counter.
    pub(crate) fn startup(&self) -> Value {
        let (wall_us, cpu_us) = self.state().startup_us;
        json!({ "process_startup_time_us": wall_us, "process_startup_time_cpu_us": cpu_us })
    }
}
