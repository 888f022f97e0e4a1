//! `/host`: what this host offers: its CPUs, its tick, its KVM; and what disturbs the vCPUs on it now.

use std::time::Duration;

use accounting::disturbance::{self, Disturbance};
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

/// Between two looks at the vCPUs: what is going on shows in what grows meanwhile, and a tick in how many there were.
const TICKS: u64 = 50;

/// Neither the host nor the disturbances are read on the API's thread: trying KVM takes its time, and so do two looks. No
/// vCPU is disturbed: where there is one, KVM is not tried.
pub(super) async fn get(State(shared): State<Shared>) -> Result<Response, Fault> {
    let read = async || {
        let kvm = if shared.backend.vcpus() > 0 {
            vmm::host::kvm_at_its_word
        } else {
            vmm::host::kvm
        };
        let host = tokio::task::spawn_blocking(move || Host::read(kvm())).await;
        let host = host.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        host.map_err(|error| Fault(format!("The host's CPUs could not be read: {error}.")))
    };
    let host = shared.host.get_or_try_init(read).await?;
    if shared.backend.vcpus() > 0 {
        look(&shared).await?;
        tokio::time::sleep(Duration::from_nanos(TICKS.saturating_mul(host.tick_ns))).await;
    }
    let of_vcpus = look(&shared).await?;
    let of_process = disturbance::of_process();
    let mut disturbances: Vec<_> = of_process.iter().map(|found| Shown::new(None, found)).collect();
    for (vcpu, found) in (0..).zip(of_vcpus) {
        // Each finds the process's disturbances too.
        let own = found.iter().filter(|found| !of_process.contains(found));
        disturbances.extend(own.map(|found| Shown::new(Some(vcpu), found)));
    }
    Ok(json(&Answer { host, disturbances }))
}

/// Looks at each vCPU, in order.
async fn look(shared: &Shared) -> Result<Vec<Vec<Disturbance>>, Fault> {
    let backend = shared.backend.clone();
    let look = move || (0..backend.vcpus()).map(|index| backend.disturbances(index)).collect();
    let looked = tokio::task::spawn_blocking(look).await;
    looked.map_err(|error| Fault(format!("The vCPUs' disturbances could not be looked for: {error}.")))
}
