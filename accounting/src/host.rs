//! What the host says of its CPUs: which are there, which were asked to be tickless, which are isolated; and how long
//! its tick is.
//!
//! A name in a file is a wish, not a fact: that `nohz_full=` names a CPU does not prove that its tick is stopped.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use rustix::thread::{CpuSet as Mask, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_getres};
use serde::{Deserialize, Serialize};

/// A set of CPU numbers.
pub type CpuSet = BTreeSet<u32>;

/// The host's CPUs, read once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct HostCpus {
    /// CPUs that exist.
    pub present: CpuSet,
    /// CPUs that can run something now.
    pub online: CpuSet,
    /// CPUs named by `nohz_full=`; `null` where the kernel was built without `CONFIG_NO_HZ_FULL`.
    pub nohz_full: Option<CpuSet>,
    /// CPUs that load balancing leaves alone: `isolcpus=` and isolated cpuset partitions.
    pub isolated: CpuSet,
    /// CPUs a thread of this process may be pinned to: online, and in its cpuset.
    pub allowed: CpuSet,
    /// CPUs this process runs on while nobody pins it: its affinity, from which the kernel leaves `isolcpus=` out.
    pub affinity: CpuSet,
}

impl HostCpus {
    /// Reads sysfs, the cpuset file system and this process's affinity.
    ///
    /// # Errors
    /// A file that is there but cannot be read or understood, by its path.
    pub fn read() -> io::Result<Self> {
        let system = Path::new("/sys/devices/system/cpu");
        let list = |path: &Path| match std::fs::read_to_string(path) {
            Ok(text) => parse_cpu_list(&text)
                .map(Some)
                .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {e}", path.display()))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
        };
        let present = list(&system.join("present"))?.unwrap_or_default();
        let online = list(&system.join("online"))?.unwrap_or_default();
        let mut isolated = list(&system.join("isolated"))?.unwrap_or_default();
        // Written by cpuset partitions of type "isolated" (Documentation/admin-guide/cgroup-v2.rst).
        isolated.extend(list(Path::new("/sys/fs/cgroup/cpuset.cpus.isolated"))?.unwrap_or_default());
        let affinity = affinity_of_this_thread();
        let affinity = affinity.map_err(|e| io::Error::new(e.kind(), format!("the CPUs of this thread: {e}")))?;
        let allowed = allowed_by_cpuset(&online, &affinity);
        let allowed = allowed.map_err(|e| io::Error::new(e.kind(), format!("the CPUs of this cpuset: {e}")))?;
        Ok(Self {
            nohz_full: list(&system.join("nohz_full"))?,
            present,
            online,
            isolated,
            allowed,
            affinity,
        })
    }

    /// Whether `cpu` is named by `nohz_full=`.
    #[must_use]
    pub fn is_nohz_full(&self, cpu: u32) -> bool {
        self.nohz_full.as_ref().is_some_and(|set| set.contains(&cpu))
    }

    /// Where everything but vCPUs should run: this process's affinity, less `nohz_full`, less isolated, less `pinned`.
    /// Should nothing be left, the CPUs that are at least not `pinned`; failing those, all of the affinity.
    #[must_use]
    pub fn housekeeping(&self, pinned: &CpuSet) -> CpuSet {
        let but = |unwanted: &dyn Fn(u32) -> bool| -> CpuSet {
            self.affinity.iter().copied().filter(|&cpu| !unwanted(cpu)).collect()
        };
        let quiet = |cpu: u32| self.is_nohz_full(cpu) || self.isolated.contains(&cpu);
        [
            but(&|cpu| quiet(cpu) || pinned.contains(&cpu)),
            but(&|cpu| pinned.contains(&cpu)),
        ]
        .into_iter()
        .find(|set| !set.is_empty())
        .unwrap_or_else(|| self.affinity.clone())
    }
}

/// Confines the calling thread to `cpus`.
///
/// # Errors
/// What `sched_setaffinity` says: `EINVAL` where none of them may be used.
pub fn run_on(cpus: &CpuSet) -> io::Result<()> {
    Ok(sched_setaffinity(None, &mask(cpus)?)?)
}

/// `cpus` as the system calls have it.
///
/// # Errors
/// A number above the 1,024 of a `cpu_set_t`.
pub fn mask(cpus: &CpuSet) -> io::Result<Mask> {
    let mut mask = Mask::new();
    for &cpu in cpus {
        let cpu = cpu as usize;
        if cpu >= Mask::MAX_CPU {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("CPU {cpu} is out of range"),
            ));
        }
        mask.set(cpu);
    }
    Ok(mask)
}

fn affinity_of_this_thread() -> io::Result<CpuSet> {
    let mask = sched_getaffinity(None)?;
    let cpus = (0u32..).filter(|&cpu| mask.is_set(cpu as usize));
    // Nobody looks on through all that there may be.
    Ok(cpus.take(mask.count() as usize).collect())
}

