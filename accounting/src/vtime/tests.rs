//! What is read is what was written, however the two meet.

use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;

use super::*;
use crate::clock::Instant;

fn step(writer: &mut VtimeWriter, now: u64, to: State, handled: Option<ExitReason>) -> Snapshot {
    writer.turn_at(now, to, handled);
    writer.totals
}

#[test]
fn a_slice_goes_to_the_state_that_is_left() {
    let (mut writer, reader) = vtime(100, 0);
    step(&mut writer, 110, State::Vmm, None);
    step(&mut writer, 113, State::Guest, None);
    step(&mut writer, 163, State::Vmm, None);
    step(&mut writer, 170, State::Guest, Some(ExitReason::Io));
    let s = reader.snapshot().expect("nobody writes");
    assert_eq!(
        (s.state, s.stamp, s.guest, s.vmm, s.paused),
        (State::Guest, 170, 50, 10, 10)
    );
    assert_eq!(s.exits[ExitReason::Io as usize], ExitTicks { count: 1, vmm: 7 });
}

#[test]
fn a_clock_that_steps_back_costs_nothing_and_loses_nothing() {
    let (mut writer, reader) = vtime(100, 0);
    step(&mut writer, 90, State::Vmm, None);
    step(&mut writer, 200, State::Guest, None);
    let s = reader.snapshot().expect("nobody writes");
    assert_eq!((s.stamp, s.vmm, s.paused), (200, 100, 0));
}

#[test]
fn the_clocks_end_and_a_clock_that_stands_still_or_wraps_lose_nothing() {
    // 2^64 ticks are 117 years at 5 GHz.
    let five_ghz = Scale::of(Instant::default(), Instant { ticks: 5, ns: 1 });
    let (mut writer, reader) = vtime_at(five_ghz, 0, 0);
    let times = [1 << 63, 1 << 63, u64::MAX - 1, u64::MAX, u64::MAX, 5, 0, u64::MAX];
    for (i, now) in times.into_iter().enumerate() {
        let to = if i % 2 == 0 { State::Vmm } else { State::Guest };
        writer.turn_at(now, to, (to == State::Guest).then_some(ExitReason::Io));
        let (s, h) = (
            reader.snapshot().expect("nobody writes"),
            reader.histograms().expect("nobody writes"),
        );
        assert_eq!(s.paused + s.vmm + s.guest, s.stamp);
        assert_eq!(h.vmm.iter().sum::<u64>(), s.exits[ExitReason::Io as usize].count);
    }
    assert_eq!(reader.snapshot().expect("nobody writes").stamp, u64::MAX);
}

#[test]
fn a_transition_while_the_clock_is_read_makes_the_reader_take_both_anew() {
    let (writer, reader) = vtime_at(ns_clock(), 0, 0);
    let writer = std::cell::RefCell::new(writer);
    let read = reader.snapshot_at(|| {
        let now = writer.borrow().totals.stamp + 10;
        if now < 50 {
            writer.borrow_mut().turn_at(now, State::Vmm, None);
        }
        now
    });
    let (snapshot, now) = read.expect("five tries are enough");
    assert_eq!((snapshot.stamp, now), (40, 50));
}

fn any_reason() -> impl Strategy<Value = Option<ExitReason>> {
    proptest::option::of((0..ExitReason::COUNT).prop_map(|i| ExitReason::ALL[i]))
}

proptest! {
    #[test]
    fn what_is_read_is_what_was_written_after_every_transition(
        steps in proptest::collection::vec((0u64..1_000, 0u64..4, any_reason()), 1..60),
    ) {
        let (mut writer, reader) = vtime(0, 0);
        let mut now = 0;
        for (slice, to, handled) in steps {
            now += slice;
            let written = step(&mut writer, now, State::from_word(to), handled);
            prop_assert_eq!(reader.snapshot(), Some(written));
        }
    }
}

/// 1 GHz: a tick is a nanosecond.
fn ns_clock() -> Scale {
    Scale::of(
        Instant::default(),
        Instant {
            ticks: 1_000,
            ns: 1_000,
        },
    )
}

