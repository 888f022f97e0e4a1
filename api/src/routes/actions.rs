//! `/actions`: start, Ctrl-Alt-Del, and Firecracker's flush of metrics.

use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use vmm::{Action, Reply, RunState};

use super::{Fault, Shared, act, ask, parse};

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
        ActionType::FlushMetrics => flush_metrics(&shared).await,
    }
}

/// As Firecracker where no metrics file is configured: refused before the start, and nothing to do after it.
async fn flush_metrics(shared: &Shared) -> Result<Response, Fault> {
    match ask(shared, Action::GetInfo).await? {
        Reply::Info(info) if info.state == RunState::NotStarted => Err(Fault(
            "The requested operation is not supported before starting the microVM.".to_owned(),
        )),
        _ => Ok(StatusCode::NO_CONTENT.into_response()),
    }
}
