//! Static CPU templates, by Firecracker's names: a guest sees an older processor than its host's, and the same on different hosts.
//!
//! | template | for hosts | the guest's processor | what is said of attacks |
//! |---|---|---|---|
//! | C3 | Intel's Skylake to Sapphire Rapids | Ivy Bridge, as of Amazon's C3 | by KVM, of this host |
//! | T2 | Intel's Skylake to Sapphire Rapids | Haswell, as of Amazon's T2 | by KVM, of this host |
//! | T2S | Skylake and Cascade Lake | likewise | what holds on both |
//! | T2CL | Cascade Lake to Sapphire Rapids | likewise | of this host |
//! | T2A | AMD's Milan | AMD's own, with T2's features | by KVM, of this host |
//!
//! A template is a list of features (`spec.rs`), and its guest is shown those of them that KVM offers: what is not on the list is
//! taken away, so a host that is newer than the list shows nothing more (Firecracker, which names what it takes away, stops at Ice
//! Lake). Nothing is promised that the host does not have; what of
//! the list it lacks is told as a warning. T2, T2S, T2CL and T2A have one list: programs choose the same instructions on all.
//!
//! A kernel chooses its mitigations by vendor, family and model too. The Intel templates show Haswell's or Ivy Bridge's, as Amazon's
//! instances do and Firecracker, that the hosts look alike. T2A is for one model, and leaves its family and model: of the family that
//! Firecracker gives it no AMD processor was made for two decades, and a kernel would not look for what ails a Milan.
//!
//! Caches, brand, frequencies and the sizes of saved state stay the host's. A feature that is hidden is hidden, not switched off:
//! templates make guests portable, and no safer.

mod spec;

use std::fmt;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::custom::register;
use spec::{Since, WORDS, arch_capabilities};

/// A template by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the module's table")]
pub enum Template {
    C3,
    T2,
    T2S,
    T2CL,
    T2A,
}

/// Why a template cannot be had on this host. The first sentences are Firecracker's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// Another vendor's processor.
    #[error(
        "CPU vendor mismatched between actual CPU and CPU template. {template:?} is for {wanted}, and this host's CPU is \
         {host}: name another cpu_template, or none"
    )]
    Vendor {
        /// The template.
        template: Template,
        /// Whose processors it is for.
        wanted: &'static str,
        /// This host's.
        host: HostCpu,
    },
    /// Another processor of the vendor's.
    #[error(
        "The current CPU model is not permitted to apply the CPU template. {template:?} is for {}, and this host's CPU is \
         {host}: name another cpu_template, or none",
        template.hosts()
    )]
    Model {
        /// The template.
        template: Template,
        /// This host's.
        host: HostCpu,
    },
}

const INTEL: &str = "GenuineIntel";
const AMD: &str = "AuthenticAMD";

/// A processor as leaf 1 has it in EAX: Intel SDM vol. 2A, CPUID, "Version Information".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    family: u32,
    model: u32,
    stepping: u32,
}

impl Version {
    const IVY_BRIDGE: Self = Self::new(6, 0x3e, 4);
    const HASWELL: Self = Self::new(6, 0x3f, 2);
    /// The rest of EAX is reserved.
    const MASK: u32 = 0x0fff_3fff;

    const fn new(family: u32, model: u32, stepping: u32) -> Self {
        Self {
            family,
            model,
            stepping,
        }
    }

    fn of(eax: u32) -> Self {
        let family = eax >> 8 & 0xf;
        let extended = if matches!(family, 0x6 | 0xf) {
            eax >> 12 & 0xf0
        } else {
            0
        };
        Self {
            family: family + if family == 0xf { eax >> 20 & 0xff } else { 0 },
            model: eax >> 4 & 0xf | extended,
            stepping: eax & 0xf,
        }
    }

    /// Of family 6 only, which needs no extension.
    fn eax(self) -> u32 {
        (self.model & 0xf0) << 12 | self.family << 8 | (self.model & 0xf) << 4 | self.stepping
    }

    fn is_skylake(self) -> bool {
        (self.family, self.model) == (6, 0x55) && self.stepping <= 4
    }

    /// Intel gave it Skylake's model, and later steppings.
    fn is_cascade_lake(self) -> bool {
        (self.family, self.model) == (6, 0x55) && matches!(self.stepping, 5..=7)
    }

    /// Ice Lake and Sapphire Rapids.
    fn is_later(self) -> bool {
        self.family == 6 && matches!(self.model, 0x6a | 0x8f)
    }

    fn is_milan(self) -> bool {
        (self.family, self.model) == (0x19, 0x01)
    }
}

/// This host's processor, as KVM passes it on to guests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostCpu {
    vendor: String,
    brand: String,
    version: Version,
}

