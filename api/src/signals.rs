//! SIGINT, SIGTERM, SIGHUP and SIGQUIT end the microVM in good order: `ending.rs` says how.
//!
//! They are blocked in every thread and waited for by one of their own, so that none of them ever interrupts a vCPU.

#![allow(unsafe_code, reason = "signal sets and sigwait have no safe wrapper")]

use std::ffi::c_int;
use std::io;
use std::mem::MaybeUninit;

use seccomp::Role;

use crate::exit;

const ENDING: [c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// The signals blocked by [`block`].
#[derive(Clone, Copy)]
pub struct Blocked(libc::sigset_t);

/// Blocks the signals in the calling thread, and so in every thread it starts. One that the process was started with
/// ignored (`nohup`) stays ignored.
///
/// # Errors
/// What the system says.
pub fn block() -> io::Result<Blocked> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set it is given.
    let mut set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init()
    };
    for signal in ENDING {
        if !is_ignored(signal)? {
            // SAFETY: the set is initialised and the number is a signal's.
            unsafe { libc::sigaddset(&raw mut set, signal) };
        }
    }
    // SAFETY: the set is initialised; the old one is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) } {
        0 => Ok(Blocked(set)),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// A write beyond the largest file that this process may write (`RLIMIT_FSIZE`) fails, as on a full disk, and does not end it
/// (SIGXFSZ): the guest gets an I/O error, the log loses a line.
pub fn ignore_file_size_limit() {
    // SAFETY: ignoring a signal runs no handler; the number is a signal's, so it cannot fail.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

fn is_ignored(signal: c_int) -> io::Result<bool> {
    let mut old = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: no new action is given; the old one is written whole where the call succeeds.
    let old = unsafe {
        if libc::sigaction(signal, std::ptr::null(), old.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        old.assume_init()
    };
    Ok(old.sa_sigaction == libc::SIG_IGN)
}

/// Calls `on_signal` for each of the signals, on a thread named `signals`, for as long as the process lives.
///
/// # Errors
/// The thread could not be started.
pub fn watch(blocked: Blocked, mut on_signal: impl FnMut(c_int) + Send + 'static) -> io::Result<()> {
    let wait = move || {
        if let Err(error) = seccomp::enter(Role::Vmm) {
            // As everywhere: it is confined, or there is no microVM.
            exit::say(&error.to_string());
            std::process::exit(exit::FAILED.into());
        }
        loop {
            let mut signal = 0;
            // SAFETY: the set is initialised, and `signal` is writable.
            if unsafe { libc::sigwait(&raw const blocked.0, &raw mut signal) } == 0 {
                on_signal(signal);
            }
        }
    };
    vmm::thread("signals").spawn(wait).map(drop)
}

/// A signal's name.
#[must_use]
pub fn name(signal: c_int) -> &'static str {
    match signal {
        libc::SIGINT => "SIGINT",
        libc::SIGTERM => "SIGTERM",
        libc::SIGHUP => "SIGHUP",
        libc::SIGQUIT => "SIGQUIT",
        _ => "a signal",
    }
}
