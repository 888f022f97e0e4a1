//! What a guest's processor is made from: this host's, changed by a template or as its user wants.

use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VcpuFd};

use super::custom::{self, CpuConfig, CustomError};
use super::template::{Template, TemplateError};

/// One of them: a template and a custom configuration do not add up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Processor {
    /// What KVM offers on this host.
    #[default]
    Host,
    /// A template's.
    Template(Template),
    /// As `/cpu-config` describes it.
    Custom(CpuConfig),
}

/// Why a processor cannot be had here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessorError {
    /// The template is not for this host.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// This host has not what is to be changed.
    #[error(transparent)]
    Custom(#[from] CustomError),
    /// A register that a template changes is not there.
    #[error(
        "MSR {msr:#x} of vCPU {index} cannot be {done}, and cpu_template {template:?} changes it: use a newer Linux on the \
         host, or name another cpu_template"
    )]
    TemplateMsr {
        /// The template.
        template: Template,
        /// The vCPU.
        index: u32,
        /// The register.
        msr: u32,
        /// "read" or "set".
        done: &'static str,
    },
}

impl Processor {
    /// Whether KVM's capability `number`, which we would ask for, need not be there.
    #[must_use]
    pub fn does_without(&self, number: u32) -> bool {
        matches!(self, Self::Custom(config) if config.does_without(number))
    }

    /// Whether `kvm` has the capabilities that it has to have.
    ///
    /// # Errors
    /// The first that it lacks.
    pub fn check(&self, kvm: &Kvm) -> Result<(), ProcessorError> {
        match self {
            Self::Custom(config) => Ok(config.check(kvm)?),
            Self::Host | Self::Template(_) => Ok(()),
        }
    }

    /// Changes `cpuid`, from [`super::cpuid::supported`]; what numbers the guest's processors is written over it afterwards. What the
    /// user should know is returned.
    ///
    /// # Errors
    /// A host that the template is not for; a leaf that is not there.
    pub fn change_cpuid(&self, cpuid: &mut CpuId) -> Result<Vec<String>, ProcessorError> {
        match self {
            Self::Host => Ok(Vec::new()),
            Self::Template(template) => Ok(template.change_cpuid(cpuid)?),
            Self::Custom(config) => Ok(config.change_cpuid(cpuid).map(|()| Vec::new())?),
        }
    }

    /// Changes the model-specific registers of vCPU `index`.
    ///
    /// # Errors
    /// The first register that cannot be read or set.
    pub fn change_msrs(&self, fd: &VcpuFd, index: u32) -> Result<(), ProcessorError> {
        match self {
            Self::Host => Ok(()),
            Self::Custom(config) => Ok(config.change_msrs(fd, index)?),
            Self::Template(template) => match template.msr() {
                Some((msr, keeps, sets)) => {
                    let changed = custom::change_msr(fd, msr, |value| value & keeps | sets);
                    changed.map_err(|done| ProcessorError::TemplateMsr {
                        template: *template,
                        index,
                        msr,
                        done,
                    })
                }
                None => Ok(()),
            },
        }
    }
}
