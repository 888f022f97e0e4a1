//! `/actions`: start, Ctrl-Alt-Del, and Firecracker's flush of metrics.

use axum::body::Bytes;
use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use vmm::Action;

use super::{Fault, Shared, act, parse};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    action_type: ActionType,
}

#[derive(Deserialize)]
enum ActionType {
    FlushMetrics,
    InstanceStart,
    SendCtrlAltDel,
}

pub(super) async fn put(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    let Body { action_type } = parse(&body)?;
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
