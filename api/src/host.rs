//! What this host offers a guest: its CPUs, its tick, its KVM. Answered by `GET /host` and judged by `chronovisor check`.

use std::io;

use accounting::host::{HostCpus, tick_ns};
use serde::Serialize;
use vmm::host::KvmStatus;

/// The host, as read once.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Host {
    /// Its CPUs.
    pub cpus: HostCpus,
    /// Length of its timer tick, in nanoseconds.
    pub tick_ns: u64,
    /// Its KVM.
    pub kvm: Kvm,
    /// The mode of transparent huge pages: always, madvise or never; `null` where the kernel has none.
    pub transparent_hugepage: Option<String>,
}

/// What its KVM is good for.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Kvm {
    /// Why it cannot be used at all.
    pub error: Option<String>,
    /// The modules behind it.
    pub modules: Vec<String>,
    /// Whether the kernel of a distribution runs on it; `null` where that is not known without disturbing vCPUs.
    pub runs_stock_kernels: Option<bool>,
}

impl From<KvmStatus> for Kvm {
    fn from(status: KvmStatus) -> Self {
        Self {
            error: status.error,
            modules: status.modules,
            runs_stock_kernels: status.runs_stock_kernels,
        }
    }
}

impl Host {
    /// Reads it; `kvm` is what was found out of its KVM.
    ///
    /// # Errors
    /// A file of sysfs that cannot be read or understood, by its path.
    pub fn read(kvm: KvmStatus) -> io::Result<Self> {
        Ok(Self {
            cpus: HostCpus::read()?,
            tick_ns: tick_ns(),
            kvm: kvm.into(),
            transparent_hugepage: transparent_hugepage(),
        })
    }
}

/// The word in brackets: `always [madvise] never` (Documentation/admin-guide/mm/transhuge.rst).
fn transparent_hugepage() -> Option<String> {
    let text = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?;
    Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
}
