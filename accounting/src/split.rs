//! The split: what vtime stamped and what the kernel knows, made into modes and bounds.
//!
//! Four facts are exact, and everything is hung on them: the elapsed time E and the paused time P (stamps), the VMM's
//! wall time V outside `KVM_RUN` (stamps), and the time on a CPU (the SCHED clock). So
//!
//! ```text
//!   E = P + on-CPU + off-CPU
//!   on-CPU  = guest + host_user + host_kernel
//!   off-CPU = halted + waiting + blocked
//! ```
//!
//! *Off-CPU.* `waiting` is the scheduler's run_delay and `halted` KVM's halt_wait; both land when the wait ends, so
//! what is off-CPU beyond the two is either blocked time of the past or the wait still going on. The state at the
//! instant of reading tells which: blocked time is what was beyond the two when last seen with nothing going on.
//!
//! *On-CPU, source `vtime`.* User time cannot accrue inside the ioctl, so the kernel's VIRT = guest + host_user and
//! host_user <= V give guest in `[VIRT - V, VIRT]`; the stat file cuts it to `[stat, stat + 10 ms]`. What the kernel's
//! reader leaves out, less than a tick each in utime and in gtime, widens both.
//!
//! *On-CPU, source `oncpu`.* The kernel samples, so its division of CPU time proves nothing. Guest time is at most the
//! on-CPU time inside `KVM_RUN`, and that less halt-polling is the estimate.

use crate::reading::{Bounds, Mode, Modes, Source, VcpuState};
use crate::vtime::State;

/// One instant's figures, all since the first stamp, all in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inputs {
    /// Time since the first stamp.
    pub elapsed_ns: u64,
    /// Paused, the running slice included.
    pub paused_ns: u64,
    /// Outside `KVM_RUN` and not paused, the running slice included.
    pub vmm_ns: u64,
    /// The state at the instant.
    pub state: State,
    /// How long it has been in that state.
    pub slice_ns: u64,
    /// On a CPU: the SCHED clock.
    pub sched_ns: u64,
    /// How old that is at the instant.
    pub sched_age_ns: u64,
    /// Whether the thread is on a CPU at the instant.
    pub on_cpu: bool,
    /// Whether the kernel has it runnable (state `R`), on a CPU or not.
    pub runnable: bool,
    /// The VIRT clock.
    pub virt_ns: u64,
    /// The PROF clock.
    pub prof_ns: u64,
    /// Guest time as the stat file has it, rounded down to `stat_unit_ns`.
    pub stat_guest_ns: u64,
    /// The unit of the stat file: 10 ms.
    pub stat_unit_ns: u64,
    /// run_delay.
    pub run_delay_ns: u64,
    /// KVM's halt_wait; 0 where there is none.
    pub halt_wait_ns: u64,
    /// KVM's halt-polling; 0 where there is none.
    pub halt_poll_ns: u64,
    /// How old the oldest of the probes may be at the instant.
    pub age_ns: u64,
    /// Length of the host's tick.
    pub tick_ns: u64,
}

/// One instant's raw answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Sums to the elapsed time; may step back from one instant to the next.
    pub modes: Modes,
    /// Holds the true guest time.
    pub guest: Bounds,
    /// What the vCPU is doing.
    pub state: VcpuState,
    /// The mode that the running slice counts as.
    pub pending: Mode,
}

/// Splits; keeps from one instant to the next only how much was blocked for certain.
#[derive(Clone, Debug)]
pub struct Split {
    source: Source,
    blocked_ns: u64,
}

impl Split {
    /// A split by `source`.
    #[must_use]
    pub fn new(source: Source) -> Self {
        Self { source, blocked_ns: 0 }
    }

    /// By what.
    #[must_use]
    pub fn source(&self) -> Source {
        self.source
    }

