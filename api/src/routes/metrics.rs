//! `GET /metrics`: the same figures for Prometheus, read on this thread as `/vcpus` is. `PUT /metrics` is Firecracker's, and another
//! matter: see `outputs.rs`.

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::Shared;
use crate::prometheus::{self, vcpus, vcpus::Vcpu};

pub(super) async fn get(State(shared): State<Shared>) -> Response {
    let backend = &shared.backend;
    let read = |index| {
        Some(Vcpu {
            reading: backend.read(index)?,
            histograms: backend.histograms(index)?,
        })
    };
    let vcpus: Vec<_> = (0..backend.vcpus()).filter_map(read).collect();
    let text = vcpus::write(backend.id(), &vcpus);
    ([(header::CONTENT_TYPE, prometheus::CONTENT_TYPE)], text).into_response()
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};
    use axum::http::Request;
    use tower::ServiceExt;
    use vmm::RunState;

    use super::super::tests::router_in;
    use super::*;

    async fn metrics(state: RunState) -> String {
        let request = Request::get("/metrics").body(Body::empty()).unwrap();
        let response = router_in(state).oneshot(request).await.unwrap();
        assert_eq!(response.headers()[header::CONTENT_TYPE], prometheus::CONTENT_TYPE);
        assert_eq!(response.status(), 200);
        let body = to_bytes(response.into_body(), usize::MAX).await.unwrap();
        String::from_utf8(body.into()).unwrap()
    }

    #[tokio::test]
    async fn a_microvm_has_no_vcpus_to_show_before_its_start_and_all_of_them_after() {
        let before = metrics(RunState::NotStarted).await;
        assert!(before.ends_with("chronovisor_vcpus{id=\"fake\"} 0\n"), "{before}");
        let after = metrics(RunState::Paused).await;
        for vcpu in 0..2 {
            let sample = format!("chronovisor_vcpu_gtime_seconds_total{{id=\"fake\",vcpu=\"{vcpu}\"}} 4.890000000\n");
            assert!(after.contains(&sample), "{after}");
        }
    }
}
