//! Unix sockets that this process listens on, and their files.
//!
//! An existing file is never replaced, not even the socket of a process that has ended: two that start at once would each take the path
//! from the other, and it may be another microVM's. A [`Refusal`] says which it is. One that has been bound and does not listen yet
//! refuses connections as one left behind does: only one that goes on refusing them is called that.
//!
//! A [`Listening`] removes the file before it closes the socket: there is no instant at which its file is one left behind.
//!
//! A file goes with its [`SocketFile`], and with the process where that ends by [`remove_all`]: on a way out that waits for nobody,
//! whoever owns the file may not get to drop it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Longest path of a unix socket, in bytes: `sun_path` holds 108, the last one a NUL (unix(7)).
pub const MAX_PATH: usize = 107;

/// Connections that may wait to be accepted: as many as std's listeners let.
const BACKLOG: i32 = 128;

/// How often a socket that nobody listens on is looked at before it is one left behind, and how long between two looks. From
/// bind(2) to listen(2) are some microseconds, unless its process is not run.
const LOOKS: usize = 20;
const BETWEEN_LOOKS: Duration = Duration::from_millis(5);

/// The files of all sockets of this process.
static FILES: Mutex<Vec<Weak<SocketFile>>> = Mutex::new(Vec::new());

/// Why there is no socket at a path. Whoever wanted it there says so in the words of his user.
#[derive(Debug)]
pub enum Refusal {
    /// The path does not fit in a socket's address.
    TooLong {
        /// Its length, in bytes.
        length: usize,
    },
    /// Somebody listens there.
    InUse,
    /// A socket nobody listens on.
    Stale,
    /// Something else has that name.
    NotASocket,
    /// Its directory is not there.
    NoDirectory(PathBuf),
    /// Whatever else the system said.
    Other(io::Error),
}

impl From<Errno> for Refusal {
    fn from(error: Errno) -> Self {
        Self::Other(error.into())
    }
}

/// A socket's file. Dropping it removes it.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl SocketFile {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes it, unless somebody has put another in its place.
    fn remove(&self) {
        let ours = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino()) == self.identity;
        if self.path.symlink_metadata().is_ok_and(ours) {
            // Nothing is left to be done about a failure: its owner is on the way out.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.remove();
    }
}

/// A socket that listens, and its file.
#[derive(Debug)]
pub struct Listening<L = UnixListener> {
    // In the order in which they go.
    file: Arc<SocketFile>,
    listener: L,
}

impl<L> Listening<L> {
    /// Its file.
    #[must_use]
    pub fn file(&self) -> &SocketFile {
        &self.file
    }

    /// The listener.
    #[must_use]
    pub fn listener(&self) -> &L {
        &self.listener
    }

    /// The same, with its listener in the shape that `shape` makes of it.
    ///
    /// # Errors
    /// What `shape` says.
    pub fn try_map<M, E>(self, shape: impl FnOnce(L) -> Result<M, E>) -> Result<Listening<M>, E> {
        let Self { file, listener } = self;
        let listener = shape(listener)?;
        Ok(Listening { file, listener })
    }
}

/// Removes the files of all sockets of this process, which is about to end.
pub fn remove_all() {
    let files = FILES.lock().unwrap_or_else(PoisonError::into_inner);
    files.iter().filter_map(Weak::upgrade).for_each(|file| file.remove());
}

/// Listens at `path`, without blocking. The file has `mode`, less the umask, from the instant it exists; [`None`] is the system's 0777.
///
/// # Errors
/// See [`Refusal`].
pub fn bind(path: &Path, mode: Option<Mode>) -> Result<Listening, Refusal> {
    bind_after(path, mode, || std::thread::sleep(BETWEEN_LOOKS))
}

/// [`bind`], which waits for another to listen, or to go, by `wait`.
fn bind_after(path: &Path, mode: Option<Mode>, mut wait: impl FnMut()) -> Result<Listening, Refusal> {
    let length = path.as_os_str().len();
    if length > MAX_PATH {
        return Err(Refusal::TooLong { length });
    }
    let address = SocketAddrUnix::new(path)?;
    let fd = socket()?;
    if let Some(mode) = mode {
        // bind(2) gives the file the socket's own mode, less the umask (Linux net/unix/af_unix.c, unix_bind_bsd): set
        // beforehand, there is no instant at which others could connect.
        rustix::fs::fchmod(&fd, mode)?;
    }
    let mut looks = 1;
    // It follows no symbolic link in the last part, and replaces nothing.
    while let Err(error) = rustix::net::bind(&fd, &address) {
        match refusal(path, error) {
            Refusal::Stale if looks < LOOKS => wait(),
            refusal => return Err(refusal),
        }
        looks += 1;
    }
    let metadata = path.symlink_metadata().map_err(Refusal::Other)?;
    let file = Arc::new(SocketFile {
        path: path.to_owned(),
        identity: (metadata.dev(), metadata.ino()),
    });
    let mut files = FILES.lock().unwrap_or_else(PoisonError::into_inner);
    files.retain(|file| file.strong_count() > 0);
    files.push(Arc::downgrade(&file));
    drop(files);
    rustix::net::listen(&fd, BACKLOG)?;
    let listener = UnixListener::from(fd);
    Ok(Listening { file, listener })
}