    /// Splits one instant.
    pub fn split(&mut self, i: &Inputs) -> Answer {
        let (state, pending) = state_of(i);
        let paused = i.paused_ns.min(i.elapsed_ns);
        let active = i.elapsed_ns - paused;
        // A thread that was on a CPU when its SCHED clock was read, just before the instant, is so still.
        let since = if i.on_cpu { i.sched_age_ns } else { 0 };
        let on_cpu = i.sched_ns.saturating_add(since).min(active);

        let off_cpu = active - on_cpu;
        let waiting = i.run_delay_ns.min(off_cpu);
        // halt_wait goes on until the vCPU runs again, so the wait for a CPU after the wake-up is in both.
        let halted = i.halt_wait_ns.min(off_cpu - waiting);
        let mut modes = Modes {
            paused_ns: paused,
            waiting_ns: waiting,
            halted_ns: halted,
            ..Modes::default()
        };
        self.off_cpu_rest(i, state, off_cpu - waiting - halted, &mut modes);

        let guest = match self.source {
            Source::Vtime => by_vtime(i, on_cpu, active, &mut modes),
            Source::Oncpu => by_on_cpu(i, on_cpu, active, &mut modes),
        };
        Answer {
            modes,
            guest,
            state,
            pending,
        }
    }

    /// Gives what is off-CPU and neither run_delay nor halt_wait to the wait still going on, less what was blocked
    /// earlier.
    fn off_cpu_rest(&mut self, i: &Inputs, state: VcpuState, rest: u64, modes: &mut Modes) {
        // No wait is longer than the slice it is in.
        let before = self.blocked_ns.max(rest.saturating_sub(i.slice_ns)).min(rest);
        match state {
            VcpuState::Halted => modes.halted_ns += rest - before,
            VcpuState::Waiting => modes.waiting_ns += rest - before,
            VcpuState::Blocked => {
                modes.blocked_ns = rest;
                return;
            }
            VcpuState::Guest | VcpuState::Vmm | VcpuState::Paused | VcpuState::Exited => {
                self.blocked_ns = rest;
                modes.blocked_ns = rest;
                return;
            }
        }
        modes.blocked_ns = before;
    }
}

/// What the vCPU is doing, and the mode its running slice counts as.
fn state_of(i: &Inputs) -> (VcpuState, Mode) {
    match i.state {
        State::Inactive => (VcpuState::Exited, Mode::Paused),
        State::Paused => (VcpuState::Paused, Mode::Paused),
        State::Guest if i.on_cpu => (VcpuState::Guest, Mode::Guest),
        State::Vmm if i.on_cpu => (VcpuState::Vmm, Mode::HostUser),
        _ if i.runnable => (VcpuState::Waiting, Mode::Waiting),
        // Asleep inside the ioctl: KVM sleeps interruptibly in HLT and nowhere else for long.
        State::Guest => (VcpuState::Halted, Mode::Halted),
        State::Vmm => (VcpuState::Blocked, Mode::Blocked),
    }
}

/// The kernel's own division of CPU time, which on a CPU with vtime is exact to its unflushed residues.
fn by_vtime(i: &Inputs, on_cpu: u64, active: u64, modes: &mut Modes) -> Bounds {
    // utime and gtime are flushed when they reach a tick, so up to one of each is missing from a read; and from the
    // baseline that was subtracted.
    let residue = 2 * i.tick_ns;
    let in_run = active.saturating_sub(i.vmm_ns);
    let kernel = i.prof_ns.saturating_sub(i.virt_ns).min(on_cpu);
    let user = on_cpu - kernel;

    // All are as old as the probes, and so is a lower bound's truth: true then, true now. An upper one must add the age.
    let uppers = [
        i.virt_ns.saturating_add(residue).saturating_add(i.age_ns),
        i.stat_guest_ns
            .saturating_add(i.stat_unit_ns)
            .saturating_add(residue)
            .saturating_add(i.age_ns),
        in_run,
        on_cpu.saturating_add(i.age_ns),
    ];
    let upper = uppers.into_iter().fold(u64::MAX, u64::min);
    let lower = i
        .virt_ns
        .saturating_sub(i.vmm_ns)
        .saturating_sub(residue)
        .max(i.stat_guest_ns);
    // Where two of the clocks contradict each other, one of them is wrong and there is no telling which: both are inside.
    let (lower, upper) = (lower.min(upper), upper.max(lower));

    modes.guest_ns = user.saturating_sub(i.vmm_ns).clamp(lower, upper).min(on_cpu);
    modes.host_user_ns = user.saturating_sub(modes.guest_ns);
    modes.host_kernel_ns = on_cpu - modes.guest_ns - modes.host_user_ns;
    Bounds { lower, upper }
}

