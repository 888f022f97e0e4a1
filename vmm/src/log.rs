//! `/logger`: who writes the log is the program's to know; here is only the way to it, and to files that grow line by line.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::config::Logger;

/// Why the log cannot be written as asked. Firecracker's words.
#[derive(Debug, thiserror::Error)]
#[error("Failed to open target file: {0}")]
pub struct LogError(#[from] pub io::Error);

/// Opens a file or fifo that output is added to: the log, metrics, the serial port's.
///
/// # Errors
/// What the system said.
pub fn append_to(path: &Path) -> io::Result<File> {
    // A fifo opened for reading too does not wait for its reader; O_NONBLOCK: a full one loses output, not time.
    OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
}

type Configure = dyn Fn(&Logger) -> Result<(), LogError> + Send;

/// What turns a [`Logger`] into a log.
pub struct LogSink(Box<Configure>);

impl LogSink {
    /// `configure` is called on the VMM thread, for each [`crate::Action::PutLogger`].
    pub fn new(configure: impl Fn(&Logger) -> Result<(), LogError> + Send + 'static) -> Self {
        Self(Box::new(configure))
    }

    pub(crate) fn configure(&self, logger: &Logger) -> Result<(), LogError> {
        (self.0)(logger)
    }
}

impl Default for LogSink {
    /// Of a program whose log cannot be configured.
    fn default() -> Self {
        Self::new(|_| Ok(()))
    }
}

impl fmt::Debug for LogSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LogSink")
    }
}
