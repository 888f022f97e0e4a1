//! A network of a test's own, where taps come and go that nobody else sees.

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Moves the calling thread into a network of its own. What it starts is in there too.
///
/// # Errors
/// Who may not do that, or that there are no taps here.
pub fn own() -> Result<(), String> {
    // SAFETY: a new network namespace takes nothing from the thread that memory or descriptors rely on.
    #[expect(unsafe_code, reason = "unshare can take away what a thread shares")]
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.map_err(|error| format!("no network namespace: {error}"))?;
    std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/net/tun")
        .map_err(|error| format!("/dev/net/tun: {error}"))
        .map(drop)
}
