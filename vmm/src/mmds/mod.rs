//! MMDS, the microVM metadata service: a JSON document that the host writes and the guest reads over HTTP, at a link-local
//! address that is answered by the VMM itself. No packet of it reaches a tap.
//!
//! ```text
//!   PUT, PATCH, GET /mmds ──► data.rs ◄── Mmds::respond ◄── http.rs ◄── stack.rs ◄── frames of the guest
//!   PUT /mmds/config      ──► config.rs       │                      TCP, IPv4, ARP     (one per interface)
//!                                          token.rs
//! ```
//!
//! What the guest sees is Firecracker's, version 1.14: paths are JSON pointers, formats are IMDS text and JSON, version 2 wants a
//! session token (`src/vmm/src/mmds` and `docs/mmds/mmds-user-guide.md` there). Departures, each for the guest's good: a response has
//! a reason phrase; `Connection: close` is honoured; every error body is `text/plain`; after a request that it cannot frame (a body,
//! an unknown method) the server closes the connection rather than take what follows for a request.
//!
//! One [`Mmds`] is shared by the API's actions and by the [`Stack`] of each interface. All of them run on the VMM thread, so the
//! lock of [`SharedMmds`] is never contended; it is there because a device that holds a [`Stack`] must be `Send`. It is held for the
//! making of one response, never across a return to the caller.

pub mod config;
pub mod data;
mod detour;
pub mod http;
pub mod metrics;
pub mod stack;
mod token;
mod wire;

use std::sync::{Arc, Mutex};
use std::time::Instant;

use config::{MmdsConfig, Version};
use data::{DataStore, Format, LookupError};
use http::{Method, Request, Response, Status};
use metrics::MmdsMetrics;
pub use stack::Stack;
use token::Tokens;

use crate::devices::virtio::count;

/// One service for the API and every interface.
pub type SharedMmds = Arc<Mutex<Mmds>>;

/// Where session tokens are asked for.
const TOKEN_PATH: &str = "/latest/api/token";

/// The service: its document, its configuration, its session tokens.
#[derive(Debug)]
pub struct Mmds {
    /// What the host writes and the guest reads.
    pub data: DataStore,
    version: Version,
    imds_compat: bool,
    tokens: Tokens,
    metrics: Arc<MmdsMetrics>,
}

impl Mmds {
    /// An empty service of version 1, whose document may take `limit_bytes` ([`data::DEFAULT_LIMIT_BYTES`]), with a new key for its
    /// tokens. `now` is the instant from which their lives are told.
    ///
    /// # Errors
    /// The kernel gave no random bytes.
    pub fn new(limit_bytes: usize, now: Instant) -> std::io::Result<Self> {
        Ok(Self {
            data: DataStore::new(limit_bytes),
            version: Version::default(),
            imds_compat: false,
            tokens: Tokens::new(now)?,
            metrics: Arc::default(),
        })
    }

    /// What was counted so far.
    #[must_use]
    pub fn metrics(&self) -> &Arc<MmdsMetrics> {
        &self.metrics
    }

    /// Takes over version and format of a configuration that passed [`MmdsConfig::check`]. Tokens stay valid.
    pub fn configure(&mut self, config: &MmdsConfig) {
        self.version = config.version;
        self.imds_compat = config.imds_compat;
    }

    /// The answer to a guest's `request`.
    pub fn respond(&mut self, request: &Request<'_>, now: Instant) -> Response {
        if request.path.is_empty() {
            return Response::text(Status::BadRequest, "Invalid URI.");
        }
        match request.method {
            Method::Get => self.get(request, now),
            Method::Put => self.put(request, now),
            Method::Patch => Response::method_not_allowed("Not allowed HTTP method."),
        }
    }

    /// Version 1 answers whatever token came, or none: what ran before version 2 goes on running.
    fn get(&self, request: &Request<'_>, now: Instant) -> Response {
        let refusal = match request.token {
            None => {
                count(&self.metrics.rx_no_token, 1);
                Some(
                    "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify the session \
                     token.",
                )
            }
            Some(token) if !self.tokens.valid(token, now) => {
                count(&self.metrics.rx_invalid_token, 1);
                Some("MMDS token not valid.")
            }
            Some(_) => None,
        };
        if let Some(why) = refusal.filter(|_| self.version == Version::V2) {
            return Response::text(Status::Unauthorized, why);
        }
        let format = if self.imds_compat { Format::Imds } else { request.accept };
        match self.data.get_path(&one_slash(request.path), format) {
            Ok(body) => Response::ok(format, body),
            Err(LookupError::NotFound) => not_found(request),
            Err(error @ LookupError::UnsupportedValueType) => Response::text(Status::NotImplemented, error.to_string()),
        }
    }

    /// The one resource that a guest may PUT is a new session token, in both versions.
    fn put(&mut self, request: &Request<'_>, now: Instant) -> Response {
        // A proxy that forwards for others would hand them a token that is this guest's alone (as Firecracker, as IMDSv2).
        if let Some(name) = request.forwarded_for {
            let why = format!("Invalid header. Reason: Unsupported header name. Key: {name}");
            return Response::text(Status::BadRequest, why);
        }
        if one_slash(request.path) != TOKEN_PATH {
            return not_found(request);
        }
        let Some((name, value)) = request.ttl else {
            return Response::text(
                Status::BadRequest,
                "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
                 `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.",
            );
        };
        let Ok(ttl_seconds) = value.parse() else {
            let why = format!("Invalid header. Reason: Invalid value. Key:{name}; Value:{value}");
            return Response::text(Status::BadRequest, why);
        };
        match self.tokens.issue(ttl_seconds, now) {
            Ok(token) => Response::ok(Format::Imds, token).with_header(name, ttl_seconds),
            Err(error) => Response::text(Status::BadRequest, error.to_string()),
        }
    }
}

fn not_found(request: &Request<'_>) -> Response {
    Response::text(Status::NotFound, format!("Resource not found: {}.", request.path))
}

/// `path` with each run of slashes made one: what makes it a JSON pointer.
fn one_slash(path: &str) -> String {
    let mut clean = String::with_capacity(path.len());
    for c in path.chars() {
        if c != '/' || !clean.ends_with('/') {
            clean.push(c);
        }
    }
    clean
}

#[cfg(test)]
#[path = "respond_tests.rs"]
mod respond_tests;
