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
//! instant of reading tells which: blocked time is what was beyond the two when last seen with nothing going on. A
//! thread blocks in the VMM, so no more than V was blocked: what exceeds that was asleep in `KVM_RUN`, and is halted
//! even where KVM does not count it, as it does not count a vCPU's wait for its start-up interrupt.
//!
//! *On-CPU.* The guest's share is one source's claim ([`claims`]). The rest is the VMM's and the kernel's: by the
//! kernel's own division where that is exact to a few ticks, else by V, of which blocked time was not on a CPU.

pub mod claims;
mod earlier;

use crate::probe::Utime;
use crate::reading::{Mode, Modes, VcpuState};
use crate::vtime::State;

pub use claims::Claim;
pub use earlier::Earlier;

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
    /// Whether it sleeps uninterruptibly (state `D`): a disk, a page fault. KVM's sleep in HLT is interruptible.
    pub uninterruptible: bool,
    /// The kernel's division of CPU time, where it is exact to a few ticks: on a CPU with vtime.
    pub utime: Option<Utime>,
    /// Guest time as the stat file has it, rounded down to `stat_unit_ns`.
    pub stat_guest_ns: u64,
    /// The unit of the stat file: 10 ms.
    pub stat_unit_ns: u64,
    /// How much less than it says the thread may have had: 0, but where it had run a guest before its first stamp.
    pub stat_baseline_ns: u64,
    /// Time on a CPU, at most, since the stat file was read.
    pub stat_age_ns: u64,
    /// run_delay.
    pub run_delay_ns: u64,
    /// KVM's halt_wait; 0 where there is none.
    pub halt_wait_ns: u64,
    /// KVM's halt-polling; 0 where there is none.
    pub halt_poll_ns: u64,
    /// Time on a CPU, at most, since the oldest of the other probes was read.
    pub age_ns: u64,
    /// Length of the host's tick.
    pub tick_ns: u64,
    /// Where the thread was moved: what was known by then. `utime` and `stat_guest_ns` are of the time since.
    pub earlier: Earlier,
}

/// One instant's raw answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Sums to the elapsed time; may step back from one instant to the next.
    pub modes: Modes,
    /// What the vCPU is doing.
    pub state: VcpuState,
    /// The mode that the running slice counts as.
    pub pending: Mode,
}

/// What of the elapsed time was on a CPU and what was not; the first half of a split, the same for every source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Presence {
    /// Not paused, in nanoseconds.
    pub active_ns: u64,
    /// On a CPU, in nanoseconds.
    pub on_cpu_ns: u64,
    /// Off-CPU and neither run_delay nor halted, in nanoseconds.
    pub blocked_ns: u64,
    answer: Answer,
}

/// Splits; keeps from one instant to the next only how much was blocked for certain.
#[derive(Clone, Debug, Default)]
pub struct Split {
    blocked_ns: u64,
}

impl Split {
    /// The off-CPU modes of one instant. Follow with [`Presence::with_guest`].
    pub fn presence(&mut self, i: &Inputs) -> Presence {
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
        Presence {
            active_ns: active,
            on_cpu_ns: on_cpu,
            blocked_ns: modes.blocked_ns,
            answer: Answer { modes, state, pending },
        }
    }

    /// Gives what is off-CPU and neither run_delay nor halt_wait to the wait still going on, less what was blocked
    /// earlier.
    fn off_cpu_rest(&mut self, i: &Inputs, state: VcpuState, rest: u64, modes: &mut Modes) {
        // No wait is longer than the slice it is in.
        let before = self.blocked_ns.max(rest.saturating_sub(i.slice_ns)).min(rest);
        let blocked = match state {
            VcpuState::Halted | VcpuState::Waiting => before,
            VcpuState::Blocked => rest,
            VcpuState::Guest | VcpuState::Vmm | VcpuState::Paused | VcpuState::Exited => {
                self.blocked_ns = rest;
                rest
            }
        };
        match state {
            VcpuState::Waiting => modes.waiting_ns += rest - blocked,
            _ => modes.halted_ns += rest - blocked,
        }
        // Beyond V it slept in KVM_RUN: halted, but for an uninterruptible sleep still going on, which is the host's.
        let slept = if i.uninterruptible { i.slice_ns } else { 0 };
        let in_vmm = blocked.min(i.vmm_ns.saturating_add(slept));
        modes.halted_ns += blocked - in_vmm;
        modes.blocked_ns = in_vmm;
    }
}

