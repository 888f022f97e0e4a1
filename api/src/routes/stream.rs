//! `GET /vcpus/stream`: readings as they come, as server-sent events, for as long as the client listens or the microVM lives.
//!
//! ```text
//!  sampler, one for each interval in use ──► the latest readings ──► a body for each client: takes them when the client
//!  (reads every vCPU once an interval)       (one place, shared)     has been sent all of those before, else skips them
//! ```
//!
//! Promises: however many clients, and however slow, the vCPUs are read once an interval; no client ever waits for another;
//! for a client that does not read, one event for each vCPU is held and no more. Nothing is queued: who was late gets what
//! is true then. Nothing runs, and nothing is allocated, before a first client asks.

mod sampler;

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use axum::Extension;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use hyper::body::Frame;
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Instant, Sleep};

use super::{Fault, Shared};
use crate::backend::Backend;
use crate::line::Line;
pub(super) use sampler::Streams;

/// The shortest and the longest interval, in milliseconds.
const INTERVALS_MS: std::ops::RangeInclusive<u64> = 10..=60_000;

/// The longest that a client hears nothing, be it that there is nothing to read or that its interval is longer: proxies close
/// connections on which nothing is said.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// What is said first where there is nothing to read yet: a comment, which clients pass over (HTML Standard, 9.2.6).
const NONE_YET: Bytes = Bytes::from_static(b": no vCPU runs yet\n\n");

/// What is said where nothing was for [`KEEP_ALIVE`].
const STILL_HERE: Bytes = Bytes::from_static(b": still here\n\n");

/// What may follow the path after a question mark.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(super) struct Asked {
    /// Time between two events of a vCPU.
    #[serde(default = "one_second")]
    #[cfg_attr(test, schemars(range(min = *INTERVALS_MS.start(), max = *INTERVALS_MS.end())))]
    interval_ms: u64,
}

const fn one_second() -> u64 {
    1000
}

/// The first readings at once, the others whenever the interval has passed, in step with all clients of that interval.
pub(super) async fn stream(
    State(shared): State<Shared>,
    line: Option<Extension<Arc<Line>>>,
    asked: Result<Query<Asked>, QueryRejection>,
) -> Result<Response, Fault> {
    let Query(Asked { interval_ms }) = asked.map_err(|error| Fault::new(format!("{}.", error.body_text())))?;
    if !INTERVALS_MS.contains(&interval_ms) {
        let (least, most) = INTERVALS_MS.into_inner();
        return Err(Fault::new(format!(
            "interval_ms is {interval_ms}: give {least} to {most} milliseconds."
        )));
    }
    let place = shared.streams.place()?;
    let first = render(&*shared.backend, 0);
    if let Some(Extension(line)) = line {
        // Before the start the first message is no measure.
        line.becomes_stream(first.len().max(4096));
    }
    let body = Readings {
        _place: place,
        first: Some(first),
        next: Next::Awaited(change(shared.streams.clone().join(&shared.backend, interval_ms))),
        way: Arc::default(),
        said: Instant::now(),
        silence: Box::pin(tokio::time::sleep(KEEP_ALIVE)),
    };
    let head = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    Ok((head, Body::new(body)).into_response())
}

/// One event for each vCPU; a comment where there is none.
fn render(backend: &dyn Backend, capacity: usize) -> Bytes {
    let mut text = Vec::with_capacity(capacity);
    for reading in (0..backend.vcpus()).filter_map(|index| backend.read(index)) {
        let whole = text.len();
        text.extend_from_slice(b"event: reading\ndata: ");
        match serde_json::to_writer(&mut text, &reading) {
            Ok(()) => text.extend_from_slice(b"\n\n"),
            Err(_) => text.truncate(whole),
        }
    }
    if text.is_empty() { NONE_YET } else { text.into() }
}

type Change = Pin<Box<dyn Future<Output = (bool, watch::Receiver<Bytes>)> + Send>>;

/// Ends with the next readings, or with the last of them: then it is false.
fn change(mut client: watch::Receiver<Bytes>) -> Change {
    Box::pin(async move { (client.changed().await.is_ok(), client) })
}

