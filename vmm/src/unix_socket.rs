//! Unix sockets that this process listens on, and their files.
//!
//! An existing file is never replaced, but for the socket of a process that has ended, which a kill -9 leaves behind:
//! of the same user, with nobody listening. A [`Refusal`] says what else it is. One that has been bound and does not
//! listen yet refuses connections as one left behind does: only one that goes on refusing them is called that. Two that
//! start at once would each take the path from the other: who replaces a file holds the directory's lock (flock(2))
//! from its last look at it until its own listens, and removes only the very file that it has looked at all the time.
//! Where that lock cannot be had nothing is replaced.
//!
//! What is removed is looked at, and removed, in a directory that is kept open (a [`Place`]), so that both are of one
//! file even where the path has come to lead elsewhere.
//!
//! A [`Listening`] removes the file before it closes the socket: there is no instant at which its file is one left
//! behind.
//!
//! A file goes with its [`SocketFile`], and with the process where that ends by [`remove_all`]: on a way out that waits
//! for nobody, whoever owns the file may not get to drop it.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, Stat, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::geteuid;

/// Longest path of a unix socket, in bytes: `sun_path` holds 108, the last one a NUL (unix(7)).
pub const MAX_PATH: usize = 107;

/// Connections that may wait to be accepted: as many as std's listeners let.
const BACKLOG: i32 = 128;

/// How often a socket that nobody listens on is looked at before it is one left behind, and how long between two looks.
/// From bind(2) to listen(2) are some microseconds, unless its process is not run.
const LOOKS: usize = 20;
const BETWEEN_LOOKS: Duration = Duration::from_millis(5);

/// The files of all sockets of this process; none once it is about to end, and then there are to be no more. Held while
/// one is made.
static FILES: Mutex<Option<Vec<Weak<SocketFile>>>> = Mutex::new(Some(Vec::new()));

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
    /// A socket nobody listens on, which is not ours to replace: another user's, or its directory cannot be locked.
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

/// A name in a directory that is kept open: of that directory, whatever its path comes to mean.
#[derive(Debug)]
struct Place {
    directory: OwnedFd,
    name: OsString,
}

impl Place {
    /// The one that `path` leads to now.
    fn of(path: &Path) -> rustix::io::Result<Self> {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        // A directory need not be readable for a file to be made in it.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            directory: rustix::fs::open(parent.unwrap_or(Path::new(".")), flags, Mode::empty())?,
            name: path.file_name().unwrap_or_default().to_owned(),
        })
    }

    /// What is there: the link, where it is one.
    fn look(&self) -> rustix::io::Result<Stat> {
        rustix::fs::statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW)
    }

    fn remove(&self) -> rustix::io::Result<()> {
        rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty())
    }

    /// The lock of the directory, for as long as the descriptor lives; none where it cannot be had. Others of ours hold
    /// it for an instant; who keeps it for good (it keeps systemd-tmpfiles from cleaning up) must not keep us.
    fn lock(&self) -> Option<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(&self.directory, ".", flags, Mode::empty()).ok()?;
        for _ in 0..LOOKS {
            match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Some(directory),
                Err(Errno::WOULDBLOCK | Errno::INTR) => std::thread::sleep(BETWEEN_LOOKS),
                Err(_) => return None,
            }
        }
        None
    }
}

/// Which file it is of all that there have been: another may get the inode number of one that is gone, but it is made
/// later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    /// Seconds and nanoseconds.
    changed: (i64, i64),
}

impl Identity {
    fn of(stat: &Stat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            changed: (stat.st_ctime, stat.st_ctime_nsec.cast_signed()),
        }
    }
}

fn is_socket(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Socket
}

