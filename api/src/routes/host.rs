//! `/host`: what this host offers: its CPUs, its tick, its KVM; and what disturbs the vCPUs on it now.

use std::time::Duration;

use accounting::disturbance::{self, Disturbance};
use axum::extract::State;
use axum::response::Response;
use serde::Serialize;
use vmm::{Action, Reply};

use super::{Fault, Shared, ask, json};
use crate::host::Host;

/// What is answered.
#[derive(Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[cfg_attr(test, schemars(rename = "HostAnswer"))]
pub(super) struct Answer<'a> {
    /// Read once, when first asked for.
    #[serde(flatten)]
    host: &'a Host,
    /// Looked for at each request.
    disturbances: Vec<Shown>,
}

/// Something that disturbs.
#[derive(Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[cfg_attr(test, schemars(rename = "Disturbance"))]
struct Shown {
    /// Of which kind.
    kind: &'static str,
    /// Whose, where it is not the whole process's.
    #[serde(skip_serializing_if = "Option::is_none")]
    vcpu: Option<u32>,
    /// What, where and by how much; and what to do.
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

/// Nothing is read on the API's thread: trying KVM takes its time, and so do two looks. The VMM's tries it, which may open /dev/kvm;
/// where there is a vCPU, which would be disturbed, it does not.
pub(super) async fn get(State(shared): State<Shared>) -> Result<Response, Fault> {
    let started = || shared.backend.vcpus() > 0;
    let read = async || {
        let Reply::Kvm(kvm) = ask(&shared, Action::GetKvm).await? else {
            unreachable!("it is what was asked for")
        };
        let host = blocking(move || Host::read(*kvm)).await?;
        host.map_err(|error| Fault::new(format!("The host's CPUs could not be read: {error}.")))
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
    done.map_err(|error| Fault::new(format!("The host could not be looked at: {error}.")))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};
    use std::time::Instant;

    use accounting::reading::Histograms;
    use accounting::{Explained, Reading};
    use vmm::RunState;

    use super::*;
    use crate::backend::fake::Fake;
    use crate::backend::{Answer, Backend};

    /// Notes when vCPU 0 is looked at.
    struct Watched(Fake, Mutex<Vec<Instant>>);

    impl Backend for Watched {
        fn send(&self, action: Action, answer: Answer) {
            self.0.send(action, answer);
        }
        fn vcpus(&self) -> usize {
            self.0.vcpus()
        }
        fn read(&self, index: usize) -> Option<Reading> {
            self.0.read(index)
        }
        fn explain(&self, index: usize) -> Option<Explained> {
            self.0.explain(index)
        }
        fn histograms(&self, index: usize) -> Option<Histograms> {
            self.0.histograms(index)
        }
        fn disturbances(&self, index: usize) -> Vec<Disturbance> {
            if index == 0 {
                self.1.lock().unwrap().push(Instant::now());
            }
            self.0.disturbances(index)
        }
    }

    #[tokio::test]
    async fn two_who_ask_at_once_do_not_cut_each_others_looks_short() {
        let backend = Arc::new(Watched(Fake::new(RunState::Running), Mutex::default()));
        let shared = Shared::new(backend.clone(), || {});
        let ask = || get(State(shared.clone()));
        let (one, two) = tokio::join!(ask(), ask());
        assert!(one.is_ok() && two.is_ok(), "{one:?} {two:?}");
        let looks = backend.1.lock().unwrap().clone();
        let apart: Vec<_> = looks.chunks(2).map(|pair| pair[1] - pair[0]).collect();
        // A sleep is no shorter than it was asked to be.
        let wait = Duration::from_nanos(TICKS * accounting::host::tick_ns());
        assert!(
            apart.len() == 2 && apart.iter().all(|&apart| apart >= wait),
            "{apart:?}"
        );
    }
}
