//! Which microVMs a user means: the API sockets that patterns name, as the machine has them now.
//!
//! A pattern is a glob (`/run/vms/*.socket`), a directory, which stands for every socket in it, or one path. What bears a
//! pattern's very name comes before what it matches as a glob, so a path with a `[` in it can be given as it is. A `*` does
//! not match the dot of a hidden file, and `**` matches any depth of directories.
//!
//! Nothing is kept between two looks, and no socket is connected to: sockets appear and vanish with their microVMs, and the
//! file of one may outlive it. Whether anybody answers there is for the caller to find out.

use std::fs::{self, FileType};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use glob::MatchOptions;

/// Where microVMs are looked for unless told: the socket that this program serves by default, and the directory beside it
/// that is meant for those of a machine with several.
pub const DEFAULT_PATTERNS: [&str; 2] = ["/run/chronovisor.socket", "/run/chronovisor/*.socket"];

/// As a shell's globs.
const OPTIONS: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: true,
};

/// Names some sockets: see the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err(
                "give a socket's path, a directory of sockets, or a glob such as '/run/vms/*.socket'".to_owned(),
            );
        }
        match glob::Pattern::new(text) {
            Err(error) if !Path::new(text).exists() => Err(format!(
                "not a glob: {} at character {}; a path that has [, * or ? in it must exist",
                error.msg,
                error.pos + 1
            )),
            _ => Ok(Self(text.to_owned())),
        }
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The microVMs that some patterns name.
#[derive(Clone, Debug)]
pub struct Fleet(Vec<Pattern>);

/// What there is now.
#[derive(Debug, Default)]
pub struct Found {
    /// The sockets, in the order of their paths; one that several patterns or several names lead to, once.
    pub sockets: Vec<PathBuf>,
    /// The directories that could not be read. What is missing is no error: it may come yet.
    pub unreadable: Vec<(PathBuf, io::Error)>,
}

impl Fleet {
    /// Those of [`DEFAULT_PATTERNS`] where no pattern is given.
    #[must_use]
    pub fn new(patterns: Vec<Pattern>) -> Self {
        if patterns.is_empty() {
            return Self(DEFAULT_PATTERNS.map(|text| Pattern(text.to_owned())).into());
        }
        Self(patterns)
    }

    /// The patterns, to name them to a user.
    #[must_use]
    pub fn patterns(&self) -> &[Pattern] {
        &self.0
    }

    /// Looks for the sockets there are now. Reads directories and the metadata of what the patterns match: some
    /// microseconds a file, but not for an async thread where a file system may hang.
    #[must_use]
    pub fn find(&self) -> Found {
        let mut found = Found::default();
        let mut sockets = Vec::new();
        for Pattern(text) in &self.0 {
            find_one(text, &mut |path| sockets.extend(identify(path)), &mut found.unreadable);
        }
        sockets.sort_unstable();
        // The name that sorts first stays: that is the same one at each look.
        let mut seen = std::collections::BTreeSet::new();
        sockets.retain(|&(_, inode)| seen.insert(inode));
        found.sockets = sockets.into_iter().map(|(path, _)| path).collect();
        found
    }
}

/// Device and inode.
type Inode = (u64, u64);

/// A socket's path, and which file it is; `None` for anything else, and for what has just gone.
fn identify(path: PathBuf) -> Option<(PathBuf, Inode)> {
    let metadata = fs::metadata(&path).ok()?;
    let inode = (metadata.dev(), metadata.ino());
    metadata.file_type().is_socket().then_some((path, inode))
}

/// Hands what one pattern names to `take`, sockets among it.
fn find_one(text: &str, take: &mut dyn FnMut(PathBuf), unreadable: &mut Vec<(PathBuf, io::Error)>) {
    let path = Path::new(text);
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => {
            if let Err(error) = in_directory(path, take) {
                unreadable.push((path.to_owned(), error));
            }
        }
        Ok(_) => take(path.to_owned()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => unreadable.push((path.to_owned(), error)),
        // A literal path that was in nobody's way when it was parsed, and is gone, need not be a glob.
        Err(_) => {
            for entry in glob::glob_with(text, OPTIONS).into_iter().flatten() {
                match entry {
                    Ok(path) => take(path),
                    Err(error) => unreadable.push((error.path().to_owned(), error.into())),
                }
            }
        }
    }
}

