//! The signal that takes a vCPU thread out of `KVM_RUN`, and what other signals may do to that thread: nothing.
#![allow(
    unsafe_code,
    reason = "a thread's signal mask has no safe wrapper that sets it whole"
)]

use std::io;
use std::sync::{Once, OnceLock};

use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// The signal: real-time, so that no shell or service manager sends it.
pub(crate) fn number() -> c_int {
    SIGRTMIN()
}

/// Installs the handler, once for the process. Without one the signal would end it. It does nothing, since to interrupt
/// `KVM_RUN` is all that is asked; and it has no SA_RESTART, lest the kernel go back into `KVM_RUN` behind our back.
pub(crate) fn install() -> io::Result<()> {
    extern "C" fn nothing(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}
    static ONCE: Once = Once::new();
    static FAILED: OnceLock<i32> = OnceLock::new();
    ONCE.call_once(|| {
        if let Err(error) = register_signal_handler(number(), nothing) {
            let _ = FAILED.set(error.errno());
        }
    });
    FAILED
        .get()
        .map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(*errno)))
}

/// Sets the calling thread's signal mask to a vCPU's: the kick comes through, and what the thread itself may cause (a
/// fault, an abort, a system call that is not allowed). All else, SIGINT and SIGTERM too, is for other threads: each
/// would be an exit from the guest that nobody asked for.
pub(crate) fn mask() -> io::Result<()> {
    use libc::{SIG_SETMASK, SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP};
    // SAFETY: a sigset_t of zeroes is a valid one; sigfillset, sigdelset and pthread_sigmask are given a pointer to it,
    // and signals that exist.
    let error = unsafe {
        let mut mask = std::mem::zeroed();
        libc::sigfillset(&raw mut mask);
        for through in [number(), SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGSYS, SIGTRAP] {
            libc::sigdelset(&raw mut mask, through);
        }
        libc::pthread_sigmask(SIG_SETMASK, &raw const mask, std::ptr::null_mut())
    };
    if error == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(error))
    }
}
