//! A client of the REST API as small as can be: one request a connection, over the unix socket.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

/// What was answered.
#[derive(Clone, Debug, PartialEq)]
pub struct Response {
    /// HTTP's status code.
    pub status: u16,
    /// The body; `Null` where it is empty.
    pub body: Value,
}

impl Response {
    /// The `fault_message` of an error.
    #[must_use]
    pub fn fault(&self) -> &str {
        self.body["fault_message"].as_str().unwrap_or_default()
    }
}

/// Sends one request and reads the whole answer.
///
/// # Errors
/// What the socket says, or that the answer is not HTTP with a body of JSON.
pub fn request(socket: &Path, method: &str, path: &str, body: Option<&str>) -> io::Result<Response> {
    // Guards against a server that hangs; nothing is measured by it.
    request_within(Duration::from_secs(60), socket, method, path, body)
}

/// Likewise, for a client that would rather ask again than wait longer.
///
/// # Errors
/// As [`request`].
pub fn request_within(
    patience: Duration,
    socket: &Path,
    method: &str,
    path: &str,
    body: Option<&str>,
) -> io::Result<Response> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(patience))?;
    let body = body.unwrap_or_default();
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    )?;
    read_response(&mut stream)
}

/// Reads one answer to its end, from a server that closes the connection after it.
///
/// # Errors
/// As [`request`].
pub fn read_response(stream: &mut impl Read) -> io::Result<Response> {
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let bad = || io::Error::new(io::ErrorKind::InvalidData, format!("not an answer: {text:?}"));
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(bad)?;
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or_else(bad)?;
    let body = if body.is_empty() {
        Value::Null
    } else {
        serde_json::from_str(body).map_err(|_| bad())?
    };
    Ok(Response { status, body })
}
