//! What the kernel knows of a thread, by reads that disturb nobody: none restarts a stopped tick, and none sends an
//! interrupt to the thread's CPU.
//!
//! | probe | gives | known flaw |
//! |---|---|---|
//! | thread clock SCHED | time on a CPU: exact, live, monotone, on any kernel | none |
//! | thread clocks VIRT, PROF | utime (guest included), utime + stime | within 2 or 3 ticks, and only on a CPU with vtime; may step back |
//! | `/proc/self/task/T/stat` | guest time in units of 10 ms; the thread's state | on a tick-sampling CPU, anything |
//! | `/proc/self/task/T/schedstat` | run_delay | lands when the wait ends |
//! | [`bpf`] | guest time: exact, live | needs privilege, and costs every exit a little; some backends pass no tracepoints |
//! | KVM's binary statistics | halt_wait_ns, halt_poll_*_ns, blocking | land when the halt ends; some backends leave some at 0 |
//!
//! Absolute values; [`crate::account`] subtracts the baselines it took at the first stamp.

pub mod bpf;
mod kvm_stats;
mod proc;
mod thread_clock;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

pub use kvm_stats::{KvmCounters, KvmStats};
pub use proc::{ParseError, Stat, parse_schedstat, parse_stat};
pub use thread_clock::{ThreadClock, Which};

use crate::clock;
use crate::host::tick_ns;

/// What the kernel says of a thread, read one probe after the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Raw {
    /// When the first probe was read, in TSC ticks.
    pub begun_at: u64,
    /// Time on a CPU before anything else was read, in nanoseconds.
    pub sched_before_ns: u64,
    /// Time on a CPU, in nanoseconds; read last.
    pub sched_ns: u64,
    /// When it was read, in TSC ticks.
    pub sched_read_at: u64,
    /// Whether it grew while the other probes were read: the thread is on a CPU now.
    pub on_cpu: bool,
    /// utime and utime + stime; `None` where they were not asked for.
    pub utime: Option<Utime>,
    /// `/proc/self/task/T/stat`, of this reading or of an earlier one.
    pub stat: Stat,
    /// Time on a CPU right before `stat` was read, in nanoseconds.
    pub stat_sched_ns: u64,
    /// Time runnable but off the CPU, in nanoseconds, the wait still going on excluded; 0 without `CONFIG_SCHED_INFO`.
    pub run_delay_ns: u64,
    /// KVM's statistics; `None` where KVM has none.
    pub kvm: Option<KvmCounters>,
}

/// The kernel's division of a thread's CPU time, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Utime {
    /// The VIRT clock: utime, guest included.
    pub virt_ns: u64,
    /// The PROF clock: utime + stime.
    pub prof_ns: u64,
}

/// The open probes of one thread of this process.
#[derive(Debug)]
pub struct Probes {
    sched: ThreadClock,
    virt: ThreadClock,
    prof: ThreadClock,
    stat: File,
    schedstat: Option<File>,
    kvm: Option<KvmStats>,
    buffer: Vec<u8>,
    /// The stat file as last read, and the SCHED clock right before that.
    stat_was: Option<(Stat, u64)>,
    /// How far SCHED may advance before the stat file is read again.
    stat_keeps_ns: u64,
}

/// What a reading needs beside what every reading does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Nothing; and the stat file only when the thread is off the CPU or has run for long since it was read: it costs
    /// as much as all the rest, and of a running thread it tells nothing but guest time in units of 10 ms.
    Lean,
    /// As `Lean`, and the VIRT and PROF clocks.
    Utime,
    /// All of it, afresh.
    Full,
}

impl Probes {
    /// Opens the probes of thread `tid` of this process. `kvm` is the descriptor that `KVM_GET_STATS_FD` gave for the
    /// vCPU; one that cannot be understood is refused.
    ///
    /// # Errors
    /// The probe by name, and what the system said.
    pub fn open(tid: i32, kvm: Option<File>) -> Result<Self, (&'static str, io::Error)> {
        let schedstat = match File::open(format!("/proc/self/task/{tid}/schedstat")) {
            Ok(file) => Some(file),
            // CONFIG_SCHED_INFO is not set: waits will be in `blocked`.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(("schedstat", error)),
        };
        let stat = File::open(format!("/proc/self/task/{tid}/stat")).map_err(|e| ("stat", e))?;
        let kvm = kvm.map(KvmStats::open).transpose().map_err(|e| ("KVM statistics", e))?;
        Ok(Self {
            sched: ThreadClock::new(tid, Which::Sched),
            virt: ThreadClock::new(tid, Which::Virt),
            prof: ThreadClock::new(tid, Which::Prof),
            stat,
            schedstat,
            kvm,
            // /proc/self/task/T/stat is some 300 bytes: 52 numbers of at most 20 digits and a name of 15.
            buffer: vec![0; 2048],
            stat_was: None,
            stat_keeps_ns: tick_ns() / 4,
        })
    }