/// The sockets in a directory, and what a link there may lead to.
fn in_directory(path: &Path, take: &mut dyn FnMut(PathBuf)) -> io::Result<()> {
    let may_be = |kind: FileType| kind.is_socket() || kind.is_symlink();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type().is_ok_and(may_be) {
            take(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::scratch::Scratch;

    fn fleet(patterns: &[PathBuf]) -> Fleet {
        let pattern = |path: &PathBuf| path.to_str().unwrap().parse().unwrap();
        Fleet::new(patterns.iter().map(pattern).collect())
    }

    /// The names of what was found.
    fn names(patterns: &[PathBuf]) -> Vec<String> {
        let found = fleet(patterns).find();
        assert!(found.unreadable.is_empty(), "{:?}", found.unreadable);
        let name = |path: PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
        found.sockets.into_iter().map(name).collect()
    }

    /// Sockets `b.socket`, `a.socket`, `.hidden.socket` and `sub/c.socket`, and a file `f.socket`.
    fn furnished() -> (Scratch, Vec<UnixListener>) {
        let scratch = Scratch::new();
        fs::create_dir(scratch.path("sub")).unwrap();
        fs::write(scratch.path("f.socket"), "").unwrap();
        let bind = |name| UnixListener::bind(scratch.path(name)).unwrap();
        let listeners = ["b.socket", "a.socket", ".hidden.socket", "sub/c.socket"].map(bind);
        (scratch, listeners.into())
    }

    #[test]
    fn a_glob_finds_sockets_only_in_order_and_as_a_shell_would() {
        let (scratch, _open) = furnished();
        assert_eq!(names(&[scratch.path("*.socket")]), ["a.socket", "b.socket"]);
        assert_eq!(names(&[scratch.path("[b-z].socket")]), ["b.socket"]);
        assert_eq!(names(&[scratch.path("*/*.socket")]), ["c.socket"]);
        assert_eq!(
            names(&[scratch.path("**/*.socket")]),
            ["a.socket", "b.socket", "c.socket"]
        );
    }

    #[test]
    fn a_directory_stands_for_every_socket_in_it() {
        let (scratch, _open) = furnished();
        assert_eq!(names(&[scratch.path("")]), [".hidden.socket", "a.socket", "b.socket"]);
        assert_eq!(names(&[scratch.path("sub")]), ["c.socket"]);
    }

    #[test]
    fn one_path_is_itself_even_where_it_looks_like_a_glob() {
        let (scratch, _open) = furnished();
        assert_eq!(names(&[scratch.path("a.socket")]), ["a.socket"]);
        assert!(names(&[scratch.path("f.socket")]).is_empty());
        for name in ["[a].socket", "open[.socket"] {
            let _listener = UnixListener::bind(scratch.path(name)).unwrap();
            assert_eq!(names(&[scratch.path(name)]), [name]);
        }
    }

    #[test]
    fn a_socket_that_several_patterns_or_names_lead_to_is_found_once() {
        let (scratch, _open) = furnished();
        symlink(scratch.path("a.socket"), scratch.path("linked.socket")).unwrap();
        let patterns = ["*.socket", "a.socket", "", "linked.socket"].map(|name| scratch.path(name));
        assert_eq!(names(&patterns), [".hidden.socket", "a.socket", "b.socket"]);
        assert_eq!(names(&[scratch.path("linked.socket")]), ["linked.socket"]);
    }

    #[test]
    fn each_look_finds_what_there_is_then() {
        let (scratch, _open) = furnished();
        let fleet = fleet(&[scratch.path("*.socket"), scratch.path("later/")]);
        let found = |fleet: &Fleet| fleet.find().sockets.len();
        assert_eq!(found(&fleet), 2);
        fs::create_dir(scratch.path("later")).unwrap();
        let _listener = UnixListener::bind(scratch.path("later/d")).unwrap();
        assert_eq!(found(&fleet), 3);
        fs::remove_file(scratch.path("a.socket")).unwrap();
        assert_eq!(found(&fleet), 2);
    }

    #[test]
    fn nothing_there_is_no_error_and_what_is_no_pattern_is_one() {
        let scratch = Scratch::new();
        assert!(names(&[scratch.path("none"), scratch.path("no/*.socket")]).is_empty());
        for (text, says) in [
            ("", "directory"),
            ("/run/a[b", "character 7"),
            ("/run/***", "not a glob"),
        ] {
            let said = text.parse::<Pattern>().unwrap_err();
            assert!(said.contains(says), "{text}: {said}");
        }
    }

    #[test]
    fn no_pattern_means_the_places_where_this_program_serves() {
        let defaults = Fleet::new(Vec::new());
        assert_eq!(defaults.patterns().len(), DEFAULT_PATTERNS.len());
        assert!(DEFAULT_PATTERNS.contains(&crate::cli::DEFAULT_SOCKET));
        for text in DEFAULT_PATTERNS {
            assert_eq!(text.parse::<Pattern>().unwrap().to_string(), text);
        }
    }
}
