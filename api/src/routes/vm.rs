//! `/`, `/version`, `/vm` and `/vm/config`: the microVM as a whole.

use axum::body::Bytes;
use axum::extract::State;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use vmm::Action;

use super::{FIRECRACKER_API, Fault, Shared, act, json, parse};

pub(super) async fn info(State(shared): State<Shared>) -> Result<Response, Fault> {
    act(&shared, Action::GetInfo).await
}

pub(super) async fn config(State(shared): State<Shared>) -> Result<Response, Fault> {
    act(&shared, Action::GetConfig).await
}

pub(super) async fn version() -> Response {
    json(&Version {
        firecracker_version: FIRECRACKER_API,
        chronovisor_version: env!("CARGO_PKG_VERSION"),
    })
}

/// Versions.
#[derive(Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[cfg_attr(test, schemars(rename = "Versions"))]
pub(super) struct Version {
    /// Firecracker's, whose API this one is.
    firecracker_version: &'static str,
    /// This program's.
    chronovisor_version: &'static str,
}

/// What the guest is to do.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(super) struct Vm {
    /// Which.
    state: Wanted,
}

/// What a guest can be told to do; what it does already has no effect.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
enum Wanted {
    /// Stand still.
    Paused,
    /// Go on.
    Resumed,
}

pub(super) async fn patch_state(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    let Vm { state } = parse(&body)?;
    let action = match state {
        Wanted::Paused => Action::Pause,
        Wanted::Resumed => Action::Resume,
    };
    act(&shared, action).await
}
