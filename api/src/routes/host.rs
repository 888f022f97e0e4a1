//! `/host`: what this host offers: its CPUs, its tick, its KVM.

use axum::extract::State;
use axum::response::Response;

use super::{Fault, Shared, json};
use crate::host::Host;

/// Read once, when first asked for, and not on this thread: trying KVM takes its time.
pub(super) async fn get(State(shared): State<Shared>) -> Result<Response, Fault> {
    let read = async || {
        let host = tokio::task::spawn_blocking(Host::read).await;
        let host = host.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        host.map_err(|error| Fault(format!("The host's CPUs could not be read: {error}.")))
    };
    Ok(json(shared.host.get_or_try_init(read).await?))
}
