//! Whether a CPU's tick is stopped while a thread runs there, judged by what the CPU's local timer does.
//!
//! The LOC count of a CPU grows by one for each interrupt of its local timer: for the tick, HZ times a second, and for
//! every other timer that is due there, such as the guest's own where KVM keeps it with a host hrtimer (always with SVM;
//! with VMX where there is no preemption timer). Therefore
//!
//! * a count that hardly grows while the thread runs proves that the tick is stopped;
//! * one that grows as fast as the tick would proves nothing by itself: the guest's timer may be behind it.
//!
//! How many ticks there must have been, had the tick run, is not `busy / tick`: a thread that sleeps across each tick meets
//! none. A stretch on the CPU of length b holds at least `b / tick - 1` of them, so n stretches of `busy` in all hold at least
//! `busy / tick - n`; and there is one stretch more than there were switches.

/// Fewer ticks than this prove nothing: a timer or two may be due at any time.
const LEAST: u64 = 20;

/// A stopped tick leaves fewer than a tenth of the ticks there would have been. Other timers of the host are rare on a CPU
/// that runs one task; a guest's own timer, slower than that, leaves the verdict as true as it was.
const SHARE: u64 = 10;

/// A verdict stands until the thread has run for so long without another: past that, it is of another time.
const STANDS_NS: u64 = 2_000_000_000;

/// Totals at one instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// LOC of the CPU.
    pub loc: u64,
    /// LOC of all other CPUs together.
    pub loc_elsewhere: u64,
    /// The thread's time on the CPU, in nanoseconds.
    pub busy_ns: u64,
    /// How often the thread left the CPU.
    pub switches: u64,
}

/// What two samples tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// The tick was stopped.
    Stopped,
    /// The timer was as busy as a tick, or nearly: the tick, or something else.
    Doubtful,
    /// Nothing: the thread ran for too short a time, or this host does not count its ticks as LOC.
    Unknown,
}

/// Watches one CPU's tick.
#[derive(Clone, Debug)]
pub struct TickWatch {
    tick_ns: u64,
    last: Option<Sample>,
    stopped: Option<bool>,
}

impl TickWatch {
    /// A watch of a CPU whose tick would come every `tick_ns` nanoseconds.
    #[must_use]
    pub fn new(tick_ns: u64) -> Self {
        Self {
            tick_ns: tick_ns.max(1),
            last: None,
            stopped: None,
        }
    }

    /// Judges the time since the last sample. Where the judgement is [`Judgement::Doubtful`], `settle` is asked whether the
    /// tick runs: it may not know either.
    pub fn observe(&mut self, now: Sample, settle: impl FnOnce() -> Option<bool>) -> Judgement {
        let Some(last) = self.last else {
            self.last = Some(now);
            return Judgement::Unknown;
        };
        let judgement = self.judge(&last, &now);
        match judgement {
            Judgement::Stopped => self.stopped = Some(true),
            Judgement::Doubtful => self.stopped = settle().map(|runs| !runs),
            Judgement::Unknown if now.busy_ns.saturating_sub(last.busy_ns) > STANDS_NS => self.stopped = None,
            // Too little to tell by: the next sample is held against the same one, and may have enough.
            Judgement::Unknown => return judgement,
        }
        self.last = Some(now);
        judgement
    }

    /// Forgets all: the thread ran on another CPU.
    pub fn forget(&mut self) {
        *self = Self::new(self.tick_ns);
    }

    /// Whether the tick was stopped while the thread ran, when that could last be told.
    #[must_use]
    pub fn stopped(&self) -> Option<bool> {
        self.stopped
    }

