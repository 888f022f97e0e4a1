//! The real slots under the model checker; see the latch's own models for what it proves.

use super::*;
use crate::clock::Instant;

/// A try stores and loads some 20 words a transition, so not every interleaving can be tried: all with up to two
/// preemptions, which is what it takes to tear a read (into the writer, and back).
const PREEMPTIONS: usize = 2;

/// Runs an exit and its handling, every slice one tick long, while `read` reads.
fn exit_and_read(read: fn(&VtimeReader)) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(PREEMPTIONS);
    model.check(move || {
        let ns_clock = Scale::of(Instant::default(), Instant { ticks: 1, ns: 1 });
        let (mut writer, reader) = vtime_at(ns_clock, 0, 0);
        writer.turn_at(1, State::Vmm, None);
        writer.turn_at(2, State::Guest, None);
        let vcpu = loom::thread::spawn(move || {
            writer.turn_at(3, State::Vmm, None);
            writer.turn_at(4, State::Guest, Some(ExitReason::Io));
        });
        read(&reader);
        vcpu.join().expect("it only stores");
    });
}

#[test]
fn a_snapshot_is_of_one_transition() {
    exit_and_read(|reader| {
        let s = reader.snapshot().expect("a reader was kept waiting");
        assert_eq!(s.paused + s.vmm + s.guest, s.stamp);
        assert_eq!(s.stamp + 1, s.sequence);
        assert_eq!(s.exits[ExitReason::Io as usize].count, u64::from(s.sequence == 5));
    });
}

#[test]
fn histograms_are_of_one_transition() {
    exit_and_read(|reader| {
        let h = reader.histograms().expect("a reader was kept waiting");
        let [run, vmm] = [h.run, h.vmm].map(|counts| counts.iter().sum::<u64>());
        assert_eq!((run, vmm), (u64::from(h.sequence >= 4), u64::from(h.sequence == 5)));
        assert_eq!((run, vmm), (h.run_ticks, h.vmm_ticks));
    });
}
