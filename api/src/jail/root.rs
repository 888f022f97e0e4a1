//! The jail's root: a mount namespace in which nothing of the host is left but what is named here.
//!
//! | | | why |
//! |---|---|---|
//! | `/` | the jail's directory, `nosuid`, its user's | what was put there for the microVM; its API's socket |
//! | `/dev` | memory, read-only | `kvm`, `net/tun`, `null`, `urandom`: the user's, mode 0600 |
//! | `/proc` | `subset=pid,hidepid=2`, read-only | what the kernel says of this process's threads |
//! | `/sys` | memory, read-only | what readings are made of: the host's CPUs, huge pages, this cgroup's quota |
//!
//! All but `/` is in the namespace only, and goes with the last process in it. By `hidepid=2` /proc has no process of
//! another user; those of the same user it has all, unless --new-pid-ns leaves them out.
//!
//! What of the host is to be seen is picked up as detached mounts (open_tree(2)) before the host goes away, and put
//! down after that (move_mount(2)): every path that is walked inside then ends inside, whatever the microVM's user has
//! left there.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, StatVfsMountFlags, Uid, chmodat, chownat, fchmod, fchown, makedev,
    mknodat, open, openat, statvfs,
};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_bind_recursive,
    mount_change, mount_remount, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::args::Plan;
use super::cgroup;
use super::error::JailError;
use super::undo::{self, Undo};

/// Of /sys, what readings are made of: where there is such a thing.
const SYSTEM: [&str; 3] = [
    "/sys/devices/system/cpu",
    "/sys/fs/cgroup/cpuset.cpus.isolated",
    "/sys/kernel/mm/transparent_hugepage",
];

/// A mount that is not yet put anywhere.
#[derive(Debug)]
struct Piece {
    mount: OwnedFd,
    /// From the jail's root.
    target: PathBuf,
    is_directory: bool,
    flags: MountFlags,
}

/// What of the host is to be seen.
#[derive(Debug)]
pub struct Pieces {
    system: Vec<Piece>,
    binds: Vec<Piece>,
    /// The device number of /dev/kvm, where there is one.
    kvm: Option<u64>,
}

