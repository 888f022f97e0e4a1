//! What is fuzzed: every place where bytes of a guest, of a client, of a file or of the kernel are taken apart.
//!
//! A target is a function of an input; nothing here knows of an engine. `cargo xtask fuzz` runs each under libFuzzer (main.rs);
//! tests/replay.rs gives it, as an ordinary test, all inputs that are kept: see README.md.

mod stats;

/// A target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, which its folders have too.
    pub name: &'static str,
    /// Takes an input, and panics where a promise is broken.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: &[Target] = &[
    target("loaders", vmm::fuzz::loaders),
    target("virtio", vmm::fuzz::virtio),
    target("vsock", vmm::fuzz::vsock),
    target("mmds", vmm::fuzz::mmds),
    target("ports", vmm::fuzz::ports),
    target("http", api::fuzz::http),
    target("config_file", api::fuzz::config_file),
    target("stats", stats::run),
];

const fn target(name: &'static str, run: fn(&[u8])) -> Target {
    Target { name, run }
}

/// The target of that name.
#[must_use]
pub fn named(name: &str) -> Option<Target> {
    TARGETS.iter().copied().find(|target| target.name == name)
}
