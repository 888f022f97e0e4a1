//! One vCPU's account: the writer's half stays on the vCPU thread, the reader's half is shared.
//!
//! A reading costs a lock among readers, which the vCPU thread never takes, and the probes' system calls: none of
//! them sleeps, signals, or sends an interrupt to the vCPU's CPU.

mod explain;
mod gtime;
mod seat;
mod stamped;
mod take;

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::param::clock_ticks_per_second;

pub use explain::{Explained, Explanation, ProbeValues, SourceClaim};
use gtime::{Bpf, Claims};
pub use gtime::{Gtime, GtimeSource, UnknownSource};
use seat::{Division, Placed, Seat};
use stamped::{Bracket, Steering};
use take::{Closed, Taken};

use crate::clock::{self, Instant, Scale};
use crate::disturbance::{Disturbance, Watch};
use crate::host::{HostCpus, tick_ns};
use crate::ledger::{self, Ledger};
use crate::probe::bpf::Tracked;
use crate::probe::{Depth, Probes, Raw};
use crate::reading::{Bounds, ExitTotals, Exits, Histogram, Histograms, HostCpu, Pending, Reading, Source, VcpuState};
use crate::split::{Earlier, Split};
use crate::vtime::{BUCKETS, ExitReason, VtimeReader, VtimeWriter, vtime};

/// What [`Account::open`] needs to know.
#[derive(Debug)]
pub struct Open {
    /// The vCPU's index, from 0.
    pub index: u32,
    /// The descriptor `KVM_GET_STATS_FD` gave for this vCPU; `None` where KVM has none (before Linux 5.14).
    pub kvm_stats: Option<File>,
    /// The one CPU the calling thread is pinned to, if it is.
    pub pinned: Option<u32>,
    /// The host's CPUs.
    pub host: Arc<HostCpus>,
    /// What guest time is to be derived from.
    pub gtime: Gtime,
}

