//! What is answered beside the table: shapes, limits, readings.

use axum::body::to_bytes;
use serde_json::{Value, json};
use tower::ServiceExt;
use vmm::RunState::{self, NotStarted, Paused, Running};

use super::*;
use crate::backend::fake::{self, Fake};

pub(super) fn router_in(state: RunState) -> Router {
    let shared = Shared::new(Arc::new(Fake::new(state)), || {});
    router(shared, Limits::default())
}

/// Sends `method path body` to a microVM in `state`; gives the status and the body.
pub(super) async fn request_of(router: &Router, method: &str, path: &str, body: &str) -> (u16, Value) {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .body(Body::from(body.to_owned()))
        .unwrap();
    let response = router.clone().oneshot(request).await.unwrap();
    let status = response.status().as_u16();
    let media = response
        .headers()
        .get("content-type")
        .map(|media| media.to_str().unwrap().to_owned());
    if let Some(media) = media.filter(|media| media != "application/json") {
        // Not JSON: what there is to say of it here is what it is. A stream has no end.
        return (status, Value::String(media));
    }
    let bytes = to_bytes(response.into_body(), usize::MAX).await.unwrap();
    let value = if bytes.is_empty() {
        Value::Null
    } else {
        serde_json::from_slice(&bytes).unwrap()
    };
    (status, value)
}

async fn request(state: RunState, method: &str, path: &str, body: &str) -> (u16, Value) {
    request_of(&router_in(state), method, path, body).await
}

const MACHINE: &str = r#"{"vcpu_count": 1, "mem_size_mib": 256}"#;
const BOOT: &str = r#"{"kernel_image_path": "/vmlinux", "boot_args": "console=ttyS0", "initrd_path": "/initrd"}"#;

#[tokio::test]
async fn what_is_asked_for_is_answered_200_in_firecrackers_shapes() {
    assert_eq!(
        request(Paused, "GET", "/", "").await,
        (
            200,
            json!({"id": "fake", "state": "Paused", "vmm_version": env!("CARGO_PKG_VERSION"), "app_name": "Chronovisor"})
        )
    );
    let (status, version) = request(NotStarted, "GET", "/version", "").await;
    assert_eq!(
        (status, version["firecracker_version"].as_str()),
        (200, Some(FIRECRACKER_API))
    );
    let machine = json!({
        "vcpu_count": 2, "mem_size_mib": 128, "smt": false, "track_dirty_pages": false, "huge_pages": "None"
    });
    assert_eq!(
        request(Running, "GET", "/machine-config", "").await,
        (200, machine.clone())
    );
    let (status, config) = request(Running, "GET", "/vm/config", "").await;
    assert_eq!((status, &config["machine-config"]), (200, &machine));
    let (status, host) = request(Paused, "GET", "/host", "").await;
    assert_eq!(status, 200);
    assert!(host["tick_ns"].as_u64().is_some_and(|tick| tick > 0), "{host}");
    assert!(
        host["cpus"]["online"]
            .as_array()
            .is_some_and(|online| !online.is_empty()),
        "{host}"
    );
    let found = host["disturbances"].as_array().expect("a list");
    let of_vcpu: Vec<_> = found.iter().filter(|found| found["vcpu"] == 1).collect();
    assert!(
        matches!(of_vcpu[..], [one] if one["kind"] == "moved_affinity" && one["says"].is_string()),
        "{host}"
    );
}

