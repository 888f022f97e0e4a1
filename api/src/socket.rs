//! The API's sockets: a unix socket only its owner may open, and a TCP one when asked for: on the loopback, unless it
//! is asked for elsewhere in so many words, and with a token ([`Reach`]).
//!
//! The unix socket's file has mode 0600 from the instant it exists, and replaces none but one that a process left
//! behind which has ended (`vmm::unix_socket`): the error says what is there, and what to do.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use vmm::unix_socket::{self, Listening, MAX_PATH, Refusal};

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
    /// A socket nobody listens on, and not ours to replace.
    #[error(
        "--api-sock {0}: a socket nobody listens on, which is not replaced: it is another user's, or its directory \
         cannot be locked: see that no other process is about to use it, and remove it (rm {0}), or choose another path"
    )]
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
        "--api-listen {0}: other hosts can reach that address, and change the microVM: give 127.0.0.1:PORT or [::1]:PORT, and bring it elsewhere by ssh -L; or --api-listen-anywhere, with --api-token-file"
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

/// Listens on a unix socket at `path`, non-blocking.
///
/// # Errors
/// See [`SocketError`].
pub fn bind(path: &Path) -> Result<Listening, SocketError> {
    unix_socket::bind(path, Some(Mode::RUSR | Mode::WUSR)).map_err(|refusal| in_words(path, refusal))
}

fn in_words(path: &Path, refusal: Refusal) -> SocketError {
    let path = path.to_owned();
    match refusal {
        Refusal::TooLong { length } => SocketError::TooLong { path, length },
        Refusal::InUse => SocketError::InUse(path),
        Refusal::Stale => SocketError::Stale(path),
        Refusal::NotASocket => SocketError::NotASocket(path),
        Refusal::NoDirectory(directory) => SocketError::NoDirectory { path, directory },
        Refusal::Other(source) => SocketError::Other { path, source },
    }
}

/// From where the API may be reached by TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// This host.
    Loopback,
    /// Any: whoever asks for it has seen to it that there is a token.
    Anywhere,
}

/// Listens on an address, non-blocking.
///
/// # Errors
/// See [`SocketError`].
pub fn bind_tcp(address: SocketAddr, reach: Reach) -> Result<TcpListener, SocketError> {
    if reach == Reach::Loopback && !address.ip().is_loopback() {
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
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn the_socket_is_its_owners_alone_and_goes_with_its_guard() {
        let scratch = Scratch::new();
        let path = scratch.path("s");
        let listening = bind(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(UnixStream::connect(&path).is_ok());
        drop(listening);
        assert!(!path.exists());
    }

    #[test]
    fn a_path_that_cannot_be_is_refused_with_what_to_do_and_left_as_it_was() {
        let scratch = Scratch::new();
        let (in_use, plain) = (scratch.path("in-use"), scratch.path("plain"));
        let _listener = UnixListener::bind(&in_use).unwrap();
        std::fs::write(&plain, "precious").unwrap();
        let long = scratch.path("l".repeat(MAX_PATH));
        let table = [
            (in_use.clone(), "another process is listening"),
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
        assert!(in_use.exists() && plain.exists());
        assert!(UnixStream::connect(&in_use).is_ok());
    }

    #[test]
    fn a_symbolic_link_is_followed_nowhere() {
        let scratch = Scratch::new();
        let target = scratch.path("target");
        std::os::unix::fs::symlink(&target, scratch.path("dangling")).unwrap();
        let _listener = UnixListener::bind(scratch.path("socket")).unwrap();
        std::os::unix::fs::symlink(scratch.path("socket"), scratch.path("to-socket")).unwrap();
        for name in ["dangling", "to-socket"] {
            let refused = bind(&scratch.path(name)).unwrap_err();
            assert!(matches!(refused, SocketError::NotASocket(_)), "{name}: {refused}");
            assert!(scratch.path(name).is_symlink(), "{name} is left as it was");
        }
        assert!(!target.exists());
    }

    #[test]
    fn one_left_behind_by_a_process_that_has_ended_is_replaced() {
        let scratch = Scratch::new();
        let path = scratch.path("s");
        drop(UnixListener::bind(&path).unwrap());
        let _listening = bind(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(UnixStream::connect(&path).is_ok());
        let refused = in_words(&path, Refusal::Stale).to_string();
        assert!(refused.contains("remove it (rm "), "{refused}");
    }

    #[test]
    fn tcp_is_for_the_loopback_unless_it_is_for_anywhere() {
        let loopback = |address: &str| bind_tcp(address.parse().unwrap(), Reach::Loopback);
        for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:80", "[::ffff:127.0.0.1]:0"] {
            let refused = loopback(address).unwrap_err();
            assert!(matches!(refused, SocketError::NotLoopback(_)), "{address}");
            assert!(
                refused
                    .to_string()
                    .contains("--api-listen-anywhere, with --api-token-file")
            );
        }
        let first = loopback("127.0.0.1:0").unwrap();
        let taken = loopback(&first.local_addr().unwrap().to_string())
            .unwrap_err()
            .to_string();
        assert!(taken.starts_with("--api-listen 127.0.0.1:"), "{taken}");
        assert!(bind_tcp("0.0.0.0:0".parse().unwrap(), Reach::Anywhere).is_ok());
    }
}
