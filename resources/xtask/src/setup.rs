//! Makes, once, what every other command needs: the kernel, the guest's initramfs.

use std::collections::HashSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};

use crate::build;
use crate::cpio::Archive;
use crate::layout::Layout;
use crate::modules::Modules;
use crate::progress::Progress;
use crate::{debian, vmlinux};

/// Debian's kernel and busybox, and what was made of them.
pub struct Kit {
    /// The kernel as Debian ships it.
    pub bzimage: PathBuf,
    /// The ELF kernel inside it.
    pub vmlinux: PathBuf,
    /// The kernel's modules.
    pub modules: PathBuf,
    /// A static shell and what goes with it.
    pub busybox: PathBuf,
    /// A checker of ext4 file systems, static.
    pub e2fsck: PathBuf,
    /// The guest's initramfs.
    pub initramfs: PathBuf,
}

/// Makes what is not there yet. Touches the network the first time only.
pub fn setup(layout: &Layout) -> Result<Kit> {
    let kept = layout.kept();
    let downloads = downloads(layout)?;
    let _lock = lock(&kept)?;
    let kernel = unpacked(&kept, "kernel", || debian::kernel_package(&downloads))?;
    let busybox = unpacked(&kept, "busybox", || debian::busybox_package(&downloads))?.join("bin/busybox");
    let e2fsck = unpacked(&kept, "e2fsck", || debian::e2fsck_package(&downloads))?.join("sbin/e2fsck.static");
    let bzimage = starting_with(&kernel.join("boot"), "vmlinuz-")?;
    let modules = starting_with(&kernel.join("lib/modules"), "")?;

    let bed = layout.bed();
    fs::create_dir_all(&bed)?;
    let vmlinux = bed.join("vmlinux");
    if !vmlinux.exists() {
        let elf = vmlinux::extract(&fs::read(&bzimage)?)
            .with_context(|| format!("cannot take the kernel out of {}", bzimage.display()))?;
        write_whole(&vmlinux, &elf)?;
    }
    write_if_changed(&bed.join("bzImage"), &fs::read(&bzimage)?)?;
    let initramfs = bed.join("guest.cpio");
    let init = build::guest_init(layout)?;
    write_if_changed(
        &initramfs,
        &guest_initramfs(&fs::read(init)?, &fs::read(&busybox)?, &modules)?,
    )?;
    Ok(Kit {
        bzimage: bed.join("bzImage"),
        vmlinux,
        modules,
        busybox,
        e2fsck,
        initramfs,
    })
}

/// Where downloads are kept.
pub fn downloads(layout: &Layout) -> Result<PathBuf> {
    let downloads = layout.kept().join("downloads");
    fs::create_dir_all(&downloads).with_context(|| format!("cannot make {}", downloads.display()))?;
    Ok(downloads)
}

/// Locks `kept`: two of us at a time would write to the same temporary names. The lock goes with the file, however we end.
pub fn lock(kept: &Path) -> Result<File> {
    let lock = File::create(kept.join("lock"))?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        let _progress = Progress::new("waiting for another cargo xtask");
        flock(&lock, FlockOperation::LockExclusive)?;
    }
    Ok(lock)
}

/// Drivers of our devices. Debian's kernel finds the devices by ACPI once `virtio_mmio` is there.
const GUEST_MODULES: [&str; 6] = [
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
];

/// The guest's initramfs. Serial console, ACPI and ext4 are built into Debian's kernel; the drivers of virtio devices are not: each is
/// loaded when a step of the guest's needs it (`modules/NAME` lists what has to be loaded for it, in order).
fn guest_initramfs(init: &[u8], busybox: &[u8], modules: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    for dir in ["bin", "dev", "proc", "sys", "tmp"] {
        archive.dir(dir)?;
    }
    archive.file("init", 0o755, init)?;
    archive.file("bin/busybox", 0o755, busybox)?;
    archive.symlink("bin/sh", "busybox")?;
    archive.dir("modules")?;
    let modules = Modules::of(modules)?;
    let mut there = HashSet::new();
    for name in GUEST_MODULES {
        let closure = modules.closure(name)?;
        let order: String = closure.iter().map(|(name, _)| format!("{name}\n")).collect();
        archive.file(&format!("modules/{name}"), 0o644, order.as_bytes())?;
        for (name, module) in closure {
            if there.insert(name.clone()) {
                archive.file(&format!("modules/{name}.ko"), 0o644, &module)?;
            }
        }
    }
    Ok(archive.finish()?)
}

/// The package `name`, unpacked in `kept`.
pub fn unpacked(kept: &Path, name: &str, package: impl FnOnce() -> Result<PathBuf>) -> Result<PathBuf> {
    let dir = kept.join(name);
    if !dir.exists() {
        let package = package()?;
        let _progress = Progress::new(format!("unpacking {}", package.display()));
        debian::unpack(&package, &dir)?;
    }
    Ok(dir)
}

/// The entry of `dir` whose name starts with `prefix`.
fn starting_with(dir: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let paths: Vec<PathBuf> = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    let starts = |path: &PathBuf| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(prefix))
    };
    paths.into_iter().find(starts).with_context(|| {
        format!(
            "no {prefix}* in {}: remove {} and try again",
            dir.display(),
            dir.parent().unwrap_or(dir).display()
        )
    })
}

/// Writes `path` under a temporary name first, so that whoever sees it sees all of it.
fn write_whole(path: &Path, content: &[u8]) -> Result<()> {
    let partial = path.with_extension("partial");
    fs::write(&partial, content).with_context(|| format!("cannot write {}", partial.display()))?;
    Ok(fs::rename(&partial, path)?)
}

fn write_if_changed(path: &Path, content: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == content) {
        return Ok(());
    }
    write_whole(path, content)
}