impl Inputs {
    /// The kernel's share by its own division.
    fn kernel_ns(&self, utime: Utime) -> u64 {
        let since = utime.prof_ns.saturating_sub(utime.virt_ns);
        self.earlier.kernel_ns.saturating_add(since)
    }
}

impl Presence {
    /// Wall time inside `KVM_RUN`, in nanoseconds.
    #[must_use]
    pub fn in_run_ns(&self, i: &Inputs) -> u64 {
        self.active_ns.saturating_sub(i.vmm_ns)
    }

    /// An estimate of what of V was on a CPU, in nanoseconds. What was blocked was not; nor was the wait for a CPU that
    /// follows a sleep, as waits for a CPU do as a rule: so the waits are shared out as the sleeps are, between those in the VMM
    /// and those in `KVM_RUN`.
    #[must_use]
    pub fn vmm_on_cpu_ns(&self, i: &Inputs) -> u64 {
        let modes = &self.answer.modes;
        let (blocked, slept) = (
            u128::from(self.blocked_ns),
            u128::from(self.blocked_ns) + u128::from(modes.halted_ns),
        );
        let waited = u128::from(modes.waiting_ns) * blocked / slept.max(1);
        let waited = u64::try_from(waited).unwrap_or(u64::MAX);
        (i.vmm_ns.saturating_sub(self.blocked_ns))
            .saturating_sub(waited)
            .min(self.on_cpu_ns)
    }

