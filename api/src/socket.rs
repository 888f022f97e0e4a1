//! The API's sockets: a unix socket only its owner may open, and a TCP one on the loopback when asked for.
//!
//! The unix socket's file has mode 0600 from the instant it exists, and is removed with its [`SocketFile`]. An existing file is never replaced, not even the socket of a process
//! that has ended: two servers started at once would each take the path from the other. The error says which it is, and what to do.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Longest path of a unix socket, in bytes: `sun_path` holds 108, the last one a NUL (unix(7)).
const MAX_PATH: usize = 107;

/// Connections that may wait for the API's thread: as many as std's listeners let.
const BACKLOG: i32 = 128;

/// Why a socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path does not fit in a socket's address.
    #[error(
        "--api-sock {path}: the path has {length} bytes and a unix socket's at most {MAX_PATH}: choose a shorter one"
    )]
    TooLong {
        /// As given.
        path: PathBuf,
        /// Its length, in bytes.
        length: usize,
    },
    /// Another process answers there.
    #[error("--api-sock {0}: another process is listening there: end it, or choose another path")]
    InUse(PathBuf),
    /// A socket nobody listens on.
    #[error("--api-sock {0}: left behind by a process that has ended: remove it (rm {0}) and try again")]
    Stale(PathBuf),
    /// Something else has that name.
    #[error("--api-sock {0}: this file exists and is not a socket: choose another path")]
    NotASocket(PathBuf),
    /// Its directory is not there.
    #[error("--api-sock {path}: the directory {directory} does not exist: create it, or choose another path")]
    NoDirectory {
        /// As given.
        path: PathBuf,
        /// What is missing.
        directory: PathBuf,
    },
    /// Anything else.
    #[error("--api-sock {path}: cannot listen there: {source}")]
    Other {
        /// As given.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// An address that other hosts can reach.
    #[error(
        "--api-listen {0}: the API has no authentication, so only loopback addresses are allowed: 127.0.0.1:PORT or [::1]:PORT"
    )]
    NotLoopback(SocketAddr),
    /// TCP said no.
    #[error("--api-listen {address}: cannot listen there: {source}")]
    Tcp {
        /// As given.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// A unix socket's file. Dropping it removes it.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl SocketFile {
    /// Removes the file, unless somebody has put another in its place.
    pub fn remove(&self) {
        let ours = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino()) == self.identity;
        if self.path.symlink_metadata().is_ok_and(ours) {
            // Nothing is left to be done about a failure: the process is on its way out.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Listens on a unix socket at `path`, non-blocking.
///
/// # Errors
/// See [`SocketError`].
pub fn bind(path: &Path) -> Result<(UnixListener, Arc<SocketFile>), SocketError> {
    let other = |source| SocketError::Other {
        path: path.to_owned(),
        source,
    };
    let length = path.as_os_str().len();
    if length > MAX_PATH {
        return Err(SocketError::TooLong {
            path: path.to_owned(),
            length,
        });
    }
    let address = SocketAddrUnix::new(path).map_err(|error| other(error.into()))?;
    let fd = socket().map_err(|error| other(error.into()))?;
    // bind(2) gives the file the socket's own mode, less the umask (Linux net/unix/af_unix.c, unix_bind_bsd): set
    // beforehand, there is no instant at which others could connect.
    rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR).map_err(|error| other(error.into()))?;
    rustix::net::bind(&fd, &address).map_err(|error| refusal(path, error.into()))?;
    let metadata = path.symlink_metadata().map_err(other)?;
    let file = SocketFile {
        path: path.to_owned(),
        identity: (metadata.dev(), metadata.ino()),
    };
    rustix::net::listen(&fd, BACKLOG).map_err(|error| other(error.into()))?;
    Ok((UnixListener::from(fd), Arc::new(file)))
}

fn socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Says why `bind` failed.
fn refusal(path: &Path, source: io::Error) -> SocketError {
    let owned = path.to_owned();
    match source.kind() {
        io::ErrorKind::AddrInUse => match path.symlink_metadata() {
            Ok(metadata) if !metadata.file_type().is_socket() => SocketError::NotASocket(owned),
            _ => match connect(path) {
                Err(rustix::io::Errno::CONNREFUSED) => SocketError::Stale(owned),
                _ => SocketError::InUse(owned),
            },
        },
        io::ErrorKind::NotFound => {
            let directory = path.parent().unwrap_or(Path::new("/")).to_owned();
            SocketError::NoDirectory { path: owned, directory }
        }
        _ => SocketError::Other { path: owned, source },
    }
}

/// Knocks, without waiting: the connect of a listener whose queue is full would.
fn connect(path: &Path) -> rustix::io::Result<()> {
    rustix::net::connect(&socket()?, &SocketAddrUnix::new(path)?)
}

/// Listens on a loopback address, non-blocking.
///
/// # Errors
/// See [`SocketError`].
pub fn bind_tcp(address: SocketAddr) -> Result<TcpListener, SocketError> {
    if !address.ip().is_loopback() {
        return Err(SocketError::NotLoopback(address));
    }
    let listener = TcpListener::bind(address).map_err(|source| SocketError::Tcp { address, source })?;
    listener
        .set_nonblocking(true)
        .map_err(|source| SocketError::Tcp { address, source })?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn the_socket_is_its_owners_alone_and_goes_with_its_guard() {
        let scratch = Scratch::new();
        let path = scratch.path("s");
        let (_listener, file) = bind(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(UnixStream::connect(&path).is_ok());
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_has_taken_the_sockets_place_is_left_alone() {
        let scratch = Scratch::new();
        let path = scratch.path("s");
        let (_listener, file) = bind(&path).unwrap();
        // Made before the other goes, so that it cannot get its inode number.
        std::fs::write(scratch.path("other"), "precious").unwrap();
        std::fs::rename(scratch.path("other"), &path).unwrap();
        drop(file);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_path_that_cannot_be_is_refused_with_what_to_do_and_left_as_it_was() {
        let scratch = Scratch::new();
        let (in_use, stale, plain) = (scratch.path("in-use"), scratch.path("stale"), scratch.path("plain"));
        let _listener = UnixListener::bind(&in_use).unwrap();
        drop(UnixListener::bind(&stale).unwrap());
        std::fs::write(&plain, "precious").unwrap();
        let long = scratch.path("l".repeat(MAX_PATH));
        let table = [
            (in_use.clone(), "another process is listening"),
            (stale.clone(), "remove it (rm "),
            (plain.clone(), "not a socket"),
            (scratch.path("missing/s"), "missing does not exist"),
            (scratch.path("plain/s"), "Not a directory"),
            (long, "107"),
        ];
        for (path, says) in table {
            let said = bind(&path).expect_err(says).to_string();
            assert!(said.contains(says), "{said}");
            assert!(said.starts_with(&format!("--api-sock {}", path.display())), "{said}");
        }
        assert!(in_use.exists() && stale.exists() && plain.exists());
        assert!(UnixStream::connect(&in_use).is_ok());
    }

    #[test]
    fn the_longest_path_is_bound() {
        let scratch = Scratch::new();
        let room = MAX_PATH - scratch.path("x").as_os_str().len() + 1;
        let path = scratch.path("x".repeat(room));
        assert_eq!(path.as_os_str().len(), MAX_PATH);
        assert!(bind(&path).is_ok());
    }

    #[test]
    fn a_socket_whose_queue_is_full_is_in_use_not_waited_for() {
        let scratch = Scratch::new();
        let path = scratch.path("s");
        let fd = socket().unwrap();
        rustix::net::bind(&fd, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&fd, 0).unwrap();
        let _queued = UnixStream::connect(&path).unwrap();
        assert!(matches!(bind(&path), Err(SocketError::InUse(_))));
    }

    #[test]
    fn tcp_is_for_the_loopback_only() {
        for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:80"] {
            assert!(
                matches!(bind_tcp(address.parse().unwrap()), Err(SocketError::NotLoopback(_))),
                "{address}"
            );
        }
        let first = bind_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let taken = bind_tcp(first.local_addr().unwrap()).unwrap_err().to_string();
        assert!(taken.starts_with("--api-listen 127.0.0.1:"), "{taken}");
    }
}
