//! What each source claims of the guest's time: a point, and an interval that holds the truth.
//!
//! *Guest time* is the time the vCPU thread is on a CPU between KVM's decision to enter the guest and its return from
//! it, the switch of worlds included: the kernel's gtime. Where just it begins and ends is each source's own: `vtime` and
//! `oncpu` go by where the kernel's accounting turns (`vtime_guest_enter`, `vtime_guest_exit`), `bpf` by KVM's tracepoints,
//! which are inside of that at the entry and, where `kvm_exit` is passed late (Linux 6.1 on AMD, see
//! [`crate::probe::bpf`]), a little outside at the exit. So on a guest that does nothing but exit the intervals of two
//! sources need not meet: in an emulator they part by 2 to 15 us an exit, as measured; on hardware it has not been.
//!
//! | source | what it has | what it claims |
//! |---|---|---|
//! | `bpf` | stamps at `kvm_entry` and `kvm_exit` | their sum, live, to the time that reading them took |
//! | `vtime` | the kernel's gtime in units of 10 ms, its utime | between that and that + 10 ms + a tick |
//! | `oncpu` | time on a CPU inside `KVM_RUN` | at most that; at least nothing |
//!
//! *vtime.* The kernel adds guest time up in a residue that reaches `gtime` when it amounts to a tick, and that a read
//! outside of the guest leaves out (`kernel/sched/cputime.c`, `task_gtime`); the stat file rounds down to 10 ms. So
//! the truth is in `[stat, stat + 10 ms + tick]`, however long the vCPU lives. utime holds guest time, and lacks up
//! to a tick of either: `VIRT + 2 ticks` is another upper end. What VIRT holds beside guest time is the VMM's, but V
//! does not bound that from above, since the way from the kernel to the stamp and back is outside of V: 3 to 9 us
//! an exit, as measured in an emulator. However little it is, it adds up, and so a lower end made of `VIRT - V` would be
//! false after enough exits: there is none.
//!
//! *oncpu.* The kernel samples, so its division of CPU time proves nothing. Guest time is at most the on-CPU time
//! inside `KVM_RUN`; that less halt-polling is the estimate. That none of it was the kernel's, handling exits, cannot
//! be shown: the lower end is 0.
//!
//! Of a thread that was moved, both claim this of the time since, on top of what was known by then ([`super::Earlier`]).

use super::{Inputs, Presence};
use crate::reading::{Bounds, Source};

/// What one source says of the guest's time at one instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Which one.
    pub source: Source,
    /// Its best figure, in nanoseconds; within `bounds`.
    pub point_ns: u64,
    /// Holds the truth.
    pub bounds: Bounds,
}

/// By the kernel's full-dynticks accounting; `None` where the thread's CPU has none.
#[must_use]
pub fn vtime(i: &Inputs, at: &Presence) -> Option<Claim> {
    let utime = i.utime?;
    let earlier = &i.earlier.guest;
    let uppers = [
        (earlier.upper.saturating_add(i.stat_guest_ns))
            .saturating_add(i.stat_unit_ns.saturating_add(i.tick_ns))
            .saturating_add(i.stat_age_ns),
        (earlier.upper.saturating_add(utime.virt_ns))
            .saturating_add(i.tick_ns.saturating_mul(2))
            .saturating_add(i.age_ns),
    ];
    let upper = uppers.into_iter().fold(most(i, at), u64::min);
    // True when it was read, and so true now.
    let lower = (earlier.lower).saturating_add(i.stat_guest_ns.saturating_sub(i.stat_baseline_ns));
    // Where two of the clocks contradict each other, one of them is wrong and there is no telling which: both are inside.
    let bounds = Bounds {
        lower: lower.min(upper),
        upper: upper.max(lower),
    };
    // What is not the kernel's, the VMM's wall time taken for its user time.
    let point = (at.on_cpu_ns.saturating_sub(i.kernel_ns(utime))).saturating_sub(i.vmm_ns);
    Some(Claim {
        source: Source::Vtime,
        point_ns: point.clamp(bounds.lower, bounds.upper),
        bounds,
    })
}

