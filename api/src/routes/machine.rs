//! `/machine-config` and `/boot-source`: what the microVM is made of, before its start.

use axum::body::Bytes;
use axum::extract::State;
use axum::response::Response;
use vmm::Action;
use vmm::config::MachineConfigUpdate;

use super::{Fault, Shared, act, parse};

pub(super) async fn get(State(shared): State<Shared>) -> Result<Response, Fault> {
    act(&shared, Action::GetMachineConfig).await
}

pub(super) async fn put(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    act(&shared, Action::PutMachineConfig(parse(&body)?)).await
}

pub(super) async fn patch(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    let update: MachineConfigUpdate = parse(&body)?;
    if update == MachineConfigUpdate::default() {
        return Err(Fault::new("Empty PATCH request."));
    }
    act(&shared, Action::PatchMachineConfig(update)).await
}

pub(super) async fn put_boot_source(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    act(&shared, Action::PutBootSource(parse(&body)?)).await
}
