//! The REST surface: Firecracker's paths with its status codes and bodies, and ours beside them.
//!
//! Promises: 200 with JSON, 204 on a change of state, 400 with `{"fault_message": "..."}` on every refusal (413 where
//! the metadata would be too large, 401 where a token is needed, 503 where as many wait as may), unknown paths and
//! methods included. A slash after a path is as none. JSON is accepted under any content type; unknown fields are
//! refused. A body is read to its end within [`Limits`] before any handler sees the request, so a slow or endless one
//! costs its own connection only. No more than [`QUEUE`] requests wait for the VMM's thread at a time. A change that
//! was taken in is made with all that follows from it, whether or not its client waits for the answer.

mod actions;
mod balloon;
mod bearer;
mod count;
mod devices;
mod drives;
mod fault;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzz;
mod host;
mod id;
mod interfaces;
mod list;
mod machine;
mod metrics;
mod mmds;
mod openapi;
mod outputs;
mod rebinding;
mod refusals;
mod stream;
mod ui;
mod unsupported;
mod vcpus;
mod vm;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::http::uri::PathAndQuery;
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::sync::{Mutex, OnceCell, Semaphore, oneshot};
use vmm::{Action, ActionError, Metadata, Reply};

use crate::backend::Backend;
use crate::host::Host;
pub(crate) use bearer::OverTcp;
use fault::Fault;
use id::Id;

/// The version of Firecracker whose API this one follows: what `GET /version` answers, as clients choose features by
/// it.
pub const FIRECRACKER_API: &str = "1.14.0";

/// Requests that may wait for the VMM's thread at once, whether or not their clients still do: a client that asks and
/// hangs up, again and again, would make a line without end of what a busy thread has yet to do. Half of the places
/// that connections have: readings, which do not wait for that thread, have the others.
const QUEUE: usize = 32;

/// The path whose answer has no end.
pub(crate) const STREAM: &str = "/vcpus/stream";

/// How much of a request is taken, and how long anything about it may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Largest body, in bytes. Firecracker's `HTTP_MAX_PAYLOAD_SIZE` unless told otherwise.
    pub body_bytes: usize,
    /// Longest wait for a whole body.
    pub body_time: Duration,
    /// How long a connection may stay without a request.
    pub idle_time: Duration,
    /// How long a request's head may take, from its first byte to its last.
    pub head_time: Duration,
    /// How long a client may take to take an answer.
    pub answer_time: Duration,
    /// How long requests under way may take to finish once the server stops.
    pub linger: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 51_200,
            body_time: Duration::from_secs(10),
            idle_time: Duration::from_secs(60),
            head_time: Duration::from_secs(5),
            answer_time: Duration::from_secs(30),
            linger: Duration::from_millis(500),
        }
    }
}

/// What the handlers share.
#[derive(Clone)]
pub struct Shared {
    backend: Arc<dyn Backend>,
    started: Arc<dyn Fn() + Send + Sync>,
    moved: Arc<dyn Fn() + Send + Sync>,
    /// The host, once somebody has asked for it.
    host: Arc<OnceCell<Host>>,
    /// Held by whoever looks for disturbances, from the first look to the last.
    looks: Arc<Mutex<()>>,
    streams: Arc<stream::Streams>,
    /// Turns to wait for the VMM's thread.
    queue: Arc<Semaphore>,
    refusals: Arc<refusals::Refusals>,
}

