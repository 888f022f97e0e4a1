//! A disk of the host's that can be full: a small file system in memory.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::bed::Folder;

/// What keeps its space from others.
const BALLAST: &str = "ballast";

/// The file system. It is seen by the thread that made it, and by what that starts.
#[derive(Debug)]
pub struct Disk(Folder);

impl Disk {
    /// One of `kib` KiB.
    ///
    /// # Errors
    /// Only root may.
    ///
    /// # Panics
    /// Where root may not either.
    pub fn new(kib: u32) -> Result<Self, String> {
        // SAFETY: a new mount namespace takes nothing from the thread that memory or descriptors rely on.
        #[expect(unsafe_code, reason = "unshare can take away what a thread shares")]
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.map_err(|error| format!("no mount namespace: {error}"))?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
            .expect("it is this thread's own");
        let folder = Folder::new();
        let size = std::ffi::CString::new(format!("size={kib}k")).expect("digits");
        mount("none", folder.path(), "tmpfs", MountFlags::empty(), &*size).expect("a file system in memory");
        Ok(Self(folder))
    }

    /// The path of `name` on it.
    #[must_use]
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A file `name` of `len` bytes that takes no space yet.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn sparse(&self, name: &str, len: u64) -> PathBuf {
        let path = self.join(name);
        File::create(&path)
            .and_then(|file| file.set_len(len))
            .expect("a sparse file");
        path
    }

    /// Leaves no space on it.
    ///
    /// # Panics
    /// When that fails.
    pub fn fill(&self) {
        let mut file = File::options()
            .create(true)
            .append(true)
            .open(self.join(BALLAST))
            .expect("a file");
        while file.write(&[0; 4096]).is_ok_and(|written| written > 0) {}
    }

    /// Gives the space back that [`Disk::fill`] took.
    ///
    /// # Panics
    /// When it took none.
    pub fn free(&self) {
        std::fs::remove_file(self.join(BALLAST)).expect("it is full");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Else it goes with the thread; its folder could not be removed.
        let _ = unmount(self.0.path(), UnmountFlags::DETACH);
    }
}
