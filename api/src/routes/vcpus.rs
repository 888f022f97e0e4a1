//! `/vcpus`: where the vCPUs' time went. Read on this thread: neither the VMM thread nor any vCPU thread takes part.

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::response::Response;

use super::{Fault, Shared, json};

/// A reading of each vCPU, in order; none before the start.
pub(super) async fn list(State(shared): State<Shared>) -> Response {
    let backend = &shared.backend;
    let readings: Vec<_> = (0..backend.vcpus()).filter_map(|index| backend.read(index)).collect();
    json(&readings)
}

pub(super) async fn cputime(
    State(shared): State<Shared>,
    index: Result<Path<String>, PathRejection>,
) -> Result<Response, Fault> {
    let Path(index) = index.map_err(|error| Fault(format!("Invalid vCPU index: {error}.")))?;
    let count = shared.backend.vcpus();
    if count == 0 {
        return Err(Fault(
            "The microVM has no vCPUs before it is started: send InstanceStart first.".to_owned(),
        ));
    }
    let reading = index.parse().ok().and_then(|index| shared.backend.read(index));
    reading.map(|reading| json(&reading)).ok_or_else(|| match count {
        1 => Fault(format!("There is no vCPU {index:?}: this microVM has one, number 0.")),
        _ => Fault(format!(
            "There is no vCPU {index:?}: this microVM has {count}, numbered 0 to {}.",
            count - 1
        )),
    })
}
