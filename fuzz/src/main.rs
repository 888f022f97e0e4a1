//! A target under libFuzzer: the one that `CHRONOVISOR_FUZZ` names. Arguments are libFuzzer's.

#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

static TARGET: OnceLock<fuzz::Target> = OnceLock::new();

fn begin() {
    let name = std::env::var("CHRONOVISOR_FUZZ").unwrap_or_default();
    let target = fuzz::named(&name).unwrap_or_else(|| panic!("CHRONOVISOR_FUZZ={name:?}: no such target"));
    TARGET.get_or_init(|| target);
    #[expect(unsafe_code, reason = "a plain system call that no crate of ours wraps")]
    // SAFETY: no handler: the signal is ignored, as Rust's own start, which libFuzzer's takes the place of, has it.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
    }
    // The host would fill 2 MiB with zeros for the first byte that a device writes.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
}

fuzz_target!(init: begin(), |data: &[u8]| {
    if let Some(target) = TARGET.get() {
        (target.run)(data);
    }
});
