//! The guest's half of HTTP/1: a request read from the bytes that came, a response made into bytes. Syntax is httparse's.
//!
//! A request of this service is a head of at most [`REQUEST_LIMIT_BYTES`] and no body. One that announces a body, or that cannot be
//! read, is answered by an error after which the connection ends: where the next request begins is not known.

use std::fmt::{Display, Write};

use crate::mmds::data::Format;

/// Largest request, as Firecracker's endpoints buffer it. One that is not whole by then resets its connection.
pub const REQUEST_LIMIT_BYTES: usize = 2500;

/// Headers that a request may have; with names and values of a few bytes, more than fit in [`REQUEST_LIMIT_BYTES`].
const MAX_HEADERS: usize = 64;

/// What the service is asked to do. Any other method is answered here, with 501.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Read metadata.
    Get,
    /// Make a session token.
    Put,
    /// Known, and not allowed.
    Patch,
}

/// What the service needs of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// What to do.
    pub method: Method,
    /// The absolute path, query included as it came; empty where the target has none.
    pub path: &'a str,
    /// JSON if `Accept` is exactly that, IMDS text otherwise.
    pub accept: Format,
    /// `X-metadata-token`, or AWS's name of it.
    pub token: Option<&'a str>,
    /// `X-metadata-token-ttl-seconds`, or AWS's name of it, and its value.
    pub ttl: Option<(&'a str, &'a str)>,
    /// The name of an `X-Forwarded-For` header, as it was written.
    pub forwarded_for: Option<&'a str>,
    /// Whether the connection is to stay: HTTP/1.1's default, HTTP/1.0's wish.
    pub keep_alive: bool,
}

/// What bytes received so far are.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed<'a> {
    /// The beginning of a request.
    Partial,
    /// A request, and how many of the bytes it took.
    Whole(Request<'a>, usize),
    /// Not a request that this service can read; the connection ends with this answer.
    Refused(Response),
}

/// Reads the request at the beginning of `bytes`.
#[must_use]
pub fn parse(bytes: &[u8]) -> Parsed<'_> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    let length = match head.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Parsed::Partial,
        Err(httparse::Error::Version) => return refused(Status::NotImplemented, "Unsupported HTTP version."),
        Err(_) => return refused(Status::BadRequest, "Invalid request."),
    };
    // httparse takes the head for complete with these three in it.
    let (Some(method), Some(target), Some(minor)) = (head.method, head.path, head.version) else {
        return refused(Status::BadRequest, "Invalid request.");
    };
    let method = match method {
        "GET" => Method::Get,
        "PUT" => Method::Put,
        "PATCH" => Method::Patch,
        _ => return refused(Status::NotImplemented, "Unsupported HTTP method."),
    };
    let mut request = Request {
        method,
        path: absolute_path(target),
        accept: Format::Imds,
        token: None,
        ttl: None,
        forwarded_for: None,
        keep_alive: minor == 1,
    };
    for header in head.headers.iter() {
        if let Err(refusal) = request.take_header(header) {
            return Parsed::Refused(refusal);
        }
    }
    Parsed::Whole(request, length)
}