/// A socket's file. Dropping it removes it.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    place: Arc<Place>,
    /// Device and inode: its own for as long as its socket is open, and its user may change its mode.
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
        let ours = |stat: Stat| (stat.st_dev, stat.st_ino) == self.identity;
        if self.place.look().is_ok_and(ours) {
            // Nothing is left to be done about a failure: its owner is on the way out.
            let _ = self.place.remove();
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

/// Removes the files of all sockets of this process, which is about to end: another thread that would make one is
/// refused.
pub fn remove_all() {
    let mut files = FILES.lock().unwrap_or_else(PoisonError::into_inner);
    let removed = files.take().into_iter().flatten();
    removed.filter_map(|file| file.upgrade()).for_each(|file| file.remove());
}

/// Listens at `path`, without blocking. The file has `mode`, less the umask, from the instant it exists; [`None`] is
/// the system's 0777.
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
    let place = Arc::new(Place::of(path).map_err(|error| refusal(path, error))?);
    let fd = socket()?;
    if let Some(mode) = mode {
        // bind(2) gives the file the socket's own mode, less the umask (Linux net/unix/af_unix.c, unix_bind_bsd): set
        // beforehand, there is no instant at which others could connect.
        rustix::fs::fchmod(&fd, mode)?;
    }
    // From its last look at a file that is to be replaced until this one listens.
    let mut locked = None;
    let (mut left, mut looks) = (None, 0);
    let mut tries = 0..4 * LOOKS;
    // It follows no symbolic link in the last part.
    let file = loop {
        let refused = match own(path, &place, || rustix::net::bind(&fd, &address))? {
            Ok(file) => break file,
            Err(error) => refusal(path, error),
        };
        if !matches!(refused, Refusal::Stale) || tries.next().is_none() {
            return Err(refused);
        }
        // By its path, as it was bound and connected to.
        let Ok(now) = rustix::fs::lstat(path).map(|stat| Identity::of(&stat)) else {
            // It has gone.
            continue;
        };
        if left != Some(now) {
            (left, looks) = (Some(now), 0);
        }
        looks += 1;
        if looks < LOOKS {
            wait();
        } else if locked.is_some() {
            remove_stale(path, &place, now)?;
        } else {
            locked = place.lock();
            if locked.is_none() {
                return Err(Refusal::Stale);
            }
        }
    };
    rustix::net::listen(&fd, BACKLOG)?;
    drop(locked);
    let listener = UnixListener::from(fd);
    Ok(Listening { file, listener })
}

/// Makes a socket's file at `path` by `bind`, and has it removed with the process from then on.
fn own(
    path: &Path,
    place: &Arc<Place>,
    bind: impl FnOnce() -> rustix::io::Result<()>,
) -> Result<rustix::io::Result<Arc<SocketFile>>, Refusal> {
    let mut files = FILES.lock().unwrap_or_else(PoisonError::into_inner);
    let ending = || Refusal::Other(io::Error::other("this process is about to end"));
    let files = files.as_mut().ok_or_else(ending)?;
    if let Err(error) = bind() {
        return Ok(Err(error));
    }
    let stat = place.look().inspect_err(|_| {
        // Nobody else will. There is nothing to be done about another failure.
        let _ = place.remove();
    })?;
    if !is_socket(&stat) {
        return Err(Refusal::Other(io::Error::other("another file took its place at once")));
    }
    let file = Arc::new(SocketFile {
        path: path.to_owned(),
        place: Arc::clone(place),
        identity: (stat.st_dev, stat.st_ino),
    });
    files.retain(|file| file.strong_count() > 0);
    files.push(Arc::downgrade(&file));
    Ok(Ok(file))
}

