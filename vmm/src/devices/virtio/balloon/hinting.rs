//! Free page hinting (5.5.6.4): asked by the host, the guest tells once which of its pages are free, and leaves them alone until
//! the host is done with them.
//!
//! ```text
//!  host's command:   0 ──start──► n ────────────────────────────────► 1 (done: the guest may use the pages again)
//!  guest's command:                   n, pages, pages, ..., 0 (stop)      by itself after the guest's stop, or by request
//! ```

use serde::{Deserialize, Serialize};

/// The guest has no more to tell.
const STOP: u32 = 0;
/// The host is done with what it was told.
const DONE: u32 = 1;

/// `PATCH /balloon/hinting/start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct HintingStart {
    /// Whether the guest gets its pages back as soon as it has told all, rather than when it is stopped by request.
    #[serde(default = "yes")]
    pub acknowledge_on_stop: bool,
}

fn yes() -> bool {
    true
}

impl Default for HintingStart {
    fn default() -> Self {
        Self {
            acknowledge_on_stop: true,
        }
    }
}

/// `GET /balloon/hinting/status`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct HintingStatus {
    /// What the host last asked for: a run's number, 0 before the first run, 1 when a run is over.
    pub host_cmd: u32,
    /// What the guest last said: the number of the run it tells pages of, or 0 when it has told all.
    pub guest_cmd: Option<u32>,
}

/// Where a run is.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Hinting {
    pub status: HintingStatus,
    last_run: u32,
    acknowledge_on_stop: bool,
}

impl Hinting {
    /// Begins a run of a number of its own.
    pub fn start(&mut self, start: HintingStart) {
        // Two numbers are taken.
        self.last_run = self.last_run.wrapping_add(1).max(DONE + 1);
        self.acknowledge_on_stop = start.acknowledge_on_stop;
        self.status.host_cmd = self.last_run;
    }

    /// Ends the run.
    pub fn done(&mut self) {
        self.status.host_cmd = DONE;
    }

    /// The guest says `command`. True where that ends the run.
    pub fn hear(&mut self, command: u32) -> bool {
        self.status.guest_cmd = Some(command);
        let ends = command == STOP || command == DONE;
        ends && self.acknowledge_on_stop && self.status.host_cmd > DONE
    }

    /// Whether pages told now are of this run, and not to be touched by the guest.
    pub fn is_of_this_run(&self) -> bool {
        self.status.host_cmd > DONE && self.status.guest_cmd == Some(self.status.host_cmd)
    }

    /// Another driver: it knows nothing of the last one's run.
    pub fn reset(&mut self) {
        self.status = HintingStatus::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_has_a_number_of_its_own_that_is_neither_stop_nor_done() {
        let mut hinting = Hinting::default();
        let mut start = || {
            hinting.start(HintingStart::default());
            hinting.status.host_cmd
        };
        assert_eq!((start(), start()), (2, 3));
        hinting.last_run = u32::MAX;
        hinting.start(HintingStart::default());
        assert_eq!(hinting.status.host_cmd, 2);
    }

    #[test]
    fn pages_count_from_the_guests_answer_to_the_end_of_the_run() {
        let mut hinting = Hinting::default();
        assert!(!hinting.is_of_this_run(), "no run");
        hinting.start(HintingStart::default());
        assert!(!hinting.is_of_this_run(), "no answer");
        assert!(!hinting.hear(7) && !hinting.is_of_this_run(), "another run's");
        assert!(!hinting.hear(2) && hinting.is_of_this_run());
        assert!(hinting.hear(STOP) && !hinting.is_of_this_run());
        hinting.done();
        assert!(!hinting.hear(DONE) && !hinting.is_of_this_run(), "over");
    }

    #[test]
    fn a_run_that_is_to_be_stopped_by_request_is_not_over_before() {
        let mut hinting = Hinting::default();
        hinting.start(HintingStart {
            acknowledge_on_stop: false,
        });
        assert!(!hinting.hear(2) && !hinting.hear(STOP));
        assert_eq!(
            serde_json::from_str::<HintingStart>("{}").unwrap(),
            HintingStart::default()
        );
    }
}
