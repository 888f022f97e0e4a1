//! `/balloon`.

use axum::body::Bytes;
use axum::extract::State;
use axum::response::Response;
use vmm::Action;

use super::{Fault, Shared, act, parse};

pub(super) async fn get(State(shared): State<Shared>) -> Result<Response, Fault> {
    act(&shared, Action::GetBalloon).await
}

pub(super) async fn put(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    act(&shared, Action::PutBalloon(parse(&body)?)).await
}
