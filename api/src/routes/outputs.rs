//! Where what the VMM and the guest say goes, before the start: `/logger`, `/metrics` and `/serial`.

use axum::body::Bytes;
use axum::extract::State;
use axum::response::Response;
use vmm::Action;

use super::{Fault, Shared, act, parse};

pub(super) async fn put_logger(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    act(&shared, Action::PutLogger(parse(&body)?)).await
}

pub(super) async fn put_metrics(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    act(&shared, Action::PutMetrics(parse(&body)?)).await
}

pub(super) async fn put_serial(State(shared): State<Shared>, body: Bytes) -> Result<Response, Fault> {
    act(&shared, Action::PutSerial(parse(&body)?)).await
}
