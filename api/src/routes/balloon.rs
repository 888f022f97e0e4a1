//! `/balloon`: put before the start, changed and asked after it.

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{Method, Uri};
use axum::response::Response;
use vmm::{Action, HintingStart};

use super::{Fault, Shared, act, parse};

pub(super) async fn get(State(shared): State<Shared>) -> Result<Response, Fault> {
    act(&shared, Action::GetBalloon).await
}

pub(super) async fn put(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    act(&shared, Action::PutBalloon(parse(&body)?)).await
}

pub(super) async fn patch(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    act(&shared, Action::PatchBalloon(parse(&body)?)).await
}

pub(super) async fn statistics(State(shared): State<Shared>) -> Result<Response, Fault> {
    act(&shared, Action::GetBalloonStats).await
}

pub(super) async fn patch_statistics(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    act(&shared, Action::PatchBalloonStats(parse(&body)?)).await
}

/// The body may be left out.
pub(super) async fn start_hinting(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    let start = if body.is_empty() {
        HintingStart::default()
    } else {
        parse(&body)?
    };
    act(&shared, Action::StartHinting(start)).await
}

/// There need be no body, and what is in one has no effect.
pub(super) async fn stop_hinting(State(shared): State<Shared>) -> Result<Response, Fault> {
    act(&shared, Action::StopHinting).await
}

pub(super) async fn hinting_status(State(shared): State<Shared>) -> Result<Response, Fault> {
    act(&shared, Action::GetHintingStatus).await
}

/// Firecracker's words for what is below `/balloon` and nothing.
pub(super) async fn get_unknown(Path(path): Path<String>) -> Fault {
    Fault::new(format!("Unrecognized GET request path `{path}`."))
}

/// Firecracker's words for what is below `/balloon/hinting` and nothing, or not by this method.
pub(super) async fn unknown_hinting(method: Method, uri: Uri) -> Fault {
    let below = uri.path().strip_prefix("/balloon/hinting/").unwrap_or_default();
    Fault::new(format!("Unrecognized {method} request path `/hinting/{below}`."))
}
