//! The unix socket that stands for the guest on the host: `uds_path`, with the process's umask as Firecracker's. Its file goes with
//! the device.

use std::ffi::OsString;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use super::VsockError;
use crate::unix_socket::{self, Listening, Refusal};

/// The socket, listening, and its file.
#[derive(Debug)]
pub struct Socket(Listening);

impl Socket {
    /// Listens at `path`, without blocking.
    ///
    /// # Errors
    /// The path is taken, too long, or cannot be made.
    pub fn bind(path: &Path) -> Result<Self, VsockError> {
        let listening = unix_socket::bind(path, None).map_err(|refusal| in_words(path, refusal))?;
        Ok(Self(listening))
    }

    /// The next of those who wait to be connected.
    ///
    /// # Errors
    /// There is none (`WouldBlock`), or no descriptor for it.
    pub fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.listener().accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    /// The listener.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
        self.0.listener()
    }

    /// Connects to the host's end of a guest's connection to `port`: a socket beside this one, by the port's number. It
    /// does not wait: a socket whose queue is full is one where nobody listens.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = OsString::from(self.0.file().path());
        path.push(format!("_{port}"));
        Ok(unix_socket::connect(Path::new(&path))?.into())
    }
}

fn in_words(path: &Path, refusal: Refusal) -> VsockError {
    let path = path.to_owned();
    match refusal {
        Refusal::TooLong { length } => VsockError::TooLong { path, length },
        Refusal::InUse => VsockError::InUse(path),
        Refusal::Stale => VsockError::Stale(path),
        Refusal::NotASocket => VsockError::NotASocket(path),
        Refusal::NoDirectory(_) => VsockError::NoDirectory(path),
        Refusal::Other(source) => VsockError::Socket { path, source },
    }
}

/// The port of `CONNECT port`, as Firecracker reads it.
#[must_use]
pub fn port_of(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_whitespace();
    let connect = words.next()?.eq_ignore_ascii_case("connect");
    let port = words.next()?.parse().ok()?;
    connect.then_some(port)
}