#[test]
fn a_stay_and_an_exit_are_each_in_their_histogram_as_soon_as_they_end() {
    let (mut writer, reader) = vtime_at(ns_clock(), 0, 0);
    let read = || reader.histograms().expect("nobody writes");
    writer.turn_at(1_000, State::Vmm, None);
    writer.turn_at(2_000, State::Guest, None);
    assert_eq!(
        read(),
        Histograms {
            sequence: 3,
            ..Histograms::default()
        },
        "a pause and its end are no exit"
    );

    writer.turn_at(2_000 + 100, State::Vmm, None);
    let mut expected = Histograms {
        sequence: 4,
        run_ticks: 100,
        ..Histograms::default()
    };
    expected.run[1] = 1; // 64 to 128 ns
    assert_eq!(read(), expected);

    writer.turn_at(2_100 + 63, State::Guest, Some(ExitReason::Mmio));
    (expected.sequence, expected.vmm[0], expected.vmm_ticks) = (5, 1, 63);
    assert_eq!(read(), expected);

    writer.turn_at(2_163 + (1 << 36), State::Vmm, None);
    (expected.sequence, expected.run[BUCKETS - 1], expected.run_ticks) = (6, 1, 100 + (1 << 36));
    assert_eq!(read(), expected);
}

proptest! {
    #[test]
    fn every_stay_and_every_exit_is_counted_once_where_its_length_belongs(
        steps in proptest::collection::vec((prop_oneof![0u64..300, 0u64..1 << 40], 0u64..4, any_reason()), 1..60),
    ) {
        let (mut writer, reader) = vtime_at(ns_clock(), 0, 0);
        let (mut now, mut state, mut expected) = (0, State::Paused, Histograms::default());
        for (slice, to, handled) in steps {
            now += slice;
            writer.turn_at(now, State::from_word(to), handled);
            let bucket = (0..BUCKETS).find(|&i| upper_edge_ns(i).is_none_or(|edge| slice < edge));
            let bucket = bucket.expect("the last has no edge");
            match (state, handled) {
                (State::Guest, _) => {
                    expected.run[bucket] += 1;
                    expected.run_ticks += slice;
                }
                (State::Vmm, Some(_)) => {
                    expected.vmm[bucket] += 1;
                    expected.vmm_ticks += slice;
                }
                _ => {}
            }
            state = State::from_word(to);
            expected.sequence = writer.totals.sequence;
            prop_assert_eq!(reader.histograms(), Some(expected));
            let exits = writer.totals.exits.iter().map(|exit| exit.count).sum::<u64>();
            prop_assert_eq!(expected.vmm.iter().sum::<u64>(), exits);
        }
    }
}

#[test]
fn no_reader_sees_half_a_stamp() {
    let (mut writer, reader) = vtime(0, 0);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut last = 0;
                    while !done.load(Ordering::Relaxed) {
                        let Some(s) = reader.snapshot() else { continue };
                        // The writer below stamps by ones, so every tick is in exactly one bucket.
                        assert_eq!(s.guest + s.vmm + s.paused, s.stamp);
                        assert_eq!(
                            s.exits.iter().map(|e| e.vmm).sum::<u64>(),
                            s.exits.iter().map(|e| e.count).sum::<u64>()
                        );
                        assert!(s.sequence >= last);
                        last = s.sequence;

                        let Some(h) = reader.histograms() else { continue };
                        // Every slice is of one tick.
                        assert_eq!(h.run.iter().sum::<u64>(), h.run_ticks);
                        assert_eq!(h.vmm.iter().sum::<u64>(), h.vmm_ticks);
                        assert!(h.sequence >= last);
                        last = h.sequence;
                    }
                })
            })
            .collect();
        let mut now = 0;
        let mut tick = || {
            now += 1;
            now
        };
        writer.turn_at(tick(), State::Vmm, None);
        for i in 0..300_000 {
            writer.turn_at(
                tick(),
                State::Guest,
                (i > 0).then_some(ExitReason::ALL[i % ExitReason::COUNT]),
            );
            writer.turn_at(tick(), State::Vmm, None);
        }
        done.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().expect("a reader saw half a stamp");
        }
    });
}
