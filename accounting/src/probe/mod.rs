//! What the kernel knows of a thread, by reads that disturb nobody: none restarts a stopped tick, and none sends an
//! interrupt to the thread's CPU.
//!
//! | probe | gives | known flaw |
//! |---|---|---|
//! | thread clock SCHED | time on a CPU: exact, live, monotone, on any kernel | none |
//! | thread clocks VIRT, PROF | utime (guest included), utime + stime | within 2 or 3 ticks, and only on a CPU with vtime; may step back |
//! | `/proc/self/task/T/stat` | guest time in units of 10 ms; the thread's state | on a tick-sampling CPU, anything |
//! | `/proc/self/task/T/schedstat` | run_delay | lands when the wait ends |
//! | KVM's binary statistics | halt_wait_ns, halt_poll_*_ns, blocking | land when the halt ends; some backends leave some at 0 |
//!
//! Absolute values; [`crate::account`] subtracts the baselines it took at the first stamp.

mod kvm_stats;
mod proc;
mod thread_clock;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

pub use kvm_stats::{KvmCounters, KvmStats};
pub use proc::{ParseError, Stat, parse_schedstat, parse_stat};
pub use thread_clock::{ThreadClock, Which};

/// All the kernel says of a thread, read one after the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Raw {
    /// Time on a CPU, in nanoseconds; read last.
    pub sched_ns: u64,
    /// When it was read, in TSC ticks.
    pub sched_read_at: u64,
    /// Whether `sched_ns` grew while the other probes were read: the thread is on a CPU now.
    pub on_cpu: bool,
    /// utime, guest included, in nanoseconds.
    pub virt_ns: u64,
    /// utime + stime, in nanoseconds.
    pub prof_ns: u64,
    /// `/proc/self/task/T/stat`.
    pub stat: Stat,
    /// Time runnable but off the CPU, in nanoseconds, the wait still going on excluded; 0 without `CONFIG_SCHED_INFO`.
    pub run_delay_ns: u64,
    /// KVM's statistics; `None` where KVM has none.
    pub kvm: Option<KvmCounters>,
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
        })
    }

    /// Reads them all. SCHED is first and last: first to see whether it grows, last because it is the exact one and
    /// should be no older than it must. PROF is read before VIRT, so that time passing between the two makes
    /// `prof - virt`, the kernel's share, too small and never too large: a total too small is put right by the next
    /// reading, one too large never.
    ///
    /// # Errors
    /// The probe by name, and what the system said; `ESRCH` or `EINVAL` when the thread is gone.
    pub fn read(&mut self) -> Result<Raw, (&'static str, io::Error)> {
        let sched_before = self.sched.read_ns().map_err(|e| ("SCHED clock", e))?;
        let text = read_text(&self.stat, &mut self.buffer).map_err(|e| ("stat", e))?;
        let stat = parse_stat(text).map_err(|e| ("stat", io::Error::new(io::ErrorKind::InvalidData, e)))?;
        let run_delay_ns = match &self.schedstat {
            Some(file) => {
                let text = read_text(file, &mut self.buffer).map_err(|e| ("schedstat", e))?;
                parse_schedstat(text).map_err(|e| ("schedstat", io::Error::new(io::ErrorKind::InvalidData, e)))?
            }
            None => 0,
        };
        let kvm = self
            .kvm
            .as_mut()
            .map(KvmStats::read)
            .transpose()
            .map_err(|e| ("KVM statistics", e))?;
        let prof_ns = self.prof.read_ns().map_err(|e| ("PROF clock", e))?;
        let virt_ns = self.virt.read_ns().map_err(|e| ("VIRT clock", e))?;
        let sched_read_at = crate::clock::ticks();
        let sched_ns = self.sched.read_ns().map_err(|e| ("SCHED clock", e))?;
        let on_cpu = sched_ns > sched_before;
        Ok(Raw {
            sched_ns,
            sched_read_at,
            on_cpu,
            virt_ns,
            prof_ns,
            stat,
            run_delay_ns,
            kvm,
        })
    }
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
        let raw = probes.read().expect("own probes");
        assert!(raw.on_cpu && raw.sched_ns > 0);
        assert_eq!(raw.stat.state, b'R');

        let (tell_tid, tid) = std::sync::mpsc::channel();
        let (wake, sleep) = std::sync::mpsc::channel::<()>();
        let sleeper = std::thread::spawn(move || {
            tell_tid.send(this_thread()).expect("the test listens");
            let _ = sleep.recv();
        });
        let mut probes = Probes::open(tid.recv().expect("the thread tells"), None).expect("its probes");
        // It may still be on its way to sleep.
        let asleep = (0..10_000)
            .map(|_| probes.read().expect("its probes"))
            .find(|raw| raw.stat.state == b'S');
        assert!(!asleep.expect("it sleeps in the end").on_cpu);
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
            probes.read().is_err()
        });
        assert!(gone);
    }
}