/// The body of one client's answer.
struct Readings {
    _place: OwnedSemaphorePermit,
    first: Option<Bytes>,
    next: Next,
    way: Arc<Mutex<Way>>,
    /// When it was sent something last.
    said: Instant,
    /// Ends no later than the time for a word of comment; and is set anew only then, so that a reading sets no timer.
    silence: Pin<Box<Sleep>>,
}

/// What comes after the readings that the client was sent last.
enum Next {
    Awaited(Change),
    /// There are new readings.
    Due(watch::Receiver<Bytes>),
    Ended,
}

/// The way to the client.
#[derive(Debug, Default)]
enum Way {
    #[default]
    Free,
    /// Readings are on it: `Some` is to be woken once they have been sent.
    Taken(Option<Waker>),
}

/// Readings on their way: dropped by hyper once the socket has taken the last byte.
struct OnTheWay {
    readings: Bytes,
    way: Arc<Mutex<Way>>,
}

impl AsRef<[u8]> for OnTheWay {
    fn as_ref(&self) -> &[u8] {
        &self.readings
    }
}

impl Drop for OnTheWay {
    fn drop(&mut self) {
        if let Way::Taken(Some(waker)) = std::mem::take(&mut *lock(&self.way)) {
            waker.wake();
        }
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The microVM has ended, and the client has not taken what was on its way: it is not waited for.
#[derive(Debug, thiserror::Error)]
#[error("the microVM has ended")]
struct Ended;

impl Readings {
    fn send(&mut self, readings: Bytes) -> Frame<Bytes> {
        *lock(&self.way) = Way::Taken(None);
        self.said = Instant::now();
        let way = self.way.clone();
        Frame::data(Bytes::from_owner(OnTheWay { readings, way }))
    }

    /// Whether nothing has been said for too long. If not, the caller is woken when it may have been.
    fn is_silent(&mut self, context: &mut Context<'_>) -> bool {
        while self.silence.as_mut().poll(context).is_ready() {
            let due = self.said + KEEP_ALIVE;
            let now = Instant::now();
            self.silence
                .as_mut()
                .reset(if due > now { due } else { now + KEEP_ALIVE });
            if due <= now {
                // The timer has to be asked once for it to wake anybody.
                let _ = self.silence.as_mut().poll(context);
                return true;
            }
        }
        false
    }

    /// Whether the last readings are still on their way; then `waker` is woken when they no longer are.
    fn way_is_taken(&self, waker: &Waker) -> bool {
        match &mut *lock(&self.way) {
            Way::Free => false,
            Way::Taken(waiting) => {
                *waiting = Some(waker.clone());
                true
            }
        }
    }
}

impl HttpBody for Readings {
    type Data = Bytes;
    type Error = Ended;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Ended>>> {
        if let Some(readings) = self.first.take() {
            return Poll::Ready(Some(Ok(self.send(readings))));
        }
        loop {
            match std::mem::replace(&mut self.next, Next::Ended) {
                Next::Awaited(mut change) => match change.as_mut().poll(context) {
                    Poll::Pending => {
                        self.next = Next::Awaited(change);
                        // Who has not taken the last word needs no other.
                        if self.is_silent(context) && !self.way_is_taken(context.waker()) {
                            return Poll::Ready(Some(Ok(self.send(STILL_HERE))));
                        }
                        return Poll::Pending;
                    }
                    Poll::Ready((true, client)) => self.next = Next::Due(client),
                    Poll::Ready((false, _)) => {}
                },
                // The next readings may come any number of times until the way is free: this is not woken by them. It is polled at the
                // end, as all connections are (hyper-util's graceful shutdown).
                Next::Due(mut client) => {
                    if !self.way_is_taken(context.waker()) {
                        let readings = client.borrow_and_update().clone();
                        self.next = Next::Awaited(change(client));
                        return Poll::Ready(Some(Ok(self.send(readings))));
                    }
                    if client.has_changed().is_ok() {
                        self.next = Next::Due(client);
                        return Poll::Pending;
                    }
                }
                Next::Ended if self.way_is_taken(context.waker()) => return Poll::Ready(Some(Err(Ended))),
                Next::Ended => return Poll::Ready(None),
            }
        }
    }
}

#[cfg(test)]
mod tests;
