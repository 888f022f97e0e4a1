//! A second view of a vCPU's `kvm_run` page.
//!
//! kvm-ioctls keeps its own mapping behind `&mut VcpuFd`, which belongs to the vCPU thread and which a `VcpuExit` keeps
//! borrowed. Two things need the page all the same: whoever kicks the vCPU sets `immediate_exit` from another thread,
//! and the exit handling reads fields that `VcpuExit` leaves out. KVM maps the same page as often as asked, so both get
//! a mapping of their own.
#![allow(unsafe_code, reason = "maps the page and reads a union that KVM fills in")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU8;

use kvm_bindings::{KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, kvm_run};
use kvm_ioctls::VcpuFd;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::VcpuEnd;

/// The mapping. It outlives the vCPU's descriptor, so a late kick still has a page to write to.
#[derive(Debug)]
pub(crate) struct RunPage(NonNull<kvm_run>);

// SAFETY: the pointer is to a mapping that lives as long as the value. Any thread may use `immediate_exit`, which is
// atomic; the other accessors say that they are the vCPU thread's, and are volatile reads of plain integers, so that a
// caller who breaks that rule gets a stale value.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps the `kvm_run` of the vCPU behind `fd`.
    pub(crate) fn map(fd: &VcpuFd) -> io::Result<Self> {
        // SAFETY: `fd` is open for as long as it is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        // SAFETY: a new mapping, at an address of the kernel's choice, touches no memory that is in use.
        let page = unsafe {
            mmap(
                std::ptr::null_mut(),
                size_of::<kvm_run>(),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                0,
            )
        }?;
        Ok(Self(NonNull::new(page.cast()).expect("mmap gives no null page")))
    }

    /// A page of our own that no KVM writes to, holding `run`: for the tests of who reads it.
    #[cfg(test)]
    pub(crate) fn of(run: kvm_run) -> Self {
        // SAFETY: as in `map`.
        let page = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                size_of::<kvm_run>(),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }
        .expect("a page");
        let page: NonNull<kvm_run> = NonNull::new(page.cast()).expect("mmap gives no null page");
        // SAFETY: the mapping is large enough, page-aligned and nobody else's.
        unsafe { page.write(run) };
        Self(page)
    }

    /// The byte that makes `KVM_RUN` return `EINTR` before it enters the guest. See [`crate::kick`] for who writes it
    /// when.
    pub(crate) fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte is in the mapping, is aligned as every byte is, and in this process is only accessed as an
        // atomic.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.0.as_ptr()).immediate_exit) }
    }

    /// The last exit's reason. For the vCPU thread, after `KVM_RUN` returned 0.
    pub(crate) fn exit_reason(&self) -> u32 {
        // SAFETY: in the mapping and aligned; an integer, valid whatever its bits.
        unsafe { (&raw const (*self.0.as_ptr()).exit_reason).read_volatile() }
    }

    /// The width of one access of a `KVM_EXIT_IO`, whose data may hold several. For the vCPU thread, after that exit.
    pub(crate) fn io_size(&self) -> u8 {
        // SAFETY: in the mapping and aligned; an integer, valid whatever its bits.
        unsafe { (&raw const (*self.0.as_ptr()).__bindgen_anon_1.io.size).read_volatile() }
    }

    /// What KVM says of a `KVM_EXIT_INTERNAL_ERROR`, but for the instruction pointer. For the vCPU thread, after that
    /// exit.
    pub(crate) fn internal_error(&self) -> VcpuEnd {
        // SAFETY: in the mapping and aligned; integers and arrays and a union of them, valid whatever their bits.
        let failure = unsafe { (&raw const (*self.0.as_ptr()).__bindgen_anon_1.emulation_failure).read_volatile() };
        let (mut insn, mut insn_len) = ([0; 15], 0);
        // `emulation_failure` shares its first words with `internal`, the shape of every other suberror. Flags are
        // valid when ndata counts them (Documentation/virt/kvm/api.rst, KVM_EXIT_INTERNAL_ERROR; arch/x86/kvm/x86.c,
        // prepare_emulation_failure_exit).
        let flagged = failure.suberror == KVM_INTERNAL_ERROR_EMULATION
            && failure.ndata > 0
            && failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
        if flagged {
            // SAFETY: the flag says that KVM filled this member in; it is made of bytes.
            let bytes = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
            insn = bytes.insn_bytes;
            insn_len = bytes.insn_size.min(15);
        }
        VcpuEnd::InternalError {
            suberror: failure.suberror,
            rip: 0,
            insn,
            insn_len,
        }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and `self` was the last to use it.
        let unmapped = unsafe { munmap(self.0.as_ptr().cast(), size_of::<kvm_run>()) };
        debug_assert!(unmapped.is_ok());
    }
}
