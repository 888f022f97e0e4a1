//! What KVM must be told of a vCPU before it runs, whatever it boots: CPUID, model-specific registers, local APIC.
//!
//! General and segment registers depend on how the kernel is booted, and are the VMM's. [`apply`] does all of it; the
//! parts are public for those who need to change one.

pub mod cpuid;
pub mod custom;
pub mod lapic;
pub mod msrs;
pub mod processor;
pub mod template;

use kvm_bindings::CpuId;
use kvm_ioctls::VcpuFd;

pub use cpuid::Topology;
pub use custom::CpuConfig;
pub use processor::{Processor, ProcessorError};
pub use template::Template;

/// Why a vCPU could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// KVM refused a call.
    #[error("cannot {what} of vCPU {index}: {source}")]
    Kvm {
        /// The vCPU.
        index: u32,
        /// The step.
        what: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// KVM refused one model-specific register, and with it all that follow.
    #[error("cannot set MSR {msr:#x} of vCPU {index}: this KVM does not take it")]
    Msr {
        /// The vCPU.
        index: u32,
        /// The register.
        msr: u32,
    },
    /// More CPUID leaves than KVM takes.
    #[error("cannot set the CPUID of vCPU {index}: it has {leaves} leaves, more than KVM takes")]
    Leaves {
        /// The vCPU.
        index: u32,
        /// How many.
        leaves: usize,
    },
}

/// Sets the CPUID, the boot MSRs and the local APIC of vCPU `index` of a guest that has an in-kernel interrupt
/// controller. `supported` is the whole guest's, from [`cpuid::supported`].
///
/// # Errors
/// See [`SetupError`].
pub fn apply(fd: &VcpuFd, supported: &CpuId, topology: Topology, index: u32) -> Result<(), SetupError> {
    cpuid::set(fd, supported, topology, index)?;
    msrs::set(fd, index)?;
    lapic::set(fd, index)
}