    fn judge(&self, last: &Sample, now: &Sample) -> Judgement {
        let grown = |of: fn(&Sample) -> u64| of(now).saturating_sub(of(last));
        let stretches = grown(|s| s.switches).saturating_add(1);
        let ticks = (grown(|s| s.busy_ns) / self.tick_ns).saturating_sub(stretches);
        // Where a CPU is tickless another keeps the time, and so its tick: LOC counts it, unless the tick of this host comes
        // from another device (HPET, Hyper-V's or Xen's timers), and then LOC says nothing.
        if ticks < LEAST || grown(|s| s.loc_elsewhere) < ticks / 2 {
            return Judgement::Unknown;
        }
        if grown(|s| s.loc) < ticks / SHARE {
            Judgement::Stopped
        } else {
            Judgement::Doubtful
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TICK: u64 = 4_000_000;
    const SECOND: u64 = 1_000_000_000;

    /// After a second in which the thread ran for `busy_ms`, left the CPU so often, and LOC grew by so much here and elsewhere.
    fn judged(busy_ms: u64, switches: u64, loc: u64, loc_elsewhere: u64) -> Judgement {
        let mut watch = TickWatch::new(TICK);
        let start = Sample {
            loc: 7_000,
            loc_elsewhere: 90_000,
            busy_ns: 5 * SECOND,
            switches: 12,
        };
        assert_eq!(watch.observe(start, || None), Judgement::Unknown);
        let end = Sample {
            loc: start.loc + loc,
            loc_elsewhere: start.loc_elsewhere + loc_elsewhere,
            busy_ns: start.busy_ns + busy_ms * 1_000_000,
            switches: start.switches + switches,
        };
        watch.observe(end, || None)
    }

    #[test]
    fn samples_too_close_to_tell_by_add_up_until_they_tell() {
        // Half of the CPU, in turns of 8 ms, the tick running, looked at each 200 ms.
        let mut watch = TickWatch::new(TICK);
        let mut now = Sample::default();
        let judgements = [(); 6].map(|()| {
            let judgement = watch.observe(now, || Some(true));
            now.busy_ns += 100_000_000;
            now.switches += 12;
            now.loc += 50;
            now.loc_elsewhere += 50;
            judgement
        });
        assert!(judgements.contains(&Judgement::Doubtful), "{judgements:?}");
        assert_eq!(watch.stopped(), Some(false));
    }

    #[test]
    fn a_timer_that_is_silent_while_the_thread_runs_is_a_tick_stopped() {
        use Judgement::{Doubtful, Stopped, Unknown};
        for (what, judgement, busy_ms, switches, loc, elsewhere) in [
            ("spins, no tick", Stopped, 1_000, 0, 1, 250),
            ("spins, a slow timer of the guest's", Stopped, 1_000, 0, 20, 250),
            ("spins, the tick or the guest's timer", Doubtful, 1_000, 0, 250, 250),
            ("spins, something in between", Doubtful, 1_000, 0, 60, 250),
            ("sleeps", Unknown, 0, 1, 0, 250),
            ("runs for a few ticks only", Unknown, 80, 1, 0, 250),
            ("runs half of the time, in long stretches", Stopped, 500, 10, 1, 250),
            ("sleeps across each tick", Unknown, 900, 250, 0, 250),
            ("a host whose tick is no LOC", Unknown, 1_000, 0, 0, 0),
        ] {
            assert_eq!(judged(busy_ms, switches, loc, elsewhere), judgement, "{what}");
        }
    }

    #[test]
    fn a_verdict_stands_while_the_thread_sleeps_and_not_for_ever_while_it_runs() {
        let mut watch = TickWatch::new(TICK);
        let mut now = Sample::default();
        watch.observe(now, || None);
        let mut pass = |watch: &mut TickWatch, busy_ns, switches| {
            now.busy_ns += busy_ns;
            now.switches += switches;
            now.loc_elsewhere += 250;
            watch.observe(now, || None);
            watch.stopped()
        };
        assert_eq!(pass(&mut watch, SECOND, 0), Some(true));
        for _ in 0..100 {
            assert_eq!(pass(&mut watch, 0, 1), Some(true));
        }
        let run: Vec<_> = (0..3).map(|_| pass(&mut watch, SECOND, 1_000)).collect();
        assert_eq!(run, [Some(true), Some(true), None]);
    }

    #[test]
    fn doubt_is_settled_by_who_knows_and_else_is_doubt() {
        for (runs, stopped) in [(Some(true), Some(false)), (Some(false), Some(true)), (None, None)] {
            let mut watch = TickWatch::new(TICK);
            watch.observe(Sample::default(), || None);
            let now = Sample {
                loc: 250,
                loc_elsewhere: 250,
                busy_ns: SECOND,
                switches: 0,
            };
            assert_eq!(watch.observe(now, || runs), Judgement::Doubtful);
            assert_eq!(watch.stopped(), stopped);
        }
    }

    proptest! {
        /// However a thread's stretches on its CPU lie to the ticks, a tick that runs is never judged stopped.
        #[test]
        fn a_tick_that_runs_is_never_judged_stopped(
            stretches in prop::collection::vec((0..3 * TICK, 0..200 * TICK), 1..60),
        ) {
            let (mut watch, mut now) = (TickWatch::new(TICK), Sample::default());
            watch.observe(now, || None);
            let mut at = 0;
            for (idle, busy) in stretches {
                let begin = at + idle;
                at = begin + busy;
                // The tick comes at each multiple of its length, and while the CPU is idle it does not.
                now.loc += at / TICK - begin / TICK;
                now.loc_elsewhere += (idle + busy) / TICK + 1;
                now.busy_ns += busy;
                now.switches += 1;
            }
            prop_assert_ne!(watch.observe(now, || None), Judgement::Stopped);
        }

        #[test]
        fn no_figures_make_it_panic(samples in prop::collection::vec(any::<[u64; 4]>(), 0..5), tick in any::<u64>()) {
            let mut watch = TickWatch::new(tick);
            for [loc, loc_elsewhere, busy_ns, switches] in samples {
                let sample = Sample { loc, loc_elsewhere, busy_ns, switches };
                watch.observe(sample, || Some(true));
            }
        }
    }
}
