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

/// Nothing is read on the API's thread: trying KVM takes its time, and so do two looks. No vCPU is disturbed: where there
/// is one, KVM is not tried.
pub(super) async fn get(State(shared): State<Shared>) -> Result<Response, Fault> {
    let started = || shared.backend.vcpus() > 0;
    let read = async || {
        let kvm = if started() {
            vmm::host::kvm_at_its_word
        } else {
            vmm::host::kvm
        };
        let host = blocking(move || Host::read(kvm())).await?;
        host.map_err(|error| Fault(format!("The host's CPUs could not be read: {error}.")))
    };
    let host = shared.host.get_or_try_init(read).await?;
    // Requests at once take turns: a look between the two of another would cut its time short.
    let _turn = shared.looks.lock().await;
    if started() {
        look(&shared).await?;
        tokio::time::sleep(Duration::from_nanos(TICKS.saturating_mul(host.tick_ns))).await;
    }
    let (of_process, of_vcpus) = look(&shared).await?;
    let mut disturbances: Vec<_> = of_process.iter().map(|found| Shown::new(None, found)).collect();
    for (vcpu, found) in (0..).zip(of_vcpus) {
        // Each finds the process's disturbances too.
        let own = found.iter().filter(|found| !of_process.contains(found));
        disturbances.extend(own.map(|found| Shown::new(Some(vcpu), found)));
    }
    Ok(json(&Answer { host, disturbances }))
}

/// Looks at the process, and at each vCPU, in order.
async fn look(shared: &Shared) -> Result<(Vec<Disturbance>, Vec<Vec<Disturbance>>), Fault> {
    let backend = shared.backend.clone();
    blocking(move || {
        let of_vcpus = (0..backend.vcpus()).map(|index| backend.disturbances(index)).collect();
        (disturbance::of_process(), of_vcpus)
    })
    .await
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Fault> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Fault(format!("The host could not be looked at: {error}.")))
}
