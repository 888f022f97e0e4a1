//! `/host`: what this host offers: its CPUs and its tick.

use axum::response::Response;

use super::{Fault, json};
use crate::host::Host;

pub(super) async fn get() -> Result<Response, Fault> {
    let host = Host::read().map_err(|error| Fault(format!("The host's CPUs could not be read: {error}.")))?;
    Ok(json(&host))
}
