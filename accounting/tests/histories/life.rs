//! A vCPU's true life, made up, and what the probes would say of it.

use accounting::probe::Utime;
use accounting::reading::{Bounds, Source};
use accounting::split::{Earlier, Inputs};
use accounting::vtime::State;
use proptest::prelude::*;

pub const US: u64 = 1_000;
pub const MS: u64 = 1_000 * US;
/// HZ=250.
pub const TICK: u64 = 4 * MS;
/// The unit of the stat file.
pub const STAT: u64 = 10 * MS;

/// What a vCPU thread can truly be doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    Guest,
    /// Handling an exit in the kernel.
    Kernel,
    /// Polling for the end of a HLT.
    Polling,
    /// Asleep in HLT.
    Halted,
    /// Runnable inside `KVM_RUN`, off the CPU.
    WaitingInRun,
    Vmm,
    /// A system call of the VMM.
    SystemCall,
    Blocked,
    /// Runnable outside `KVM_RUN`, off the CPU.
    WaitingInVmm,
    Paused,
}

pub use Doing::{Blocked, Guest, Halted, Kernel, Paused, Polling, SystemCall, Vmm, WaitingInRun, WaitingInVmm};

pub const ALL: [Doing; 10] = [
    Guest,
    Kernel,
    Polling,
    Halted,
    WaitingInRun,
    Vmm,
    SystemCall,
    Blocked,
    WaitingInVmm,
    Paused,
];
pub const USER: [Doing; 2] = [Guest, Vmm];
pub const ON_CPU: [Doing; 5] = [Guest, Kernel, Polling, Vmm, SystemCall];
pub const RUNNABLE: [Doing; 7] = [Guest, Kernel, Polling, Vmm, SystemCall, WaitingInRun, WaitingInVmm];
pub const IN_VMM: [Doing; 4] = [Vmm, SystemCall, Blocked, WaitingInVmm];

/// A true life: what was done, for how long, in nanoseconds.
#[derive(Clone, Debug)]
pub struct Life(pub Vec<(Doing, u64)>);

impl Life {
    pub fn length(&self) -> u64 {
        self.0.iter().map(|(_, length)| length).sum()
    }

    /// Each part, with its beginning and end.
    fn parts(&self) -> impl Iterator<Item = (Doing, u64, u64)> {
        self.0.iter().scan(0, |at, &(doing, length)| {
            let begun = *at;
            *at += length;
            Some((doing, begun, *at))
        })
    }

    /// Time spent doing any of `what` until `t`.
    pub fn until(&self, t: u64, what: &[Doing]) -> u64 {
        let of_part = |(doing, begun, end): (Doing, u64, u64)| match what.contains(&doing) {
            true => end.min(t).saturating_sub(begun),
            false => 0,
        };
        self.parts().map(of_part).sum()
    }

    /// As [`Life::until`], but a part counts only once it has ended, as the kernel's waits do.
    fn ended_until(&self, t: u64, what: &[Doing]) -> u64 {
        let ended = self.parts().filter(|(doing, _, end)| what.contains(doing) && *end <= t);
        ended.map(|(_, begun, end)| end - begun).sum()
    }

    /// KVM's halt_wait: it ends when the vCPU runs again, the wait for a CPU after the wake-up included.
    fn halt_wait_until(&self, t: u64) -> u64 {
        let parts: Vec<_> = self.parts().collect();
        let halts = parts.iter().enumerate().filter(|(_, (doing, ..))| *doing == Halted);
        halts
            .map(|(i, &(_, begun, end))| match parts.get(i + 1) {
                Some(&(WaitingInRun, _, end)) => (begun, end),
                _ => (begun, end),
            })
            .filter(|&(_, end)| end <= t)
            .map(|(begun, end)| end - begun)
            .sum()
    }