/// Removes the socket at `place`, which nobody listens on, if it is one of this user's, and `left`, the one that has
/// been looked at: another is left alone, to be looked at in its turn.
fn remove_stale(path: &Path, place: &Place, left: Identity) -> Result<(), Refusal> {
    let stat = match place.look() {
        Ok(stat) if Identity::of(&stat) == left => stat,
        Ok(_) | Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    if !is_socket(&stat) || stat.st_uid != geteuid().as_raw() {
        return Err(Refusal::Stale);
    }
    match place.remove() {
        Ok(()) => tracing::info!(
            "{}: left behind by a process that has ended, and replaced",
            path.display()
        ),
        Err(Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(())
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
        Errno::ADDRINUSE => match rustix::fs::lstat(path) {
            Ok(stat) if !is_socket(&stat) => Refusal::NotASocket,
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

    /// A path in a folder of its own.
    fn lonely() -> PathBuf {
        let directory = path();
        std::fs::create_dir(&directory).unwrap();
        directory.join("s")
    }

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
        let path = lonely();
        let fd = socket().unwrap();
        rustix::net::bind(&fd, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        let listens = || rustix::net::listen(&fd, BACKLOG).unwrap();
        assert!(matches!(bind_after(&path, None, listens), Err(Refusal::InUse)));
        drop(fd);
        let mut waits = 0;
        let bound = bind_after(&path, None, || waits += 1);
        assert!(bound.is_ok(), "one left behind is replaced");
        assert_eq!(waits, LOOKS - 1);
        drop(bound);
        leave_behind(&path);
        let goes = || std::fs::remove_file(&path).unwrap();
        assert!(bind_after(&path, None, goes).is_ok(), "its place is free");
    }

    /// A socket of a process that has ended.
    fn leave_behind(path: &Path) {
        rustix::net::bind(socket().unwrap(), &SocketAddrUnix::new(path).unwrap()).unwrap();
    }

    #[test]
    fn of_many_that_find_one_left_behind_one_has_it() {
        for _ in 0..10 {
            let path = lonely();
            leave_behind(&path);
            let start = std::sync::Barrier::new(8);
            let binds = || {
                start.wait();
                bind(&path, None)
            };
            let results: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(binds)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
            let refused = results.iter().filter_map(|result| result.as_ref().err());
            assert!(refused.into_iter().all(|refusal| matches!(refusal, Refusal::InUse)));
            assert!(UnixStream::connect(&path).is_ok(), "whoever has it is heard");
        }
    }

    #[test]
    fn one_left_behind_is_not_replaced_where_others_may_be_at_it() {
        let path = lonely();
        leave_behind(&path);
        let held = Place::of(&path).unwrap().lock().unwrap();
        assert!(matches!(bind_after(&path, None, || ()), Err(Refusal::Stale)));
        assert!(path.exists());
        drop(held);
        drop(bind(&path, None).unwrap());
        std::fs::remove_dir(path.parent().unwrap()).unwrap();
    }

    #[test]
    fn what_has_taken_the_place_of_one_left_behind_is_left_alone() {
        let path = lonely();
        let looked_at = || Identity::of(&rustix::fs::lstat(&path).unwrap());
        leave_behind(&path);
        let (place, left) = (Place::of(&path).unwrap(), looked_at());
        // Made before the other goes, so that it cannot get its inode number.
        let other = path.with_extension("other");
        leave_behind(&other);
        std::fs::rename(&other, &path).unwrap();
        remove_stale(&path, &place, left).unwrap();
        assert!(
            path.exists(),
            "a socket nobody listens on either, and not the one looked at"
        );

        // The path leads to another directory: what has the name in the locked one is not what was looked at.
        let (directory, moved) = (path.parent().unwrap(), path.with_file_name("").with_extension("moved"));
        std::fs::rename(directory, &moved).unwrap();
        std::fs::create_dir(directory).unwrap();
        leave_behind(&path);
        remove_stale(&path, &place, looked_at()).unwrap();
        assert!(path.exists() && moved.join("s").exists());

        let place = Place::of(&path).unwrap();
        remove_stale(&path, &place, looked_at()).unwrap();
        assert!(!path.exists(), "the very one");
        std::fs::remove_dir(directory).unwrap();
        std::fs::remove_dir_all(moved).unwrap();
    }

    #[test]
    fn its_file_goes_from_the_directory_it_was_made_in_and_from_no_other() {
        let path = lonely();
        let listening = bind(&path, None).unwrap();
        let (directory, moved) = (path.parent().unwrap(), path.with_file_name("").with_extension("moved"));
        std::fs::rename(directory, &moved).unwrap();
        std::fs::create_dir(directory).unwrap();
        std::fs::hard_link(moved.join("s"), &path).unwrap();
        drop(listening);
        assert!(path.exists(), "of the same inode, where it was not made");
        assert!(!moved.join("s").exists());
        std::fs::remove_dir_all(directory).unwrap();
        std::fs::remove_dir(moved).unwrap();
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