/// By the time on a CPU inside `KVM_RUN`.
#[must_use]
pub fn oncpu(i: &Inputs, at: &Presence) -> Claim {
    let upper = most(i, at);
    let lower = i.earlier.guest.lower.min(upper);
    let point = (at.on_cpu_ns - at.vmm_on_cpu_ns(i)).saturating_sub(i.halt_poll_ns);
    Claim {
        source: Source::Oncpu,
        point_ns: point.clamp(lower, upper),
        bounds: Bounds { lower, upper },
    }
}

/// On a CPU inside `KVM_RUN`. The VMM may have been off the CPU for any part of V: then more of the on-CPU time was inside.
fn most(i: &Inputs, at: &Presence) -> u64 {
    let all = at.in_run_ns(i).min(at.on_cpu_ns.saturating_add(i.age_ns));
    all.min(i.earlier.most(i, at))
}

#[cfg(test)]
mod tests {
    use super::super::Split;
    use super::super::tests::{MS, spinning};
    use super::*;

    fn presence(i: &Inputs) -> Presence {
        Split::default().presence(i)
    }

    #[test]
    fn vtime_takes_the_vmms_wall_time_for_its_user_time_within_what_stat_allows() {
        let inputs = spinning();
        let at = presence(&inputs);
        let claim = vtime(&inputs, &at).expect("a CPU with vtime");
        assert_eq!(claim.point_ns, 850 * MS);
        assert_eq!(
            claim.bounds,
            Bounds {
                lower: 840 * MS,
                upper: 854 * MS
            }
        );
        let modes = at.with_guest(&inputs, claim.point_ns).modes;
        assert_eq!((modes.host_user_ns, modes.host_kernel_ns), (100 * MS, 50 * MS));
    }

    #[test]
    fn a_point_outside_of_what_stat_allows_is_moved_to_its_edge() {
        let inputs = Inputs {
            stat_guest_ns: 820 * MS,
            ..spinning()
        };
        let claim = vtime(&inputs, &presence(&inputs)).expect("a CPU with vtime");
        assert_eq!((claim.point_ns, claim.bounds.upper), (834 * MS, 834 * MS));
    }

    #[test]
    fn what_may_have_run_since_a_probe_was_read_widens_the_upper_end_only() {
        let inputs = Inputs {
            stat_age_ns: MS,
            ..spinning()
        };
        let claim = vtime(&inputs, &presence(&inputs)).expect("a CPU with vtime");
        assert_eq!((claim.bounds.lower, claim.bounds.upper), (840 * MS, 855 * MS));
    }

    #[test]
    fn clocks_that_contradict_each_other_widen_the_bounds() {
        let inputs = Inputs {
            stat_guest_ns: 910 * MS,
            ..spinning()
        };
        // No more than 900 ms were inside KVM_RUN, and no less than 910 ms were the guest's.
        let claim = vtime(&inputs, &presence(&inputs)).expect("a CPU with vtime");
        assert_eq!(
            claim.bounds,
            Bounds {
                lower: 900 * MS,
                upper: 910 * MS
            }
        );
    }

    #[test]
    fn without_vtime_on_its_cpu_the_kernels_division_is_no_source() {
        let inputs = Inputs {
            utime: None,
            ..spinning()
        };
        assert_eq!(vtime(&inputs, &presence(&inputs)), None);
    }

    #[test]
    fn a_wait_that_follows_a_sleep_of_the_vmm_is_not_taken_for_its_cpu_time() {
        // 400 ms in KVM_RUN, all on a CPU; of 600 ms outside 500 were asleep and 80 waiting for a CPU.
        let inputs = Inputs {
            vmm_ns: 600 * MS,
            sched_ns: 420 * MS,
            run_delay_ns: 80 * MS,
            utime: None,
            ..spinning()
        };
        let claim = oncpu(&inputs, &presence(&inputs));
        assert_eq!((claim.point_ns, claim.bounds.upper), (400 * MS, 400 * MS));
    }

    #[test]
    fn on_cpu_claims_no_more_than_it_can_prove() {
        let inputs = Inputs {
            halt_poll_ns: 30 * MS,
            utime: None,
            ..spinning()
        };
        let at = presence(&inputs);
        let claim = oncpu(&inputs, &at);
        assert_eq!(
            (claim.point_ns, claim.bounds.lower, claim.bounds.upper),
            (870 * MS, 0, 900 * MS)
        );
        let modes = at.with_guest(&inputs, claim.point_ns).modes;
        assert_eq!((modes.host_user_ns, modes.host_kernel_ns), (100 * MS, 30 * MS));
    }
}