impl<'a> Request<'a> {
    fn take_header(&mut self, header: &httparse::Header<'a>) -> Result<(), Response> {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        // A value that is no text is no token, number or media type either.
        let value = std::str::from_utf8(header.value).unwrap_or_default().trim();
        if is("accept") {
            let json = value == "application/json";
            self.accept = if json { Format::Json } else { Format::Imds };
        } else if is("x-metadata-token") || is("x-aws-ec2-metadata-token") {
            self.token.get_or_insert(value);
        } else if is("x-metadata-token-ttl-seconds") || is("x-aws-ec2-metadata-token-ttl-seconds") {
            self.ttl.get_or_insert((header.name, value));
        } else if is("x-forwarded-for") {
            self.forwarded_for.get_or_insert(header.name);
        } else if is("connection") {
            for option in value.split(',').map(str::trim) {
                if option.eq_ignore_ascii_case("close") {
                    self.keep_alive = false;
                } else if option.eq_ignore_ascii_case("keep-alive") {
                    self.keep_alive = true;
                }
            }
        } else if is("content-length") {
            match value.parse::<u32>() {
                Ok(0) => {}
                Ok(_) => return Err(Response::last(Status::BadRequest, "Invalid request.")),
                Err(_) => {
                    let why = format!(
                        "Invalid header. Reason: Invalid value. Key:{}; Value:{value}",
                        header.name
                    );
                    return Err(Response::last(Status::BadRequest, why));
                }
            }
        } else if is("transfer-encoding") && value != "identity" {
            return Err(Response::last(Status::BadRequest, "Invalid request."));
        }
        Ok(())
    }
}

fn refused(status: Status, why: &str) -> Parsed<'static> {
    Parsed::Refused(Response::last(status, why))
}

/// The path of a request target in origin form (`/path`) or absolute form (`http://host/path`); empty if there is none.
fn absolute_path(target: &str) -> &str {
    if target.starts_with('/') {
        return target;
    }
    target
        .strip_prefix("http://")
        .and_then(|rest| rest.find('/').map(|path| &rest[path..]))
        .unwrap_or("")
}

/// The statuses that the service answers with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// 200.
    Ok,
    /// 400.
    BadRequest,
    /// 401: a token is missing, forged or expired.
    Unauthorized,
    /// 404.
    NotFound,
    /// 405.
    MethodNotAllowed,
    /// 501: a method or version that is not spoken, or a value that IMDS has no form for.
    NotImplemented,
}

impl Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Ok => "200 OK",
            Self::BadRequest => "400 Bad Request",
            Self::Unauthorized => "401 Unauthorized",
            Self::NotFound => "404 Not Found",
            Self::MethodNotAllowed => "405 Method Not Allowed",
            Self::NotImplemented => "501 Not Implemented",
        })
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// What became of the request.
    pub status: Status,
    /// What the body is.
    pub format: Format,
    /// The body.
    pub body: String,
    /// Whether the connection ends with this answer.
    pub close: bool,
    /// Whole header lines besides those that every response has.
    extra: String,
}

impl Response {
    /// 200 with `body`.
    #[must_use]
    pub fn ok(format: Format, body: String) -> Self {
        Self {
            status: Status::Ok,
            format,
            body,
            close: false,
            extra: String::new(),
        }
    }

    /// `status`, and why, as text.
    #[must_use]
    pub fn text(status: Status, why: impl Into<String>) -> Self {
        Self {
            status,
            ..Self::ok(Format::Imds, why.into())
        }
    }

    /// As [`Response::text`], and the connection ends with it.
    #[must_use]
    pub fn last(status: Status, why: impl Into<String>) -> Self {
        Self {
            close: true,
            ..Self::text(status, why)
        }
    }

    /// 405, naming the methods that are allowed.
    #[must_use]
    pub fn method_not_allowed(why: &str) -> Self {
        Self::text(Status::MethodNotAllowed, why).with_header("Allow", "GET, PUT")
    }

    /// With one more header. `name` and `value` hold no line end: a name is one that httparse passed, or ours.
    #[must_use]
    pub fn with_header(mut self, name: &str, value: impl Display) -> Self {
        write!(self.extra, "{name}: {value}\r\n").expect("a string takes all");
        self
    }

    /// The response as it is sent.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let connection = if self.close { "close" } else { "keep-alive" };
        let kind = match self.format {
            Format::Json => "application/json",
            Format::Imds => "text/plain",
        };
        format!(
            "HTTP/1.1 {}\r\nConnection: {connection}\r\n{}Content-Type: {kind}\r\nContent-Length: {}\r\n\r\n{}",
            self.status,
            self.extra,
            self.body.len(),
            self.body
        )
        .into_bytes()
    }
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod http_tests;
