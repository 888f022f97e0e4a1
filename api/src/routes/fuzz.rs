//! Requests that anybody may send who reaches the socket: see [`crate::fuzz`].
//!
//! An input is text, as the rows of table.txt are: its first byte is the microVM's state, by table.txt's letters N, R, P, E and K; then
//! each line is a request: method, path, body. There is no machine, and no socket: whatever hyper would not let through is left out.

use std::sync::Mutex as Lock;

use axum::body::to_bytes;
use tokio::runtime::{Builder, Runtime};
use tower::ServiceExt;
use vmm::fake::FakeVm;

use super::*;
use crate::backend::Answer;
use crate::backend::fake::Fake;
use crate::config_file::fuzz::makes_another;
use crate::fuzz::tame;

/// Of one input.
const MOST_REQUESTS: usize = 32;

const KERNEL: &str = r#"{"kernel_image_path": "/vmlinux"}"#;
/// What table.txt's microVMs are configured as.
const CONFIGURED: [(&str, &str); 5] = [
    (
        "/drives/rootfs",
        r#"{"drive_id": "rootfs", "is_root_device": true, "path_on_host": "/rootfs"}"#,
    ),
    (
        "/drives/data",
        r#"{"drive_id": "data", "is_root_device": false, "path_on_host": "/data"}"#,
    ),
    (
        "/network-interfaces/eth0",
        r#"{"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:ac:10:00:02"}"#,
    ),
    ("/vsock", r#"{"guest_cid": 3, "uds_path": "v.sock"}"#),
    (
        "/balloon",
        r#"{"amount_mib": 16, "deflate_on_oom": false, "stats_polling_interval_s": 1, "free_page_hinting": true}"#,
    ),
];

/// The microVM of the input at hand, behind a router that is made once.
struct Current(Lock<Fake>);

impl Current {
    fn with<T>(&self, ask: impl FnOnce(&Fake) -> T) -> T {
        ask(&self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

impl Backend for Current {
    fn send(&self, action: Action, answer: Answer) {
        self.with(|fake| fake.send(tame(action), answer));
    }
    fn id(&self) -> &'static str {
        "fuzz"
    }
    fn vcpus(&self) -> usize {
        self.with(Backend::vcpus)
    }
    fn read(&self, index: usize) -> Option<accounting::Reading> {
        self.with(|fake| fake.read(index))
    }
    fn explain(&self, index: usize) -> Option<accounting::Explained> {
        self.with(|fake| fake.explain(index))
    }
    fn histograms(&self, index: usize) -> Option<accounting::reading::Histograms> {
        self.with(|fake| fake.histograms(index))
    }
    fn disturbances(&self, index: usize) -> Vec<accounting::disturbance::Disturbance> {
        self.with(|fake| fake.disturbances(index))
    }
}

struct Bench {
    runtime: Runtime,
    router: Router,
    current: Arc<Current>,
}

thread_local! {
    static BENCH: Bench = Bench::new();
}

impl Bench {
    fn new() -> Self {
        let current = Arc::new(Current(Lock::new(Fake::of(FakeVm::new()))));
        let shared = Shared::new(current.clone(), || {});
        Self {
            runtime: Builder::new_current_thread().enable_time().build().expect("a runtime"),
            router: router(shared, Limits::default()),
            current,
        }
    }

    /// Has the microVM be another one, in the state of `letter`.
    fn begin(&self, letter: u8) {
        *self.current.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Fake::of(FakeVm::new());
        if letter == b'E' {
            return;
        }
        let put = |path: &str, body: &str| {
            let status = self.runtime.block_on(self.request("PUT", path, body));
            assert_eq!(status, Some(StatusCode::NO_CONTENT), "PUT {path}");
        };
        put("/boot-source", KERNEL);
        if letter != b'K' {
            CONFIGURED.iter().for_each(|(path, body)| put(path, body));
        }
        if letter != b'N' {
            put("/actions", r#"{"action_type": "InstanceStart"}"#);
        }
        if letter == b'P' {
            self.current.with(|fake| fake.send(Action::Pause, Box::new(drop)));
        }
    }

    /// The status; none where it is no request at all.
    async fn request(&self, method: &str, path: &str, body: &str) -> Option<StatusCode> {
        let request = Request::builder().method(method).uri(path);
        let request = request.body(Body::from(body.to_owned())).ok()?;
        let heads = request.method() == Method::HEAD;
        let response = self.router.clone().oneshot(request).await.expect("a router answers");
        let status = response.status();
        let media = response
            .headers()
            .get(header::CONTENT_TYPE)
            .map(|media| media.as_bytes().to_vec());
        if media.as_deref().is_some_and(|media| media != b"application/json") {
            // The page, the text for Prometheus; or the stream, which has no end.
            assert_eq!(status, StatusCode::OK);
            return Some(status);
        }
        let bytes = to_bytes(response.into_body(), usize::MAX)
            .await
            .expect("it is in memory");
        match status.as_u16() {
            200 => assert!(
                serde_json::from_slice::<Value>(&bytes).is_ok(),
                "{method} {path}: {bytes:?}"
            ),
            204 => assert!(bytes.is_empty(), "{method} {path}: {bytes:?}"),
            400 | 413 | 503 if heads => {}
            400 | 413 | 503 => {
                let fault: serde_json::Map<String, Value> = serde_json::from_slice(&bytes).expect("a fault");
                let said = fault.get("fault_message").and_then(Value::as_str);
                assert!(
                    fault.len() == 1 && said.is_some_and(|said| !said.is_empty()),
                    "{fault:?}"
                );
            }
            _ => panic!("{method} {path}: {status}"),
        }
        Some(status)
    }
}

pub(crate) fn run(data: &[u8]) {
    let Some((&letter, rest)) = data.split_first() else {
        return;
    };
    BENCH.with(|bench| {
        bench.begin(letter);
        let text = String::from_utf8_lossy(rest);
        for line in text.lines().filter(|line| !line.is_empty()).take(MOST_REQUESTS) {
            let (method, rest) = line.split_once(' ').unwrap_or((line, ""));
            let (path, body) = rest.split_once(' ').unwrap_or((rest, ""));
            // It is this host that answers: at its own pace, and in threads.
            if path.trim_matches('/') != "host" {
                bench.runtime.block_on(bench.request(method, path, body));
            }
        }
        let configured = |answer| match answer {
            Ok(Reply::Config(config)) if config.boot_source.is_some() => makes_another(&config),
            Ok(Reply::Config(_)) => {}
            other => panic!("{other:?}"),
        };
        bench
            .current
            .with(|fake| fake.send(Action::GetConfig, Box::new(configured)));
    });
}
