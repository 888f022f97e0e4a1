//! Laws 1, 2, 5 and 6 of a thread that is moved between CPUs where the kernel stamps and CPUs where it samples.

use accounting::ledger::Ledger;
use accounting::reading::Source;
use accounting::split::{Earlier, Split};
use proptest::prelude::*;

use super::life::{Guest, Host, Life, Look, Stay, Taken, any_life, any_look, take_at};
use super::{Published, claim, in_order, publish};

/// A life on several CPUs: at each look the thread may be moved to a CPU that stamps, or to one that samples.
fn any_moves() -> impl Strategy<Value = Vec<(Look, Option<bool>)>> {
    let step = (any_look(), proptest::option::weighted(0.3, any::<bool>()));
    proptest::collection::vec(step, 1..40).prop_map(|steps| {
        let (looks, moves): (Vec<_>, Vec<_>) = steps.into_iter().unzip();
        in_order(looks).into_iter().zip(moves).collect()
    })
}

/// What is known at the instant, by what the stay allows.
fn until_now(split: &mut Split, taken: &Taken) -> Earlier {
    let at = split.presence(&taken.inputs);
    let claim = claim(Source::Vtime, taken, &at);
    Earlier::until(&taken.inputs, &at, &claim)
}

/// Publishes, and holds the bounds against the truth.
fn told(
    life: &Life,
    split: &mut Split,
    ledger: &mut Ledger,
    taken: &Taken,
    last: Published,
) -> Result<Published, TestCaseError> {
    let published = publish(split, ledger, Source::Vtime, taken, last)?;
    let truth = life.until(taken.inputs.elapsed_ns, &[Guest]);
    let bounds = published.bounds.expect("just published");
    prop_assert!(
        (bounds.lower..=bounds.upper).contains(&truth),
        "{} outside {:?} of {:?}",
        truth,
        bounds,
        taken.inputs
    );
    Ok(published)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn of_any_life_and_any_moves_readings_are_lawful_and_their_bounds_hold_the_true_guest_time(
        life in any_life(), counts in any::<[bool; 3]>(), stamps in any::<bool>(), steps in any_moves(),
    ) {
        let host = Host { source: Source::Oncpu, baseline_residues: [0; 2], counts };
        let (mut split, mut ledger, mut last) = (Split::default(), Ledger::default(), Published::default());
        let mut stay = Stay { moved: true, division: stamps.then(Default::default), earlier: Earlier::default() };
        // When the last move ended, since when probes can be read, and the last reading.
        let (mut moved, mut read) = (0, 0);
        for (look, move_to) in steps {
            let probing: u64 = look.gaps.iter().sum();
            let now = look.now(&life).max(moved + probing).max(read);
            if now > life.length() {
                break;
            }
            let taken = take_at(&life, &host, &look, now, &stay);
            last = told(&life, &mut split, &mut ledger, &taken, last)?;
            read = now;
            let Some(stamps) = move_to else { continue };
            // In the middle of the move nothing is known but time on a CPU; the probes of its end are read after it began.
            stay = Stay { division: None, earlier: until_now(&mut split, &taken), moved: true };
            let arrived = now + probing + u64::from(look.at) % 50_000;
            if arrived > life.length() {
                break;
            }
            let taken = take_at(&life, &host, &look, arrived, &stay);
            stay.earlier = until_now(&mut split, &taken);
            stay.division = stamps.then_some(taken.division);
            (moved, read) = (arrived, arrived);
            last = told(&life, &mut split, &mut ledger, &taken, last)?;
        }
    }

    #[test]
    fn what_a_stay_has_proved_no_move_takes_back(life in any_life(), look in any_look()) {
        // At leisure: all of a life on a CPU that stamps, then to one that samples.
        let host = Host { source: Source::Oncpu, baseline_residues: [0; 2], counts: [true; 3] };
        let (mut split, now) = (Split::default(), life.length());
        let stamped = Stay { moved: true, division: Some(Default::default()), ..Stay::default() };
        let look = Look { gaps: [0; 7], ..look };
        let known = until_now(&mut split, &take_at(&life, &host, &look, now, &stamped));
        let stay = Stay { division: None, earlier: known, moved: true };
        let taken = take_at(&life, &host, &look, now, &stay);
        prop_assert_eq!(until_now(&mut split, &taken).guest, known.guest, "no time has passed");
    }
}
