//! What has been made on the host so far, and how it goes again: newest first, by the directories it was made in,
//! whatever has become of the paths that led to them.
//!
//! Where a microVM has had a jail's directory before, its user may have put anything there. So nothing here follows a
//! symbolic link: a path is walked part by part, and a part that is no directory ends the walk.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, fchmod, mkdirat, openat, renameat, statat, unlinkat};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, capabilities, move_into_link_name_space, set_capabilities};

use super::error::JailError;

/// One thing to undo.
#[derive(Debug)]
enum Deed {
    /// Remove what has this name in this directory.
    Remove {
        directory: OwnedFd,
        name: OsString,
        is_directory: bool,
    },
    /// Go back to the cgroup whose list of processes this is.
    Return(File),
}

/// See the module. What is in it is undone when it is dropped.
#[derive(Debug, Default)]
pub struct Undo {
    deeds: Vec<Deed>,
    /// The host's mount namespace, once it has been left.
    host: Option<OwnedFd>,
}

impl Undo {
    /// A directory `name` was made in `directory`.
    pub fn directory(&mut self, directory: &impl AsFd, name: &OsStr) -> Result<(), JailError> {
        self.made(directory, name, true)
    }

    /// A file `name` was made in `directory`.
    pub fn file(&mut self, directory: &impl AsFd, name: &OsStr) -> Result<(), JailError> {
        self.made(directory, name, false)
    }

    fn made(&mut self, directory: &impl AsFd, name: &OsStr, is_directory: bool) -> Result<(), JailError> {
        let directory = directory.as_fd().try_clone_to_owned();
        self.deeds.push(Deed::Remove {
            directory: directory.map_err(JailError::io("remember what it made"))?,
            name: name.to_owned(),
            is_directory,
        });
        Ok(())
    }

    /// This process leaves the cgroup that `home` is the list of processes of.
    pub fn moved(&mut self, home: File) {
        self.deeds.push(Deed::Return(home));
    }

    /// This process leaves `host`, its mount namespace.
    pub fn left(&mut self, host: OwnedFd) {
        self.host = Some(host);
    }

    /// Nothing is to be undone by this process: it was another's.
    pub fn forget(&mut self) {
        self.deeds.clear();
        self.host = None;
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if self.deeds.is_empty() && self.host.is_none() {
            return;
        }
        // Those that were laid down for the program's sake are still at hand (see `process::become_user`).
        if let Ok(mut sets) = capabilities(None) {
            sets.effective = sets.permitted;
            let _ = set_capabilities(None, sets);
        }
        // A directory that something is mounted on can be removed from elsewhere only.
        if let Some(host) = self.host.take() {
            let _ = move_into_link_name_space(host.as_fd(), Some(LinkNameSpaceType::Mount));
        }
        for deed in self.deeds.drain(..).rev() {
            // Another jail may be in a directory or cgroup by now: then it stays.
            match deed {
                Deed::Remove {
                    directory,
                    name,
                    is_directory,
                } => {
                    let flags = if is_directory {
                        AtFlags::REMOVEDIR
                    } else {
                        AtFlags::empty()
                    };
                    let _ = unlinkat(&directory, &name, flags);
                }
                Deed::Return(mut home) => {
                    let _ = home.write_all(b"0");
                }
            }
        }
    }
}

/// Opens the directory `path`, whose last part is no symbolic link.
pub fn open_real(path: &Path) -> Result<OwnedFd, JailError> {
    openat(CWD, path, OPEN, Mode::empty()).map_err(JailError::step(format!("open {}", path.display())))
}

const OPEN: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);
/// Of the directories that lead somewhere: the jail's user goes through, and owns none.
const THROUGH: Mode = Mode::from_raw_mode(0o755);

/// Opens the directory `path` below `from`, and makes what is missing of it.
pub fn directories(from: &impl AsFd, path: &Path, undo: &mut Undo) -> Result<OwnedFd, JailError> {
    directories_with(from, path, THROUGH, undo)
}

/// Likewise, and those made have `mode`, from their first instant.
pub fn directories_with(from: &impl AsFd, path: &Path, mode: Mode, undo: &mut Undo) -> Result<OwnedFd, JailError> {
    let here = from.as_fd().try_clone_to_owned();
    let mut here = here.map_err(JailError::io("use a directory"))?;
    for part in path {
        match mkdirat(&here, part, mode) {
            Ok(()) => {
                undo.directory(&here, part)?;
                let made = openat(&here, part, OPEN, Mode::empty());
                let made = made.map_err(JailError::step(format!("open {}, just made", path.display())))?;
                // Whatever the umask takes away.
                fchmod(&made, mode).map_err(JailError::step(format!("set the mode of {}", path.display())))?;
                here = made;
            }
            Err(Errno::EXIST) => {
                let what = format!(
                    "use {}, of which each part must be a directory, no symbolic link",
                    path.display()
                );
                here = openat(&here, part, OPEN, Mode::empty()).map_err(JailError::step(what))?;
            }
            Err(error) => return Err(JailError::step(format!("make the directory {}", path.display()))(error)),
        }
    }
    Ok(here)
}