/// Why an account could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A probe's file or clock cannot be read.
    #[error("cannot read {what} of the vCPU thread: {source}")]
    Probe {
        /// Which probe.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

/// The reading side of one vCPU's account. Any thread of this process may read; no reading touches the vCPU thread.
#[derive(Debug)]
pub struct Account {
    index: u32,
    tid: i32,
    vtime: VtimeReader,
    host: Arc<HostCpus>,
    gtime_source: GtimeSource,
    /// The thread's guest time by BPF's stamps, or why it has none.
    stamps: Result<Tracked, Arc<str>>,
    /// The first stamp.
    opened: Instant,
    /// What the probes said at the first stamp.
    baseline: Raw,
    tick_ns: u64,
    stat_unit_ns: u64,
    /// The thread's own, for its last look: taken by [`Account::close`], and by nobody else.
    last_probes: Mutex<Option<Probes>>,
    placed: Placed,
    /// The last instant, and what the probes said then, when the thread has ended.
    closed: OnceLock<Closed>,
    books: Mutex<Books>,
}

/// What readings need from one another.
#[derive(Debug)]
struct Books {
    probes: Probes,
    seat: Seat,
    /// What disturbs the thread; looked for at most once a second.
    watch: Watch,
    /// Of BPF's clock against the readings'.
    steering: Steering,
    split: Split,
    ledger: Ledger,
    /// By [`ExitReason`]'s discriminant, as published.
    exits: [ExitTotals; ExitReason::COUNT],
    /// The last ones, empty at first.
    histograms: Histograms,
    /// From the first reading on, which [`Account::open`] takes.
    said: Option<Said>,
}

/// What a reading says beside the totals.
#[derive(Clone, Copy, Debug)]
struct Said {
    state: VcpuState,
    pending: Pending,
    gtime_bounds_ns: Bounds,
    source: Source,
    host_cpu: HostCpu,
}

impl Account {
    /// Opens the calling thread's account: takes the baselines of every probe and the first stamp, in state `Paused`.
    /// Call it on the vCPU thread itself, once pinned.
    ///
    /// # Errors
    /// When a probe that every Linux has cannot be read.
    pub fn open(open: Open) -> Result<(VtimeWriter, Arc<Self>), OpenError> {
        let probe = |(what, source)| OpenError::Probe { what, source };
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let kvm_stats = open.kvm_stats.as_ref().map(File::try_clone).transpose();
        let kvm_stats = kvm_stats.map_err(|error| probe(("KVM statistics", error)))?;
        let mut probes = Probes::open(tid, open.kvm_stats).map_err(probe)?;
        let last_probes = Probes::open(tid, kvm_stats).map_err(probe)?;
        let baseline = probes.read(Depth::Full).map_err(probe)?;
        let stamps = match &open.gtime.bpf {
            Bpf::Attached(meter) => meter.track(tid).map_err(|error| error.to_string().into()),
            Bpf::Absent(why) => Err(why.clone()),
        };
        let vtime_cpu = open.pinned.is_some_and(|cpu| open.host.is_nohz_full(cpu));
        let seat = Seat {
            pinned: open.pinned,
            division: vtime_cpu.then(|| Division::of(&baseline, 0)),
            earlier: Earlier::default(),
        };
        let watch = Watch::new(tid, open.pinned, Arc::clone(&open.host));
        let bracket = Bracket::now();
        let opened = bracket.now;
        let (writer, reader) = vtime(opened.ticks, baseline.sched_ns);
        let account = Self {
            index: open.index,
            tid,
            vtime: reader,
            host: open.host,
            gtime_source: open.gtime.source,
            stamps,
            opened,
            baseline,
            tick_ns: tick_ns(),
            stat_unit_ns: 1_000_000_000 / clock_ticks_per_second().max(1),
            last_probes: Mutex::new(Some(last_probes)),
            placed: Placed::new(open.pinned.filter(|_| vtime_cpu), tid),
            closed: OnceLock::new(),
            books: Mutex::new(Books {
                probes,
                seat,
                watch,
                steering: Steering::since(bracket.lead()),
                split: Split::default(),
                ledger: Ledger::default(),
                exits: [ExitTotals::default(); ExitReason::COUNT],
                histograms: Histograms {
                    index: open.index,
                    run: Histogram::new(&[0; BUCKETS], 0),
                    vmm: Histogram::new(&[0; BUCKETS], 0),
                },
                said: None,
            }),
        };
        // All later readings may fall back on the first.
        let mut books = account.books();
        let depth = books.seat.depth();
        while account.refresh(&mut books, depth, |_| ()).is_none() {
            // Nobody writes yet, so it was a probe, which answers now or says what it is.
            books.probes.read(Depth::Full).map_err(probe)?;
        }
        drop(books);
        Ok((writer, Arc::new(account)))
    }

    /// Closes the account: takes the last stamp and the last value of every probe, so that readings go on being
    /// answered, standing still, when the thread is gone. Call it on the vCPU thread, last. It does not wait for a reading
    /// under way, so a reader that is held up, for whatever time, does not hold up the vCPU's end.
    pub fn close(&self, writer: VtimeWriter) {
        let mut probes = self.last_probes.lock().unwrap_or_else(PoisonError::into_inner).take();
        // The thread is here, so its clocks can be read; if not, it accrued nothing that anybody knows of.
        let raw = probes.as_mut().and_then(|probes| probes.read(Depth::Full).ok());
        let moved = self.placed.left();
        let (bracket, stamps) = self.instant();
        let end = Closed {
            raw: raw.unwrap_or(self.baseline),
            moved,
            bracket,
            stamps,
        };
        // In this order: whoever sees the end sees its instant too.
        let _ = self.closed.set(end);
        writer.end(bracket.now.ticks);
    }

    /// Linux thread id of the vCPU thread.
    #[must_use]
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// The one host CPU that the thread is pinned to, if to one: as [`Account::open`] or [`Account::put`] was told last.
    #[must_use]
    pub fn pinned(&self) -> Option<u32> {
        self.books().seat.pinned
    }

    /// A reading, the running slice included. May be called from any thread of this process, at any rate.
    #[expect(clippy::missing_panics_doc, reason = "open() takes the first reading")]
    pub fn read(&self) -> Reading {
        let mut books = self.books();
        let depth = books.seat.depth();
        self.refresh(&mut books, depth, |_| ());
        // Else the writer outran every try, or the thread died without closing: what was read last is of one instant
        // too, and as true as it was.
        self.published(&books)
            .expect("open() took the first, with nobody writing")
    }

    /// A reading, and what it was made of: each source's own claim, each probe's raw value. Makes all the probes, of which a
    /// reading leaves out what it can do without.
    /// `None` where [`Account::read`] would repeat its last reading.
    pub fn explain(&self) -> Option<Explained> {
        let mut books = self.books();
        let explain = self.refresh(&mut books, Depth::Full, |taken| Explanation::new(self, taken))?;
        Some(Explained {
            reading: self.published(&books)?,
            explain,
        })
    }

    /// How long stays in `KVM_RUN` and the handling of exits took, whole and of one instant. May be called as
    /// [`Account::read`], costs no system call, and no figure is ever smaller than in an earlier answer.
    pub fn histograms(&self) -> Histograms {
        let mut books = self.books();
        let now = self.closed.get().map_or_else(Instant::now, |end| end.bracket.now);
        // Else the writer outran every try: the last answer is of one instant too.
        if let Some(h) = self.vtime.histograms() {
            let scale = Scale::of(self.opened, now);
            let last = &mut books.histograms;
            // A scale that is better known may convert to less.
            let ns = |ticks, published_ns| scale.to_ns(ticks).max(published_ns);
            last.run = Histogram::new(&h.run, ns(h.run_ticks, last.run.sum_ns));
            last.vmm = Histogram::new(&h.vmm, ns(h.vmm_ticks, last.vmm.sum_ns));
        }
        books.histograms.clone()
    }

    /// What disturbs the thread now: looks afresh, which takes some 0.2 ms and disturbs nobody. What is going on shows in what
    /// grows between two looks, so make two, some 50 ticks of the host apart. Empty once the thread has ended.
    pub fn disturbances(&self) -> Vec<Disturbance> {
        let mut books = self.books();
        if self.closed.get().is_some() {
            return Vec::new();
        }
        self.look_afresh(&mut books);
        books.watch.findings().disturbances.clone()
    }

    fn look_afresh(&self, books: &mut Books) {
        if let Ok(raw) = books.probes.read(Depth::Full) {
            let now_ns = clock::monotonic_raw_ns();
            (books.watch).look_afresh(now_ns, raw.sched_ns, raw.stat.processor, raw.run_delay_ns);
        }
    }

    /// A panic while the lock was held left books that are whole: each is changed by one call that does not panic.
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one instant's figures and publishes them. Takes them again if this thread was held up meanwhile: upper bounds are
    /// as loose as the probes are old, and what the vCPU thread was seen to do before may not be what it has done since.
    fn refresh<T>(&self, books: &mut Books, depth: Depth, also: impl FnOnce(&Taken) -> T) -> Option<T> {
        const TRIES: usize = 3;
        let mut tries = 1;
        loop {
            let taken = self.take(books, depth)?;
            if taken.took_ns < self.tick_ns / 16 || tries == TRIES {
                self.publish(books, &taken);
                return Some(also(&taken));
            }
            tries += 1;
        }
    }

    fn publish(&self, books: &mut Books, taken: &Taken) {
        let Taken { snapshot, inputs, .. } = taken;
        let claim = self.gtime_source.choose(&taken.claims);
        let answer = taken.at.with_guest(inputs, claim.point_ns);
        let exact = match claim.source {
            Source::Bpf => ledger::EXACT_WITH_GUEST,
            Source::Vtime | Source::Oncpu => ledger::EXACT,
        };
        books.ledger.publish(inputs.elapsed_ns, answer.modes, exact);
        for (total, exit) in books.exits.iter_mut().zip(&snapshot.exits) {
            if exit.count > 0 {
                total.count = exit.count;
                // A scale that is better known may convert to less.
                total.vmm_ns = taken.scale.to_ns(exit.vmm).max(total.vmm_ns);
            }
        }
        books.said = Some(Said {
            state: answer.state,
            pending: Pending {
                mode: answer.pending,
                delta_ns: inputs.slice_ns,
            },
            gtime_bounds_ns: books.ledger.publish_bounds(claim.bounds),
            source: claim.source,
            host_cpu: self.host_cpu(taken),
        });
    }

    /// What was published last.
    fn published(&self, books: &Books) -> Option<Reading> {
        let said = books.said?;
        let (modes, elapsed_ns) = (books.ledger.modes(), books.ledger.elapsed_ns());
        let (mut total, mut by_reason) = (0, BTreeMap::new());
        for (reason, exit) in ExitReason::ALL.iter().zip(&books.exits) {
            if exit.count > 0 {
                total += exit.count;
                by_reason.insert(reason.name().to_owned(), *exit);
            }
        }
        Some(Reading {
            index: self.index,
            tid: self.tid,
            state: said.state,
            at_ns: self.opened.ns.saturating_add(elapsed_ns),
            elapsed_ns,
            utime_ns: modes.host_user_ns + modes.guest_ns,
            stime_ns: modes.host_kernel_ns,
            gtime_ns: modes.guest_ns,
            modes,
            pending: said.pending,
            gtime_bounds_ns: said.gtime_bounds_ns,
            source: said.source,
            exits: Exits { total, by_reason },
            host_cpu: said.host_cpu,
        })
    }

    fn host_cpu(&self, taken: &Taken) -> HostCpu {
        let cpu = taken.pinned.unwrap_or(taken.raw.stat.processor);
        HostCpu {
            cpu,
            pinned: taken.pinned.is_some(),
            nohz_full: self.host.is_nohz_full(cpu),
            isolated: self.host.isolated.contains(&cpu),
            tick_stopped: taken.tick_stopped,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::laws;

    /// A thread that opens an account and does what `live` does with it: a vCPU without a guest.
    fn vcpu(live: impl FnOnce(&mut VtimeWriter) + Send + 'static) -> (Arc<Account>, thread::JoinHandle<()>) {
        let (tell, told) = channel();
        let thread = thread::spawn(move || {
            let host = Arc::new(HostCpus::read().expect("sysfs"));
            let open = Open {
                index: 0,
                kvm_stats: None,
                pinned: None,
                host,
                gtime: Gtime::default(),
            };
            let (mut writer, account) = Account::open(open).expect("own probes");
            tell.send(Arc::clone(&account)).expect("the test listens");
            live(&mut writer);
            account.close(writer);
        });
        (told.recv().expect("the thread tells"), thread)
    }

    #[test]
    fn every_reading_sums_and_none_steps_back_while_a_vcpu_lives_and_after() {
        let (account, thread) = vcpu(|writer| {
            writer.resume();
            writer.guest_enter(None);
            for i in 0..20_000 {
                writer.guest_exit();
                if i % 4_000 == 0 {
                    thread::sleep(Duration::from_millis(2));
                }
                writer.guest_enter(Some(ExitReason::Io));
            }
            writer.guest_exit();
            writer.pause(Some(ExitReason::Interrupted));
        });
        let reader = || {
            let mut last = account.read();
            for _ in 0..3_000 {
                let reading = account.read();
                assert_eq!(laws::check_pair(&last, &reading), Ok(()));
                last = reading;
            }
        };
        thread::scope(|scope| {
            scope.spawn(reader);
            scope.spawn(reader);
        });
        thread.join().expect("it ends");
        let end = account.read();
        assert_eq!(
            (end.state, end.exits.by_reason["io"].count),
            (VcpuState::Exited, 20_000)
        );
        thread::sleep(Duration::from_millis(1));
        assert_eq!(account.read(), end);

        let histograms = account.histograms();
        assert_eq!(histograms.vmm.count, end.exits.total);
        // The stay that ended in the pause is one more, but its exit was counted as the pause began.
        assert_eq!(histograms.run.count, end.exits.total);
        assert!(histograms.run.sum_ns + histograms.vmm.sum_ns <= end.elapsed_ns);
    }

    #[test]
    fn a_vcpu_that_makes_no_transition_is_read_live() {
        let (stop, stopped) = channel::<()>();
        let (account, thread) = vcpu(move |writer| {
            writer.resume();
            writer.guest_enter(None);
            while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {}
            writer.guest_exit();
        });
        // It has entered the guest once it is seen there; from then on only time passes.
        let first = std::iter::repeat_with(|| account.read())
            .find(|r| r.state == VcpuState::Guest)
            .expect("forever");
        thread::sleep(Duration::from_millis(20));
        let second = account.read();
        assert_eq!(second.exits.total, 0);
        assert!(second.pending.delta_ns >= first.pending.delta_ns + 20_000_000);
        // Waiting and guest share the 20 ms, as other threads allow.
        let run = |r: &Reading| r.modes.guest_ns + r.modes.waiting_ns;
        assert!(run(&second) > run(&first));
        drop(stop);
        thread.join().expect("it ends");
    }

    #[test]
    fn a_pause_is_paused_and_nothing_else() {
        let (resume, resumed) = channel::<()>();
        let (account, thread) = vcpu(move |_| {
            let _ = resumed.recv();
        });
        // The thread may still be on its way to sleep.
        thread::sleep(Duration::from_millis(5));
        let (first, second) = (account.read(), {
            thread::sleep(Duration::from_millis(10));
            account.read()
        });
        assert_eq!(second.state, VcpuState::Paused);
        let grown = second.elapsed_ns - first.elapsed_ns;
        assert_eq!(second.modes.paused_ns - first.modes.paused_ns, grown);
        drop(resume);
        thread.join().expect("it ends");
    }
}
