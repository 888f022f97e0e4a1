//! The two files of `/proc` that tell of the whole host, opened by name; or handed over, already open, to a process that has no such
//! names: in a jail `/proc` is of that process only, and `/proc/timer_list` is root's.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SystemFile {
    /// `/proc/interrupts`
    Interrupts,
    /// `/proc/timer_list`
    TimerList,
}

/// Those that were handed over.
static INTERRUPTS: OnceLock<File> = OnceLock::new();
static TIMER_LIST: OnceLock<File> = OnceLock::new();

impl SystemFile {
    /// Its name.
    #[must_use]
    pub const fn path(self) -> &'static str {
        match self {
            Self::Interrupts => "/proc/interrupts",
            Self::TimerList => "/proc/timer_list",
        }
    }

    const fn kept(self) -> &'static OnceLock<File> {
        match self {
            Self::Interrupts => &INTERRUPTS,
            Self::TimerList => &TIMER_LIST,
        }
    }

    /// From now on it is `file`, for as long as this process lives. The first one stays.
    pub fn hand_over(self, file: File) {
        let _ = self.kept().set(file);
    }

    /// To be read from its beginning.
    ///
    /// # Errors
    /// It was not handed over, and cannot be opened.
    pub fn open(self) -> io::Result<impl Read> {
        Ok(match self.kept().get() {
            Some(file) => Open::Kept { file, at: 0 },
            None => Open::Named(File::open(self.path())?),
        })
    }

    /// All of it.
    ///
    /// # Errors
    /// As [`SystemFile::open`], or reading fails.
    pub fn read(self) -> io::Result<Vec<u8>> {
        let mut text = Vec::new();
        self.open()?.read_to_end(&mut text)?;
        Ok(text)
    }
}

/// The kernel writes such a file anew for each reader that begins at its beginning: one descriptor does for all of them.
enum Open {
    Kept { file: &'static File, at: u64 },
    Named(File),
}

impl Read for Open {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Named(file) => file.read(buffer),
            Self::Kept { file, at } => {
                let n = file.read_at(buffer, *at)?;
                *at += n as u64;
                Ok(n)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_handed_over_is_read_from_its_beginning_each_time() {
        let file = File::open("/proc/interrupts").expect("procfs");
        SystemFile::Interrupts.hand_over(file);
        let [first, second] = [(); 2].map(|()| SystemFile::Interrupts.read().expect("it is open"));
        // The CPUs' names: the counts go on.
        let head = |text: &[u8]| text.split(|&b| b == b'\n').next().map(<[u8]>::to_vec);
        assert!(first.len() > 100 && head(&first) == head(&second));
        let lines = |text: &[u8]| text.iter().filter(|&&b| b == b'\n').count();
        assert_eq!(lines(&first), lines(&second), "and to its end");
    }
}
