//! A disk that stops answering: its file's file system is frozen (ioctl_fifreeze of `linux/fs.h`), so that whatever writes to it waits,
//! and cannot be interrupted, until it is thawed.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::Signal;
use serde_json::json;
use tests::bed::{self, Folder};
use tests::require_bed;
use tests::vm::Vm;

/// `_IOWR('X', 119, int)` and 120.
const FIFREEZE: u64 = 0xc004_5877;
const FITHAW: u64 = 0xc004_5878;

/// A file system with a disk's file, on the emulated host's own disk.
struct Mounted(Folder);

impl Mounted {
    fn new() -> Self {
        let folder = Folder::new();
        mount("/dev/vda", folder.path(), "ext4", MountFlags::empty(), None).expect("the host's disk");
        Self(folder)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Whoever comes next finds it as it was; and a folder that can be removed.
        let _ = std::fs::remove_file(self.0.join("disk"));
        unmount(self.0.path(), UnmountFlags::empty()).expect("nobody is left in it");
    }
}

/// Frozen until dropped, whatever becomes of the test.
struct Frozen(File);

impl Frozen {
    fn new(path: &Path) -> Self {
        let frozen = Self(File::open(path).expect("a folder"));
        frozen.ioctl(FIFREEZE).expect("it can be frozen");
        frozen
    }

    fn ioctl(&self, request: u64) -> std::io::Result<()> {
        // SAFETY: neither request has an argument that the kernel looks at.
        #[expect(unsafe_code, reason = "nobody wraps these requests")]
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request, 0) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.ioctl(FITHAW).expect("it was frozen");
    }
}

#[test]
fn a_disk_that_has_died_holds_up_neither_the_api_nor_the_end() {
    require_bed!(nohz_full);
    if !Path::new("/dev/vda").exists() {
        bed::skipped(
            "nohz-full",
            "this host has no /dev/vda: cargo xtask rootfs could not make the disk",
        );
        return;
    }
    let mounted = Mounted::new();
    let path = mounted.0.join("disk");
    File::create(&path)
        .and_then(|file| file.set_len(64 << 20))
        .expect("an image");
    let drive = json!({
        "drive_id": "disk", "path_on_host": path, "is_root_device": false, "io_engine": "Async", "cache_type": "Writeback",
    });
    let mut vm = Vm::serve_debian("disk-verify:600000,poweroff", json!({ "drives": [drive] }));
    vm.process.wait_for("chronovisor guest: disk-verify");
    std::thread::sleep(Duration::from_secs(1));
    let frozen = Frozen::new(mounted.0.path());
    // Whatever the guest does next waits for the disk.
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(vm.ask("GET", "/", None).status, 200);
    let again = json!({ "drive_id": "disk", "path_on_host": path }).to_string();
    let refused = vm.ask("PATCH", "/drives/disk", Some(&again));
    println!("PATCH: {} {}", refused.status, refused.fault());
    assert!(
        refused.status == 400 && refused.fault().contains("have not ended"),
        "{}",
        refused.fault()
    );

    vm.process.signal(Signal::INT);
    // Said when all is done; the kernel keeps the process itself until its disk has answered.
    vm.process.wait_for_error("ended by SIGINT");
    assert!(!vm.socket().exists());
    drop(frozen);
    let (status, _, stderr) = vm.process.wait();
    assert_eq!(status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("requests have not ended"), "{stderr}");
    println!("{stderr}");
}
