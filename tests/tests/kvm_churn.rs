//! Two dozen microVMs, over and over: nothing is left behind, nothing grows, and no reading breaks a law.

use tests::churn::{self, MICROVMS};
use tests::require_bed;

/// What an allocator may come to keep in a few rounds: a page or two for each of a process's threads.
const ALLOCATOR_KIB: u64 = 64;

#[test]
fn two_dozen_microvms_hold_no_more_after_pauses_than_before() {
    require_bed!(kvm);
    let rounds = churn::pauses(2).expect("all live");
    println!("{}", rounds.json("pauses"));
    for (first, last) in rounds.first.iter().zip(&rounds.last) {
        assert_eq!((first.descriptors, first.threads), (last.descriptors, last.threads));
        assert!(
            last.resident_kib <= first.resident_kib + ALLOCATOR_KIB,
            "{first:?} {last:?}"
        );
    }
}

#[test]
fn two_dozen_microvms_that_come_and_go_leave_nothing_on_the_host() {
    require_bed!(kvm);
    let rounds = churn::starts(1).expect("they start and end");
    println!("{}", rounds.json("starts"));
    let (first, last) = (rounds.first[0], rounds.last[0]);
    // Others start and end things on this host too; one of each that each microVM left would be more than that.
    let starts = (rounds.rounds * MICROVMS) as u64;
    assert!(last.files < first.files + starts, "{first:?} {last:?}");
    assert!(last.threads < first.threads + starts, "{first:?} {last:?}");
    assert_eq!((last.kvm, last.mounts), (first.kvm, first.mounts));
}

#[test]
fn a_process_that_makes_and_drops_two_dozen_guests_has_all_back() {
    require_bed!(kvm);
    let rounds = churn::in_one_process(3).expect("KVM has room");
    println!("{}", rounds.json("in one process"));
    let (first, last) = (rounds.first[0], rounds.last[0]);
    // Each guest has a descriptor and more, a thread, and memory.
    let guests = rounds.rounds * MICROVMS;
    assert!(last.descriptors < first.descriptors + guests, "{first:?} {last:?}");
    assert!(last.threads < first.threads + guests, "{first:?} {last:?}");
    assert!(
        last.resident_kib < first.resident_kib + 4 * guests as u64,
        "{first:?} {last:?}"
    );
}