/// Asks for every CPU, looks at what is granted, and goes back to `affinity`: the kernel cuts an affinity to the cpuset. The
/// thread's present CPU stays allowed all the while, so that nothing moves it. In this thread: starting another for it would
/// cost more than all the rest of [`HostCpus::read`].
fn allowed_by_cpuset(online: &CpuSet, affinity: &CpuSet) -> io::Result<CpuSet> {
    run_on(online)?;
    let allowed = affinity_of_this_thread();
    run_on(affinity)?;
    allowed
}

/// Length of the host's timer tick in nanoseconds: 4,000,000 at HZ=250. It is the resolution of
/// `CLOCK_MONOTONIC_COARSE`, which the kernel reports as `TICK_NSEC` (`KTIME_LOW_RES`).
#[must_use]
pub fn tick_ns() -> u64 {
    let tick = clock_getres(ClockId::MonotonicCoarse);
    tick.tv_sec.unsigned_abs() * 1_000_000_000 + tick.tv_nsec.unsigned_abs()
}

/// Why a list of CPUs was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a CPU or a range of CPUs")]
pub struct CpuListError(String);

/// Parses the kernel's list format, `0-3,8`. Empty, and `(null)` as `nohz_full` has it when booted without the
/// parameter, mean none.
///
/// # Errors
/// The part that is not a CPU or a range.
pub fn parse_cpu_list(text: &str) -> Result<CpuSet, CpuListError> {
    let text = text.trim();
    let mut set = CpuSet::new();
    if text.is_empty() || text == "(null)" {
        return Ok(set);
    }
    for part in text.split(',') {
        let refuse = || CpuListError(part.to_owned());
        let cpu = |s: &str| {
            let digits = !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
            s.parse::<u32>().ok().filter(|_| digits).ok_or_else(refuse)
        };
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (cpu(first)?, cpu(last)?),
            None => (cpu(part)?, cpu(part)?),
        };
        // The kernel's own limit is 8192 CPUs (CONFIG_NR_CPUS); a larger range is not a list of CPUs.
        if first > last || last >= 1 << 16 {
            return Err(refuse());
        }
        set.extend(first..=last);
    }
    Ok(set)
}

/// CPUs as the kernel lists them: `1-3,7`. The inverse of [`parse_cpu_list`].
#[must_use]
pub fn cpu_list(set: &CpuSet) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for &cpu in set {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => runs.push((cpu, cpu)),
        }
    }
    let run = |(first, last): (u32, u32)| {
        if first == last {
            first.to_string()
        } else {
            format!("{first}-{last}")
        }
    };
    runs.into_iter().map(run).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(cpus: &[u32]) -> CpuSet {
        cpus.iter().copied().collect()
    }

    #[test]
    fn the_kernels_lists_are_understood() {
        let cases: [(&str, &[u32]); 6] = [
            ("", &[]),
            ("\n", &[]),
            ("(null)\n", &[]),
            ("0\n", &[0]),
            ("0-2,5", &[0, 1, 2, 5]),
            ("3,1", &[1, 3]),
        ];
        for (text, cpus) in cases {
            assert_eq!(parse_cpu_list(text), Ok(set(cpus)), "{text:?}");
        }
    }

    #[test]
    fn cpus_are_listed_as_the_kernel_lists_them() {
        assert_eq!(cpu_list(&set(&[0, 1, 2, 5, 7, 8])), "0-2,5,7-8");
        assert_eq!(cpu_list(&set(&[])), "");
    }

    #[test]
    fn what_is_not_a_list_is_refused_by_its_part() {
        for (text, part) in [
            ("x", "x"),
            ("1,,2", ""),
            ("2-1", "2-1"),
            ("-1", "-1"),
            ("+1", "+1"),
            ("0-4294967295", "0-4294967295"),
        ] {
            assert_eq!(parse_cpu_list(text), Err(CpuListError(part.into())), "{text:?}");
        }
    }

    #[test]
    fn housekeeping_leaves_quiet_and_pinned_cpus_alone_as_long_as_others_are_left() {
        let host = HostCpus {
            online: set(&[0, 1, 2, 3]),
            affinity: set(&[0, 1, 2, 3]),
            nohz_full: Some(set(&[2])),
            isolated: set(&[3]),
            ..HostCpus::default()
        };
        assert_eq!(host.housekeeping(&set(&[])), set(&[0, 1]));
        assert_eq!(host.housekeeping(&set(&[1])), set(&[0]));
        assert_eq!(host.housekeeping(&set(&[0, 1])), set(&[2, 3]));
        assert_eq!(host.housekeeping(&set(&[0, 1, 2, 3])), set(&[0, 1, 2, 3]));
    }

    #[test]
    fn this_host_can_be_read() {
        let host = HostCpus::read().expect("sysfs is there");
        assert!(!host.online.is_empty() && host.online.is_subset(&host.present));
        assert!(!host.allowed.is_empty() && host.allowed.is_subset(&host.online));
        assert!((100_000..=100_000_000).contains(&tick_ns()), "{}", tick_ns());
    }
}
