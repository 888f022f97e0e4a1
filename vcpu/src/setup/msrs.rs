//! The model-specific registers a kernel expects from firmware.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::SetupError;

/// The registers and their values: Intel SDM vol. 4, AMD APM vol. 2 appendix A; names as in Linux's
/// arch/x86/include/asm/msr-index.h.
const BOOT: [(u32, u64); 11] = [
    (0x174, 0),             // IA32_SYSENTER_CS
    (0x175, 0),             // IA32_SYSENTER_ESP
    (0x176, 0),             // IA32_SYSENTER_EIP
    (0xc000_0081, 0),       // STAR
    (0xc000_0082, 0),       // LSTAR
    (0xc000_0083, 0),       // CSTAR
    (0xc000_0084, 0),       // SYSCALL_MASK
    (0xc000_0102, 0),       // KERNEL_GS_BASE
    (0x10, 0),              // IA32_TSC: KVM takes a write of 0 as a start, and keeps the vCPUs' counters in step
    (0x1a0, 1),             // IA32_MISC_ENABLE: fast string operations
    (0x2ff, 1 << 11 | 0x6), // MTRRdefType: MTRRs on, memory is write-back where none says otherwise
];

/// Sets the boot MSRs of vCPU `index`.
///
/// # Errors
/// [`SetupError::Kvm`], or [`SetupError::Msr`] with the first register that KVM does not take.
pub fn set(fd: &VcpuFd, index: u32) -> Result<(), SetupError> {
    let entries = BOOT.map(|(msr, data)| kvm_msr_entry {
        index: msr,
        data,
        ..Default::default()
    });
    let msrs = Msrs::from_entries(&entries).expect("fewer entries than KVM_MAX_MSR_ENTRIES");
    let done = fd.set_msrs(&msrs).map_err(|source| SetupError::Kvm {
        index,
        what: "set the MSRs",
        source,
    })?;
    // KVM stops at the first it does not take, and returns how many it took.
    BOOT.get(done)
        .map_or(Ok(()), |&(msr, _)| Err(SetupError::Msr { index, msr }))
}
