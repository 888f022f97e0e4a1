//! Where the kernel's own guest time begins and ends: `vtime_guest_enter` and `vtime_guest_exit` of
//! `kernel/sched/cputime.c`, which run on CPUs with full-dynticks accounting only.
//!
//! Each reads the clock somewhere inside. A probe at its first instruction and one at its return enclose that, so the
//! truth is known as an interval, whatever the probes themselves cost (`Documentation/trace/kprobetrace.rst`).

use std::fs::OpenOptions;
use std::io::Write;

use anyhow::{Context, Result, bail, ensure};

use super::{Event, Trace, cut, slices};

const PROBES: &str = "/sys/kernel/tracing/kprobe_events";
const GROUP: &str = "chronovisor";
/// Name, and where: `p` at the first instruction, `r` at the return.
const EVENTS: [(&str, &str); 4] = [
    ("entering", "p:chronovisor/entering vtime_guest_enter"),
    ("entered", "r:chronovisor/entered vtime_guest_enter"),
    ("leaving", "p:chronovisor/leaving vtime_guest_exit"),
    ("left", "r:chronovisor/left vtime_guest_exit"),
];

/// A recording under way; dropped, it leaves nothing behind.
#[derive(Debug)]
pub struct Recording {
    trace: Option<Trace>,
}

/// One stay in the guest, by the kernel's own stamps: each is between two of ours, in ticks of the TSC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stay {
    /// When it began: not before, not after. `u64::MAX` where that was not seen.
    pub begun: [u64; 2],
    /// When it ended, likewise.
    pub ended: [u64; 2],
}

impl Recording {
    /// Starts to record the guest time of the threads `tids`. One recording at a time: there is one set of probes.
    ///
    /// # Errors
    /// The file of tracefs that refused, and why.
    pub fn start(tids: &[i32]) -> Result<Self> {
        let mut recording = Self { trace: None };
        for (_, probe) in EVENTS {
            write(probe)?;
        }
        let events = EVENTS.map(|(name, _)| format!("{GROUP}/{name}"));
        recording.trace = Some(Trace::begin(tids, &events.each_ref().map(String::as_str))?);
        Ok(recording)
    }

    /// Ends the recording: the stays of thread `tid`, in order.
    ///
    /// # Errors
    /// What could not be read; a line that was not understood; records that were lost.
    pub fn stop(&self, tid: i32) -> Result<Vec<Stay>> {
        let mut stays = Vec::new();
        let trace = self.trace.as_ref().context("it was not started")?;
        let never = [u64::MAX; 2];
        let mut open = Stay {
            begun: never,
            ended: never,
        };
        trace.each_line(|line| {
            let (by, tsc, name, _) = cut(line)?;
            if by != tid {
                return Ok(());
            }
            match name {
                "entering" => open.begun = [tsc, u64::MAX],
                "entered" => open.begun[1] = tsc,
                "leaving" => open.ended = [tsc, u64::MAX],
                "left" => {
                    open.ended[1] = tsc;
                    stays.push(open);
                    (open.begun, open.ended) = (never, never);
                }
                _ => bail!("{name} was not asked for"),
            }
            Ok(())
        })?;
        if open.begun != never {
            stays.push(open);
        }
        Ok(stays)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        // The instance first: probes in use cannot be removed. That it should fail is no reason for a test to.
        self.trace = None;
        for (name, _) in EVENTS {
            let _ = write(&format!("-:{GROUP}/{name}"));
        }
    }
}

fn write(line: &str) -> Result<()> {
    let file = OpenOptions::new().append(true).open(PROBES);
    let mut file = file.with_context(|| format!("cannot open {PROBES}"))?;
    writeln!(file, "{line}").with_context(|| format!("cannot write {line:?} to {PROBES}"))
}

/// The same thread's slices in the guest by two recordings, of which one's probes run before what is to be checked and one's
/// after: each stamp lies between theirs.
///
/// # Errors
/// When the two did not see the same.
pub fn between(before: &[Event], after: &[Event]) -> Result<Vec<Stay>> {
    let ended = |(from, to): (u64, Option<u64>)| (from, to.unwrap_or(u64::MAX));
    let [before, after] = [before, after].map(|events| slices(events).map(ended).collect::<Vec<_>>());
    ensure!(
        before.len() == after.len(),
        "one recording has {} slices in the guest, the other {}",
        before.len(),
        after.len()
    );
    let stay = |(before, after): ((u64, u64), (u64, u64))| Stay {
        begun: [before.0, after.0],
        ended: [before.1, after.1],
    };
    Ok(before.into_iter().zip(after).map(stay).collect())
}

/// Guest time until the instant `from..=to`, in ticks: not less than, not more than.
#[must_use]
pub fn guest_ticks_until(stays: &[Stay], [from, to]: [u64; 2]) -> [u64; 2] {
    let of = |stay: &Stay| {
        let least = stay.ended[0].min(from).saturating_sub(stay.begun[1].min(from));
        let most = stay.ended[1].min(to).saturating_sub(stay.begun[0].min(to));
        [least, most]
    };
    stays
        .iter()
        .map(of)
        .fold([0, 0], |sum, one| [sum[0] + one[0], sum[1] + one[1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stay_counts_at_least_between_the_inner_stamps_and_at_most_between_the_outer() {
        let stays = [
            Stay {
                begun: [10, 12],
                ended: [20, 23],
            },
            Stay {
                begun: [30, 31],
                ended: [u64::MAX; 2],
            },
        ];
        assert_eq!(guest_ticks_until(&stays, [5, 5]), [0, 0]);
        assert_eq!(guest_ticks_until(&stays, [15, 16]), [3, 6]);
        assert_eq!(guest_ticks_until(&stays, [25, 25]), [8, 13]);
        assert_eq!(guest_ticks_until(&stays, [40, 42]), [8 + 9, 13 + 12]);
    }
}