    /// What is done at `t`, and since when vtime has been in the state it is in.
    fn at(&self, t: u64) -> (Doing, u64) {
        let mut since = 0;
        let mut last = Paused;
        for (doing, begun, end) in self.parts() {
            if state(doing) != state(last) {
                since = begun;
            }
            last = doing;
            if t < end {
                break;
            }
        }
        (last, since)
    }
}

pub fn state(doing: Doing) -> State {
    match doing {
        Guest | Kernel | Polling | Halted | WaitingInRun => State::Guest,
        Vmm | SystemCall | Blocked | WaitingInVmm => State::Vmm,
        Paused => State::Paused,
    }
}

/// How one reading is made.
#[derive(Clone, Debug)]
pub struct Look {
    /// When, as a part of the life's length in 2^32.
    pub at: u32,
    /// How long before the next each probe is read: SCHED, stat, schedstat, KVM's, PROF, VIRT, SCHED.
    pub gaps: [u64; 7],
    /// What the reads of VIRT, PROF and the stat file leave out.
    pub residues: [u64; 3],
    /// Of a host that samples: what VIRT, PROF and the stat file say, which may be anything.
    pub sampled: [u64; 3],
}

/// What is the same for all readings of a life.
#[derive(Clone, Debug)]
pub struct Host {
    pub source: Source,
    /// What the baselines of VIRT and PROF left out.
    pub baseline_residues: [u64; 2],
    /// Whether run_delay, halt_wait and halt_poll are counted here.
    pub counts: [bool; 3],
}

/// What one reading is made from.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    pub inputs: Inputs,
    /// What the kernel's division of CPU time is held against, once the thread has been moved at this instant.
    pub division: Division,
    /// What source `bpf` says: guest time as stamped some time before the instant, during which more may have passed.
    pub stamped: Bounds,
}

/// The kernel's division of CPU time as a stay began: when VIRT, PROF and the stat file were read, and what they left out.
#[derive(Clone, Copy, Debug, Default)]
pub struct Division {
    read_at: [u64; 3],
    residues: [u64; 3],
    /// Guest time in the stat file that was sampled, on earlier stays: any.
    sampled_guest: u64,
}

/// One stay on a CPU. The first begins with the life, on a host's only kind of CPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stay {
    /// Where the kernel stamps on this CPU, though it may not on others.
    pub division: Option<Division>,
    pub earlier: Earlier,
    /// Whether it is one of several.
    pub moved: bool,
}

impl Look {
    /// The instant, in nanoseconds since the life's beginning.
    pub fn now(&self, life: &Life) -> u64 {
        u64::try_from((u128::from(life.length()) * u128::from(self.at)) >> 32).expect("shorter than the life")
    }
}

pub fn take(life: &Life, host: &Host, look: &Look) -> Taken {
    take_at(life, host, look, look.now(life), &Stay::default())
}

