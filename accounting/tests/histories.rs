//! Laws 1, 2, 5 and 6 over histories: a vCPU's true life is made up, what the probes would say of it is worked out with
//! all the errors that they are documented to have, and the split and the ledger are to make lawful readings of that,
//! whose bounds hold the true guest time.
//!
//! A second kind of history has no truth behind it: clocks that step back, statistics that jump, counters that stay 0.

use accounting::ledger::{EXACT, EXACT_WITH_GUEST, Ledger};
use accounting::probe::Utime;
use accounting::reading::{Bounds, Modes, Source};
use accounting::split::{Claim, Inputs, Presence, Split, claims};
use accounting::vtime::State;
use proptest::prelude::*;

const US: u64 = 1_000;
const MS: u64 = 1_000 * US;
/// HZ=250.
const TICK: u64 = 4 * MS;
/// The unit of the stat file.
const STAT: u64 = 10 * MS;

/// What a vCPU thread can truly be doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
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

use Doing::{Blocked, Guest, Halted, Kernel, Paused, Polling, SystemCall, Vmm, WaitingInRun, WaitingInVmm};

const ALL: [Doing; 10] = [
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
const USER: [Doing; 2] = [Guest, Vmm];
const ON_CPU: [Doing; 5] = [Guest, Kernel, Polling, Vmm, SystemCall];
const RUNNABLE: [Doing; 7] = [Guest, Kernel, Polling, Vmm, SystemCall, WaitingInRun, WaitingInVmm];
const IN_VMM: [Doing; 4] = [Vmm, SystemCall, Blocked, WaitingInVmm];

/// A true life: what was done, for how long, in nanoseconds.
#[derive(Clone, Debug)]
struct Life(Vec<(Doing, u64)>);

impl Life {
    fn length(&self) -> u64 {
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
    fn until(&self, t: u64, what: &[Doing]) -> u64 {
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

fn state(doing: Doing) -> State {
    match doing {
        Guest | Kernel | Polling | Halted | WaitingInRun => State::Guest,
        Vmm | SystemCall | Blocked | WaitingInVmm => State::Vmm,
        Paused => State::Paused,
    }
}

/// How one reading is made.
#[derive(Clone, Debug)]
struct Look {
    /// When, as a part of the life's length in 2^32.
    at: u32,
    /// How long before the next each probe is read: SCHED, stat, schedstat, KVM's, PROF, VIRT, SCHED.
    gaps: [u64; 7],
    /// What the reads of VIRT, PROF and the stat file leave out.
    residues: [u64; 3],
    /// Of a host that samples: what VIRT, PROF and the stat file say, which may be anything.
    sampled: [u64; 3],
}

/// What is the same for all readings of a life.
#[derive(Clone, Debug)]
struct Host {
    source: Source,
    /// What the baselines of VIRT and PROF left out.
    baseline_residues: [u64; 2],
    /// Whether run_delay, halt_wait and halt_poll are counted here.
    counts: [bool; 3],
}

/// What one reading is made from.
#[derive(Clone, Copy, Debug)]
struct Taken {
    inputs: Inputs,
    /// What source `bpf` says: guest time as stamped some time before the instant, during which more may have passed.
    stamped: Bounds,
}

fn take(life: &Life, host: &Host, look: &Look) -> Taken {
    let mut t = u64::try_from((u128::from(life.length()) * u128::from(look.at)) >> 32).expect("shorter than the life");
    let now = t;
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
    let utime = (host.source == Source::Vtime).then_some(Utime { virt_ns, prof_ns });
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
        stat_baseline_ns: 0,
        stat_age_ns: on_cpu_since(stat_at),
        run_delay_ns: counted(0, life.ended_until(schedstat_at, &[WaitingInRun, WaitingInVmm])),
        halt_wait_ns: counted(1, life.halt_wait_until(kvm_at)),
        halt_poll_ns: counted(2, life.ended_until(kvm_at, &[Polling])),
        age_ns: on_cpu_since(begun),
        tick_ns: TICK,
    };
    Taken {
        inputs,
        stamped: Bounds {
            lower: stamped,
            upper: stamped + (now - sched_at),
        },
    }
}

/// What was published, and what was not to step back since.
#[derive(Clone, Copy, Debug, Default)]
struct Published {
    modes: Modes,
    bounds: Option<Bounds>,
}

/// What is claimed by `source`, or by the next that there is.
fn claim(source: Source, taken: &Taken, at: &Presence) -> Claim {
    let by_bpf = Claim {
        source: Source::Bpf,
        point_ns: taken.stamped.lower,
        bounds: taken.stamped,
    };
    let by_vtime = || claims::vtime(&taken.inputs, at);
    match source {
        Source::Bpf => Some(by_bpf),
        Source::Vtime => by_vtime(),
        Source::Oncpu => None,
    }
    .unwrap_or_else(|| claims::oncpu(&taken.inputs, at))
}

/// The modes as they are, before anything is published.
fn raw(split: &mut Split, source: Source, taken: &Taken) -> (Modes, Claim) {
    let at = split.presence(&taken.inputs);
    let claim = claim(source, taken, &at);
    (at.with_guest(&taken.inputs, claim.point_ns).modes, claim)
}

/// Publishes one instant and checks laws 1, 2 and 6.
fn publish(
    split: &mut Split,
    ledger: &mut Ledger,
    source: Source,
    taken: &Taken,
    last: Published,
) -> Result<Published, TestCaseError> {
    let i = &taken.inputs;
    let (modes, claim) = raw(split, source, taken);
    let Bounds { lower, upper } = claim.bounds;
    prop_assert!((lower..=upper).contains(&claim.point_ns), "{:?}", claim);
    let exact = if claim.source == Source::Bpf {
        EXACT_WITH_GUEST
    } else {
        EXACT
    };
    let modes = ledger.publish(i.elapsed_ns, modes, exact);
    let bounds = ledger.publish_bounds(claim.bounds);
    prop_assert_eq!(modes.sum_ns(), i.elapsed_ns);
    prop_assert_eq!(ledger.elapsed_ns(), i.elapsed_ns);
    for (now, before) in modes.to_array().into_iter().zip(last.modes.to_array()) {
        prop_assert!(now >= before, "{:?} after {:?}", modes, last.modes);
    }
    let before = last.bounds.unwrap_or(Bounds { lower: 0, upper: 0 });
    prop_assert!(
        bounds.lower >= before.lower && bounds.upper >= before.upper,
        "{:?} after {:?}",
        bounds,
        before
    );
    prop_assert!(
        (bounds.lower..=bounds.upper).contains(&modes.guest_ns),
        "{:?} outside {:?}",
        modes,
        bounds
    );
    Ok(Published {
        modes,
        bounds: Some(bounds),
    })
}

fn any_length() -> impl Strategy<Value = u64> {
    prop_oneof![1..100 * US, 1..20 * MS, 1..300 * MS]
}

fn any_life() -> impl Strategy<Value = Life> {
    let doing = proptest::sample::select(&ALL[..]);
    proptest::collection::vec((doing, any_length()), 1..40).prop_map(Life)
}

fn any_look() -> impl Strategy<Value = Look> {
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

fn any_source() -> impl Strategy<Value = Source> {
    proptest::sample::select(&Source::ALL[..])
}

fn any_host() -> impl Strategy<Value = Host> {
    (any_source(), 0..2 * TICK, 0..3 * TICK, any::<[bool; 3]>()).prop_map(|(source, virt, prof, counts)| Host {
        source,
        baseline_residues: [virt, prof],
        counts,
    })
}

fn in_order(mut looks: Vec<Look>) -> Vec<Look> {
    looks.sort_by_key(|look| look.at);
    looks
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn of_any_life_readings_are_lawful_and_their_bounds_hold_the_true_guest_time(
        life in any_life(), host in any_host(), looks in proptest::collection::vec(any_look(), 1..40).prop_map(in_order),
    ) {
        let (mut split, mut ledger) = (Split::default(), Ledger::default());
        let mut last = Published::default();
        for look in looks {
            let taken = take(&life, &host, &look);
            last = publish(&mut split, &mut ledger, host.source, &taken, last)?;
            let i = taken.inputs;
            let truth = life.until(i.elapsed_ns, &[Guest]);
            let bounds = last.bounds.expect("just published");
            prop_assert!((bounds.lower..=bounds.upper).contains(&truth), "{} outside {:?} of {:?}", truth, bounds, i);
            // Stamps are exact, and a pause is told by them alone.
            prop_assert_eq!(i.paused_ns, life.until(i.elapsed_ns, &[Paused]));
        }
    }

    #[test]
    fn errors_do_not_add_up_however_many_readings_made_them(
        life in any_life(), host in any_host(), looks in proptest::collection::vec(any_look(), 1..40).prop_map(in_order),
    ) {
        let (mut split, mut ledger) = (Split::default(), Ledger::default());
        let mut last = Published::default();
        for look in &looks {
            last = publish(&mut split, &mut ledger, host.source, &take(&life, &host, look), last)?;
        }
        // The last reading is made at leisure, once every mode has grown by more than the two errors there can be: that
        // a reading misplaced all there was, and that halt_wait holds as much of run_delay.
        let mut later = life.clone();
        let grow = 2 * life.length() + 10 * TICK + STAT;
        later.0.extend(ALL.into_iter().rev().map(|doing| (doing, grow)));
        // The VMM's wall time, of which the above is four parts, is taken from the guest's.
        later.0.push((Guest, 4 * grow));
        let host = Host { baseline_residues: [0; 2], counts: [true; 3], source: host.source };
        let look = Look { at: u32::MAX, gaps: [US; 7], residues: [0; 3], sampled: [0; 3] };
        let taken = take(&later, &host, &look);
        let (raw, _) = raw(&mut split.clone(), host.source, &taken);
        let published = publish(&mut split, &mut ledger, host.source, &taken, last)?.modes;
        prop_assert_eq!(published, raw);
    }

    #[test]
    fn whatever_the_probes_say_readings_are_lawful(
        source in any_source(),
        steps in proptest::collection::vec((any_length(), any_garbage()), 1..40),
    ) {
        let (mut split, mut ledger) = (Split::default(), Ledger::default());
        let (mut elapsed_ns, mut last) = (0, Published::default());
        for (length, garbage) in steps {
            elapsed_ns += length;
            let taken = Taken { inputs: Inputs { elapsed_ns, ..garbage.inputs }, ..garbage };
            last = publish(&mut split, &mut ledger, source, &taken, last)?;
        }
    }

    #[test]
    fn after_any_number_of_years_readings_are_lawful(
        source in any_source(),
        // 2^63 ns are 292 years; a clock that stands still grows by 0.
        steps in proptest::collection::vec((prop_oneof![Just(0), Just(1), 0u64..1 << 58], any_garbage()), 1..16),
    ) {
        let (mut split, mut ledger) = (Split::default(), Ledger::default());
        let (mut elapsed_ns, mut last) = (1 << 63, Published::default());
        for (length, garbage) in steps {
            elapsed_ns += length;
            let taken = Taken { inputs: Inputs { elapsed_ns, ..garbage.inputs }, ..garbage };
            last = publish(&mut split, &mut ledger, source, &taken, last)?;
        }
    }
}

/// Figures that no host gives: small, of a like order as the elapsed time, or absurd; each on its own. Only the two units,
/// which are the kernel's constants, are such as there are: HZ=10 to 1000, USER_HZ=1 to 1000.
fn any_garbage() -> impl Strategy<Value = Taken> {
    let figure = prop_oneof![Just(0), 0..10 * MS, 0u64..1 << 34, 0u64..1 << 63, Just(u64::MAX)];
    let states = proptest::sample::select(&[State::Inactive, State::Vmm, State::Guest, State::Paused][..]);
    let figures = proptest::collection::vec(figure, 15);
    let units = (MS..100 * MS, MS..1_000 * MS);
    (figures, units, states, any::<[bool; 4]>()).prop_map(|(f, (tick_ns, stat_unit_ns), state, flags)| {
        let [on_cpu, runnable, uninterruptible, has_vtime] = flags;
        let inputs = Inputs {
            paused_ns: f[0],
            vmm_ns: f[1],
            state,
            slice_ns: f[2],
            sched_ns: f[3],
            sched_age_ns: f[4],
            on_cpu,
            runnable,
            uninterruptible,
            utime: has_vtime.then_some(Utime {
                virt_ns: f[5],
                prof_ns: f[6],
            }),
            stat_guest_ns: f[7],
            stat_unit_ns,
            run_delay_ns: f[8],
            halt_wait_ns: f[9],
            halt_poll_ns: f[10],
            age_ns: f[11],
            stat_age_ns: f[12],
            tick_ns,
            ..Inputs::default()
        };
        let stamped = Bounds {
            lower: f[13].min(f[14]),
            upper: f[13].max(f[14]),
        };
        Taken { inputs, stamped }
    })
}
