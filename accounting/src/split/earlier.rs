//! What is known of a thread's guest time from before it was put where it is now.
//!
//! The kernel divides CPU time exactly on some CPUs and not on others, so what its figures prove ends where the thread
//! leaves such a CPU: from then on they hold samples too. All else is of the thread, wherever it runs: stamps, its time
//! on a CPU, its waits. So a move closes what was proved so far, an interval, and claims go on from there: the interval of
//! the time since is added to it, end by end. What a source did not know it goes on not knowing, once: each move widens
//! the bounds by what the source of that stretch leaves open, and no further move makes more of it.

use super::{Claim, Inputs, Presence};
use crate::reading::Bounds;

/// The time before the last move; all 0 where there has been none. In nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Earlier {
    /// Holds the guest time until then.
    pub guest: Bounds,
    /// The host kernel's share until then: an estimate.
    pub kernel_ns: u64,
    /// Inside `KVM_RUN` until then, by stamps.
    pub in_run_ns: u64,
    /// On a CPU until then, at least.
    pub on_cpu_ns: u64,
}

impl Earlier {
    /// All that is known at the instant of `i`, of which `claim` is the best.
    #[must_use]
    pub fn until(i: &Inputs, at: &Presence, claim: &Claim) -> Self {
        Self {
            guest: claim.bounds,
            kernel_ns: at.with_guest(i, claim.point_ns).modes.host_kernel_ns,
            in_run_ns: at.in_run_ns(i),
            on_cpu_ns: i.sched_ns.min(at.on_cpu_ns),
        }
    }

    /// The most that can have been the guest's until the instant of `i`: what of the time since was on a CPU and in
    /// `KVM_RUN`, on top of the most that it was before.
    #[must_use]
    pub(super) fn most(&self, i: &Inputs, at: &Presence) -> u64 {
        let in_run = at.in_run_ns(i).saturating_sub(self.in_run_ns);
        let on_cpu = (at.on_cpu_ns.saturating_add(i.age_ns)).saturating_sub(self.on_cpu_ns);
        self.guest.upper.saturating_add(in_run.min(on_cpu))
    }
}