/// Likewise at another instant, of a thread that may have been moved.
pub fn take_at(life: &Life, host: &Host, look: &Look, now: u64, stay: &Stay) -> Taken {
    let mut t = now;
    // From the last probe to the first.
    let mut read_at = look.gaps;
    for read_at in read_at.iter_mut().rev() {
        t = t.saturating_sub(*read_at);
        *read_at = t;
    }
    let [begun, stat_at, schedstat_at, kvm_at, prof_at, virt_at, sched_at] = read_at;

    let clock = |t, what: &[Doing], residue: u64, baseline_residue: u64| {
        (life.until(t, what) + baseline_residue).saturating_sub(residue)
    };
    let [virt_residue, prof_residue, stat_residue] = look.residues;
    let [virt_ns, prof_ns, stat_guest_ns] = match host.source {
        Source::Vtime => [
            clock(virt_at, &USER, virt_residue, host.baseline_residues[0]),
            clock(prof_at, &ON_CPU, prof_residue, host.baseline_residues[1]),
            // A vCPU thread's guest time is 0 at its first stamp, so its baseline leaves nothing out.
            clock(stat_at, &[Guest], stat_residue, 0) / STAT * STAT,
        ],
        Source::Bpf | Source::Oncpu => look.sampled,
    };
    let mut utime = (host.source == Source::Vtime).then_some(Utime { virt_ns, prof_ns });
    let (mut stat_guest_ns, mut stat_baseline_ns) = (stat_guest_ns, 0);
    let sampled_guest = TICK + look.sampled[2];
    let division = Division {
        read_at: [virt_at, prof_at, stat_at],
        residues: look.residues,
        sampled_guest,
    };
    if stay.moved {
        utime = stay.division.map(|begun| {
            let [virt_ns, prof_ns] = [(virt_at, &USER[..], 0), (prof_at, &ON_CPU[..], 1)].map(|(at, what, i)| {
                let since = life.until(at, what).saturating_sub(life.until(begun.read_at[i], what));
                (since + begun.residues[i]).saturating_sub(look.residues[i])
            });
            // The stat file is rounded down at both ends, and holds what other stays left there.
            let since = life.until(stat_at, &[Guest]) - life.until(begun.read_at[2], &[Guest]);
            let [now, then] = [
                (begun.sampled_guest + since).saturating_sub(stat_residue),
                begun.sampled_guest - begun.residues[2],
            ];
            (stat_guest_ns, stat_baseline_ns) = ((now / STAT * STAT).saturating_sub(then / STAT * STAT), STAT + TICK);
            Utime { virt_ns, prof_ns }
        });
    }
    let (doing, since) = life.at(now);
    let counted = |i: usize, figure| if host.counts[i] { figure } else { 0 };
    // As an account has it: the thread may have been on a CPU ever since SCHED was read.
    let on_cpu_since = |t| life.until(sched_at, &ON_CPU) + (now - sched_at) - life.until(t, &ON_CPU);
    let stamped = life.until(sched_at, &[Guest]);
    let inputs = Inputs {
        elapsed_ns: now,
        paused_ns: life.until(now, &[Paused]),
        vmm_ns: life.until(now, &IN_VMM),
        state: state(doing),
        slice_ns: now - since,
        sched_ns: life.until(sched_at, &ON_CPU),
        sched_age_ns: now - sched_at,
        on_cpu: life.until(sched_at, &ON_CPU) > life.until(begun, &ON_CPU),
        runnable: RUNNABLE.contains(&life.at(stat_at).0),
        uninterruptible: false,
        utime,
        stat_guest_ns,
        stat_unit_ns: STAT,
        stat_baseline_ns,
        stat_age_ns: on_cpu_since(stat_at),
        run_delay_ns: counted(0, life.ended_until(schedstat_at, &[WaitingInRun, WaitingInVmm])),
        halt_wait_ns: counted(1, life.halt_wait_until(kvm_at)),
        halt_poll_ns: counted(2, life.ended_until(kvm_at, &[Polling])),
        age_ns: on_cpu_since(begun),
        tick_ns: TICK,
        earlier: stay.earlier,
    };
    Taken {
        inputs,
        division,
        stamped: Bounds {
            lower: stamped,
            upper: stamped + (now - sched_at),
        },
    }
}

pub fn any_length() -> impl Strategy<Value = u64> {
    prop_oneof![1..100 * US, 1..20 * MS, 1..300 * MS]
}

pub fn any_life() -> impl Strategy<Value = Life> {
    let doing = proptest::sample::select(&ALL[..]);
    proptest::collection::vec((doing, any_length()), 1..40).prop_map(Life)
}

pub fn any_look() -> impl Strategy<Value = Look> {
    let gap = prop_oneof![4 => 0..2 * US, 1 => 0..3 * MS];
    (
        any::<u32>(),
        proptest::array::uniform7(gap),
        // Less than a tick of each of guest, user and kernel time is not yet flushed: see the table of probes.
        (0..2 * TICK, 0..3 * TICK, 0..TICK),
        proptest::array::uniform3(0u64..1 << 40),
    )
        .prop_map(|(at, gaps, (virt, prof, stat), sampled)| Look {
            at,
            gaps,
            residues: [virt, prof, stat],
            sampled,
        })
}
