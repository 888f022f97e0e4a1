//! `/vcpus`: where the vCPUs' time went. Read on this thread: neither the VMM thread nor any vCPU thread takes part.

use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::response::Response;
use serde::Deserialize;

use super::{Fault, Shared, json};

/// A reading of each vCPU, in order; none before the start.
pub(super) async fn list(State(shared): State<Shared>) -> Response {
    let backend = &shared.backend;
    let readings: Vec<_> = (0..backend.vcpus()).filter_map(|index| backend.read(index)).collect();
    json(&readings)
}

/// What may follow the path after a question mark.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Asked {
    /// Whether to tell what the reading was made of.
    #[serde(default)]
    explain: Explain,
}

#[derive(Debug, Default, Deserialize)]
enum Explain {
    #[default]
    #[serde(rename = "0", alias = "false")]
    No,
    #[serde(rename = "1", alias = "true")]
    Yes,
}

pub(super) async fn cputime(
    State(shared): State<Shared>,
    index: Result<Path<String>, PathRejection>,
    asked: Result<Query<Asked>, QueryRejection>,
) -> Result<Response, Fault> {
    let Path(index) = index.map_err(|error| Fault(format!("Invalid vCPU index: {error}.")))?;
    let Query(Asked { explain }) = asked.map_err(|error| Fault(format!("{}.", error.body_text())))?;
    let count = shared.backend.vcpus();
    if count == 0 {
        return Err(Fault(
            "The microVM has no vCPUs before it is started: send InstanceStart first.".to_owned(),
        ));
    }
    let number: Option<usize> = index.parse().ok().filter(|&number| number < count);
    if let (Some(number), Explain::Yes) = (number, explain) {
        let explained = shared.backend.explain(number);
        return explained
            .map(|explained| json(&explained))
            .ok_or_else(|| Fault(format!("vCPU {number} cannot be explained at this instant: ask again.")));
    }
    let reading = number.and_then(|number| shared.backend.read(number));
    reading.map(|reading| json(&reading)).ok_or_else(|| match count {
        1 => Fault(format!("There is no vCPU {index:?}: this microVM has one, number 0.")),
        _ => Fault(format!(
            "There is no vCPU {index:?}: this microVM has {count}, numbered 0 to {}.",
            count - 1
        )),
    })
}
