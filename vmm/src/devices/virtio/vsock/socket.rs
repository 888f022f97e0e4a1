//! The unix socket that stands for the guest on the host: `uds_path`, with the process's umask as Firecracker's. An
//! existing file is never replaced: it may be another microVM's socket. The file goes with the device, unless somebody
//! has put another in its place.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::VsockError;

/// Longest path of a unix socket, in bytes: `sun_path` holds 108, the last one a NUL (unix(7)).
const MAX_PATH: usize = 107;

/// The socket, listening, and its file.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl Socket {
    /// Listens at `path`, without blocking.
    ///
    /// # Errors
    /// The path is taken, too long, or cannot be made.
    pub fn bind(path: &Path) -> Result<Self, VsockError> {
        let length = path.as_os_str().len();
        if length > MAX_PATH {
            let path = path.to_owned();
            return Err(VsockError::TooLong { path, length });
        }
        let other = |source| VsockError::Socket {
            path: path.into(),
            source,
        };
        // Made by bind(2), which follows no symbolic link in the last part and replaces nothing.
        let listener = UnixListener::bind(path).map_err(|source| refusal(path, source))?;
        let metadata = path.symlink_metadata().map_err(other)?;
        let socket = Self {
            listener,
            path: path.into(),
            identity: (metadata.dev(), metadata.ino()),
        };
        socket.listener.set_nonblocking(true).map_err(other)?;
        Ok(socket)
    }

    /// The next of those who wait to be connected.
    ///
    /// # Errors
    /// There is none (`WouldBlock`), or no descriptor for it.
    pub fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    /// The listener.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Connects to the host's end of a guest's connection to `port`: a socket beside this one, by the port's number. It
    /// does not wait: a socket whose queue is full is one where nobody listens.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        let stream = socket()?;
        rustix::net::connect(&stream, &SocketAddrUnix::new(Path::new(&path))?)?;
        Ok(stream.into())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let ours = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino()) == self.identity;
        if self.path.symlink_metadata().is_ok_and(ours) {
            // Nothing is left to be done about a failure: the microVM has ended.
            let _ = std::fs::remove_file(&self.path);
        }
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

fn socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Says why `bind` failed.
fn refusal(path: &Path, source: io::Error) -> VsockError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::AddrInUse => {}
        io::ErrorKind::NotFound => return VsockError::NoDirectory(path),
        _ => return VsockError::Socket { path, source },
    }
    match path.symlink_metadata() {
        Ok(metadata) if !metadata.file_type().is_socket() => VsockError::NotASocket(path),
        _ => match knock(&path) {
            Err(rustix::io::Errno::CONNREFUSED) => VsockError::Stale(path),
            _ => VsockError::InUse(path),
        },
    }
}

/// Connects, without waiting, to see whether somebody listens.
fn knock(path: &Path) -> rustix::io::Result<()> {
    rustix::net::connect(&socket()?, &SocketAddrUnix::new(path)?)
}
