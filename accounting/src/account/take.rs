//! One instant's figures: every probe, the stamps, and what each source claims of them. Nothing here is published, and
//! nothing is kept, but for what one instant must know of another.

use super::seat::Division;
use super::stamped::{Bracket, stamped};
use super::{Account, Books, Claims};
use crate::clock::{Instant, Scale};
use crate::probe::bpf::GuestTime;
use crate::probe::{Depth, KvmCounters, Raw, Utime};
use crate::split::{Inputs, Presence, claims};
use crate::vtime::{Snapshot, State};

/// What is known when the thread has ended.
#[derive(Debug)]
pub(super) struct Closed {
    pub(super) raw: Raw,
    /// Whether the thread may have run on another CPU than its own.
    pub(super) moved: bool,
    /// Around the last instant.
    pub(super) bracket: Bracket,
    pub(super) stamps: Option<GuestTime>,
}

/// One instant's figures, before anything is published.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    /// From the first probe to the instant, in nanoseconds.
    pub(super) took_ns: u64,
    pub(super) raw: Raw,
    /// The one CPU that the thread is pinned to, if to one.
    pub(super) pinned: Option<u32>,
    pub(super) tick_stopped: Option<bool>,
    /// Whether the kernel's division of the thread's CPU time proves nothing any more.
    pub(super) vtime_void: bool,
    pub(super) snapshot: Snapshot,
    pub(super) scale: Scale,
    /// Time on a CPU while paused, in nanoseconds.
    pub(super) paused_cpu_ns: u64,
    pub(super) inputs: Inputs,
    pub(super) at: Presence,
    pub(super) claims: Claims,
}

impl Account {
    /// Inlined by force: what it gives is a kilobyte, which a call would copy.
    #[inline(always)]
    pub(super) fn take(&self, books: &mut Books, depth: Depth) -> Option<Taken> {
        let (raw, snapshot, (bracket, stamps)) = match self.closed.get() {
            Some(end) => self.taken_last(end)?,
            None => {
                let raw = books.probes.read(depth).ok()?;
                let (snapshot, instant) = self.vtime.snapshot_at(|| self.instant())?;
                match self.closed.get() {
                    // It has ended meanwhile: then all is of its last instant, and not of this one.
                    Some(end) => self.taken_last(end)?,
                    None => (raw, snapshot, instant),
                }
            }
        };
        let (seen, moved) = match self.closed.get() {
            Some(end) => (books.watch.findings(), end.moved),
            None => {
                let Raw { stat, run_delay_ns, .. } = raw;
                let seen = (books.watch).look(bracket.now.ns, raw.sched_ns, stat.processor, run_delay_ns);
                (seen, false)
            }
        };
        let (tick_stopped, vtime_void) = (seen.tick_stopped, seen.vtime_void || moved);
        let scale = Scale::of(self.opened, bracket.now);
        let seat = books.seat;
        let paused_cpu_ns = paused_cpu_ns(&snapshot, &raw);
        let mut inputs = self.inputs(&snapshot, bracket.now, scale, &raw);
        inputs.earlier = seat.earlier;
        if let (Some(utime), Some(begun)) = (raw.utime, &seat.division) {
            self.divide(&mut inputs, &raw, utime, begun, paused_cpu_ns);
        }
        if vtime_void {
            inputs.utime = None;
        }
        // A scale that is better known may convert the same ticks to a nanosecond less.
        inputs.paused_ns = inputs.paused_ns.max(books.ledger.modes().paused_ns);
        let at = books.split.presence(&inputs);
        let bpf = stamps.map(|time| {
            let steered = books.steering.seen(bracket.lead());
            stamped(time, &bracket, steered, inputs.elapsed_ns)
        });
        Some(Taken {
            took_ns: scale.to_ns(bracket.now.ticks.saturating_sub(raw.begun_at)),
            raw,
            pinned: seat.pinned,
            tick_stopped,
            vtime_void,
            snapshot,
            scale,
            paused_cpu_ns,
            inputs,
            at,
            claims: [
                bpf.map(Into::into),
                claims::vtime(&inputs, &at),
                Some(claims::oncpu(&inputs, &at)),
            ],
        })
    }

