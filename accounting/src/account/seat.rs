//! Where the thread is put, and how its account goes on when it is put elsewhere.
//!
//! Stamps, time on a CPU and waits are the thread's own, wherever it runs. What depends on the CPU is the kernel's division
//! of that time: exact where it stamps, nothing where it samples. A [`Seat`] is one stay, and holds the figures of that
//! division as it began. A move is three instants:
//!
//! ```text
//!   old seat          │ the move         │ new seat
//!   ──────────────────┼──────────────────┼──────────────────
//!   proved by its     │ on either CPU:   │ proved by its
//!   own source        │ by oncpu         │ own source
//! ```
//!
//! Readers wait for it, under the lock that they share: so no reading is of a thread that is on one CPU and an account that
//! is of another, and the very next is by the new seat's source.

use std::sync::{Arc, Mutex, PoisonError};

use super::{Account, Books, Taken};
use crate::disturbance::{Placement, Watch, Whereabouts};
use crate::probe::{Depth, Raw, Utime};
use crate::split::Earlier;

/// So many takes, at each end of a move, of which the quickest counts.
const TRIES: usize = 8;

/// One stay.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seat {
    /// The one CPU that the thread is pinned to, if to one.
    pub(super) pinned: Option<u32>,
    /// The kernel's division as the stay began, where it goes by stamps here.
    pub(super) division: Option<Division>,
    /// What was known by then.
    pub(super) earlier: Earlier,
}

/// The kernel's division of the thread's CPU time at one instant.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Division {
    pub(super) utime: Utime,
    pub(super) guest_time_clk: u64,
    /// Time on a CPU while paused, in nanoseconds.
    pub(super) paused_cpu_ns: u64,
}

impl Division {
    pub(super) fn of(raw: &Raw, paused_cpu_ns: u64) -> Self {
        Self {
            utime: raw.utime.unwrap_or_default(),
            guest_time_clk: raw.stat.guest_time_clk,
            paused_cpu_ns,
        }
    }
}

impl Seat {
    pub(super) fn depth(&self) -> Depth {
        match self.division {
            Some(_) => Depth::Utime,
            None => Depth::Lean,
        }
    }
}

/// What the vCPU thread itself has to know at its end, when it waits for no reader: where it was put last. Locked for one
/// assignment by whoever moves it, and by no reader. No CPU where it was put to one whose tick samples: there it has nothing
/// to lose.
#[derive(Debug)]
pub(super) struct Placed {
    first: Mutex<(Option<u32>, Option<Placement>)>,
    /// The thread's own: it may open nothing at its end.
    whereabouts: Option<Whereabouts>,
}

impl Placed {
    /// Of thread `tid`, which is there.
    pub(super) fn new(pinned: Option<u32>, tid: i32) -> Self {
        let whereabouts = Whereabouts::of(tid);
        let placement = whereabouts.as_ref().and_then(Whereabouts::now);
        Self {
            first: Mutex::new((pinned, placement)),
            whereabouts,
        }
    }

    fn set(&self, pinned: Option<u32>, placement: Option<Placement>) {
        *self.first.lock().unwrap_or_else(PoisonError::into_inner) = (pinned, placement);
    }

    /// Whether the thread may have been elsewhere since. In the middle of a move it may, and claims less.
    pub(super) fn left(&self) -> bool {
        let now = || self.whereabouts.as_ref()?.now();
        match &*self.first.lock().unwrap_or_else(PoisonError::into_inner) {
            (Some(cpu), Some(first)) => now().is_some_and(|now| now.left(*cpu, first)),
            _ => false,
        }
    }
}

