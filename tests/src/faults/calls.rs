//! Which system calls are made to fail, and with what: errors that Linux has for them, by their manual pages.
//!
//! Left out are calls that cannot fail where their arguments are right (`rt_sigaction`, `futex`, `close`, `munmap`, `prlimit64` that
//! asks or raises a soft limit), reads and writes of what is no file (an eventfd, a timer: they fail where a counter is full or empty
//! only, and that is no fault), `unlinkat`, whose failure is the very thing that a leftover is, and `brk`, which reports no errors: an
//! allocator that gets no more by it asks `mmap`.
//! `KVM_RUN` is a call of its own.

use libc::{EACCES, EAGAIN, EBUSY, EINTR, EINVAL, EIO, EMFILE, ENODEV, ENOLCK, ENOMEM, ENOSPC, EPERM, c_int, c_long};

/// `_IO(KVMIO, 0x80)`.
pub const KVM_RUN: u64 = 0xae80;

/// What is done to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effect {
    /// It fails, undone.
    Error(c_int),
    /// Half of what it should write is written.
    Short,
    /// It never returns, but for a signal that ends its thread: a disk that has died.
    Hang,
}

impl Effect {
    /// As it is told: the error's name.
    #[must_use]
    pub fn name(self) -> String {
        let names = [
            (EACCES, "EACCES"),
            (EAGAIN, "EAGAIN"),
            (EBUSY, "EBUSY"),
            (EINTR, "EINTR"),
            (EINVAL, "EINVAL"),
            (EIO, "EIO"),
            (EMFILE, "EMFILE"),
            (ENODEV, "ENODEV"),
            (ENOLCK, "ENOLCK"),
            (ENOMEM, "ENOMEM"),
            (ENOSPC, "ENOSPC"),
            (EPERM, "EPERM"),
        ];
        match self {
            Self::Short => "half".into(),
            Self::Hang => "hangs".into(),
            Self::Error(errno) => names
                .iter()
                .find(|(known, _)| *known == errno)
                .map_or_else(|| errno.to_string(), |(_, name)| (*name).to_owned()),
        }
    }
}

/// What the call's first argument is, so that it can be told what the call was about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    /// Nothing that says anything.
    Nothing,
    /// A descriptor.
    Descriptor,
    /// A path.
    FirstPath,
    /// The second argument is a path.
    Path,
}

/// A call that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its name.
    pub name: &'static str,
    /// Its number.
    pub number: c_long,
    /// What it is about.
    pub of: Of,
    /// How.
    pub effects: &'static [Effect],
}

use Effect::{Error, Short};
use Of::{Descriptor, FirstPath, Nothing, Path};

/// The call of that name.
///
/// # Panics
/// When it is not in the table.
#[must_use]
pub fn of_name(name: &str) -> &'static Call {
    CALLS.iter().find(|call| call.name == name).expect("it is in the table")
}

const fn call(name: &'static str, number: c_long, of: Of, effects: &'static [Effect]) -> Call {
    Call {
        name,
        number,
        of,
        effects,
    }
}

/// All of them.
pub const CALLS: &[Call] = &[
    call("open", libc::SYS_open, FirstPath, &[Error(EMFILE), Error(EACCES)]),
    call("openat", libc::SYS_openat, Path, &[Error(EMFILE), Error(EACCES)]),
    call("mmap", libc::SYS_mmap, Nothing, &[Error(ENOMEM)]),
    call("mprotect", libc::SYS_mprotect, Nothing, &[Error(ENOMEM)]),
    call("madvise", libc::SYS_madvise, Nothing, &[Error(ENOMEM)]),
    call(
        "ioctl",
        libc::SYS_ioctl,
        Descriptor,
        &[Error(EIO), Error(EINTR), Error(ENOMEM)],
    ),
    call("KVM_RUN", libc::SYS_ioctl, Descriptor, &[Error(EIO)]),
    call("read", libc::SYS_read, Descriptor, &[Error(EIO), Error(EINTR)]),
    call("pread64", libc::SYS_pread64, Descriptor, &[Error(EIO), Error(EINTR)]),
    call(
        "write",
        libc::SYS_write,
        Descriptor,
        &[Error(ENOSPC), Error(EINTR), Short],
    ),
    call("writev", libc::SYS_writev, Descriptor, &[Error(ENOSPC), Error(EINTR)]),
    call(
        "pwrite64",
        libc::SYS_pwrite64,
        Descriptor,
        &[Error(ENOSPC), Error(EINTR)],
    ),
    call("preadv", libc::SYS_preadv, Descriptor, &[Error(EIO), Error(EINTR)]),
    call("pwritev", libc::SYS_pwritev, Descriptor, &[Error(ENOSPC), Error(EINTR)]),
    call("fdatasync", libc::SYS_fdatasync, Descriptor, &[Error(EIO)]),
    call("eventfd2", libc::SYS_eventfd2, Nothing, &[Error(EMFILE)]),
    call("epoll_create1", libc::SYS_epoll_create1, Nothing, &[Error(EMFILE)]),
    call("epoll_ctl", libc::SYS_epoll_ctl, Descriptor, &[Error(ENOSPC)]),
    call("timerfd_create", libc::SYS_timerfd_create, Nothing, &[Error(EMFILE)]),
    call("pipe2", libc::SYS_pipe2, Nothing, &[Error(EMFILE)]),
    call("socket", libc::SYS_socket, Nothing, &[Error(EMFILE)]),
    call("socketpair", libc::SYS_socketpair, Nothing, &[Error(EMFILE)]),
    call("bind", libc::SYS_bind, Descriptor, &[Error(EACCES)]),
    call("listen", libc::SYS_listen, Descriptor, &[Error(ENOMEM)]),
    call("accept4", libc::SYS_accept4, Descriptor, &[Error(EMFILE), Error(EINTR)]),
    call("fcntl", libc::SYS_fcntl, Descriptor, &[Error(EMFILE)]),
    call("flock", libc::SYS_flock, Descriptor, &[Error(EINTR), Error(ENOLCK)]),
    call("lseek", libc::SYS_lseek, Descriptor, &[Error(EIO)]),
    call("statx", libc::SYS_statx, Path, &[Error(EACCES)]),
    call("newfstatat", libc::SYS_newfstatat, Path, &[Error(EACCES)]),
    call("fstat", libc::SYS_fstat, Descriptor, &[Error(EIO)]),
    call("fchmod", libc::SYS_fchmod, Descriptor, &[Error(EPERM)]),
    call("getdents64", libc::SYS_getdents64, Descriptor, &[Error(EIO)]),
    call("clone3", libc::SYS_clone3, Nothing, &[Error(EAGAIN)]),
    call("sigaltstack", libc::SYS_sigaltstack, Nothing, &[Error(ENOMEM)]),
    call(
        "sched_setaffinity",
        libc::SYS_sched_setaffinity,
        Nothing,
        &[Error(EINVAL), Error(EPERM)],
    ),
    call(
        "sched_getaffinity",
        libc::SYS_sched_getaffinity,
        Nothing,
        &[Error(EINVAL)],
    ),
    call("getrandom", libc::SYS_getrandom, Nothing, &[Error(EINTR)]),
    call(
        "io_uring_setup",
        libc::SYS_io_uring_setup,
        Nothing,
        &[Error(ENOMEM), Error(EPERM)],
    ),
    call(
        "io_uring_register",
        libc::SYS_io_uring_register,
        Descriptor,
        &[Error(ENOMEM)],
    ),
    call(
        "io_uring_enter",
        libc::SYS_io_uring_enter,
        Descriptor,
        &[Error(EINTR), Error(EBUSY)],
    ),
];