    /// The whole answer, the guest having had `guest_ns` of the time on a CPU.
    #[must_use]
    pub fn with_guest(&self, i: &Inputs, guest_ns: u64) -> Answer {
        let Answer { mut modes, .. } = self.answer;
        modes.guest_ns = guest_ns.min(self.on_cpu_ns);
        let host = self.on_cpu_ns - modes.guest_ns;
        modes.host_user_ns = match i.utime {
            Some(utime) => host.saturating_sub(i.kernel_ns(utime)),
            None => self.vmm_on_cpu_ns(i).min(host),
        };
        modes.host_kernel_ns = host - modes.host_user_ns;
        Answer { modes, ..self.answer }
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
        State::Guest if !i.uninterruptible => (VcpuState::Halted, Mode::Halted),
        State::Guest => (VcpuState::Blocked, Mode::Blocked),
        State::Vmm => (VcpuState::Blocked, Mode::Blocked),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::reading::Bounds;

    pub(crate) const MS: u64 = 1_000_000;

    /// A second in: 900 ms in KVM_RUN, 100 ms in the VMM, always on a CPU.
    pub(crate) fn spinning() -> Inputs {
        Inputs {
            elapsed_ns: 1_000 * MS,
            vmm_ns: 100 * MS,
            state: State::Guest,
            slice_ns: 5 * MS,
            sched_ns: 1_000 * MS,
            on_cpu: true,
            runnable: true,
            utime: Some(Utime {
                virt_ns: 950 * MS,
                prof_ns: 1_000 * MS,
            }),
            stat_guest_ns: 840 * MS,
            stat_unit_ns: 10 * MS,
            tick_ns: 4 * MS,
            ..Inputs::default()
        }
    }

    /// One instant by source `oncpu`.
    fn split(split: &mut Split, i: &Inputs) -> Answer {
        let at = split.presence(i);
        at.with_guest(i, claims::oncpu(i, &at).point_ns)
    }

    #[test]
    fn a_halt_still_going_on_is_halted_and_so_it_is_once_kvm_has_counted_it() {
        let mut by = Split::default();
        let asleep = Inputs {
            elapsed_ns: 3_000 * MS,
            sched_ns: 1_000 * MS,
            slice_ns: 2_000 * MS,
            on_cpu: false,
            runnable: false,
            ..spinning()
        };
        let during = split(&mut by, &asleep);
        assert_eq!((during.state, during.pending), (VcpuState::Halted, Mode::Halted));
        assert_eq!((during.modes.halted_ns, during.modes.blocked_ns), (2_000 * MS, 0));
        let awake = Inputs {
            halt_wait_ns: 2_000 * MS,
            on_cpu: true,
            runnable: true,
            slice_ns: 2_000 * MS,
            ..asleep
        };
        assert_eq!(split(&mut by, &awake).modes.halted_ns, 2_000 * MS);
    }

    #[test]
    fn a_wait_for_a_cpu_still_going_on_is_waiting() {
        let inputs = Inputs {
            elapsed_ns: 1_003 * MS,
            on_cpu: false,
            ..spinning()
        };
        let answer = split(&mut Split::default(), &inputs);
        assert_eq!((answer.state, answer.modes.waiting_ns), (VcpuState::Waiting, 3 * MS));
    }

    #[test]
    fn what_was_blocked_stays_blocked_when_the_guest_halts_later() {
        let mut by = Split::default();
        let blocked = Inputs {
            elapsed_ns: 1_007 * MS,
            vmm_ns: 107 * MS,
            state: State::Vmm,
            slice_ns: 8 * MS,
            on_cpu: false,
            runnable: false,
            ..spinning()
        };
        assert_eq!(split(&mut by, &blocked).modes.blocked_ns, 7 * MS);
        let back = Inputs {
            on_cpu: true,
            runnable: true,
            ..blocked
        };
        assert_eq!(split(&mut by, &back).modes.blocked_ns, 7 * MS);
        let halted = Inputs {
            elapsed_ns: 1_107 * MS,
            state: State::Guest,
            slice_ns: 101 * MS,
            ..blocked
        };
        let answer = split(&mut by, &halted);
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
        let modes = split(&mut Split::default(), &inputs).modes;
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
            uninterruptible: !on_cpu && !runnable && f[11] & 1 == 1,
            utime: (f[11] & 2 == 2).then_some(Utime {
                virt_ns: f[5],
                prof_ns: f[6],
            }),
            stat_guest_ns: f[7],
            stat_unit_ns: 10 * MS,
            stat_baseline_ns: f[11] >> 40,
            stat_age_ns: f[11] >> 22,
            run_delay_ns: f[8],
            halt_wait_ns: f[9],
            halt_poll_ns: f[10],
            age_ns: f[11] >> 20,
            tick_ns: 4 * MS,
            earlier: Earlier {
                guest: Bounds {
                    lower: f[11] >> 30,
                    upper: f[11] >> 2,
                },
                kernel_ns: f[11] >> 10,
                in_run_ns: f[5],
                on_cpu_ns: f[6],
            },
        })
    }

    proptest! {
        #[test]
        fn whatever_the_probes_say_the_modes_sum_to_the_elapsed_time(
            history in proptest::collection::vec(any_inputs(), 1..20),
        ) {
            let mut split = Split::default();
            for i in history {
                let at = split.presence(&i);
                for claim in claims::vtime(&i, &at).into_iter().chain([claims::oncpu(&i, &at)]) {
                    let Bounds { lower, upper } = claim.bounds;
                    prop_assert!((lower..=upper).contains(&claim.point_ns));
                    prop_assert_eq!(at.with_guest(&i, claim.point_ns).modes.sum_ns(), i.elapsed_ns);
                }
            }
        }
    }

    #[test]
    fn a_wait_for_the_start_up_interrupt_is_halted_and_stays_so_when_it_ends_uncounted() {
        let mut by = Split::default();
        let asleep = Inputs {
            elapsed_ns: 1_000 * MS,
            state: State::Guest,
            slice_ns: 999 * MS,
            ..Inputs::default()
        };
        assert_eq!(split(&mut by, &asleep).modes.halted_ns, 1_000 * MS);
        let paused = Inputs {
            elapsed_ns: 1_500 * MS,
            paused_ns: 500 * MS,
            state: State::Paused,
            slice_ns: 500 * MS,
            ..Inputs::default()
        };
        let modes = split(&mut by, &paused).modes;
        assert_eq!((modes.halted_ns, modes.blocked_ns), (1_000 * MS, 0));
    }

    #[test]
    fn an_uninterruptible_sleep_in_kvm_run_is_blocked() {
        let inputs = Inputs {
            elapsed_ns: 1_005 * MS,
            on_cpu: false,
            runnable: false,
            uninterruptible: true,
            vmm_ns: 0,
            ..spinning()
        };
        let answer = split(&mut Split::default(), &inputs);
        assert_eq!((answer.state, answer.modes.blocked_ns), (VcpuState::Blocked, 5 * MS));
    }
}