#[tokio::test]
async fn the_client_that_configures_and_starts_gets_what_it_configured() {
    let router = router_in(NotStarted);
    assert_eq!(request_of(&router, "PUT", "/machine-config", MACHINE).await.0, 204);
    assert_eq!(
        request_of(&router, "GET", "/machine-config", "").await.1["mem_size_mib"],
        256
    );
    assert_eq!(request_of(&router, "PUT", "/boot-source", BOOT).await.0, 204);
    assert_eq!(request_of(&router, "GET", "/", "").await.1["state"], "Not started");
    assert_eq!(
        request_of(&router, "PUT", "/actions", r#"{"action_type": "InstanceStart"}"#)
            .await
            .0,
        204
    );
    assert_eq!(request_of(&router, "GET", "/", "").await.1["state"], "Running");
    assert_eq!(
        request_of(&router, "GET", "/vcpus", "")
            .await
            .1
            .as_array()
            .map(Vec::len),
        Some(1)
    );
}

#[tokio::test]
async fn readings_are_answered_exactly_as_accounting_gives_them() {
    assert_eq!(request(NotStarted, "GET", "/vcpus", "").await, (200, json!([])));
    let expected = [0, 1].map(|index| serde_json::to_value(fake::reading(index)).unwrap());
    assert_eq!(
        request(Running, "GET", "/vcpus", "").await,
        (200, Value::from(expected.to_vec()))
    );
    assert_eq!(
        request(Running, "GET", "/vcpus/1/cputime", "").await,
        (200, expected[1].clone())
    );
}

#[tokio::test]
async fn where_a_vcpu_is_can_be_asked_and_who_moves_it_is_told_of_it() {
    assert_eq!(
        request(Running, "GET", "/vcpus/0/affinity", "").await,
        (200, json!({"cpu": "none"})),
        "the fake's are not pinned"
    );
    let told = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let moved = {
        let told = told.clone();
        move || {
            told.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    };
    let shared = Shared::new(Arc::new(Fake::new(Running)), || {}).when_moved(moved);
    let router = router(shared, Limits::default());
    for body in [r#"{"cpu": 3}"#, r#"{"cpu": "three"}"#] {
        request_of(&router, "PUT", "/vcpus/0/affinity", body).await;
    }
    assert_eq!(told.load(std::sync::atomic::Ordering::Relaxed), 1);
}

#[tokio::test]
async fn the_guests_start_over_the_api_is_told_once() {
    let told = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let started = {
        let told = told.clone();
        move || {
            told.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    };
    let shared = Shared::new(Arc::new(Fake::new(NotStarted)), started);
    let router = router(shared, Limits::default());
    assert_eq!(request_of(&router, "PUT", "/boot-source", BOOT).await.0, 204);
    for status in [204, 400] {
        assert_eq!(
            request_of(&router, "PUT", "/actions", r#"{"action_type": "InstanceStart"}"#)
                .await
                .0,
            status
        );
    }
    assert_eq!(told.load(std::sync::atomic::Ordering::Relaxed), 1);
}

#[tokio::test]
async fn json_is_accepted_under_any_content_type() {
    for content_type in [
        "application/x-www-form-urlencoded",
        "application/json",
        "text/plain",
        "nonsense",
    ] {
        let request = Request::builder()
            .method("PUT")
            .uri("/machine-config")
            .header("Content-Type", content_type);
        let response = router_in(NotStarted)
            .oneshot(request.body(Body::from(MACHINE)).unwrap())
            .await
            .unwrap();
        assert_eq!(response.status(), 204, "{content_type}");
    }
}

#[tokio::test]
async fn a_body_may_have_51200_bytes_and_not_one_more() {
    let padded = |length: usize| format!("{MACHINE}{}", " ".repeat(length - MACHINE.len()));
    assert_eq!(
        request(NotStarted, "PUT", "/machine-config", &padded(51_200)).await.0,
        204
    );
    for length in [51_201, 10 << 20, 20 << 20] {
        let (status, value) = request(NotStarted, "PUT", "/machine-config", &padded(length)).await;
        assert_eq!(status, 400, "{length}");
        assert!(value["fault_message"].as_str().unwrap().contains("51200"), "{value}");
    }
}

#[tokio::test]
async fn metadata_is_put_patched_and_got_within_its_limit() {
    let router = router_in(Running);
    let put = async |body: &str| request_of(&router, "PUT", "/mmds", body).await;
    assert_eq!(put(r#"{"a": 1, "b": {"c": 2}}"#).await.0, 204);
    let patch = request_of(&router, "PATCH", "/mmds", r#"{"a": null, "b": {"d": 3}}"#).await;
    assert_eq!(patch.0, 204);
    let got = request_of(&router, "GET", "/mmds", "").await;
    assert_eq!(got, (200, json!({ "b": { "c": 2, "d": 3 } })));
    // A patch is added to what is there: each fits into a request, both together not into the limit.
    let half = |key| format!(r#"{{"{key}": "{}"}}"#, "x".repeat(30_000));
    assert_eq!(request_of(&router, "PATCH", "/mmds", &half("e")).await.0, 204);
    let (status, answer) = request_of(&router, "PATCH", "/mmds", &half("f")).await;
    let says = "MMDS limit exceeded error: The MMDS patch request doesn't fit.";
    assert_eq!((status, &answer["fault_message"]), (413, &json!(says)));
    assert_eq!(put(r#"{"a": 1}"#).await.0, 204, "what was refused is not in the way");
}

#[tokio::test]
async fn what_should_be_asked_for_in_another_way_is_answered_with_a_header() {
    let table = [
        ("/vsock", r#"{"guest_cid": 3, "uds_path": "v"}"#, false),
        ("/vsock", r#"{"guest_cid": 3, "uds_path": "v", "vsock_id": "v"}"#, true),
        ("/mmds/config", r#"{"network_interfaces": ["eth0"]}"#, true),
        (
            "/mmds/config",
            r#"{"network_interfaces": ["eth0"], "version": "V2"}"#,
            false,
        ),
        ("/machine-config", MACHINE, false),
        (
            "/machine-config",
            r#"{"vcpu_count": 1, "mem_size_mib": 256, "cpu_template": "None"}"#,
            true,
        ),
    ];
    for (path, body, deprecated) in table {
        let router = router_in(NotStarted);
        let interface = r#"{"iface_id": "eth0", "host_dev_name": "tap0"}"#;
        request_of(&router, "PUT", "/network-interfaces/eth0", interface).await;
        let request = Request::put(path).body(Body::from(body)).unwrap();
        let response = router.oneshot(request).await.unwrap();
        assert_eq!(response.status(), 204, "{path} {body}");
        assert_eq!(
            response.headers().contains_key("deprecation"),
            deprecated,
            "{path} {body}"
        );
    }
}

#[tokio::test]
async fn histograms_have_their_edges_in_nanoseconds() {
    let (status, value) = request(Running, "GET", "/vcpus/1/histograms", "").await;
    assert_eq!((status, &value["index"]), (200, &json!(1)));
    assert_eq!(value["vmm"]["buckets"][5], json!({"le_ns": 2048, "count": 1}));
    assert_eq!(
        (&value["run"]["count"], &value["run"]["sum_ns"]),
        (&json!(1), &json!(1 << 20))
    );
    assert_eq!(value["run"]["buckets"][31]["le_ns"], Value::Null);
}

#[tokio::test]
async fn a_reading_is_explained_only_when_asked() {
    for (query, explained) in [
        ("", false),
        ("?explain=0", false),
        ("?explain=1", true),
        ("?explain=true", true),
    ] {
        let (status, value) = request(Running, "GET", &format!("/vcpus/0/cputime{query}"), "").await;
        assert_eq!(
            (status, &value["gtime_ns"]),
            (200, &json!(4_890_000_000_u64)),
            "{query}"
        );
        assert_eq!(value["explain"]["sources"].is_array(), explained, "{query}");
    }
}

#[tokio::test]
async fn a_microvm_that_has_ended_says_so() {
    struct Ended;
    impl Backend for Ended {
        fn send(&self, _: Action, _: crate::backend::Answer) {}
        fn vcpus(&self) -> usize {
            0
        }
        fn read(&self, _: usize) -> Option<accounting::Reading> {
            None
        }
        fn explain(&self, _: usize) -> Option<accounting::Explained> {
            None
        }
        fn histograms(&self, _: usize) -> Option<accounting::reading::Histograms> {
            None
        }
        fn disturbances(&self, _: usize) -> Vec<accounting::disturbance::Disturbance> {
            Vec::new()
        }
    }
    let router = router(Shared::new(Arc::new(Ended), || {}), Limits::default());
    let (status, value) = request_of(&router, "GET", "/", "").await;
    assert_eq!(
        (status, value["fault_message"].as_str()),
        (400, Some("the microVM has ended"))
    );
}
