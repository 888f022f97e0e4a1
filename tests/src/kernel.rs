//! What the host's kernel itself says of a thread and of a CPU, for anybody who looks: the figures that readings are
//! held against.

use std::fs;

use accounting::clock::thread_cpu_ns;
use accounting::probe::{parse_schedstat, parse_stat};

/// What the kernel says at one instant of the calling thread, and of the CPU it is on. All in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kernel {
    /// utime, guest time included: field 14 of `/proc/PID/task/TID/stat`, in steps of 10 ms. Scaled by the kernel, so
    /// that utime and stime make the thread's exact time on a CPU.
    pub utime_ns: u64,
    /// stime: field 15, likewise.
    pub stime_ns: u64,
    /// Guest time: field 43, in steps of 10 ms. As it was sampled, or stamped on a CPU whose tick is stopped.
    pub gtime_ns: u64,
    /// The thread's exact time on a CPU.
    pub sched_ns: u64,
    /// Time that it was runnable but off the CPU: exact; 0 without `CONFIG_SCHED_INFO`.
    pub run_delay_ns: u64,
    /// The CPU.
    pub cpu: u32,
    /// user, nice and system of the CPU's line in `/proc/stat`, guest time included, in steps of 10 ms: what the CPU's
    /// tasks were charged.
    pub charged_ns: u64,
    /// idle and iowait of that line: exact, in steps of 10 ms, since the kernel stamps the idle loop.
    pub idle_ns: u64,
}

impl Kernel {
    /// Asks.
    ///
    /// # Panics
    /// When /proc is not there, or not as `Documentation/filesystems/proc.rst` has it.
    #[must_use]
    pub fn read() -> Self {
        let text = fs::read_to_string("/proc/thread-self/stat").expect("procfs");
        let stat = parse_stat(text.as_bytes()).expect("the kernel's text");
        let name_end = text.rfind(')').expect("parse_stat found it");
        let field = |n: usize| number(text[name_end + 1..].split_whitespace().nth(n - 3));
        let cpu = stat.processor;
        let text = fs::read_to_string("/proc/stat").expect("procfs");
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(&format!("cpu{cpu} ")))
            .expect("a line for each CPU");
        // user nice system idle iowait irq softirq steal guest guest_nice
        let column = |n: usize| number(line.split_whitespace().nth(n));
        Self {
            utime_ns: field(14),
            stime_ns: field(15),
            gtime_ns: stat.guest_time_clk * clk_ns(),
            sched_ns: thread_cpu_ns(),
            run_delay_ns: fs::read("/proc/thread-self/schedstat")
                .map_or(0, |text| parse_schedstat(&text).expect("the kernel's text")),
            cpu,
            charged_ns: column(0) + column(1) + column(2),
            idle_ns: column(3) + column(4),
        }
    }
}

/// A figure in clock ticks, as nanoseconds.
fn number(word: Option<&str>) -> u64 {
    word.and_then(|word| word.parse::<u64>().ok())
        .expect("the kernel's number")
        * clk_ns()
}

fn clk_ns() -> u64 {
    1_000_000_000 / rustix::param::clock_ticks_per_second()
}

/// The release of the kernel that runs, as `uname -r` has it.
#[must_use]
pub fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_burns_is_charged_by_the_exact_clock_and_in_the_long_run_by_utime_and_stime() {
        let before = Kernel::read();
        while thread_cpu_ns() < before.sched_ns + 100_000_000 {}
        let after = Kernel::read();
        // Rounded down to 10 ms each, both of them, at both ends.
        let (utime, stime) = (after.utime_ns - before.utime_ns, after.stime_ns - before.stime_ns);
        assert!(utime + stime + 20_000_000 >= 100_000_000, "{before:?} {after:?}");
        assert_eq!(after.gtime_ns, before.gtime_ns);
    }
}
