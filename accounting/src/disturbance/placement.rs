//! Where a thread may run, and how often it has been moved: what tells, afterwards, that it was elsewhere meanwhile.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
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

/// Where a thread's placement is read, again and again: for whoever may open no file any more by the time he wants to know.
#[derive(Debug)]
pub struct Whereabouts {
    status: File,
    sched: Option<File>,
}

impl Whereabouts {
    /// Of thread `tid`; `None` where it is gone.
    #[must_use]
    pub fn of(tid: i32) -> Option<Self> {
        let task = Path::new("/proc/self/task").join(tid.to_string());
        Some(Self {
            status: File::open(task.join("status")).ok()?,
            sched: File::open(task.join("sched")).ok(),
        })
    }

    /// Now; `None` where the thread is gone, or the kernel does not say.
    #[must_use]
    pub fn now(&self) -> Option<Placement> {
        let status = parse_status(&from_the_start(&self.status).ok()?).ok()?;
        let sched = self.sched.as_ref().and_then(|sched| from_the_start(sched).ok());
        Some(Placement {
            allowed: status.allowed,
            migrations: sched.and_then(|text| parse_migrations(&text).ok()),
        })
    }
}

/// All that a file of /proc says now.
fn from_the_start(file: &File) -> io::Result<Vec<u8>> {
    let mut text = vec![0; 4096];
    let mut length = 0;
    loop {
        match file.read_at(&mut text[length..], length as u64) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if length == text.len() {
            text.resize(2 * length, 0);
        }
    }
    text.truncate(length);
    Ok(text)
}

impl Placement {
    /// Of thread `tid` now; `None` where it is gone, or the kernel does not say.
    #[must_use]
    pub fn of(tid: i32) -> Option<Self> {
        Whereabouts::of(tid)?.now()
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

    #[test]
    fn what_is_read_again_is_what_is_so_by_then() {
        let moved = std::thread::spawn(|| {
            let tid = rustix::thread::gettid().as_raw_nonzero().get();
            let whereabouts = Whereabouts::of(tid).expect("the thread is here");
            let before = whereabouts.now().expect("it is told").allowed;
            let first = *before.first().expect("it runs somewhere");
            crate::host::run_on(&CpuSet::from([first])).expect("one of its own");
            let after = whereabouts.now().expect("it is told").allowed;
            assert_eq!(after, CpuSet::from([first]));
        });
        moved.join().expect("as it should be");
    }
}