impl Account {
    /// Puts the thread elsewhere: `go` gives it another affinity, to `pinned` alone if that is `Some`, and returns once
    /// it can no longer run outside of it, as `sched_setaffinity` does. The next reading is by the source that
    /// the new place allows; no law is suspended. Readings meanwhile wait.
    ///
    /// The thread must not be moved in another way: that is a [`crate::disturbance::Disturbance`], which this puts an end
    /// to. A vCPU thread that has ended may be passed: then `go` decides what to say.
    ///
    /// # Errors
    /// What `go` says; then nothing has changed.
    pub fn put<E>(&self, pinned: Option<u32>, go: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let mut books = self.books();
        // An outside move since the last look must not pass for time on the old CPU.
        self.look_afresh(&mut books);
        let before = self.take_surely(&mut books).map(|taken| {
            self.publish(&mut books, &taken);
            taken.until_now()
        });
        go()?;
        // Without figures from before the move, what the move leaves is as true: less is known.
        let earlier = before.unwrap_or(books.seat.earlier);
        let seat = Seat {
            pinned,
            division: None,
            earlier,
        };
        books.seat = seat;
        let seen_on = books.probes.read(Depth::Full).ok().map(|raw| raw.stat.processor);
        let asleep_on = seen_on.filter(|&cpu| pinned.is_some_and(|pinned| pinned != cpu));
        let stamps_here = pinned.filter(|&cpu| self.host.is_nohz_full(cpu));
        self.placed.set(
            stamps_here,
            Placement::of(self.tid).map(|p| p.asleep(asleep_on.is_some())),
        );
        books.watch = Watch::of_moved(self.tid, pinned, Arc::clone(&self.host), asleep_on);
        if let Some(taken) = self.take_surely(&mut books) {
            books.seat = Seat {
                division: stamps_here.map(|_| Division::of(&taken.raw, taken.paused_cpu_ns)),
                earlier: taken.until_now(),
                ..seat
            };
        }
        // A reading that the writer outruns repeats what was published last: that must not be of the old seat.
        if let Some(taken) = self.take_surely(&mut books) {
            self.publish(&mut books, &taken);
        }
        Ok(())
    }

    /// As [`Account::take`], which a writer that outruns it a few times makes give up; it does not outrun this many. Of a
    /// few the quickest: its bounds are the bounds of all that follows. `None` where the thread is gone, without having
    /// closed its account.
    fn take_surely(&self, books: &mut Books) -> Option<Taken> {
        let mut best: Option<Taken> = None;
        for _ in 0..TRIES {
            let taken = (0..1_000).find_map(|_| self.take(books, Depth::Full))?;
            if best.is_none_or(|best| taken.took_ns < best.took_ns) {
                best = Some(taken);
            }
            if taken.took_ns < self.tick_ns / 64 {
                break;
            }
        }
        best
    }
}

impl Taken {
    /// What is known at this instant, by the better of the sources that go by the kernel: stamps of BPF's need no seat.
    fn until_now(&self) -> Earlier {
        let [_, vtime, oncpu] = self.claims;
        let claim = vtime.or(oncpu).expect("there is always time on a CPU");
        Earlier::until(&self.inputs, &self.at, &claim)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc::channel;
    use std::thread;
    use std::time::Duration;

    use rustix::process::Pid;
    use rustix::thread::sched_setaffinity;

    use super::super::{Gtime, Open};
    use super::*;
    use crate::host::{CpuSet, HostCpus, mask};
    use crate::laws;
    use crate::reading::{Source, VcpuState};
    use crate::vtime::ExitReason;

    /// This host, as if its first CPU were `nohz_full` and the others were not.
    fn host() -> HostCpus {
        let host = HostCpus::read().expect("sysfs");
        HostCpus {
            nohz_full: host.affinity.first().map(|&cpu| CpuSet::from([cpu])),
            ..host
        }
    }

    /// Ends the other threads however a test ends.
    struct Over<'a>(&'a AtomicBool);

    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    /// A vCPU without a guest, which goes in and out of it, and sleeps now and then; paused until it has been told to go.
    fn vcpu(host: &HostCpus, over: Arc<AtomicBool>) -> (Arc<Account>, thread::JoinHandle<()>, impl FnOnce() + use<>) {
        let (tell, told) = channel();
        let (go, gone) = channel::<()>();
        let open = Open {
            index: 0,
            kvm_stats: None,
            pinned: None,
            host: Arc::new(host.clone()),
            gtime: Gtime::default(),
        };
        let thread = thread::spawn(move || {
            let (mut writer, account) = Account::open(open).expect("own probes");
            tell.send(Arc::clone(&account)).expect("the test listens");
            let _ = gone.recv();
            writer.resume();
            writer.guest_enter(None);
            for i in 0_u64.. {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                writer.guest_exit();
                if i % 4_096 == 0 {
                    thread::sleep(Duration::from_millis(1));
                }
                writer.guest_enter(Some(ExitReason::Io));
            }
            writer.guest_exit();
            account.close(writer);
        });
        (told.recv().expect("the thread tells"), thread, move || drop(go))
    }