    /// Reads them. SCHED is first and last: first to see whether it grows, last because it is the exact one and
    /// should be no older than it must. PROF is read before VIRT, so that time passing between the two makes
    /// `prof - virt`, the kernel's share, too small and never too large: a total too small is put right by the next
    /// reading, one too large never.
    ///
    /// # Errors
    /// The probe by name, and what the system said; `ESRCH` or `EINVAL` when the thread is gone.
    pub fn read(&mut self, depth: Depth) -> Result<Raw, (&'static str, io::Error)> {
        let begun_at = clock::ticks();
        let sched_before_ns = self.sched_ns()?;
        let run_delay_ns = match &self.schedstat {
            Some(file) => {
                let text = read_text(file, &mut self.buffer).map_err(|e| ("schedstat", e))?;
                parse_schedstat(text).map_err(|e| ("schedstat", invalid(e)))?
            }
            None => 0,
        };
        let kvm = self
            .kvm
            .as_mut()
            .map(KvmStats::read)
            .transpose()
            .map_err(|e| ("KVM statistics", e))?;
        let utime = match depth {
            Depth::Lean => None,
            Depth::Utime | Depth::Full => Some(self.utime()?),
        };
        let (mut sched_read_at, mut sched_ns) = (clock::ticks(), self.sched_ns()?);
        let mut on_cpu = sched_ns > sched_before_ns;
        let kept = self
            .stat_was
            .filter(|&(_, at)| on_cpu && depth != Depth::Full && sched_ns.saturating_sub(at) < self.stat_keeps_ns);
        let (stat, stat_sched_ns) = match kept {
            Some(kept) => kept,
            None => {
                let read = (self.stat()?, sched_ns);
                self.stat_was = Some(read);
                let before = sched_ns;
                (sched_read_at, sched_ns) = (clock::ticks(), self.sched_ns()?);
                on_cpu = sched_ns > before;
                read
            }
        };
        Ok(Raw {
            begun_at,
            sched_before_ns,
            sched_ns,
            sched_read_at,
            on_cpu,
            utime,
            stat,
            stat_sched_ns,
            run_delay_ns,
            kvm,
        })
    }

    fn sched_ns(&self) -> Result<u64, (&'static str, io::Error)> {
        self.sched.read_ns().map_err(|e| ("SCHED clock", e))
    }

    fn utime(&self) -> Result<Utime, (&'static str, io::Error)> {
        let prof_ns = self.prof.read_ns().map_err(|e| ("PROF clock", e))?;
        let virt_ns = self.virt.read_ns().map_err(|e| ("VIRT clock", e))?;
        Ok(Utime { virt_ns, prof_ns })
    }

    fn stat(&mut self) -> Result<Stat, (&'static str, io::Error)> {
        let text = read_text(&self.stat, &mut self.buffer).map_err(|e| ("stat", e))?;
        parse_stat(text).map_err(|e| ("stat", invalid(e)))
    }
}

fn invalid(error: ParseError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// One pread of a /proc file: the kernel makes its text afresh for each read at offset 0.
fn read_text<'a>(file: &File, buffer: &'a mut [u8]) -> io::Result<&'a [u8]> {
    let n = file.read_at(buffer, 0)?;
    Ok(&buffer[..n])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn this_thread() -> i32 {
        rustix::thread::gettid().as_raw_nonzero().get()
    }

    #[test]
    fn a_thread_that_burns_is_seen_on_a_cpu_and_one_that_sleeps_is_not() {
        let mut probes = Probes::open(this_thread(), None).expect("own probes");
        let raw = probes.read(Depth::Full).expect("own probes");
        assert!(raw.on_cpu && raw.sched_ns > 0);
        assert_eq!(raw.stat.state, b'R');

        let (tell_tid, tid) = std::sync::mpsc::channel();
        let (wake, sleep) = std::sync::mpsc::channel::<()>();
        let sleeper = std::thread::spawn(move || {
            tell_tid.send(this_thread()).expect("the test listens");
            let _ = sleep.recv();
        });
        let mut probes = Probes::open(tid.recv().expect("the thread tells"), None).expect("its probes");
        // It may still be on its way to sleep: marked as sleeping, it is on its CPU for an instant more.
        let asleep = (0..10_000).any(|_| {
            let raw = probes.read(Depth::Lean).expect("its probes");
            raw.stat.state == b'S' && !raw.on_cpu
        });
        assert!(asleep, "it sleeps in the end");
        drop(wake);
        sleeper.join().expect("it ends");
    }

    #[test]
    fn a_thread_that_is_gone_is_an_error_and_not_a_figure() {
        let (tell_tid, tid) = std::sync::mpsc::channel();
        let (end, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            tell_tid.send(this_thread()).expect("the test listens");
            let _ = wait.recv();
        });
        let mut probes = Probes::open(tid.recv().expect("the thread tells"), None).expect("its probes");
        drop(end);
        thread.join().expect("it ends");
        // join() waits for the futex the kernel clears on exit; the task itself goes a moment later.
        let gone = (0..10_000).any(|_| {
            std::thread::yield_now();
            probes.read(Depth::Full).is_err()
        });
        assert!(gone);
    }
}
