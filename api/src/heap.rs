//! Gives back what starting up needed of the heap.

#![expect(unsafe_code, reason = "malloc_trim(3) has no safe wrapper")]

/// To be called once the guest runs: a command line, a configuration and a boot leave more free than a running microVM takes again.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it frees what is free already, and may be called from any thread at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}
