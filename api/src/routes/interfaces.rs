//! `/network-interfaces/{id}`: put before the start, their limits changed after it.

use axum::body::Bytes;
use axum::extract::State;
use axum::response::Response;
use vmm::Action;
use vmm::config::{NetworkInterface, NetworkInterfaceUpdate};

use super::{Fault, Id, Shared, act, parse};

pub(super) async fn put(State(shared): State<Shared>, id: Id, body: Bytes) -> Result<Response, Fault> {
    let interface: NetworkInterface = parse(&body)?;
    id.is_interface(&interface.iface_id)?;
    act(&shared, Action::PutInterface(interface)).await
}

pub(super) async fn patch(State(shared): State<Shared>, id: Id, body: Bytes) -> Result<Response, Fault> {
    let update: NetworkInterfaceUpdate = parse(&body)?;
    id.is_interface(&update.iface_id)?;
    act(&shared, Action::PatchInterface(update)).await
}
