//! Laws 1, 2, 5 and 6 over histories: a vCPU's true life is made up, what the probes would say of it is worked out with
//! all the errors that they are documented to have, and the split and the ledger are to make lawful readings of that,
//! whose bounds hold the true guest time.
//!
//! A second kind of history has no truth behind it: clocks that step back, statistics that jump, counters that stay 0.

mod life;
mod moves;

use accounting::ledger::{EXACT, EXACT_WITH_GUEST, Ledger};
use accounting::probe::Utime;
use accounting::reading::{Bounds, Modes, Source};
use accounting::split::{Claim, Inputs, Presence, Split, claims};
use accounting::vtime::State;
use life::{ALL, Division, Guest, Host, Look, MS, Paused, STAT, TICK, Taken, US, any_length, any_life, any_look, take};
use proptest::prelude::*;

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
        Taken {
            inputs,
            stamped,
            division: Division::default(),
        }
    })
}
