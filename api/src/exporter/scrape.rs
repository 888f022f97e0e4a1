//! One socket asked once: `GET /metrics`, over a connection of its own.
//!
//! A connection that stays open between scrapes would take one of the microVM's for as long as the exporter runs, and have to
//! be made again all the same when the microVM closes idle ones; to connect costs some ten microseconds.

use std::io;
use std::path::Path;
use std::pin::pin;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper::client::conn::http1;
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use super::parse::{Malformed, Metrics};
use crate::prometheus::MAX_BYTES;

/// Most of an answer's head that is read, in bytes: hyper's least.
const MAX_HEAD: usize = 8 << 10;

/// Why a socket's figures are not there.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("nobody listens there: left behind by a process that has ended?")]
    Refused,
    #[error("the socket has just gone")]
    Gone,
    #[error("permission denied: run the exporter as the socket's owner, or as root")]
    Denied,
    #[error("no answer in time: is the microVM's process stopped?")]
    Timeout,
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    #[error("the answer broke off, or is not HTTP: {0}")]
    NotHttp(hyper::Error),
    #[error("answered with status {}: not a microVM of this program, or one without GET /metrics", .0.as_u16())]
    Status(StatusCode),
    #[error("the answer is longer than the {MAX_BYTES} bytes that a microVM's are at most")]
    TooLong,
    #[error("the answer is not a microVM's metrics: {0}")]
    Malformed(Malformed),
}

impl Failure {
    /// All there are, by [`Failure::reason`].
    pub const REASONS: [&'static str; 9] = [
        "refused",
        "gone",
        "denied",
        "timeout",
        "connect",
        "not_http",
        "status",
        "too_long",
        "malformed",
    ];

    /// In one word, for a label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Gone => "gone",
            Self::Denied => "denied",
            Self::Timeout => "timeout",
            Self::Connect(_) => "connect",
            Self::NotHttp(_) => "not_http",
            Self::Status(_) => "status",
            Self::TooLong => "too_long",
            Self::Malformed(_) => "malformed",
        }
    }

    /// Whether somebody answered who is not a microVM, or not one that has metrics: a directory of sockets may hold others,
    /// those of a microVM's own vsock for instance.
    pub fn is_of_another_program(&self) -> bool {
        match self {
            Self::NotHttp(_) | Self::Status(_) | Self::TooLong | Self::Malformed(_) => true,
            Self::Refused | Self::Gone | Self::Denied | Self::Timeout | Self::Connect(_) => false,
        }
    }

    fn to_connect(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused,
            io::ErrorKind::NotFound => Self::Gone,
            io::ErrorKind::PermissionDenied => Self::Denied,
            // Its line of connections that wait is full (unix(7)): somebody listens, and does not accept.
            io::ErrorKind::WouldBlock => Self::Timeout,
            _ => Self::Connect(error),
        }
    }
}

/// What the microVM at `path` answers. Takes as long as that takes: who calls this gives up in time by dropping it.
pub(super) async fn scrape(path: &Path) -> Result<Metrics, Failure> {
    let stream = UnixStream::connect(path).await.map_err(Failure::to_connect)?;
    let mut http = http1::Builder::new();
    http.max_buf_size(MAX_HEAD);
    let (mut sender, connection) = http.handshake(TokioIo::new(stream)).await.map_err(Failure::NotHttp)?;
    let exchange = async {
        let request = Request::get("/metrics")
            .header(header::HOST, "localhost")
            .header(header::CONNECTION, "close")
            .body(Empty::<Bytes>::new())
            .expect("a request of constants");
        let response = sender.send_request(request).await.map_err(Failure::NotHttp)?;
        if response.status() != StatusCode::OK {
            return Err(Failure::Status(response.status()));
        }
        let body = Limited::new(response.into_body(), MAX_BYTES).collect().await;
        body.map(|body| body.to_bytes()).map_err(|error| {
            if error.is::<LengthLimitError>() {
                return Failure::TooLong;
            }
            match error.downcast() {
                Ok(error) => Failure::NotHttp(*error),
                Err(error) => Failure::Connect(io::Error::other(error)),
            }
        })
    };
    let mut exchange = pin!(exchange);
    let body = tokio::select! {
        body = &mut exchange => body,
        // It has ended, and all that came is with the exchange.
        _ = connection => exchange.await,
    }?;
    let text = String::from_utf8(body.into()).map_err(|_| Failure::Malformed(Malformed::NOT_UTF8))?;
    Metrics::parse(text).map_err(Failure::Malformed)
}
