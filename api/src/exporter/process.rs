//! What the exporter costs: the metrics of a process that every exporter has, by their usual names
//! (<https://prometheus.io/docs/instrumenting/writing_clientlibs/#process-metrics>).

use std::fs;
use std::time::SystemTime;

use accounting::host::{CpuSet, HostCpus, run_on};
use rustix::process::{Resource, getrlimit};
use rustix::time::ClockId;

use super::page::{one, seconds};
use crate::prometheus::text::{Family, Kind, Seconds, Text};

const CPU: Family = Family {
    name: "process_cpu_seconds_total",
    kind: Kind::Counter,
    help: "User and system CPU time of the exporter.",
};
const RESIDENT: Family = Family {
    name: "process_resident_memory_bytes",
    kind: Kind::Gauge,
    help: "Resident memory of the exporter.",
};
const OPEN: Family = Family {
    name: "process_open_fds",
    kind: Kind::Gauge,
    help: "Descriptors that the exporter has open.",
};
const MOST: Family = Family {
    name: "process_max_fds",
    kind: Kind::Gauge,
    help: "Descriptors that the exporter may open.",
};
const START: Family = Family {
    name: "process_start_time_seconds",
    kind: Kind::Gauge,
    help: "When the exporter was started, in seconds since the epoch.",
};

/// Keeps this process on the CPUs that do the machine's housekeeping: a scrape on a vCPU's CPU would take its time, and bring
/// back its tick. Which of the other CPUs have vCPUs pinned to them is not known here.
pub(super) fn keep_off_tickless_cpus() {
    let kept = HostCpus::read().and_then(|host| run_on(&host.housekeeping(&CpuSet::new())));
    if let Err(error) = kept {
        tracing::warn!("scrapes may take the time of a vCPU on a tickless CPU: {error}");
    }
}

/// Those that can be read.
pub(super) fn write(text: &mut Text, begun: SystemTime) {
    let cpu = rustix::time::clock_gettime(ClockId::ProcessCPUTime);
    let ns = u64::try_from(i128::from(cpu.tv_sec) * 1_000_000_000 + i128::from(cpu.tv_nsec)).unwrap_or(0);
    one(text, &CPU, Seconds(ns));
    if let Some(bytes) = resident_bytes() {
        one(text, &RESIDENT, bytes);
    }
    if let Ok(descriptors) = fs::read_dir("/proc/self/fd") {
        // One is this look's.
        one(text, &OPEN, descriptors.count().saturating_sub(1));
    }
    if let Some(most) = getrlimit(Resource::Nofile).current {
        one(text, &MOST, most);
    }
    if let Ok(since_epoch) = begun.duration_since(SystemTime::UNIX_EPOCH) {
        one(text, &START, seconds(since_epoch));
    }
}

/// The second field of statm, in pages (proc(5)).
fn resident_bytes() -> Option<u64> {
    let statm = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
    pages.checked_mul(u64::try_from(rustix::param::page_size()).ok()?)
}
