//! The BPF probe: exact guest time of vCPU threads, from inside the kernel.
//!
//! KVM passes the tracepoint `kvm_entry` right before it enters the guest and `kvm_exit` after the guest has left. Two
//! small programs run there, in the kernel, on the vCPU's own thread, and keep that vCPU's guest time in a page that
//! this process has mapped:
//!
//! ```text
//!   vCPU thread, in the kernel                      any thread of ours
//!   --------------------------                      ------------------
//!   kvm_entry    open a slice,  unless one is      Tracked::read
//!   kvm_exit     close it,      if one is      --> sum + (now - began), no system call
//!   sched_switch close it,      if one is
//! ```
//!
//! It is exact with the tick stopped, on a host that samples, and whatever the guest does. A reader disturbs nobody: it
//! reads memory. What it costs is two short programs an exit, so it is for those who ask for it.
//!
//! *What a slice is.* From the stamp at `kvm_entry` to the stamp at `kvm_exit`: the guest's own time, and what the
//! kernel does between tracepoint and guest on both sides, other users of these tracepoints included. On hardware
//! that is a fraction of a microsecond an exit; in an emulator, microseconds.
//!
//! *Why a second entry changes nothing.* KVM handles some exits without leaving its innermost loop (its "fast path")
//! and enters again; `kvm_entry` is passed again, `kvm_exit` was not. The open slice goes on.
//!
//! *Why `sched_switch`.* On AMD, Linux 6.1 passes `kvm_exit` only after interrupts and preemption are on again
//! (`svm_handle_exit`), so a vCPU thread may be switched out between leaving the guest and the tracepoint. It cannot be
//! switched out without having left the guest, so closing the slice there is right; the late `kvm_exit` then finds
//! none. What is left of that gap counts as guest: the handling of interrupts that were pending at the exit.
//!
//! *How it ends.* Programs, links and maps live as long as their descriptors. They go when the [`Meter`] is dropped or
//! the process ends, however it ends: nothing stays behind, and nothing has to be cleaned up. While attached, the link
//! holds a reference on the kvm module.
//!
//! *What it needs.* Linux 5.7; root, or `CAP_BPF` with `CAP_PERFMON` (before Linux 5.8, `CAP_SYS_ADMIN`); the kvm
//! module loaded. `kernel.unprivileged_bpf_disabled` makes no difference, since it is about programs of other types.
//! Neither does kernel lockdown: it denies programs the reading of kernel memory, and these read none. No tracefs, no
//! BTF, no compiler. A KVM backend that passes no tracepoints leaves every [`GuestTime::sequence`] at 0.
//!
//! *Clocks.* Stamps are `CLOCK_MONOTONIC`, the clock that BPF has; it runs at the rate that NTP gives it, up to 500 ppm
//! off `CLOCK_MONOTONIC_RAW`, which readings are told in. The caller converts: both clocks over the same span of time
//! give the ratio.

mod error;
mod insn;
mod map;
mod program;
mod sys;

use std::collections::VecDeque;
use std::ffi::CStr;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{major, minor};

pub use error::BpfError;
use map::{ENTRIES, FiguresMap, Threads};
use program::{Act, Identity, program};

/// Where the programs run: the program's name, what it does, the tracepoint.
const PROGRAMS: [(&str, Act, &CStr); 3] = [
    ("cv_kvm_entry", Act::Open, c"kvm_entry"),
    ("cv_kvm_exit", Act::Close, c"kvm_exit"),
    ("cv_sched_switch", Act::Close, c"sched_switch"),
];

/// The attached programs. One is enough for a process, and all its vCPUs; a process that forks attaches afterwards, for
/// the programs know it by its id.
///
/// ```no_run
/// use accounting::probe::bpf::Meter;
///
/// let meter = Meter::attach()?;
/// // On the vCPU's thread, before its first KVM_RUN:
/// let tid = rustix::thread::gettid().as_raw_nonzero().get();
/// let vcpu = meter.track(tid)?;
/// // On any thread, at any time:
/// if let Some(time) = vcpu.read() {
///     println!("{} ns, and {:?} since", time.sum_ns, time.began_ns);
/// }
/// # Ok::<(), accounting::probe::bpf::BpfError>(())
/// ```
#[derive(Debug)]
pub struct Meter {
    threads: Threads,
    figures: FiguresMap,
    /// Detach when closed.
    _links: [OwnedFd; PROGRAMS.len()],
    /// Whether a tracepoint has been passed by any vCPU.
    heard: AtomicBool,
    /// Indices nobody uses, the one given up last at the end. A program that found the thread of an index just given up
    /// may still be writing its figures, for the microsecond it takes; so that index is taken again last.
    free: Mutex<VecDeque<u32>>,
}

impl Meter {
    /// Loads the programs and attaches them.
    ///
    /// # Errors
    /// [`BpfError`] tells privilege, tracepoint and kernel apart. Nothing is left attached.
    pub fn attach() -> Result<Arc<Self>, BpfError> {
        let identity = Identity::of_this_process()?;
        let threads = Threads::create()?;
        let figures = FiguresMap::create()?;
        let maps = map::descriptors(&threads, &figures);
        let attach = |(name, act, tracepoint)| {
            let program = sys::load(name, &program(act, identity, maps)).map_err(|e| BpfError::of_load(name, e))?;
            // The link keeps the program.
            sys::open_raw_tracepoint(tracepoint, program.as_fd()).map_err(|e| BpfError::of_link(tracepoint, e))
        };
        let [entry, exit, switch] = PROGRAMS;
        let links = [attach(entry)?, attach(exit)?, attach(switch)?];
        Ok(Arc::new(Self {
            threads,
            figures,
            _links: links,
            heard: AtomicBool::new(false),
            free: Mutex::new((0..ENTRIES).collect()),
        }))
    }

