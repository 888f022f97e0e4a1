//! Why there is no jail. The first words are those of Firecracker's jailer where it refuses the same.

use std::io;
use std::num::ParseIntError;
use std::path::{Path, PathBuf};

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Not root.
    #[error("a jail is made by root: run it as root; what runs in it is the user of --uid")]
    NotRoot,
    /// Not a name.
    #[error("Invalid instance ID: {0}")]
    Id(String),
    /// A path that does not lead anywhere.
    #[error("Failed to canonicalize path {}: {source}", path.display())]
    Canonicalize {
        /// As given.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A program that is none.
    #[error("{} is not a file", .0.display())]
    NotAFile(PathBuf),
    /// A base that is none.
    #[error("{} is not a directory", .0.display())]
    NotADirectory(PathBuf),
    /// Not a user's number.
    #[error("Invalid uid: {0}")]
    Uid(String),
    /// Not a group's number.
    #[error("Invalid gid: {0}")]
    Gid(String),
    /// The parent cgroup leads elsewhere.
    #[error("Parent cgroup path is invalid. Path should not be absolute or contain '..' or '.'")]
    CgroupParent,
    /// Neither 1 nor 2.
    #[error("{0} is an invalid cgroup version specifier")]
    CgroupVersion(String),
    /// Not `FILE=VALUE`.
    #[error("Invalid format for cgroups: {0}: give FILE=VALUE, as in cpuset.cpus=2-3")]
    CgroupFormat(String),
    /// Not `CONTROLLER.PROPERTY`.
    #[error("Cgroup invalid file: {0}: give one of the cgroup's own, as in cpuset.cpus")]
    CgroupFile(String),
    /// No such hierarchy is mounted.
    #[error(
        "Hierarchy not found: no cgroup file system of version {version} is mounted; this host may have version {other}: --cgroup-version {other}"
    )]
    CgroupHierarchy {
        /// The one asked for.
        version: u8,
        /// The other one.
        other: u8,
    },
    /// No such controller.
    #[error("Controller {0} is unavailable: no cgroup hierarchy that is mounted here has it")]
    CgroupController(String),
    /// A cgroup that cannot be set up.
    #[error("{}: cannot {what}: {source}", path.display())]
    Cgroup {
        /// What was wanted of it.
        what: String,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Not `RESOURCE=VALUE`.
    #[error("Invalid format for resources limits: {0}: give fsize=BYTES or no-file=NUMBER")]
    LimitFormat(String),
    /// Not a number.
    #[error("Invalid limit value for resource: {value}: {source}")]
    LimitValue {
        /// As given.
        value: String,
        /// Why.
        source: ParseIntError,
    },
    /// Not a resource.
    #[error("Invalid resource argument: {0}: fsize and no-file are known")]
    Limit(String),
    /// Not something to be shown.
    #[error(
        "--bind {0}: give PATH, or PATH:PATH, and :ro for read-only: in the jail an absolute path, not /dev itself nor one in /proc or /sys"
    )]
    Bind(String),
    /// The program needs others.
    #[error(
        "--exec-file {}: is linked dynamically, and what it needs is not in the jail: give a static one, or leave --exec-file out for this \
         program, whose libraries are brought along", .0.display()
    )]
    Dynamic(PathBuf),
    /// Somebody may have left it, and it stands where a file is to be written.
    #[error("{} is a directory, where the jail has a file: who ran in it before may have made it: remove it", .0.display())]
    InTheWay(PathBuf),
    /// The loader would load what it names.
    #[error(
        "{} names libraries to load into the program, and who ran in this jail before may have left it: remove it",
        .0.display()
    )]
    Preload(PathBuf),
    /// Somebody is in there.
    #[error("{}: process {pid} runs in this jail: end it, or choose another --id", root.display())]
    InUse {
        /// The jail's root.
        root: PathBuf,
        /// Who.
        pid: u32,
    },
    /// Two at once.
    #[error("{}: another process makes a jail of this --id at this very moment: choose another", .0.display())]
    Busy(PathBuf),
    /// Whatever else could not be done, and with what.
    #[error("the jail: cannot {what}: {source}")]
    Step {
        /// What was to be done, with what.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// This host's root is where it booted from.
    #[error(
        "the jail: cannot make it the root: {source}; a host whose own root is its initramfs cannot have that replaced (pivot_root(2)): \
         have it switch to another root first (switch_root(8))"
    )]
    Pivot {
        /// What the system said.
        source: io::Error,
    },
    /// It was ended in between.
    #[error("the jail: the process that was to become the program ended before it did")]
    Vanished,
    /// What another process of ours says.
    #[error("{0}")]
    Told(String),
}

impl JailError {
    /// What could not be done, with what the system says.
    pub fn step(what: impl Into<String>) -> impl FnOnce(rustix::io::Errno) -> Self {
        let what = what.into();
        move |errno| Self::Step {
            what,
            source: errno.into(),
        }
    }

    /// Likewise.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Step { what, source }
    }

    /// As the host knows it, if it names a path below `directory`.
    pub fn below(self, directory: &Path) -> Self {
        match self {
            Self::InTheWay(path) => Self::InTheWay(directory.join(path)),
            Self::Preload(path) => Self::Preload(directory.join(path)),
            other => other,
        }
    }
}
