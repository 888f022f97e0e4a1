//! `/host`: what this host offers: its CPUs, its tick, its KVM; and what disturbs the vCPUs on it now.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use accounting::disturbance::{self, Disturbance, Watch};
use accounting::host::HostCpus;
use accounting::reading::{Reading, VcpuState};
use axum::extract::State;
use axum::response::Response;
use serde::Serialize;

use super::{Fault, Shared, json};
use crate::host::Host;

/// What is answered.
#[derive(Serialize)]
struct Answer<'a> {
    /// Read once, when first asked for.
    #[serde(flatten)]
    host: &'a Host,
    /// Looked for at each request.
    disturbances: Vec<Shown>,
}

#[derive(Serialize)]
struct Shown {
    kind: &'static str,
    /// Whose, where it is not the whole process's.
    #[serde(skip_serializing_if = "Option::is_none")]
    vcpu: Option<u32>,
    says: String,
}

impl Shown {
    fn new(vcpu: Option<u32>, disturbance: &Disturbance) -> Self {
        Self {
            kind: disturbance.kind(),
            vcpu,
            says: disturbance.to_string(),
        }
    }
}

/// The vCPUs' watches, by thread id.
pub(super) type Watches = Arc<Mutex<BTreeMap<i32, Watch>>>;

/// Between two looks at the vCPUs: what is going on shows in what grows meanwhile, and a tick in how many there were.
const TICKS: u64 = 50;

/// Neither the host nor the disturbances are read on the API's thread: trying KVM takes its time, and so do two looks.
pub(super) async fn get(State(shared): State<Shared>) -> Result<Response, Fault> {
    let read = async || {
        let host = tokio::task::spawn_blocking(Host::read).await;
        let host = host.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        host.map_err(|error| Fault(format!("The host's CPUs could not be read: {error}.")))
    };
    let host = shared.host.get_or_try_init(read).await?;
    let cpus = Arc::new(host.cpus.clone());
    if look(&shared, &cpus).await?.is_some() {
        tokio::time::sleep(Duration::from_nanos(TICKS.saturating_mul(host.tick_ns))).await;
    }
    let of_vcpus = look(&shared, &cpus).await?.unwrap_or_default();
    let of_process = disturbance::of_process();
    let mut disturbances: Vec<_> = of_process.iter().map(|found| Shown::new(None, found)).collect();
    for (vcpu, found) in of_vcpus {
        // Each finds the process's disturbances too.
        let own = found.iter().filter(|found| !of_process.contains(found));
        disturbances.extend(own.map(|found| Shown::new(Some(vcpu), found)));
    }
    Ok(json(&Answer { host, disturbances }))
}

/// Looks at each vCPU there is; `None` where there is none.
async fn look(shared: &Shared, cpus: &Arc<HostCpus>) -> Result<Option<Vec<(u32, Vec<Disturbance>)>>, Fault> {
    let (backend, watches, cpus) = (shared.backend.clone(), shared.watches.clone(), cpus.clone());
    let look = move || {
        let readings = (0..backend.vcpus()).filter_map(|index| backend.read(index));
        let mut watches = watches.lock().unwrap_or_else(PoisonError::into_inner);
        let found: Vec<_> = readings
            .filter(|reading| reading.state != VcpuState::Exited)
            .map(|reading| (reading.index, look_at(&mut watches, &reading, &cpus)))
            .collect();
        (!found.is_empty()).then_some(found)
    };
    let looked = tokio::task::spawn_blocking(look).await;
    looked.map_err(|error| Fault(format!("The vCPUs' disturbances could not be looked for: {error}.")))
}

fn look_at(watches: &mut BTreeMap<i32, Watch>, reading: &Reading, cpus: &Arc<HostCpus>) -> Vec<Disturbance> {
    let cpu = reading.host_cpu.cpu;
    let watch = watches
        .entry(reading.tid)
        .or_insert_with(|| Watch::new(reading.tid, reading.host_cpu.pinned.then_some(cpu), cpus.clone()));
    let on_cpu_ns = reading.utime_ns + reading.stime_ns;
    let findings = watch.look_afresh(reading.at_ns, on_cpu_ns, cpu, reading.modes.waiting_ns);
    findings.disturbances.clone()
}
