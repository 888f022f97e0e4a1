//! Where a thread may run, and how often it has been moved: what tells, afterwards, that it was elsewhere meanwhile.

use std::fs;
use std::path::Path;

use super::text::{parse_migrations, parse_status};
use crate::host::CpuSet;

/// A thread of this process at one instant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Where it may run.
    pub allowed: CpuSet,
    /// How often it has been moved from CPU to CPU; `None` without `CONFIG_SCHED_DEBUG`.
    pub migrations: Option<u64>,
}

impl Placement {
    /// Of thread `tid` now; `None` where it is gone, or the kernel does not say.
    #[must_use]
    pub fn of(tid: i32) -> Option<Self> {
        let task = Path::new("/proc/self/task").join(tid.to_string());
        let status = parse_status(&fs::read(task.join("status")).ok()?).ok()?;
        let sched = fs::read(task.join("sched"));
        Some(Self {
            allowed: status.allowed,
            migrations: sched.ok().and_then(|text| parse_migrations(&text).ok()),
        })
    }

    /// The same, of a thread that was pinned while it was asleep on another CPU, if it was: it is moved once more, of its own
    /// accord, when it wakes up.
    #[must_use]
    pub fn asleep(self, elsewhere: bool) -> Self {
        Self {
            migrations: self.migrations.map(|moves| moves + u64::from(elsewhere)),
            ..self
        }
    }

    /// Whether the thread, which was `first` when it was pinned to `cpu`, may have run elsewhere since.
    #[must_use]
    pub fn left(&self, cpu: u32, first: &Self) -> bool {
        self.allowed != CpuSet::from([cpu]) || self.migrations > first.migrations
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placement(allowed: &[u32], migrations: Option<u64>) -> Placement {
        Placement {
            allowed: allowed.iter().copied().collect(),
            migrations,
        }
    }

    #[test]
    fn who_may_run_elsewhere_or_was_moved_and_moved_back_has_left() {
        let first = placement(&[1], Some(2));
        assert!(!placement(&[1], Some(2)).left(1, &first));
        assert!(placement(&[0], Some(2)).left(1, &first));
        assert!(placement(&[0, 1], Some(2)).left(1, &first));
        assert!(placement(&[1], Some(4)).left(1, &first), "away and back");
        let asleep = first.clone().asleep(true);
        assert!(!placement(&[1], Some(3)).left(1, &asleep), "woken up where it was put");
        assert!(placement(&[1], Some(5)).left(1, &asleep), "and away and back");
        let untold = placement(&[1], None);
        assert!(!untold.left(1, &untold));
    }

    #[test]
    fn this_thread_can_be_told() {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let here = Placement::of(tid).expect("the thread is here");
        assert!(!here.allowed.is_empty());
        assert_eq!(Placement::of(i32::MAX), None);
    }
}
