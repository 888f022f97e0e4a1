//! `/vcpus`: where the vCPUs' time went, read on this thread: neither the VMM thread nor any vCPU thread takes part. And
//! where the vCPUs are, which the VMM thread changes.

use axum::body::Bytes;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::response::Response;
use serde::Deserialize;
use vmm::Action;
use vmm::affinity::{Affinity, Place};

use super::{Fault, Shared, act, json, parse};

/// A reading of each vCPU, in order; none before the start.
pub(super) async fn list(State(shared): State<Shared>) -> Response {
    let backend = &shared.backend;
    let readings: Vec<_> = (0..backend.vcpus()).filter_map(|index| backend.read(index)).collect();
    json(&readings)
}

/// What may follow the path after a question mark.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(super) struct Asked {
    /// Whether to tell what the reading was made of.
    #[serde(default)]
    explain: Explain,
}

#[derive(Debug, Default, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
enum Explain {
    #[default]
    #[serde(rename = "0", alias = "false")]
    No,
    #[serde(rename = "1", alias = "true")]
    Yes,
}

/// What is answered: a reading, or one that is explained.
#[cfg(test)]
#[derive(schemars::JsonSchema)]
#[schemars(untagged)]
#[expect(dead_code, reason = "a shape, which is answered as one of the two")]
pub(super) enum Cputime {
    Reading(accounting::Reading),
    Explained(Box<accounting::Explained>),
}

pub(super) async fn cputime(
    State(shared): State<Shared>,
    index: Result<Path<String>, PathRejection>,
    asked: Result<Query<Asked>, QueryRejection>,
) -> Result<Response, Fault> {
    let Query(Asked { explain }) = asked.map_err(|error| Fault::new(format!("{}.", error.body_text())))?;
    let number = number(&shared, index)?;
    Ok(match explain {
        Explain::Yes => {
            let explained = shared.backend.explain(number);
            let again = || Fault::new(format!("vCPU {number} cannot be explained at this instant: ask again."));
            json(&explained.ok_or_else(again)?)
        }
        Explain::No => json(&shared.backend.read(number)),
    })
}

/// How long its stays in `KVM_RUN` and the handling of its exits took.
pub(super) async fn histograms(
    State(shared): State<Shared>,
    index: Result<Path<String>, PathRejection>,
) -> Result<Response, Fault> {
    let number = number(&shared, index)?;
    Ok(json(&shared.backend.histograms(number)))
}

/// Where it is: pinned to a host CPU, or not.
pub(super) async fn affinity(
    State(shared): State<Shared>,
    index: Result<Path<String>, PathRejection>,
) -> Result<Response, Fault> {
    let number = number(&shared, index)?;
    let reading = shared.backend.read(number);
    let pinned = reading.map(|reading| reading.host_cpu).filter(|host| host.pinned);
    let cpu = pinned.map_or(Place::None, |host| Place::Cpu(host.cpu));
    Ok(json(&Affinity { cpu }))
}

/// Puts it elsewhere. When this is answered it is there, and the next reading is by what that CPU allows.
pub(super) async fn put_affinity(
    State(shared): State<Shared>,
    index: Result<Path<String>, PathRejection>,
    body: Bytes,
) -> Result<Response, Fault> {
    let number = number(&shared, index)?;
    let Affinity { cpu: place } = parse(&body)?;
    let index = u32::try_from(number).map_err(|error| Fault::new(format!("Invalid vCPU index: {error}.")))?;
    let response = act(&shared, Action::PutAffinity { index, place }).await?;
    (shared.moved)();
    Ok(response)
}

/// The vCPU that the path names: one that is there.
fn number(shared: &Shared, index: Result<Path<String>, PathRejection>) -> Result<usize, Fault> {
    let Path(index) = index.map_err(|error| Fault::new(format!("Invalid vCPU index: {error}.")))?;
    let count = shared.backend.vcpus();
    let number = index.parse().ok().filter(|&number| number < count);
    number.ok_or_else(|| match count {
        0 => Fault::new("The microVM has no vCPUs before it is started: send InstanceStart first."),
        1 => Fault::new(format!("There is no vCPU {index:?}: this microVM has one, number 0.")),
        _ => Fault::new(format!(
            "There is no vCPU {index:?}: this microVM has {count}, numbered 0 to {}.",
            count - 1
        )),
    })
}