/// Leaves the host's mount namespace for one of its own, and picks up what is to be seen of the host.
#[expect(unsafe_code, reason = "unshare can take away what a thread shares")]
pub fn leave_host(plan: &Plan, undo: &mut Undo) -> Result<Pieces, JailError> {
    let host = open("/proc/self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let host = host.map_err(JailError::step("open /proc/self/ns/mnt"))?;
    // SAFETY: a mount namespace of its own takes nothing from the process that memory or descriptors rely on.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.map_err(JailError::step("make a mount namespace"))?;
    undo.left(host);
    // What is mounted here stays here, and what the host mounts later does not come here.
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(JailError::step("keep its mounts from the host's"))?;
    let quotas = cgroup::quotas().map_err(JailError::io("find out about its cgroup"))?;
    let modules = fs::read_dir("/sys/module").into_iter().flatten().flatten();
    let kvm_modules = modules.filter(|entry| entry.file_name().to_string_lossy().starts_with("kvm"));
    let same = |path: PathBuf| (path.clone(), path);
    let all = SYSTEM.iter().map(|path| same(PathBuf::from(path)));
    let all = all.chain(kvm_modules.map(|entry| same(entry.path()))).chain(quotas);
    let system = all.filter(|(path, _)| path.exists());
    let kvm = fs::metadata("/dev/kvm")
        .ok()
        .filter(|kvm| kvm.file_type().is_char_device());
    Ok(Pieces {
        system: system
            .map(|(path, shown)| pick_up(&path, &shown, true))
            .collect::<Result<_, _>>()?,
        binds: plan
            .binds
            .iter()
            .map(|bind| pick_up(&bind.source, &bind.target, bind.read_only))
            .collect::<Result<_, _>>()?,
        kvm: kvm.map(|kvm| kvm.rdev()),
    })
}

fn pick_up(source: &Path, target: &Path, read_only: bool) -> Result<Piece, JailError> {
    let what = || format!("show {} in it", source.display());
    let metadata = fs::metadata(source).map_err(JailError::io(what()))?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let is_device = metadata.file_type().is_char_device() || metadata.file_type().is_block_device();
    let devices = if is_device {
        MountFlags::empty()
    } else {
        MountFlags::NODEV
    };
    let writing = if read_only {
        MountFlags::RDONLY
    } else {
        MountFlags::empty()
    };
    Ok(Piece {
        mount: open_tree(CWD, source, flags).map_err(JailError::step(what()))?,
        target: target.strip_prefix("/").unwrap_or(target).to_owned(),
        is_directory: metadata.is_dir(),
        flags: MountFlags::NOSUID | MountFlags::NOEXEC | devices | writing,
    })
}

/// Makes `path` the root, and lets go of the host's. Gives it, opened.
pub fn pivot(path: &Path) -> Result<OwnedFd, JailError> {
    // A root is a mount, of which submounts are part that somebody has put there.
    mount_bind_recursive(path, path).map_err(JailError::step(format!("mount {}", path.display())))?;
    tighten(path, MountFlags::NOSUID)?;
    chdir(path).map_err(JailError::step(format!("change to {}", path.display())))?;
    // The old root comes to lie on the new one, and is taken off: no directory is needed for it (pivot_root(2)).
    pivot_root(".", ".").map_err(|error| match error {
        Errno::INVAL => JailError::Pivot { source: error.into() },
        error => JailError::step("make it the root")(error),
    })?;
    unmount(".", UnmountFlags::DETACH).map_err(JailError::step("let go of the host's root"))?;
    chdir("/").map_err(JailError::step("change to its root"))?;
    undo::open_real(Path::new("/"))
}

/// Fills the root with what is in it besides what was put there.
pub fn furnish(root: &OwnedFd, pieces: Pieces, plan: &Plan, undo: &mut Undo) -> Result<(), JailError> {
    let user = (Uid::from_raw(plan.uid), Gid::from_raw(plan.gid));
    for name in ["dev", "proc", "sys"] {
        undo::directories(root, Path::new(name), undo)?;
    }
    for path in ["", "run"] {
        let directory = undo::directories(root, Path::new(path), undo)?;
        fchmod(&directory, Mode::RWXU)
            .and_then(|()| fchown(&directory, Some(user.0), Some(user.1)))
            .map_err(JailError::step(format!("give /{path} to its user")))?;
    }
    let quiet = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount("tmpfs", "/dev", "tmpfs", quiet, c"mode=0755,size=64k,nr_inodes=64")
        .map_err(JailError::step("mount /dev"))?;
    devices(pieces.kvm, user)?;
    mount(
        "tmpfs",
        "/sys",
        "tmpfs",
        quiet | MountFlags::NODEV,
        c"mode=0755,size=64k,nr_inodes=256",
    )
    .map_err(JailError::step("mount /sys"))?;
    let all = quiet | MountFlags::NODEV | MountFlags::RDONLY;
    mount("proc", "/proc", "proc", all, c"subset=pid,hidepid=2").map_err(JailError::step("mount /proc"))?;
    for piece in pieces.system.into_iter().chain(pieces.binds) {
        put_down(root, piece, undo)?;
    }
    tighten(Path::new("/dev"), quiet | MountFlags::RDONLY)?;
    tighten(Path::new("/sys"), all)
}

/// Numbers as in Documentation/admin-guide/devices.txt.
fn devices(kvm: Option<u64>, user: (Uid, Gid)) -> Result<(), JailError> {
    let dev = undo::open_real(Path::new("/dev"))?;
    // It goes with the mount.
    let mut undo = Undo::default();
    undo::directories(&dev, Path::new("net"), &mut undo)?;
    undo.forget();
    let mut all = vec![
        ("net/tun", makedev(10, 200)),
        ("null", makedev(1, 3)),
        ("urandom", makedev(1, 9)),
    ];
    // Without one the microVM says so, better than by what the system says of one that leads nowhere.
    all.extend(kvm.map(|number| ("kvm", number)));
    for (name, number) in all {
        let what = || format!("make /dev/{name}");
        mknodat(&dev, name, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, number)
            .and_then(|()| chmodat(&dev, name, Mode::RUSR | Mode::WUSR, AtFlags::empty()))
            .and_then(|()| chownat(&dev, name, Some(user.0), Some(user.1), AtFlags::SYMLINK_NOFOLLOW))
            .map_err(JailError::step(what()))?;
    }
    Ok(())
}

fn put_down(root: &OwnedFd, piece: Piece, undo: &mut Undo) -> Result<(), JailError> {
    let place = Path::new("/").join(&piece.target);
    let what = || format!("show something as {}", place.display());
    if piece.is_directory {
        undo::directories(root, &piece.target, undo)?;
    } else {
        mount_point(root, &piece.target, undo)?;
    }
    move_mount(
        piece.mount.as_fd(),
        "",
        CWD,
        &place,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .map_err(JailError::step(what()))?;
    tighten(&place, piece.flags)
}

/// Makes an empty file to mount one on, unless there is something.
fn mount_point(root: &OwnedFd, path: &Path, undo: &mut Undo) -> Result<(), JailError> {
    let what = || format!("make {}", Path::new("/").join(path).display());
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(JailError::step(what())(Errno::INVAL));
    };
    let directory = undo::directories(root, parent, undo)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(&directory, name, flags, Mode::empty()) {
        Ok(_) => undo.file(&directory, name),
        Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(JailError::step(what())(error)),
    }
}

/// Adds `flags` to those of the mount at `path`.
fn tighten(path: &Path, flags: MountFlags) -> Result<(), JailError> {
    let what = || format!("set the mount flags of {}", path.display());
    let has = statvfs(path).map_err(JailError::step(what()))?.f_flag;
    let both = [
        (StatVfsMountFlags::RDONLY, MountFlags::RDONLY),
        (StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
        (StatVfsMountFlags::NODEV, MountFlags::NODEV),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
        (StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
        (StatVfsMountFlags::NODIRATIME, MountFlags::NODIRATIME),
        (StatVfsMountFlags::RELATIME, MountFlags::RELATIME),
    ];
    let kept = both
        .iter()
        .filter(|(flag, _)| has.contains(*flag))
        .map(|(_, flag)| *flag);
    let all = kept.fold(flags | MountFlags::BIND, |all, flag| all | flag);
    mount_remount(path, all, "").map_err(JailError::step(what()))
}