/// What can be said where the kernel samples.
fn by_on_cpu(i: &Inputs, on_cpu: u64, active: u64, modes: &mut Modes) -> Bounds {
    modes.host_user_ns = i.vmm_ns.min(on_cpu);
    let in_run = on_cpu - modes.host_user_ns;
    modes.host_kernel_ns = i.halt_poll_ns.min(in_run);
    modes.guest_ns = in_run - modes.host_kernel_ns;
    // The VMM may have been off the CPU for any part of V: then more of the on-CPU time was inside KVM_RUN.
    let upper = active.saturating_sub(i.vmm_ns).min(on_cpu.saturating_add(i.age_ns));
    // That none of it was spent handling exits in the kernel cannot be shown.
    Bounds { lower: 0, upper }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;

    /// A second in: 900 ms in KVM_RUN, 100 ms in the VMM, always on a CPU.
    fn spinning() -> Inputs {
        Inputs {
            elapsed_ns: 1_000 * MS,
            vmm_ns: 100 * MS,
            state: State::Guest,
            slice_ns: 5 * MS,
            sched_ns: 1_000 * MS,
            on_cpu: true,
            runnable: true,
            virt_ns: 950 * MS,
            prof_ns: 1_000 * MS,
            stat_guest_ns: 840 * MS,
            stat_unit_ns: 10 * MS,
            tick_ns: 4 * MS,
            ..Inputs::default()
        }
    }

    #[test]
    fn vtime_takes_the_vmms_wall_time_for_its_user_time_within_what_stat_allows() {
        let answer = Split::new(Source::Vtime).split(&spinning());
        assert_eq!(answer.modes.guest_ns, 850 * MS);
        assert_eq!(answer.modes.host_user_ns, 100 * MS);
        assert_eq!(answer.modes.host_kernel_ns, 50 * MS);
        assert_eq!(
            answer.guest,
            Bounds {
                lower: 842 * MS,
                upper: 858 * MS
            }
        );
    }

    #[test]
    fn clocks_that_contradict_each_other_widen_the_bounds() {
        let inputs = Inputs {
            stat_guest_ns: 910 * MS,
            ..spinning()
        };
        // No more than 900 ms were inside KVM_RUN, and no less than 910 ms were the guest's.
        let answer = Split::new(Source::Vtime).split(&inputs);
        assert_eq!(
            answer.guest,
            Bounds {
                lower: 900 * MS,
                upper: 910 * MS
            }
        );
    }

    #[test]
    fn on_cpu_claims_no_more_than_it_can_prove() {
        let inputs = Inputs {
            halt_poll_ns: 30 * MS,
            ..spinning()
        };
        let answer = Split::new(Source::Oncpu).split(&inputs);
        assert_eq!(answer.modes.guest_ns, 870 * MS);
        assert_eq!(answer.modes.host_kernel_ns, 30 * MS);
        assert_eq!(
            answer.guest,
            Bounds {
                lower: 0,
                upper: 900 * MS
            }
        );
    }

    #[test]
    fn a_halt_still_going_on_is_halted_and_so_it_is_once_kvm_has_counted_it() {
        let mut split = Split::new(Source::Oncpu);
        let asleep = Inputs {
            elapsed_ns: 3_000 * MS,
            sched_ns: 1_000 * MS,
            slice_ns: 2_000 * MS,
            on_cpu: false,
            runnable: false,
            ..spinning()
        };
        let during = split.split(&asleep);
        assert_eq!((during.state, during.pending), (VcpuState::Halted, Mode::Halted));
        assert_eq!((during.modes.halted_ns, during.modes.blocked_ns), (2_000 * MS, 0));
        let awake = Inputs {
            halt_wait_ns: 2_000 * MS,
            on_cpu: true,
            runnable: true,
            slice_ns: 2_000 * MS,
            ..asleep
        };
        assert_eq!(split.split(&awake).modes.halted_ns, 2_000 * MS);
    }

    #[test]
    fn a_wait_for_a_cpu_still_going_on_is_waiting() {
        let inputs = Inputs {
            elapsed_ns: 1_003 * MS,
            on_cpu: false,
            ..spinning()
        };
        let answer = Split::new(Source::Oncpu).split(&inputs);
        assert_eq!((answer.state, answer.modes.waiting_ns), (VcpuState::Waiting, 3 * MS));
    }

    #[test]
    fn what_was_blocked_stays_blocked_when_the_guest_halts_later() {
        let mut split = Split::new(Source::Oncpu);
        let blocked = Inputs {
            elapsed_ns: 1_007 * MS,
            vmm_ns: 107 * MS,
            state: State::Vmm,
            slice_ns: 8 * MS,
            on_cpu: false,
            runnable: false,
            ..spinning()
        };
        assert_eq!(split.split(&blocked).modes.blocked_ns, 7 * MS);
        let back = Inputs {
            on_cpu: true,
            runnable: true,
            ..blocked
        };
        assert_eq!(split.split(&back).modes.blocked_ns, 7 * MS);
        let halted = Inputs {
            elapsed_ns: 1_107 * MS,
            state: State::Guest,
            slice_ns: 101 * MS,
            ..blocked
        };
        let answer = split.split(&halted);
        assert_eq!((answer.modes.halted_ns, answer.modes.blocked_ns), (100 * MS, 7 * MS));
    }

    #[test]
    fn the_wake_up_latency_that_both_counters_hold_is_waiting_once() {
        let inputs = Inputs {
            elapsed_ns: 1_100 * MS,
            run_delay_ns: 30 * MS,
            halt_wait_ns: 100 * MS,
            ..spinning()
        };
        let modes = Split::new(Source::Oncpu).split(&inputs).modes;
        assert_eq!(
            (modes.waiting_ns, modes.halted_ns, modes.blocked_ns),
            (30 * MS, 70 * MS, 0)
        );
    }

    fn any_inputs() -> impl Strategy<Value = Inputs> {
        let figures = proptest::array::uniform12(0u64..1 << 63);
        (figures, 0u64..4, any::<[bool; 2]>()).prop_map(|(f, state, [on_cpu, runnable])| Inputs {
            elapsed_ns: f[0],
            paused_ns: f[1],
            vmm_ns: f[2],
            state: [State::Inactive, State::Vmm, State::Guest, State::Paused][usize::try_from(state).expect("< 4")],
            slice_ns: f[3],
            sched_ns: f[4],
            sched_age_ns: f[11] >> 24,
            on_cpu,
            runnable,
            virt_ns: f[5],
            prof_ns: f[6],
            stat_guest_ns: f[7],
            stat_unit_ns: 10 * MS,
            run_delay_ns: f[8],
            halt_wait_ns: f[9],
            halt_poll_ns: f[10],
            age_ns: f[11] >> 20,
            tick_ns: 4 * MS,
        })
    }

    proptest! {
        #[test]
        fn whatever_the_probes_say_the_modes_sum_to_the_elapsed_time(
            history in proptest::collection::vec(any_inputs(), 1..20),
            source in prop_oneof![Just(Source::Vtime), Just(Source::Oncpu)],
        ) {
            let mut split = Split::new(source);
            for inputs in history {
                let answer = split.split(&inputs);
                prop_assert_eq!(answer.modes.sum_ns(), inputs.elapsed_ns);
                prop_assert!(answer.guest.lower <= answer.guest.upper);
            }
        }
    }
}