/// Connects to `path`, without waiting: a socket whose queue is full says [`Errno::AGAIN`].
///
/// # Errors
/// Nobody listens there, or none can be connected now.
pub fn connect(path: &Path) -> rustix::io::Result<OwnedFd> {
    let stream = socket()?;
    rustix::net::connect(&stream, &SocketAddrUnix::new(path)?)?;
    Ok(stream)
}

fn socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Says why `bind` failed.
fn refusal(path: &Path, error: Errno) -> Refusal {
    match error {
        Errno::ADDRINUSE => match path.symlink_metadata() {
            Ok(metadata) if !metadata.file_type().is_socket() => Refusal::NotASocket,
            // Only to see whether somebody listens.
            _ => match connect(path) {
                // Where it has gone in between, it is bound at the next try.
                Err(Errno::CONNREFUSED | Errno::NOENT) => Refusal::Stale,
                _ => Refusal::InUse,
            },
        },
        Errno::NOENT => Refusal::NoDirectory(path.parent().unwrap_or(Path::new("/")).to_owned()),
        error => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::testing::TempFile;

    /// A path where nothing is, in a folder where much may be.
    fn path() -> PathBuf {
        let file = TempFile::new(&[]);
        let path = file.path().with_extension("socket");
        assert!(!path.exists());
        path
    }

    #[test]
    fn a_socket_has_its_mode_and_goes_with_its_file() {
        let path = path();
        let listening = bind(&path, Some(Mode::RUSR | Mode::WUSR)).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(UnixStream::connect(&path).is_ok());
        drop(listening);
        assert!(!path.exists());
    }

    #[test]
    fn one_that_does_not_listen_yet_is_not_called_left_behind() {
        let path = path();
        let fd = socket().unwrap();
        rustix::net::bind(&fd, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        let listens = || rustix::net::listen(&fd, BACKLOG).unwrap();
        assert!(matches!(bind_after(&path, None, listens), Err(Refusal::InUse)));
        drop(fd);
        let mut waits = 0;
        let refused = bind_after(&path, None, || waits += 1);
        assert!(matches!(refused, Err(Refusal::Stale)));
        assert_eq!(waits, LOOKS - 1);
        let goes = || std::fs::remove_file(&path).unwrap();
        assert!(bind_after(&path, None, goes).is_ok(), "its place is free");
    }

    #[test]
    fn a_file_that_has_taken_its_place_is_left_alone() {
        let path = path();
        let listening = bind(&path, None).unwrap();
        // Made before the other goes, so that it cannot get its inode number.
        let other = path.with_extension("other");
        std::fs::write(&other, "precious").unwrap();
        std::fs::rename(&other, &path).unwrap();
        drop(listening);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn the_longest_path_is_bound_and_one_byte_more_is_not() {
        let stem = path();
        let path = |length: usize| {
            let mut path = stem.clone().into_os_string();
            path.push("x".repeat(length - path.len()));
            PathBuf::from(path)
        };
        assert!(bind(&path(MAX_PATH), None).is_ok());
        assert!(matches!(
            bind(&path(MAX_PATH + 1), None),
            Err(Refusal::TooLong { length: 108 })
        ));
    }

    #[test]
    fn a_socket_whose_queue_is_full_is_in_use_not_waited_for() {
        let path = path();
        let fd = socket().unwrap();
        rustix::net::bind(&fd, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&fd, 0).unwrap();
        let _queued = UnixStream::connect(&path).unwrap();
        assert!(matches!(bind(&path, None), Err(Refusal::InUse)));
        std::fs::remove_file(&path).unwrap();
    }

    /// In a process of its own: other tests have sockets too.
    #[test]
    fn who_ends_without_dropping_its_files_removes_them_all_the_same() {
        const FILES: &str = "CHRONOVISOR_TEST_SOCKETS";
        if let Ok(stem) = std::env::var(FILES) {
            for number in 0..2 {
                std::mem::forget(bind(Path::new(&format!("{stem}{number}")), None).unwrap());
            }
            println!("bound: {}", Path::new(&format!("{stem}1")).exists());
            remove_all();
            return;
        }
        let stem = path();
        let itself = std::env::current_exe().unwrap();
        // The thread has that name only where there are several.
        let name = "unix_socket::tests::who_ends_without_dropping_its_files_removes_them_all_the_same";
        let output = std::process::Command::new(itself)
            .args(["--exact", name, "--nocapture"])
            .env(FILES, &stem)
            .output()
            .unwrap();
        assert!(
            String::from_utf8_lossy(&output.stdout).contains("bound: true"),
            "{output:?}"
        );
        for number in 0..2 {
            let path = PathBuf::from(format!("{}{number}", stem.display()));
            assert!(!path.exists(), "{}", path.display());
        }
    }
}