/// Puts what `content` writes into the file `path` below `from`, with `mode`, in place of what has that name.
pub fn file(
    from: &impl AsFd,
    path: &Path,
    mode: Mode,
    undo: &mut Undo,
    content: impl FnOnce(&mut File) -> io::Result<()>,
) -> Result<(), JailError> {
    let what = || format!("write {}", Path::new("/").join(path).display());
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(JailError::step(what())(Errno::INVAL));
    };
    let directory = directories(from, parent, undo)?;
    let mut new = OsString::from(".new-");
    new.push(name);
    // One that was killed may have left it.
    let _ = unlinkat(&directory, &new, AtFlags::empty());
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let there = |name: &OsStr| statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW);
    let was_there = there(name).is_ok();
    for name in [&new, name] {
        if there(name).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode).is_dir()) {
            return Err(JailError::InTheWay(parent.join(name)));
        }
    }
    let made = openat(&directory, &new, flags, Mode::RUSR).map_err(JailError::step(what()))?;
    let written = fchmod(&made, mode)
        .map_err(io::Error::from)
        .and_then(|()| content(&mut File::from(made)))
        .and_then(|()| Ok(renameat(&directory, &new, &directory, name)?));
    if let Err(source) = written {
        let _ = unlinkat(&directory, &new, AtFlags::empty());
        return Err(JailError::io(what())(source));
    }
    if was_there { Ok(()) } else { undo.file(&directory, name) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn what_was_made_goes_again_and_what_was_there_stays() {
        let scratch = Scratch::new();
        let base = open_real(&scratch.path("")).unwrap();
        std::fs::create_dir(scratch.path("there")).unwrap();
        let mut undo = Undo::default();
        directories(&base, Path::new("there/a/b"), &mut undo).unwrap();
        file(&base, Path::new("there/a/c/file"), Mode::RUSR, &mut undo, |file| {
            file.write_all(b"x")
        })
        .unwrap();
        assert_eq!(std::fs::read(scratch.path("there/a/c/file")).unwrap(), b"x");
        drop(undo);
        let left: Vec<_> = std::fs::read_dir(scratch.path("there")).unwrap().collect();
        assert!(left.is_empty() && scratch.path("there").exists(), "{left:?}");
    }

    #[test]
    fn what_is_kept_stays() {
        let scratch = Scratch::new();
        let mut undo = Undo::default();
        directories(&open_real(&scratch.path("")).unwrap(), Path::new("a"), &mut undo).unwrap();
        undo.forget();
        drop(undo);
        assert!(scratch.path("a").exists());
    }

    #[test]
    fn no_symbolic_link_is_followed() {
        let (scratch, elsewhere) = (Scratch::new(), Scratch::new());
        symlink(elsewhere.path(""), scratch.path("link")).unwrap();
        let base = open_real(&scratch.path("")).unwrap();
        let mut undo = Undo::default();
        let said = directories(&base, Path::new("link/x"), &mut undo)
            .unwrap_err()
            .to_string();
        assert!(said.contains("link/x") && said.contains("no symbolic link"), "{said}");
        let precious = elsewhere.path("precious");
        std::fs::write(&precious, "kept").unwrap();
        symlink(&precious, scratch.path("file")).unwrap();
        file(&base, Path::new("file"), Mode::RUSR | Mode::XUSR, &mut undo, |file| {
            file.write_all(b"ours")
        })
        .unwrap();
        assert_eq!(std::fs::read(&precious).unwrap(), b"kept");
        let ours = std::fs::symlink_metadata(scratch.path("file")).unwrap();
        assert!(ours.is_file() && ours.permissions().mode() & 0o777 == 0o500);
        assert_eq!(std::fs::read_dir(elsewhere.path("")).unwrap().count(), 1);
    }

    #[test]
    fn a_directory_where_a_file_goes_is_named() {
        let scratch = Scratch::new();
        let base = open_real(&scratch.path("")).unwrap();
        for name in [".new-file", "file"] {
            let left = scratch.path("a").join(name);
            std::fs::create_dir_all(left.join("full")).unwrap();
            let refused = file(&base, Path::new("a/file"), Mode::RUSR, &mut Undo::default(), |_| Ok(()));
            let said = refused.unwrap_err().below(&scratch.path("")).to_string();
            assert!(
                said.starts_with(&*left.to_string_lossy()) && said.contains("remove it"),
                "{said}"
            );
            std::fs::remove_dir_all(left).unwrap();
        }
    }

    #[test]
    fn a_file_that_cannot_be_written_is_not_there() {
        let scratch = Scratch::new();
        let base = open_real(&scratch.path("")).unwrap();
        let fails = |_: &mut File| Err(io::ErrorKind::StorageFull.into());
        assert!(file(&base, Path::new("file"), Mode::RUSR, &mut Undo::default(), fails).is_err());
        assert_eq!(std::fs::read_dir(scratch.path("")).unwrap().count(), 0);
    }
}
