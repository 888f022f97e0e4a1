//! Hands the guest over to the init of a root file system: what a distribution's initrd does, for one disk and no choices.
//!
//! Of the kernel's words (Documentation/admin-guide/kernel-parameters.txt) it knows `root=/dev/NAME`, `root=PARTUUID=` of a DOS
//! partition table, `rootfstype=` (ext4 if not said), `ro`, `rw` and `init=`. The kernel itself, which heeds them where there is no
//! initrd, cannot read a disk whose driver is a module.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{chdir, chroot};

use crate::modules;

/// Where the disk is mounted until it is the root.
const ROOT: &str = "/root";
/// In emulation, and on a busy machine, a probe takes a while.
const PATIENCE: Duration = Duration::from_secs(30);

/// The root file system that a kernel's command line names.
#[derive(Debug, PartialEq, Eq)]
pub struct Root<'a> {
    device: &'a str,
    kind: &'a str,
    read_only: bool,
    init: &'a str,
}

impl<'a> Root<'a> {
    /// None where the line has no `root=`. Of words that say the same thing the last wins, as with the kernel.
    pub fn of_command_line(line: &'a str) -> Option<Self> {
        let last = |key: &str| {
            line.split_whitespace()
                .filter_map(|word| word.strip_prefix(key))
                .next_back()
        };
        let mut access = line.split_whitespace().filter(|word| matches!(*word, "ro" | "rw"));
        Some(Self {
            device: last("root=")?,
            kind: last("rootfstype=").unwrap_or("ext4"),
            // The kernel's own default.
            read_only: access.next_back() != Some("rw"),
            init: last("init=").unwrap_or("/sbin/init"),
        })
    }

    /// Mounts it and becomes its init. Returns only if that fails, and says what did.
    pub fn switch(&self) -> String {
        match self.mount().and_then(|()| enter()) {
            Ok(()) => {
                // What the kernel did not know of its command line, it has given to us.
                let error = Command::new(self.init).args(std::env::args_os().skip(1)).exec();
                format!("cannot run {} of {}: {error}", self.init, self.device)
            }
            Err(error) => format!("cannot mount root={}: {error}", self.device),
        }
    }

    fn mount(&self) -> io::Result<()> {
        let place = Place::of(self.device).ok_or_else(|| {
            io::Error::other("only a device's name, such as /dev/vda, and PARTUUID=SSSSSSSS-PP are understood")
        })?;
        for driver in ["virtio_mmio", "virtio_blk"] {
            modules::load(driver)?;
        }
        let begun = Instant::now();
        let device = loop {
            if let Some(device) = place.find() {
                break device;
            }
            if begun.elapsed() > PATIENCE {
                return Err(io::Error::other(format!(
                    "no such disk came in {} s",
                    PATIENCE.as_secs()
                )));
            }
            thread::sleep(Duration::from_millis(10));
        };
        let flags = if self.read_only {
            MountFlags::RDONLY
        } else {
            MountFlags::empty()
        };
        fs::create_dir_all(ROOT)?;
        let kind = CString::new(self.kind)?;
        Ok(mount(&device, ROOT, &kind, flags, None)?)
    }
}

/// What `root=` says.
#[derive(Debug, PartialEq, Eq)]
enum Place<'a> {
    /// A device.
    Name(&'a str),
    /// A partition, by its number and by the signature of its disk (block/partitions/msdos.c).
    Partition { signature: u32, number: u8 },
}

impl<'a> Place<'a> {
    fn of(root: &'a str) -> Option<Self> {
        let Some(partuuid) = root.strip_prefix("PARTUUID=") else {
            return root.starts_with("/dev/").then_some(Self::Name(root));
        };
        let (signature, number) = partuuid.split_once('-').filter(|(s, n)| (s.len(), n.len()) == (8, 2))?;
        Some(Self::Partition {
            signature: u32::from_str_radix(signature, 16).ok()?,
            number: u8::from_str_radix(number, 16).ok()?,
        })
    }

    /// Its device, once that is there.
    fn find(&self) -> Option<PathBuf> {
        let device = match self {
            Self::Name(name) => PathBuf::from(name),
            Self::Partition { signature, number } => {
                let disks = fs::read_dir("/sys/block").ok()?.flatten();
                let mut disks = disks.map(|disk| Path::new("/dev").join(disk.file_name()));
                let disk = disks.find(|disk| disk_signature(disk) == Some(*signature))?;
                format!("{}{number}", disk.display()).into()
            }
        };
        device.exists().then_some(device)
    }
}

/// That of a disk with a DOS partition table.
fn disk_signature(disk: &Path) -> Option<u32> {
    let mut sector = [0; 512];
    File::open(disk).ok()?.read_exact(&mut sector).ok()?;
    let signature = sector[440..444].try_into().expect("four bytes");
    sector.ends_with(&[0x55, 0xaa]).then(|| u32::from_le_bytes(signature))
}

/// Makes [`ROOT`] the root, the file systems of the kernel with it, and gives back the memory of this initramfs.
fn enter() -> io::Result<()> {
    for name in ["dev", "proc", "sys"] {
        mount_move(format!("/{name}"), format!("{ROOT}/{name}"))?;
    }
    for name in ["/modules", "/bin"] {
        fs::remove_dir_all(name)?;
    }
    fs::remove_file("/init")?;
    chdir(ROOT)?;
    // An initramfs is the first mount and cannot be left by pivot_root: the disk is mounted over it.
    mount_move(".", "/")?;
    chroot(".")?;
    Ok(chdir("/")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernels_words_say_is_mounted() {
        let root = |line| Root::of_command_line(line);
        assert_eq!(root("console=ttyS0 noroot=/dev/vda"), None);
        assert_eq!(
            root("console=ttyS0 root=/dev/vda rw\n"),
            Some(Root {
                device: "/dev/vda",
                kind: "ext4",
                read_only: false,
                init: "/sbin/init",
            })
        );
        assert_eq!(
            root("root=/dev/vda rw init=/bin/sh root=/dev/vdb ro rootfstype=xfs"),
            Some(Root {
                device: "/dev/vdb",
                kind: "xfs",
                read_only: true,
                init: "/bin/sh",
            })
        );
    }

    #[test]
    fn a_root_is_a_device_or_a_partition_of_a_disk_with_a_signature() {
        assert_eq!(Place::of("/dev/vdb1"), Some(Place::Name("/dev/vdb1")));
        let partition = Place::Partition {
            signature: 0x0eaa_91a0,
            number: 0x1f,
        };
        assert_eq!(Place::of("PARTUUID=0eaa91a0-1f"), Some(partition));
        for other in [
            "LABEL=root",
            "PARTUUID=eaa91a0-1f",
            "PARTUUID=0eaa91a0-1f/PARTNROFF=1",
            "PARTUUID=",
            "vda",
        ] {
            assert_eq!(Place::of(other), None, "{other}");
        }
    }
}
