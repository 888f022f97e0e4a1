//! `/drives/{id}`: put before the start, changed after it.

use axum::body::Bytes;
use axum::extract::State;
use axum::response::Response;
use vmm::Action;
use vmm::config::{Drive, DriveUpdate};

use super::{Fault, Id, Shared, act, parse};

pub(super) async fn put(State(shared): State<Shared>, id: Id, body: Bytes) -> Result<Response, Fault> {
    let drive: Drive = parse(&body)?;
    id.is_drive(&drive.drive_id)?;
    act(&shared, Action::PutDrive(drive)).await
}

pub(super) async fn patch(State(shared): State<Shared>, id: Id, body: Bytes) -> Result<Response, Fault> {
    let update: DriveUpdate = parse(&body)?;
    id.is_drive(&update.drive_id)?;
    act(&shared, Action::PatchDrive(update)).await
}
