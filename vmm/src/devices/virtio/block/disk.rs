//! The file behind a disk: opened, locked, measured.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use rustix::fs::{FlockOperation, OFlags, SeekFrom, fcntl_setfl, flock, seek};
use rustix::io::Errno;

use super::{BlockError, SECTOR};

/// The file behind a disk.
#[derive(Debug)]
pub(super) struct Disk {
    pub file: Arc<File>,
    pub sectors: u64,
    /// What the driver gets for its serial number.
    pub id: [u8; 20],
}

impl Disk {
    /// Opens the file at `path` for `drive`, which has it to itself if it may write.
    ///
    /// # Errors
    /// See [`BlockError`].
    pub fn open(drive: &str, path: &Path, read_only: bool) -> Result<Self, BlockError> {
        let cannot = |source| BlockError::Open {
            drive: drive.into(),
            path: path.into(),
            source,
        };
        // Not blocking: opening a named pipe would wait for its other end.
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(cannot)?;
        let metadata = file.metadata().map_err(cannot)?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(BlockError::NotADisk {
                drive: drive.into(),
                path: path.into(),
            });
        }
        // io_uring would take it for a wish to have EAGAIN rather than to wait for the disk.
        fcntl_setfl(&file, OFlags::empty()).map_err(|e| cannot(e.into()))?;
        if !lock(&file, read_only) {
            return Err(BlockError::InUse {
                drive: drive.into(),
                path: path.into(),
            });
        }
        let unmeasured = Self {
            id: id(metadata.dev(), metadata.rdev(), metadata.ino()),
            sectors: 0,
            file: Arc::new(file),
        };
        unmeasured.measured(drive, path)
    }

    /// The same file, with the length that it has now.
    ///
    /// # Errors
    /// It has less than a sector.
    pub fn measured(&self, drive: &str, path: &Path) -> Result<Self, BlockError> {
        // A block device has its length where its end is.
        let len = seek(&self.file, SeekFrom::End(0)).map_err(|e| BlockError::Open {
            drive: drive.into(),
            path: path.into(),
            source: e.into(),
        })?;
        if len < SECTOR {
            return Err(BlockError::TooSmall {
                drive: drive.into(),
                path: path.into(),
                len,
            });
        }
        if len % SECTOR != 0 {
            tracing::warn!(
                "drive {drive}: the last {} bytes of {} make no sector: the guest does not see them",
                len % SECTOR,
                path.display()
            );
        }
        Ok(Self {
            file: Arc::clone(&self.file),
            sectors: len / SECTOR,
            id: self.id,
        })
    }

    /// Makes safe what was written (`fdatasync`); waits for `patience` at most.
    ///
    /// # Errors
    /// What the system said, or that it did not say anything in time.
    pub fn sync(&self, patience: Duration) -> io::Result<()> {
        let file = Arc::clone(&self.file);
        let (tell, told) = sync_channel(1);
        // The call waits for the disk however long that takes: not on a thread of which others want something.
        let role = seccomp::role();
        vcpu::thread("sync").spawn(move || {
            seccomp::inherited(role);
            let result = file.sync_data();
            // First: who hears of it may want the file's lock.
            drop(file);
            let _ = tell.send(result);
        })?;
        told.recv_timeout(patience)
            .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "its disk does not answer")))
    }

    /// Whether `path` names this very file.
    pub fn is_at(&self, path: &Path) -> bool {
        let key = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
        let (there, ours) = (path.metadata(), self.file.metadata());
        there.is_ok_and(|there| ours.is_ok_and(|ours| key(there) == key(ours)))
    }
}

/// Whether nobody else writes `file`, nor has it at all if it is not `read_only`; from now on. The lock goes with the descriptor, and
/// with whoever has a copy of that: io_uring for an instant longer than its ring, a child until it executes. So it is asked for
/// more than once. A file system that knows no locks has none to be held.
fn lock(file: &File, read_only: bool) -> bool {
    const TRIES: u32 = 20;
    const WAIT: Duration = Duration::from_millis(10);
    let operation = if read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    for attempt in 0..TRIES {
        if attempt > 0 {
            std::thread::sleep(WAIT);
        }
        if flock(file, operation) != Err(Errno::WOULDBLOCK) {
            return true;
        }
    }
    false
}

/// What the driver gets for the disk's serial number: the file's own, as Firecracker's, cut to what there is room for.
fn id(dev: u64, rdev: u64, ino: u64) -> [u8; 20] {
    let text = format!("{dev}{rdev}{ino}");
    let mut id = [0; 20];
    for (to, from) in id.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    id
}
