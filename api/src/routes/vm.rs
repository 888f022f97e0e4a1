//! `/`, `/version`, `/vm` and `/vm/config`: the microVM as a whole.

use axum::body::Bytes;
use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use vmm::Action;

use super::{FIRECRACKER_API, Fault, Shared, act, json, parse};

pub(super) async fn info(State(shared): State<Shared>) -> Result<Response, Fault> {
    act(&shared, Action::GetInfo).await
}

pub(super) async fn config(State(shared): State<Shared>) -> Result<Response, Fault> {
    act(&shared, Action::GetConfig).await
}

pub(super) async fn version() -> Response {
    json(&serde_json::json!({
        "firecracker_version": FIRECRACKER_API,
        "chronovisor_version": env!("CARGO_PKG_VERSION"),
    }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vm {
    state: Wanted,
}

#[derive(Deserialize)]
enum Wanted {
    Paused,
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
