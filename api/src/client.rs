//! A client of the API, for `chronovisor times` and `check`: GET over a unix socket that is kept open between requests.
//!
//! It speaks to this program's own server, which always announces a body's length: chunked answers are not understood.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Longest wait for an answer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// Largest answer: 32 vCPUs take some 40 KiB.
const MAX_BODY: usize = 4 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody serves the API there.
    #[error("{path}: nobody serves the API there ({source}): give the socket of a running microVM with --api-sock")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Nobody takes new connections.
    #[error(
        "{path}: the microVM takes no connections: as many as may wait have waited for {} s; is its process stopped?",
        patience.as_secs_f32()
    )]
    Full {
        /// The socket.
        path: PathBuf,
        /// How long was waited.
        patience: Duration,
    },
    /// No answer came in time.
    #[error("GET {path} was not answered in {} s: is the microVM's process stopped?", PATIENCE.as_secs())]
    Silent {
        /// What was asked for.
        path: String,
    },
    /// The connection broke, as it does when the microVM ends.
    #[error("the connection to the microVM broke: {0}")]
    Broken(#[from] io::Error),
    /// The server said no.
    #[error("{path} was answered {status}: {body}")]
    Refused {
        /// What was asked for.
        path: String,
        /// The HTTP status.
        status: u16,
        /// What came with it.
        body: String,
    },
}

/// An open connection.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the API's socket.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        Self::with_patience(path, PATIENCE)
    }

    /// As [`Client::connect`]; neither to be connected nor for an answer is waited longer than `patience`.
    pub(crate) fn with_patience(path: &Path, patience: Duration) -> Result<Self, ClientError> {
        let open = || {
            let address = SocketAddrUnix::new(path)?;
            let flags = SocketFlags::CLOEXEC;
            let stream = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            // It bounds connect(2) too, where the listener's line is full (Linux net/unix/af_unix.c, unix_stream_connect).
            let stream = UnixStream::from(stream);
            stream.set_write_timeout(Some(patience))?;
            stream.set_read_timeout(Some(patience))?;
            rustix::net::connect(&stream, &address)?;
            Ok(stream)
        };
        let path = path.to_owned();
        let stream = open().map_err(|source: io::Error| match source.kind() {
            io::ErrorKind::WouldBlock => ClientError::Full { path, patience },
            _ => ClientError::Connect { path, source },
        })?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// The body of `GET path`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn get(&mut self, path: &str) -> Result<Vec<u8>, ClientError> {
        self.ask(path).map_err(|error| match error {
            // What a socket's timeout is (socket(7), SO_RCVTIMEO).
            ClientError::Broken(error) if error.kind() == io::ErrorKind::WouldBlock => {
                ClientError::Silent { path: path.to_owned() }
            }
            error => error,
        })
    }

    fn ask(&mut self, path: &str) -> Result<Vec<u8>, ClientError> {
        write!(self.stream.get_mut(), "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
        let status = status(&self.line()?)?;
        let mut length = None;
        loop {
            let line = self.line()?;
            match line.split_once(':') {
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                    length = value.trim().parse().ok().filter(|&length| length <= MAX_BODY);
                }
                Some(_) => {}
                None => break,
            }
        }
        let mut body = vec![0; length.ok_or_else(|| malformed("no length that can be read"))?];
        self.stream.read_exact(&mut body)?;
        match status {
            200 => Ok(body),
            _ => Err(ClientError::Refused {
                path: path.to_owned(),
                status,
                body: String::from_utf8_lossy(&body).into_owned(),
            }),
        }
    }

    /// A line of an answer's head, without its end.
    fn line(&mut self) -> Result<String, ClientError> {
        let mut line = String::new();
        if self.stream.by_ref().take(8192).read_line(&mut line)? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Ok(line.trim_end().to_owned())
    }
}

fn status(line: &str) -> io::Result<u16> {
    let status = line
        .strip_prefix("HTTP/1.1 ")
        .and_then(|rest| rest.get(..3)?.parse().ok());
    status.ok_or_else(|| malformed("not an HTTP answer"))
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn a_microvm_that_takes_no_connections_is_given_up_and_told_from_one_that_is_not_there() {
        let scratch = Scratch::new();
        let path = scratch.path("s");
        let patience = Duration::from_millis(50);
        let nobody = Client::with_patience(&path, patience).unwrap_err();
        assert!(matches!(nobody, ClientError::Connect { .. }), "{nobody}");
        // As when its process is stopped: the system connects who comes until the line is full.
        let listener = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        let line: Vec<_> = (0..2).map(|_| UnixStream::connect(&path).unwrap()).collect();
        let full = Client::with_patience(&path, patience).unwrap_err();
        assert!(matches!(full, ClientError::Full { .. }), "{full}");
        assert!(
            full.to_string().contains("waited for 0.05 s; is its process stopped?"),
            "{full}"
        );
        drop(line);
    }
}
