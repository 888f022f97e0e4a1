//! The program in its jail: a copy, as Firecracker's jailer makes it, for two microVMs are not to share the pages of
//! one file, by whose being in a cache or not one could tell what the other does. With it, where it is linked
//! dynamically, go copies of its libraries.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;

use super::error::JailError;
use super::undo::{self, Undo};

/// Names libraries for the loader to load before all others.
const PRELOAD: &str = "etc/ld.so.preload";

/// What is to be copied.
#[derive(Debug)]
pub struct Program {
    /// Each file, opened, and where in the jail it goes: the program's own first.
    files: Vec<(File, PathBuf)>,
    /// Where its libraries are in the jail.
    pub search_path: OsString,
}

impl Program {
    /// Opens `path`, which is to be called `name` there, and its libraries.
    pub fn open(path: &Path, name: &OsStr) -> Result<Self, JailError> {
        let open = |path: &Path| File::open(path).map_err(JailError::io(format!("open {}", path.display())));
        let program = open(path)?;
        let loader = interpreter(&program).map_err(JailError::io(format!("read {}", path.display())))?;
        let mut files = vec![(program, PathBuf::from(name))];
        let mut folders: Vec<PathBuf> = Vec::new();
        if let Some(loader) = loader {
            if !is_this_program(&files[0].0) {
                return Err(JailError::Dynamic(path.to_owned()));
            }
            let maps = fs::read("/proc/self/maps").map_err(JailError::io("read /proc/self/maps"))?;
            let itself = loader.canonicalize().unwrap_or_default();
            for library in libraries(&maps).into_iter().filter(|library| *library != itself) {
                let folder = library.parent().unwrap_or(Path::new("/")).to_owned();
                if !folders.contains(&folder) {
                    folders.push(folder);
                }
                files.push((open(&library)?, below_root(&library)));
            }
            files.push((open(&loader)?, below_root(&loader)));
        }
        Ok(Self {
            files,
            search_path: folders
                .iter()
                .map(|folder| folder.as_os_str())
                .collect::<Vec<_>>()
                .join(OsStr::new(":")),
        })
    }

    /// Copies them to below `root`.
    ///
    /// Which is this process's root by now: a path in there ends in there, as for the loader.
    pub fn install(self, root: &impl AsFd, undo: &mut Undo) -> Result<(), JailError> {
        // There is no preloading for a static one (ld.so(8)).
        let is_dynamic = self.files.len() > 1;
        if is_dynamic && fs::symlink_metadata(Path::new("/").join(PRELOAD)).is_ok() {
            return Err(JailError::Preload(PRELOAD.into()));
        }
        // To be read and executed by whoever is in there.
        let mode = Mode::from_raw_mode(0o555);
        for (mut from, to) in self.files {
            undo::file(root, &to, mode, undo, |file| io::copy(&mut from, file).map(drop))?;
        }
        Ok(())
    }
}

fn below_root(path: &Path) -> PathBuf {
    path.strip_prefix("/").unwrap_or(path).to_owned()
}

fn is_this_program(file: &File) -> bool {
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    match (file.metadata(), fs::metadata("/proc/self/exe")) {
        (Ok(file), Ok(this)) => identity(file) == identity(this),
        _ => false,
    }
}

/// The libraries that a process has mapped, of its `/proc/PID/maps`.
fn libraries(maps: &[u8]) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for line in maps.split(|&byte| byte == b'\n') {
        let Some(at) = line.iter().position(|&byte| byte == b'/') else {
            continue;
        };
        let path = Path::new(OsStr::from_bytes(&line[at..]));
        let name = path.file_name().unwrap_or_default().as_bytes();
        let shared = name.windows(3).any(|part| part == b".so");
        if shared && !found.iter().any(|other| other == path) {
            found.push(path.to_owned());
        }
    }
    found
}

/// Which loader an ELF program asks for, if it is linked dynamically (elf(5)): of the 64-bit, little-endian kind. What
/// is no such program is the kernel's to refuse.
fn interpreter(file: &File) -> io::Result<Option<PathBuf>> {
    const PT_INTERP: u32 = 3;
    let mut header = [0; 64];
    if let Err(error) = file.read_exact_at(&mut header, 0) {
        let short = error.kind() == io::ErrorKind::UnexpectedEof;
        return if short { Ok(None) } else { Err(error) };
    }
    if !header.starts_with(b"\x7fELF\x02\x01") {
        return Ok(None);
    }
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0_u64, |sum, &byte| sum << 8 | u64::from(byte));
    let (table, size, count) = (
        number(&header[32..40]),
        number(&header[54..56]),
        number(&header[56..58]),
    );
    for index in 0..count {
        let mut entry = [0; 56];
        let Some(at) = table.checked_add(index * size) else {
            return Ok(None);
        };
        file.read_exact_at(&mut entry, at)?;
        if number(&entry[..4]) == u64::from(PT_INTERP) {
            let (at, length) = (number(&entry[8..16]), number(&entry[32..40]));
            // PATH_MAX, and no more.
            let mut path = vec![0; usize::try_from(length).unwrap_or(usize::MAX).min(4096)];
            file.read_exact_at(&mut path, at)?;
            path.retain(|&byte| byte != 0);
            return Ok(Some(PathBuf::from(OsString::from(OsStr::from_bytes(&path)))));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn libraries_are_told_from_other_mappings() {
        let maps = b"5-6 r--p 0 08:01 1 /usr/bin/chronovisor\n\
            7-8 r-xp 0 08:01 2    /usr/lib/x86_64-linux-gnu/libc.so.6\n\
            8-9 rw-p 0 08:01 2    /usr/lib/x86_64-linux-gnu/libc.so.6\n\
            9-a r-xp 0 08:01 3    /lib64/ld-linux-x86-64.so.2\n\
            b-c rw-p 0 00:00 0    [stack]\n";
        let found: Vec<_> = libraries(maps).iter().map(|path| path.display().to_string()).collect();
        assert_eq!(
            found,
            ["/usr/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]
        );
    }

    #[test]
    fn a_dynamic_program_names_its_loader_and_what_is_no_program_none() {
        let shell = File::open("/bin/sh").unwrap();
        // busybox is static.
        if let Some(loader) = interpreter(&shell).unwrap() {
            assert!(loader.is_absolute() && loader.exists(), "{}", loader.display());
        }
        let scratch = Scratch::new();
        for (name, content) in [("empty", &b""[..]), ("text", &[b'x'; 100]), ("cut", b"\x7fELF\x02\x01")] {
            std::fs::write(scratch.path(name), content).unwrap();
            let file = File::open(scratch.path(name)).unwrap();
            assert_eq!(interpreter(&file).unwrap(), None, "{name}");
        }
    }
}
