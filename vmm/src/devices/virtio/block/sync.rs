//! The Sync engine: `preadv` and `pwritev` between the file and guest memory, on the VMM thread.
#![allow(unsafe_code, reason = "preadv and pwritev take addresses of guest memory")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::request::Kind;

/// Does it, all of it.
///
/// # Errors
/// What the system said, or that the file ended early.
pub(super) fn run(file: &File, kind: &Kind<'_>) -> io::Result<()> {
    match kind {
        Kind::Read(at, data) => transfer(data.iovecs(), *at, |iovecs, at| {
            // SAFETY: the vectors name guest memory, which the borrow behind `data` keeps mapped, and which nothing of ours
            // takes for anything but memory that changes at any time. There are SEG_MAX of them at most, below IOV_MAX.
            unsafe { libc::preadv64(file.as_raw_fd(), iovecs.as_ptr(), count(iovecs), at) }
        }),
        Kind::Write(at, data) => transfer(data.iovecs(), *at, |iovecs, at| {
            // SAFETY: as above; the memory is only read.
            unsafe { libc::pwritev64(file.as_raw_fd(), iovecs.as_ptr(), count(iovecs), at) }
        }),
        Kind::Flush => file.sync_data(),
        Kind::Id(_) => Ok(()),
    }
}

fn count(iovecs: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(iovecs.len()).unwrap_or(libc::c_int::MAX)
}

/// Calls `step` until nothing of `iovecs` is left.
pub(super) fn transfer(
    mut iovecs: Vec<libc::iovec>,
    at: u64,
    step: impl Fn(&[libc::iovec], i64) -> isize,
) -> io::Result<()> {
    let mut at = i64::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut left = &mut iovecs[..];
    while !left.is_empty() {
        let Ok(mut done) = usize::try_from(step(left, at)) else {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        };
        if done == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends early"));
        }
        at += i64::try_from(done).unwrap_or(i64::MAX);
        while let Some(first) = left.first_mut() {
            if done < first.iov_len {
                first.iov_base = first.iov_base.cast::<u8>().wrapping_add(done).cast();
                first.iov_len -= done;
                break;
            }
            done -= first.iov_len;
            left = &mut left[1..];
        }
    }
    Ok(())
}
