//! The latch: how one writer that may be preempted anywhere, for any time, publishes many words as one unit.
//!
//! There are two slots. Publication *n* fills slot *n* mod 2 and then stores *n* as the sequence; a reader copies the
//! slot that the sequence names, and takes the copy if the sequence still says *n*. Slot *n* mod 2 is written again only
//! by publication *n + 2*, which starts after *n + 1* is published, so an unchanged sequence means an untouched slot.
//!
//! ```text
//!   sequence      n        n          n + 1     n + 1          n + 2
//!   slot n mod 2  whole    whole      whole     being filled   whole
//!   the other     whole    being f.   whole     whole          whole
//!                 read ----------------> taken
//!                 read -----------------------------> refused: the sequence moved
//! ```
//!
//! A writer stopped in mid-publication leaves the last complete slot to be read; the writer waits for nobody; a reader
//! retries only when the writer has meanwhile completed a whole publication.
//!
//! The words of a slot are atomics accessed Relaxed between the fences of Boehm, "Can seqlocks get along with
//! programming language memory models?" (MSPC 2012): there is no data race to reason about, and on x86 both fences are
//! free. What each fence is for is shown by the models below, which find the torn read as soon as either is left out.

use crate::sync::{AtomicU64, Ordering, fence};

/// A slot is a cache line apart from what is beside it, so that filling one does not disturb a reader of the other.
#[derive(Debug)]
#[repr(align(64))]
struct Apart<S>(S);

/// Two slots `S` of words, and which of them is the last complete one. The two parameters leave a fence out, for the
/// models to show what happens then.
#[derive(Debug)]
pub(super) struct Latch<S, const WRITER_FENCE: bool = true, const READER_FENCE: bool = true> {
    slots: [Apart<S>; 2],
    sequence: AtomicU64,
}

impl<S, const WRITER_FENCE: bool, const READER_FENCE: bool> Latch<S, WRITER_FENCE, READER_FENCE> {
    /// A latch whose sequence is 0.
    pub(super) fn new(slots: [S; 2]) -> Self {
        Self {
            slots: slots.map(Apart),
            sequence: AtomicU64::new(0),
        }
    }

    fn slot(&self, sequence: u64) -> &S {
        &self.slots[usize::from(sequence & 1 == 1)].0
    }

    /// Publishes what `fill` stores, Relaxed, in the slot it is given: all the words that differ from what was published
    /// two sequences ago, which the slot still holds. For the one writer only; `sequence` is one more than the last.
    #[inline(always)]
    pub(super) fn publish(&self, sequence: u64, fill: impl FnOnce(&S)) {
        // Whoever sees a word of this slot change sees the previous sequence, or a later one.
        if WRITER_FENCE {
            fence(Ordering::Release);
        }
        fill(self.slot(sequence));
        self.sequence.store(sequence, Ordering::Release);
    }

    /// One try to copy the last complete slot by `copy`, which loads Relaxed and is told the sequence. `None` if the
    /// writer completed a publication meanwhile.
    #[inline(always)]
    pub(super) fn try_read<T>(&self, copy: impl FnOnce(u64, &S) -> T) -> Option<T> {
        let sequence = self.sequence.load(Ordering::Acquire);
        let copied = copy(sequence, self.slot(sequence));
        // Pairs with the writer's: if any load above saw publication n + 2, the one below sees n + 1 or later.
        if READER_FENCE {
            fence(Ordering::Acquire);
        }
        (self.sequence.load(Ordering::Relaxed) == sequence).then_some(copied)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORDS: usize = 8;

    type Words = [AtomicU64; WORDS];

    fn latch() -> Latch<Words> {
        Latch::new(Default::default())
    }

    fn fill(n: u64, words: &[AtomicU64]) {
        words.iter().for_each(|word| word.store(n, Ordering::Relaxed));
    }

    fn copy(words: &[AtomicU64]) -> Vec<u64> {
        words.iter().map(|word| word.load(Ordering::Relaxed)).collect()
    }

    #[test]
    fn a_writer_stopped_after_any_word_leaves_the_last_publication_to_be_read_at_the_first_try() {
        let latch = latch();
        for n in 1..6 {
            latch.publish(n, |words| {
                for word in words {
                    word.store(n, Ordering::Relaxed);
                    let read = latch.try_read(|sequence, words| (sequence, copy(words)));
                    assert_eq!(read, Some((n - 1, vec![n - 1; WORDS])));
                }
            });
        }
    }

    #[test]
    fn a_reader_stopped_before_any_word_holds_up_no_writer_and_takes_nothing_torn() {
        let latch = latch();
        let mut n = 0;
        for stop in 0..=WORDS {
            for publications in 0..5 {
                let read = latch.try_read(|_, words| {
                    let mut read = copy(&words[..stop]);
                    for _ in 0..publications {
                        n += 1;
                        latch.publish(n, |words| fill(n, words));
                    }
                    read.extend(copy(&words[stop..]));
                    read
                });
                assert_eq!(read, (publications == 0).then(|| vec![n; WORDS]));
                assert_eq!(latch.try_read(|_, words| copy(words)), Some(vec![n; WORDS]));
            }
        }
    }
}

/// Every interleaving of a writer and a reader, with every value the memory model lets each load return.
#[cfg(all(test, loom))]
mod model {
    use loom::sync::Arc;

    use super::*;

    /// Publications of one run: the least by which a reader can meet the slot it reads filled again.
    const PUBLICATIONS: u64 = 2;

    type Words = [AtomicU64; 2];

    /// Publishes *n* as both words of publication *n* while a reader reads, which fails if it takes two that differ.
    fn publish_and_read<const WRITER_FENCE: bool, const READER_FENCE: bool>() {
        loom::model(|| {
            let slot = || [AtomicU64::new(0), AtomicU64::new(0)];
            let latch = Arc::new(Latch::<Words, WRITER_FENCE, READER_FENCE>::new([slot(), slot()]));
            let writer = loom::thread::spawn({
                let latch = Arc::clone(&latch);
                move || {
                    for n in 1..=PUBLICATIONS {
                        latch.publish(n, |words| {
                            words.iter().for_each(|word| word.store(n, Ordering::Relaxed))
                        });
                    }
                }
            });
            let copy = |n, words: &Words| [n, words[0].load(Ordering::Relaxed), words[1].load(Ordering::Relaxed)];
            // A try fails for a publication that was completed meanwhile; so in all it fails at most so often.
            let read = (0..=PUBLICATIONS).find_map(|_| latch.try_read(copy));
            let [n, first, second] = read.expect("the writer was where it was, and a reader was kept waiting");
            assert!(
                first == n && second == n,
                "publication {n} was read as {first} and {second}"
            );
            writer.join().expect("it only stores");
        });
    }

    #[test]
    fn no_reader_is_torn_or_kept_waiting_wherever_the_writer_is() {
        publish_and_read::<true, true>();
    }

    #[test]
    #[should_panic(expected = "was read as")]
    fn without_the_writers_fence_a_reader_is_torn() {
        publish_and_read::<false, true>();
    }

    #[test]
    #[should_panic(expected = "was read as")]
    fn without_the_readers_fence_a_reader_is_torn() {
        publish_and_read::<true, false>();
    }
}
