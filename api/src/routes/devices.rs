//! The devices of which there is one at most: `/vsock` and `/entropy`, before the start; the balloon has a file of its own.

use axum::body::Bytes;
use axum::extract::State;
use axum::response::Response;
use vmm::Action;
use vmm::config::Vsock;

use super::{Fault, Shared, act, deprecated, parse};

pub(super) async fn put_vsock(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    let vsock: Vsock = parse(&body)?;
    let by_old_name = vsock.vsock_id.is_some();
    let response = act(&shared, Action::PutVsock(vsock)).await?;
    Ok(if by_old_name { deprecated(response) } else { response })
}

pub(super) async fn put_entropy(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    act(&shared, Action::PutEntropy(parse(&body)?)).await
}
