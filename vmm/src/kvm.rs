//! KVM itself: opening it, with an answer for each way it can be missing, and a VM with what every guest of ours has.

use std::io;

use kvm_bindings::{
    KVM_API_VERSION, KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::layout;
use crate::memory::GuestMemory;

const DEVICE: &std::ffi::CStr = c"/dev/kvm";

/// Why this host's KVM cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvmError {
    /// There is none.
    #[error(
        "/dev/kvm does not exist: load KVM with `modprobe kvm_intel` or `modprobe kvm_amd`; if that fails, enable \
         virtualisation in the firmware, or nested virtualisation if this host is itself a guest"
    )]
    Missing,
    /// Not for us.
    #[error(
        "no permission to open /dev/kvm: run as root, or join the group that owns it (`usermod -aG kvm $USER`, then log in again)"
    )]
    NoPermission,
    /// It cannot be opened.
    #[error("cannot open /dev/kvm: {0}; check that the kvm module loaded without complaint (`dmesg`)")]
    Open(io::Error),
    /// It does not say what it has.
    #[error("/dev/kvm does not answer what it has ({what}): {source}; look at the host's kernel log (`dmesg`)")]
    Ask {
        /// What it was asked for.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A KVM from before 2007.
    #[error("/dev/kvm speaks version {0} of KVM's interface, 12 is needed: use a Linux kernel of 5.10 or later")]
    Version(i32),
    /// Something is missing from it.
    #[error("this host's KVM has no {0}: use a Linux kernel of 5.10 or later")]
    Capability(&'static str),
}

/// A call that KVM refused.
#[derive(Debug, thiserror::Error)]
#[error("KVM cannot {what}: {source}")]
pub struct CallError {
    /// What was asked of it.
    pub what: &'static str,
    /// What it said.
    pub source: kvm_ioctls::Error,
}

/// For `map_err`: names the call.
pub(crate) fn refused(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> CallError {
    move |source| CallError { what, source }
}

/// What we use, and how each is called in KVM's documentation.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Opens /dev/kvm and checks that it has what we use.
///
/// # Errors
/// See [`KvmError`].
pub fn open() -> Result<Kvm, KvmError> {
    open_without(|_| false)
}

/// As [`open`], but for the capabilities that `unneeded` says need not be there, by their numbers.
///
/// # Errors
/// See [`KvmError`].
pub fn open_without(unneeded: impl Fn(u32) -> bool) -> Result<Kvm, KvmError> {
    let kvm = Kvm::new_with_path(DEVICE).map_err(|e| open_error(e.errno()))?;
    let answer = |what, answer: i32| match answer {
        ..0 => Err(KvmError::Ask {
            what,
            source: io::Error::last_os_error(),
        }),
        answer => Ok(answer),
    };
    let version = answer("its version", kvm.get_api_version())?;
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        return Err(KvmError::Version(version));
    }
    for (cap, name) in NEEDED {
        if !unneeded(cap as u32) && answer(name, kvm.check_extension_int(cap))? == 0 {
            return Err(KvmError::Capability(name));
        }
    }
    Ok(kvm)
}

fn open_error(errno: i32) -> KvmError {
    match errno {
        libc::ENOENT => KvmError::Missing,
        libc::EACCES | libc::EPERM => KvmError::NoPermission,
        errno => KvmError::Open(io::Error::from_raw_os_error(errno)),
    }
}

/// A VM with `memory`, interrupt controllers and a timer; it logs writes to memory if `log_dirty` says so.
///
/// # Errors
/// The call that KVM refused.
pub fn create_vm(kvm: &Kvm, memory: &GuestMemory, log_dirty: bool) -> Result<VmFd, CallError> {
    let vm = kvm.create_vm().map_err(refused("create a VM"))?;
    vm.set_identity_map_address(layout::IDENTITY_MAP)
        .map_err(refused("set the identity map's address"))?;
    vm.set_tss_address(layout::TSS)
        .map_err(refused("set the TSS address"))?;
    vm.create_irq_chip()
        .map_err(refused("create the interrupt controllers"))?;
    // The speaker's port is the timer's too: KVM answers it instead of bothering us.
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(pit).map_err(refused("create the timer"))?;
    for (slot, (guest_phys_addr, memory_size, userspace_addr)) in (0..).zip(memory.slots()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: if log_dirty { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr,
            memory_size,
            userspace_addr,
        };
        add_region(&vm, region).map_err(refused("map guest memory"))?;
    }
    Ok(vm)
}

#[expect(unsafe_code, reason = "the ioctl hands KVM an address range of this process")]
fn add_region(vm: &VmFd, region: kvm_userspace_memory_region) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: the region is a live mapping of GuestMemory's, and no two of its regions overlap. Should it be unmapped before the
    // VM is gone, KVM learns of it (MMU notifiers) and a guest access fails; it never reaches other memory of ours, since
    // GuestMemory is dropped after the vCPUs have stopped.
    unsafe { vm.set_user_memory_region(region) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_to_have_no_kvm_has_its_own_line() {
        let line = |errno| open_error(errno).to_string();
        assert!(line(libc::ENOENT).starts_with("/dev/kvm does not exist: load KVM"));
        assert!(line(libc::EACCES).starts_with("no permission to open /dev/kvm: run as root"));
        assert!(line(libc::ENODEV).starts_with("cannot open /dev/kvm: No such device"));
        assert!(
            [line(libc::ENOENT), line(libc::EACCES), line(libc::ENODEV)]
                .iter()
                .all(|line| !line.contains('\n'))
        );
    }
}
