//! The reading side of vtime.

use std::sync::Arc;

use super::histogram::Edges;
use super::latch::Latch;
use super::slot::Slot;
use super::{Histograms, Snapshot};

/// The reading side. Reading writes nothing shared: the vCPU thread cannot tell.
#[derive(Clone, Debug)]
pub struct VtimeReader {
    latch: Arc<Latch<Slot>>,
    edges: Edges,
}

impl VtimeReader {
    /// A try fails only if the writer completes a transition within its some 50 ns; transitions are two an exit, and
    /// an exit takes a microsecond at least. A reader that fails this often was itself held up each time.
    const TRIES: usize = 64;

    pub(super) fn new(latch: Arc<Latch<Slot>>, edges: Edges) -> Self {
        Self { latch, edges }
    }

    /// The last complete snapshot; `None` where a writer in full career outran every one of a bounded number of tries.
    #[must_use]
    pub fn snapshot(&self) -> Option<Snapshot> {
        let read = || self.latch.try_read(|sequence, slot| slot.snapshot(sequence));
        (0..Self::TRIES).find_map(|_| read())
    }

    /// As [`VtimeReader::snapshot`], with what `clock` says while that snapshot is the last one: no transition comes between
    /// the two, though the reader may be held up there, so the running slice truly belongs to the snapshot's state.
    #[must_use]
    pub fn snapshot_at<T>(&self, clock: impl Fn() -> T) -> Option<(Snapshot, T)> {
        let read = || self.latch.try_read(|sequence, slot| (slot.snapshot(sequence), clock()));
        (0..Self::TRIES).find_map(|_| read())
    }

    /// The last complete histograms, all of one transition; `None` as [`VtimeReader::snapshot`]. They are apart from it
    /// because copying them takes several times as long.
    #[must_use]
    pub fn histograms(&self) -> Option<Histograms> {
        let read = || {
            self.latch
                .try_read(|sequence, slot| slot.histograms(sequence, self.edges))
        };
        (0..Self::TRIES).find_map(|_| read())
    }
}
