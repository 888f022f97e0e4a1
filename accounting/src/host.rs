//! What the host says of its CPUs: online, `nohz_full`, isolated, housekeeping; and its tick period.
use std::collections::BTreeSet;

/// A set of CPU numbers.
pub type CpuSet = BTreeSet<u32>;

/// The host's CPUs, read once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostCpus {
    /// CPUs that exist.
    pub present: CpuSet,
    /// CPUs that can run something now.
    pub online: CpuSet,
    /// CPUs named by `nohz_full=`; `None` where the kernel was built without `CONFIG_NO_HZ_FULL`.
    pub nohz_full: Option<CpuSet>,
    /// CPUs that load balancing leaves alone: `isolcpus=` and isolated cpuset partitions.
    pub isolated: CpuSet,
    /// CPUs this process may run on.
    pub allowed: CpuSet,
}

impl HostCpus {
    /// Reads sysfs, the cpuset file system and this process's affinity.
    ///
    /// # Errors
    /// A file that is there but cannot be read or understood.
    pub fn read() -> std::io::Result<Self> {
        todo!()
    }

    /// Whether `cpu` is named by `nohz_full=`.
    #[must_use]
    pub fn is_nohz_full(&self, cpu: u32) -> bool {
        self.nohz_full.as_ref().is_some_and(|set| set.contains(&cpu))
    }

    /// Where everything but vCPUs should run: online and allowed, less nohz_full, less isolated, less `pinned`;
    /// without the first two restrictions, then without any, should nothing be left.
    #[must_use]
    pub fn housekeeping(&self, pinned: &CpuSet) -> CpuSet {
        let _ = pinned;
        todo!()
    }
}

/// Length of the host's timer tick in nanoseconds: 4,000,000 at HZ=250. The resolution of `CLOCK_MONOTONIC_COARSE`.
#[must_use]
pub fn tick_ns() -> u64 {
    todo!()
}
