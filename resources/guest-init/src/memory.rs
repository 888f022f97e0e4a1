//! Memory that the guest uses, and does without.

use std::io;

use crate::modules;

/// Writes to `mib` MiB, each page of them, and frees them: the guest has them free, and the host has them in use.
pub fn touch(mib: usize) {
    // A value that the kernel does not have ready in pages.
    std::hint::black_box(vec![1u8; mib << 20]);
}

/// Loads the driver of the balloon.
pub fn load_balloon() -> io::Result<()> {
    modules::load("virtio_mmio")?;
    modules::load("virtio_balloon")
}