    /// What was taken when the thread ended.
    #[cold]
    fn taken_last(&self, end: &Closed) -> Option<(Raw, Snapshot, (Bracket, Option<GuestTime>))> {
        Some((end.raw, self.vtime.snapshot()?, (end.bracket, end.stamps)))
    }

    /// This instant, and BPF's stamps at it, if KVM's tracepoints have been heard.
    pub(super) fn instant(&self) -> (Bracket, Option<GuestTime>) {
        match &self.stamps {
            Ok(tracked) => {
                let (bracket, time) = Bracket::around(tracked);
                (bracket, time.filter(|_| tracked.heard()))
            }
            Err(_) => (Bracket::without(), None),
        }
    }

    fn inputs(&self, snapshot: &Snapshot, now: Instant, scale: Scale, raw: &Raw) -> Inputs {
        let slice = now.ticks.saturating_sub(snapshot.stamp);
        let running = |state| if snapshot.state == state { slice } else { 0 };
        let base = &self.baseline;
        let paused_cpu_ns = paused_cpu_ns(snapshot, raw);
        let kvm = |pick: fn(&KvmCounters) -> Option<u64>| {
            let value = |raw: &Raw| raw.kvm.as_ref().and_then(pick).unwrap_or(0);
            value(raw).saturating_sub(value(base))
        };
        let sched_age_ns = scale.to_ns(now.ticks.saturating_sub(raw.sched_read_at));
        // At most: a thread that was asleep may have woken up since.
        let sched_now_ns = raw.sched_ns.saturating_add(sched_age_ns);
        Inputs {
            elapsed_ns: scale.span_ns(),
            paused_ns: scale.to_ns(snapshot.paused + running(State::Paused)),
            vmm_ns: scale.to_ns(snapshot.vmm + running(State::Vmm)),
            state: snapshot.state,
            slice_ns: scale.to_ns(if snapshot.state == State::Inactive { 0 } else { slice }),
            sched_ns: raw.sched_ns.saturating_sub(base.sched_ns).saturating_sub(paused_cpu_ns),
            sched_age_ns,
            on_cpu: raw.on_cpu,
            runnable: raw.stat.state == b'R',
            uninterruptible: raw.stat.state == b'D',
            stat_unit_ns: self.stat_unit_ns,
            stat_age_ns: sched_now_ns.saturating_sub(raw.stat_sched_ns),
            run_delay_ns: raw.run_delay_ns.saturating_sub(base.run_delay_ns),
            halt_wait_ns: kvm(|k| k.halt_wait_ns),
            halt_poll_ns: kvm(|k| k.halt_poll_ns),
            age_ns: sched_now_ns.saturating_sub(raw.sched_before_ns),
            tick_ns: self.tick_ns,
            ..Inputs::default()
        }
    }

    /// What depends on where the thread is put: the kernel's division of its CPU time, since it was put there.
    fn divide(&self, inputs: &mut Inputs, raw: &Raw, utime: Utime, begun: &Division, paused_cpu_ns: u64) {
        let paused_since_ns = paused_cpu_ns.saturating_sub(begun.paused_cpu_ns);
        inputs.utime = Some(Utime {
            virt_ns: utime.virt_ns.saturating_sub(begun.utime.virt_ns),
            prof_ns: (utime.prof_ns.saturating_sub(begun.utime.prof_ns)).saturating_sub(paused_since_ns),
        });
        inputs.stat_guest_ns =
            (raw.stat.guest_time_clk.saturating_sub(begun.guest_time_clk)).saturating_mul(self.stat_unit_ns);
        // Where the thread had run a guest before, the figure was rounded down then too, and lacked a residue.
        inputs.stat_baseline_ns = match begun.guest_time_clk {
            0 => 0,
            _ => self.stat_unit_ns + self.tick_ns,
        };
    }
}

/// What pauses cost the thread in time on a CPU: not the guest's, nor the kernel's share of running it.
fn paused_cpu_ns(snapshot: &Snapshot, raw: &Raw) -> u64 {
    let this_pause = match snapshot.state {
        State::Paused => raw.sched_ns.saturating_sub(snapshot.pause_began_cpu_ns),
        State::Inactive | State::Vmm | State::Guest => 0,
    };
    snapshot.paused_cpu_ns + this_pause
}