impl HostCpu {
    fn of(supported: &CpuId) -> Self {
        let leaf = |function| supported.as_slice().iter().find(|leaf| leaf.function == function);
        let text = |registers: Vec<u32>| {
            let bytes = registers
                .into_iter()
                .flat_map(u32::to_le_bytes)
                .take_while(|&byte| byte != 0);
            String::from_utf8_lossy(&bytes.collect::<Vec<_>>()).trim().to_owned()
        };
        let brand = (0x8000_0002..=0x8000_0004).filter_map(leaf);
        Self {
            vendor: text(leaf(0).map_or(Vec::new(), |leaf| vec![leaf.ebx, leaf.edx, leaf.ecx])),
            brand: text(
                brand
                    .flat_map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
                    .collect(),
            ),
            version: Version::of(leaf(1).map_or(0, |leaf| leaf.eax)),
        }
    }
}

impl fmt::Display for HostCpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vendor, brand, version } = self;
        let Version {
            family,
            model,
            stepping,
        } = version;
        write!(
            f,
            "{brand:?} ({vendor}, family {family:#x}, model {model:#x}, stepping {stepping})"
        )
    }
}

impl Template {
    fn vendor(self) -> &'static str {
        match self {
            Self::C3 | Self::T2 | Self::T2S | Self::T2CL => INTEL,
            Self::T2A => AMD,
        }
    }

    /// The processors that it is for, in words.
    fn hosts(self) -> &'static str {
        match self {
            Self::C3 | Self::T2 => "Intel's Skylake, Cascade Lake, Ice Lake and Sapphire Rapids servers",
            Self::T2S => "Intel's Skylake and Cascade Lake servers",
            Self::T2CL => "Intel's Cascade Lake, Ice Lake and Sapphire Rapids servers",
            Self::T2A => "AMD's Milan",
        }
    }

    fn is_for(self, host: Version) -> bool {
        match self {
            Self::C3 | Self::T2 => host.is_skylake() || host.is_cascade_lake() || host.is_later(),
            Self::T2S => host.is_skylake() || host.is_cascade_lake(),
            Self::T2CL => host.is_cascade_lake() || host.is_later(),
            Self::T2A => host.is_milan(),
        }
    }

    /// The last of its processor's features.
    fn level(self) -> Since {
        match self {
            Self::C3 => Since::IvyBridge,
            Self::T2 | Self::T2S | Self::T2CL | Self::T2A => Since::Haswell,
        }
    }

    /// Who the guest's processor says it is, if not the host's.
    fn version(self) -> Option<Version> {
        match self {
            Self::C3 => Some(Version::IVY_BRIDGE),
            Self::T2 | Self::T2S | Self::T2CL => Some(Version::HASWELL),
            Self::T2A => None,
        }
    }

    /// Takes out of `cpuid`, from [`super::cpuid::supported`], what the template has not. What the user should know is returned.
    ///
    /// # Errors
    /// A host that it is not for.
    pub fn change_cpuid(self, cpuid: &mut CpuId) -> Result<Vec<String>, TemplateError> {
        let host = HostCpu::of(cpuid);
        if host.vendor != self.vendor() {
            return Err(TemplateError::Vendor {
                template: self,
                wanted: self.vendor(),
                host,
            });
        }
        if !self.is_for(host.version) {
            return Err(TemplateError::Model { template: self, host });
        }
        let mut lacking = Vec::new();
        for word in &WORDS {
            let mut leaves = cpuid.as_mut_slice().iter_mut();
            let found = leaves.find(|leaf| (leaf.function, leaf.index) == (word.leaf, word.subleaf));
            let mut absent = kvm_cpuid_entry2::default();
            let value = register(found.unwrap_or(&mut absent), word.register);
            let is_shown = |since| since == Since::Beyond || since <= self.level();
            let shown = word.features.iter().filter(|feature| is_shown(feature.since));
            let lacks = shown
                .clone()
                .filter(|f| f.since != Since::Beyond && *value & f.mask() == 0);
            lacking.extend(lacks.map(|feature| feature.name));
            *value &= shown.fold(0, |mask, feature| mask | feature.mask());
        }
        let mut leaves = cpuid.as_mut_slice().iter_mut();
        if let (Some(version), Some(leaf)) = (self.version(), leaves.find(|leaf| leaf.function == 1)) {
            leaf.eax = leaf.eax & !Version::MASK | version.eax();
        }
        let mut warnings = Vec::new();
        if !lacking.is_empty() {
            let lacking = lacking.join(", ");
            warnings.push(format!(
                "cpu_template {self:?}: of the template's features this host's KVM lacks {lacking}; its guests on other hosts may have them"
            ));
        }
        if self == Self::C3 && host.version.is_skylake() {
            warnings.push(
                "cpu_template C3: this processor does not say that it is safe from MMIO stale data, and a kernel that takes it for \
                 an Ivy Bridge does nothing against it"
                    .to_owned(),
            );
        }
        Ok(warnings)
    }

    /// The model-specific register that it changes, if any: its number, the bits of its value that stay, and those that are set.
    pub(super) fn msr(self) -> Option<(u32, u64, u64)> {
        use arch_capabilities::{MSR, T2CL_KEEPS, T2S_KEEPS, T2S_SETS};
        match self {
            Self::T2S => Some((MSR, T2S_KEEPS, T2S_SETS)),
            Self::T2CL => Some((MSR, T2CL_KEEPS, 0)),
            Self::C3 | Self::T2 | Self::T2A => None,
        }
    }
}

#[cfg(test)]
mod tests;