impl Shared {
    /// `started` is called on the API's thread once the guest has been started over the API.
    pub fn new(backend: Arc<dyn Backend>, started: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            backend,
            started: Arc::new(started),
            moved: Arc::new(|| {}),
            host: Arc::default(),
            looks: Arc::default(),
            streams: Arc::default(),
            queue: Arc::new(Semaphore::new(QUEUE)),
            refusals: Arc::default(),
        }
    }

    /// `moved` is called on the API's thread once a vCPU has been put on another host CPU.
    #[must_use]
    pub fn when_moved(self, moved: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            moved: Arc::new(moved),
            ..self
        }
    }

    /// Ends what would go on for as long as its client listens.
    pub(crate) fn end_streams(&self) {
        self.streams.end();
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

/// All paths.
pub fn router(shared: Shared, limits: Limits) -> Router {
    if let Some(requests) = shared.backend.requests() {
        count::begin(requests);
    }
    let routes = list::add_to(Router::new())
        .fallback(unknown)
        .method_not_allowed_fallback(unknown)
        .with_state(shared.clone());
    // Around all routes at once: axum wraps each route by itself in a layer of its own router.
    Router::new()
        .fallback_service(routes)
        .layer(middleware::from_fn_with_state((shared, limits), admit))
}

async fn unknown(request: Request) -> Fault {
    Fault::unknown(request.method(), request.uri().path())
}

/// Takes in the whole request, and refuses what no handler should see. The order of the checks is Firecracker's.
async fn admit(State((shared, limits)): State<(Shared, Limits)>, mut request: Request, next: Next) -> Response {
    let (method, path) = (request.method().clone(), plain(request.uri()).path().to_owned());
    let admitted = bearer::check(&request).and_then(|known| match known {
        true => Ok(()),
        false => rebinding::check(&request),
    });
    let request = match admitted {
        Ok(()) => {
            *request.uri_mut() = plain(request.uri());
            whole(request, limits).await
        }
        Err(fault) => Err(fault),
    };
    let changes = request.as_ref().is_ok_and(|request| request.method() != Method::GET);
    let handled = handle(shared, method, path, request, next);
    if !changes {
        return handled.await;
    }
    // A connection whose client hangs up is dropped, with all that it waits for. What follows from a change that the
    // VMM makes has to follow all the same, so it is a task's.
    match tokio::spawn(handled).await {
        Ok(response) => response,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Handles what was taken in, and counts it.
async fn handle(shared: Shared, method: Method, path: String, request: Result<Request, Fault>, next: Next) -> Response {
    let line = format!("{method} {path}");
    let response = match request {
        Ok(request) => next.run(request).await,
        Err(fault) => fault.into_response(),
    };
    let fault = response.extensions().get::<Fault>();
    if let Some(requests) = shared.backend.requests() {
        count::one(requests, &method, &path, fault.is_some());
    }
    match fault {
        Some(fault) => {
            let (code, why) = (response.status(), fault.message());
            let status = code.as_u16();
            match shared.refusals.log(code) {
                Some(0) => tracing::info!("{line}: {status}: {why}"),
                Some(more) if code == StatusCode::UNAUTHORIZED => {
                    tracing::info!("{line}: {status}: {why} ({more} of status {status} before it were not logged)");
                }
                Some(more) => tracing::info!("{line}: {status}: {why} ({more} refusals before it were not logged)"),
                None => {}
            }
        }
        None => tracing::debug!("{line}: {}", response.status().as_u16()),
    }
    response
}

/// `uri` with one slash before its path and none after it, which mean nothing in Firecracker's.
pub(crate) fn plain(uri: &Uri) -> Uri {
    let path = uri.path();
    let inner = path.trim_start_matches('/');
    let inner = inner.strip_suffix('/').unwrap_or(inner);
    // The page's links are relative: from under its own name they would lead nowhere.
    if path.len() == inner.len() + 1 || inner == "ui" {
        return uri.clone();
    }
    let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
    let plain = PathAndQuery::try_from(format!("/{inner}{query}"));
    // Parts of what was one: it is one again.
    plain.map_or_else(|_| uri.clone(), Uri::from)
}

async fn whole(request: Request, limits: Limits) -> Result<Request, Fault> {
    let (parts, body) = request.into_parts();
    let bytes = if body.is_end_stream() {
        Bytes::new()
    } else {
        read_body(body, limits).await?
    };
    match parts.method {
        Method::GET if !bytes.is_empty() => Err(Fault::new("GET request cannot have a body.")),
        Method::PUT | Method::PATCH if bytes.is_empty() && !may_be_empty(parts.uri.path()) => {
            Err(Fault::new(format!("Empty {} request.", parts.method)))
        }
        // axum would answer HEAD from a GET handler.
        Method::GET | Method::PUT | Method::PATCH => Ok(Request::from_parts(parts, Body::from(bytes))),
        _ => Err(Fault::no_method()),
    }
}

/// Whether a change to `path` needs no body to say what it is.
fn may_be_empty(path: &str) -> bool {
    path.starts_with("/balloon/hinting/")
}

/// How much of a body that is too large is read and thrown away, so that its sender gets to read the answer instead of
/// meeting a closed socket while it still writes.
const DISCARD_BYTES: usize = 16 << 20;

async fn read_body(mut body: Body, limits: Limits) -> Result<Bytes, Fault> {
    let announced = body.size_hint().lower();
    // Firecracker's words, where it has been said how large.
    let too_large = || {
        let limit = limits.body_bytes;
        Fault::new(if announced > limit as u64 {
            format!("Request payload with size {announced} is larger than the limit of {limit} allowed by server.")
        } else {
            format!("The request payload is larger than the limit of {limit} allowed by server.")
        })
    };
    if announced > (limits.body_bytes + DISCARD_BYTES) as u64 {
        return Err(too_large());
    }
    let collect = async {
        let (mut bytes, mut discarded) = (Vec::new(), 0);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| Fault::new(format!("The body could not be read: {error}.")))?;
            let Ok(data) = frame.into_data() else { continue };
            if discarded > 0 || bytes.len() + data.len() > limits.body_bytes {
                bytes = Vec::new();
                discarded += data.len();
                if discarded > DISCARD_BYTES {
                    break;
                }
            } else {
                bytes.extend_from_slice(&data);
            }
        }
        if discarded > 0 {
            Err(too_large())
        } else {
            Ok(Bytes::from(bytes))
        }
    };
    tokio::time::timeout(limits.body_time, collect)
        .await
        .unwrap_or_else(|_| {
            Err(Fault::new(format!(
                "The body did not arrive within {} s.",
                limits.body_time.as_secs()
            )))
        })
}

/// Reads a request's body as JSON, whatever its content type says: clients send it under a form's.
fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(body).map_err(|error| {
        Fault::new(format!(
            "An error occurred when deserializing the json body of a request: {error}."
        ))
    })
}