    fn put(account: &Account, host: &HostCpus, pinned: Option<u32>) -> std::io::Result<()> {
        let cpus = pinned.map_or_else(|| host.affinity.clone(), |cpu| CpuSet::from([cpu]));
        let mask = mask(&cpus)?;
        account.put(pinned, || Ok(sched_setaffinity(Pid::from_raw(account.tid()), &mask)?))
    }

    #[test]
    fn no_law_is_broken_by_moves_and_the_very_next_reading_is_of_the_new_place() {
        let (host, over) = (host(), Arc::new(AtomicBool::new(false)));
        let (account, thread, go) = vcpu(&host, over.clone());
        go();
        let reader = || {
            let mut last = account.read();
            while !over.load(Ordering::Relaxed) {
                let reading = account.read();
                assert_eq!(laws::check_pair(&last, &reading), Ok(()));
                last = reading;
            }
        };
        thread::scope(|scope| {
            scope.spawn(reader);
            let _over = Over(&over);
            let places = host.affinity.iter().copied().map(Some).chain([None]);
            for pinned in places.cycle().take(60) {
                put(&account, &host, pinned).expect("its affinity is ours");
                let reading = account.read();
                let stamps = pinned.is_some_and(|cpu| host.is_nohz_full(cpu));
                let source = if stamps { Source::Vtime } else { Source::Oncpu };
                assert_eq!((reading.source, account.pinned()), (source, pinned), "{reading:?}");
                assert_eq!(reading.host_cpu.pinned, pinned.is_some());
                assert_eq!(reading.host_cpu.nohz_full && pinned.is_some(), stamps);
                if let Some(cpu) = pinned {
                    assert_eq!(reading.host_cpu.cpu, cpu);
                    if !stamps {
                        assert_eq!(reading.host_cpu.tick_stopped, Some(false));
                    }
                }
                thread::sleep(Duration::from_millis(1));
                assert!(account.disturbances().iter().all(|d| d.kind() != "moved_affinity"));
            }
        });
        thread.join().expect("it ends");
        assert_eq!(account.read().state, VcpuState::Exited);
    }

    #[test]
    fn one_that_is_asleep_is_where_it_was_put_before_it_wakes_up_and_after() {
        let (host, over) = (host(), Arc::new(AtomicBool::new(false)));
        let (account, thread, go) = vcpu(&host, over.clone());
        // Wherever it sleeps, one of these is elsewhere; the last is the one that stamps.
        let mut places: Vec<u32> = host.affinity.iter().copied().collect();
        places.reverse();
        for cpu in places {
            put(&account, &host, Some(cpu)).expect("its affinity is ours");
            for _ in 0..2 {
                let reading = account.read();
                assert_eq!((reading.state, reading.host_cpu.cpu), (VcpuState::Paused, cpu));
                assert!(account.disturbances().iter().all(|d| d.kind() != "moved_affinity"));
            }
        }
        assert_eq!(account.read().source, Source::Vtime);
        go();
        while account.read().exits.total == 0 {
            thread::yield_now();
        }
        assert!(account.disturbances().iter().all(|d| d.kind() != "moved_affinity"));
        over.store(true, Ordering::Relaxed);
        thread.join().expect("it ends");
        assert_eq!(account.read().source, Source::Vtime, "nor did it leave, to its end");
    }

    #[test]
    fn a_move_that_is_refused_changes_nothing() {
        let (host, over) = (host(), Arc::new(AtomicBool::new(true)));
        let (account, thread, go) = vcpu(&host, over);
        assert_eq!(account.put(Some(0), || Err("no")), Err("no"));
        let reading = account.read();
        assert_eq!((reading.source, reading.host_cpu.pinned), (Source::Oncpu, false));
        go();
        thread.join().expect("it ends");
    }
}
