//! The descriptor of KVM's binary statistics for one vCPU, for which kvm-ioctls has no wrapper.
#![allow(unsafe_code, reason = "one ioctl without a safe wrapper")]

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use kvm_bindings::KVMIO;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl;

vmm_sys_util::ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// `KVM_GET_STATS_FD` (Documentation/virt/kvm/api.rst, 4.133); `None` where KVM has none, before Linux 5.14.
pub(crate) fn open(fd: &VcpuFd) -> io::Result<Option<File>> {
    // SAFETY: `fd` is a vCPU's, and the ioctl takes no argument.
    let stats = unsafe { ioctl(fd, KVM_GET_STATS_FD()) };
    if stats >= 0 {
        // SAFETY: KVM has just opened it for us; nobody else has it.
        let owned = unsafe { OwnedFd::from_raw_fd(stats) };
        return Ok(Some(File::from(owned)));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // What KVM answers to an ioctl that it does not know.
        Some(libc::ENOTTY | libc::EINVAL) => Ok(None),
        _ => Err(error),
    }
}