/// Sends an action to the VMM thread and waits for its answer.
async fn ask(shared: &Shared, action: Action) -> Result<Reply, Fault> {
    let turn = shared.queue.clone().try_acquire_owned();
    let turn = turn.map_err(|_| Fault::too_many(format!("{QUEUE} requests wait for the microVM: try again later.")))?;
    let (tx, rx) = oneshot::channel();
    let answer = move |answer| {
        // Its own until the thread is done with it, whoever waits.
        drop(turn);
        // The requester may have gone: then nobody waits for the answer.
        drop(tx.send(answer));
    };
    shared.backend.send(action, Box::new(answer));
    Ok(rx.await.unwrap_or(Err(ActionError::Ended))?)
}

/// Sends an action and turns its answer into a response.
async fn act(shared: &Shared, action: Action) -> Result<Response, Fault> {
    Ok(match ask(shared, action).await? {
        // KVM is told of by /host, with the rest.
        Reply::Done | Reply::GuestAsked | Reply::Kvm(_) => StatusCode::NO_CONTENT.into_response(),
        Reply::Info(info) => json(&info),
        Reply::Config(config) => json(&*config),
        Reply::MachineConfig(config) => json(&config),
        Reply::Balloon(balloon) => json(&balloon),
        Reply::BalloonStats(stats) => json(&*stats),
        Reply::HintingStatus(status) => json(&status),
        // Nothing was put: Firecracker answers with an object without entries.
        Reply::Mmds(Metadata(Value::Null)) | Reply::MmdsConfig(None) => json(&Value::Object(serde_json::Map::new())),
        Reply::Mmds(document) => json(&document),
        Reply::MmdsConfig(Some(config)) => json(&config),
    })
}

/// Says, as Firecracker does, that what was asked for should be asked for in another way.
fn deprecated(mut response: Response) -> Response {
    response
        .headers_mut()
        .insert("deprecation", HeaderValue::from_static("true"));
    response
}

/// 200 with a JSON body.
fn json<T: Serialize>(value: &T) -> Response {
    match serde_json::to_vec(value) {
        Ok(body) => ([(header::CONTENT_TYPE, "application/json")], body).into_response(),
        Err(error) => Fault::new(format!("The answer could not be written as JSON: {error}.")).into_response(),
    }
}

#[cfg(test)]
mod table;
#[cfg(test)]
mod tests;
