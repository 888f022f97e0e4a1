//! `/actions`: start, Ctrl-Alt-Del, and Firecracker's flush of metrics.

use axum::body::Bytes;
use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use vmm::Action;

use super::{Fault, Shared, act, parse};

/// What is to be done.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(super) struct ActionBody {
    /// Which.
    action_type: ActionType,
}

/// What can be done.
#[derive(Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
enum ActionType {
    /// Writes a line of metrics. After the start.
    FlushMetrics,
    /// Starts the guest. Once.
    InstanceStart,
    /// Presses Ctrl-Alt-Del. After the start.
    SendCtrlAltDel,
}

pub(super) async fn put(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    let ActionBody { action_type } = parse(&body)?;
    match action_type {
        ActionType::InstanceStart => {
            let response = act(&shared, Action::Start).await?;
            (shared.started)();
            Ok(response)
        }
        ActionType::SendCtrlAltDel => act(&shared, Action::SendCtrlAltDel).await,
        ActionType::FlushMetrics => act(&shared, Action::FlushMetrics).await,
    }
}
