//! Where what is not trusted enters, given whatever a fuzzer likes: see fuzz/README.md. With the feature `fuzzing` only.
//!
//! Each of these takes one input and panics where a promise is broken. What it does depends on the input alone, as far as the host
//! lets it: nothing of one input is left for the next, and no time passes but by the input.
//!
//! The bytes are not thrown like dice, of which a device would take hundreds for one buffer: they are a program of short steps, of
//! which a fuzzer can change, cut out or put together any without moving the sense of the others.

mod input;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use rustix::fs::{MemfdFlags, memfd_create};

use crate::{boot, devices, mmds};
pub(crate) use input::Input;

/// A kernel and the length of an initrd, put into guest memory.
pub fn loaders(data: &[u8]) {
    boot::fuzz::run(Input::new(data));
}

/// Registers, rings and buffers of any virtio device.
pub fn virtio(data: &[u8]) {
    devices::virtio::fuzz::run(Input::new(data));
}

/// Packets of a guest's, over rings that are as they should be, and programs of the host's at the other end.
pub fn vsock(data: &[u8]) {
    devices::virtio::vsock::fuzz::run(Input::new(data));
}

/// Frames of a guest that wants to read metadata.
pub fn mmds(data: &[u8]) {
    mmds::stack::fuzz::run(Input::new(data));
}

/// Ports of the serial console, of the keyboard controller, and of ACPI's registers.
pub fn ports(data: &[u8]) {
    devices::fuzz::run(Input::new(data));
}

/// A file of `len` zeros that no directory has, and a path to it.
pub(crate) fn file(len: u64) -> (File, PathBuf) {
    let file = File::from(memfd_create("input", MemfdFlags::CLOEXEC).expect("there are descriptors"));
    file.set_len(len).expect("a file in memory can be longer");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    (file, path.into())
}