    /// Starts to keep the guest time of thread `tid` of this process, from its next entry to the guest: a slice that is
    /// under way is not seen, so track before the first `KVM_RUN`.
    ///
    /// The thread should outlive what is returned: its id may be given to another thread.
    ///
    /// # Errors
    /// [`BpfError::Tracked`] where it is tracked already, [`BpfError::Full`] where 64 threads are.
    pub fn track(self: &Arc<Self>, tid: i32) -> Result<Tracked, BpfError> {
        let key = u32::try_from(tid).map_err(|_| BpfError::NoThread { tid })?;
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let &index = free.front().ok_or(BpfError::Full { limit: ENTRIES })?;
        self.figures
            .clear(index)
            .map_err(|e| BpfError::of("clear a vCPU's figures", e))?;
        self.threads.add(key, index).map_err(|e| match e.raw_os_error() {
            Some(libc::EEXIST) => BpfError::Tracked { tid },
            _ => BpfError::of("track a thread", e),
        })?;
        free.pop_front();
        Ok(Tracked {
            meter: Arc::clone(self),
            tid: key,
            index,
        })
    }
}

impl Identity {
    fn of_this_process() -> Result<Self, BpfError> {
        let namespace = fs::metadata("/proc/self/ns/pid").map_err(BpfError::Namespace)?;
        let dev = namespace.dev();
        Ok(Self {
            // MKDEV of include/linux/kdev_t.h; stat(2) tells another encoding, the same for small minors only.
            dev: u64::from(major(dev)) << 20 | u64::from(minor(dev)),
            ino: namespace.ino(),
            tgid: rustix::process::getpid().as_raw_nonzero().get(),
        })
    }
}

/// A thread whose guest time is kept, until this is dropped. Keeps the [`Meter`].
#[derive(Debug)]
pub struct Tracked {
    meter: Arc<Meter>,
    tid: u32,
    index: u32,
}

impl Tracked {
    /// The thread's guest time so far: a few loads from memory, no system call, on any thread. `None` where the vCPU
    /// outran every one of a bounded number of tries.
    #[must_use]
    pub fn read(&self) -> Option<GuestTime> {
        let time = self.meter.figures.read(self.index)?;
        if time.sequence > 0 {
            self.meter.heard.store(true, Ordering::Relaxed);
        }
        Some(time)
    }

    /// Whether a read has found that any of the meter's vCPUs passed a tracepoint. Until then nothing tells a vCPU that has
    /// not been in the guest from one of a KVM backend that passes no tracepoints.
    #[must_use]
    pub fn heard(&self) -> bool {
        self.meter.heard.load(Ordering::Relaxed)
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        // Of a key that is there, removal cannot fail. If it did, the index must not be used again, for the programs
        // would keep this thread's figures there.
        if self.meter.threads.remove(self.tid).is_ok() {
            let mut free = self.meter.free.lock().unwrap_or_else(PoisonError::into_inner);
            free.push_back(self.index);
        }
    }
}

/// What the programs know of a vCPU thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestTime {
    /// How many slices were opened, plus how many were closed; odd while in the guest. 0: no tracepoint was passed so
    /// far.
    pub sequence: u64,
    /// Closed slices, in nanoseconds of `CLOCK_MONOTONIC`.
    pub sum_ns: u64,
    /// When the slice began that is still open, in nanoseconds of `CLOCK_MONOTONIC`; `None` while not in the guest.
    pub began_ns: Option<u64>,
}

impl GuestTime {
    /// Guest time up to `now_ns` (`CLOCK_MONOTONIC`), the open slice included, in nanoseconds.
    ///
    /// Read the clock, then the figures: what was guest by then is all in it. It may be ahead of a later one by the
    /// time the program takes from its stamp to its publication, some ten instructions, since until then the slice
    /// looks open.
    #[must_use]
    pub fn at(self, now_ns: u64) -> u64 {
        let live = self.began_ns.map_or(0, |began| now_ns.saturating_sub(began));
        self.sum_ns.saturating_add(live)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_open_slice_counts_up_to_now() {
        let mut time = GuestTime {
            sequence: 3,
            sum_ns: 100,
            began_ns: Some(1_000),
        };
        assert_eq!((time.at(1_250), time.at(900)), (350, 100));
        time.began_ns = None;
        assert_eq!(time.at(5_000), 100);
    }

    /// With the privilege and a kvm module this attaches; without, it must say which is lacking.
    #[test]
    fn attaching_works_or_says_what_is_lacking() {
        let meter = match Meter::attach() {
            Ok(meter) => meter,
            Err(
                error @ (BpfError::NoPrivilege { .. } | BpfError::NoTracepoint { .. } | BpfError::Unsupported { .. }),
            ) => {
                println!("not attached: {error}");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let tracked = meter.track(tid).expect("own thread");
        assert_eq!(tracked.read(), Some(GuestTime::default()), "this thread runs no guest");
        assert!(matches!(meter.track(tid), Err(BpfError::Tracked { tid: t }) if t == tid));
        drop(tracked);
        let more: Vec<_> = (0..64).map(|n| meter.track(tid + n).expect("room for 64")).collect();
        assert!(matches!(meter.track(tid + 64), Err(BpfError::Full { limit: 64 })));
        drop(more);
        meter.track(tid).expect("room again");
    }
}
