//! What a microVM is made of: the shapes of Firecracker's `/machine-config` and `/boot-source`, and what each may hold.
//!
//! A device's shape is in `device.rs`, what goes together with what in `devices.rs`, where the outputs go in `outputs.rs`, and all
//! of it together in `vm.rs`.

mod device;
mod devices;
mod outputs;
mod vm;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
pub use vcpu::pin::Pinning;
pub use vcpu::setup::{CpuConfig, Processor, Template};

pub use device::{
    Balloon, BalloonStatsUpdate, BalloonUpdate, CacheType, Drive, DriveUpdate, Entropy, IoEngine, MacAddr,
    NetworkInterface, NetworkInterfaceUpdate, RateLimiter, TokenBucket, Vsock,
};
pub use devices::{BalloonRefused, Devices, DriveRefused, InterfaceRefused, VsockRefused};
pub use outputs::{Level, Logger, Metrics, Serial};
pub use vm::VmConfig;

/// Largest number of vCPUs.
pub const MAX_VCPUS: u8 = 32;

/// `/machine-config`, as Firecracker has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// How many vCPUs: with `smt` 1, or an even number.
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = MAX_VCPUS)))]
    pub vcpu_count: u8,
    /// Guest memory, in MiB.
    #[cfg_attr(feature = "schema", schemars(range(min = 1)))]
    pub mem_size_mib: usize,
    /// Whether vCPUs 2n and 2n+1 are presented as hardware threads of one core.
    #[serde(default)]
    pub smt: bool,
    /// Whether KVM logs which pages of guest memory are written to.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Huge pages behind guest memory.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// What the guest's processor is made from. As in Firecracker: left out, it stays as it was; and there being none is not shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
}

impl Default for MachineConfig {
    /// Firecracker's: one vCPU, 128 MiB.
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
            cpu_template: None,
        }
    }
}

/// Why a machine configuration is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Too few or too many. Firecracker's words.
    #[error(
        "The number of vCPUs must be greater than 0, less than {MAX_VCPUS} and must be 1 or an even number if SMT is enabled."
    )]
    VcpuCount(u8),
    /// No memory, or half a huge page. Firecracker's words.
    #[error("The memory size (MiB) is either 0, or not a multiple of the configured page size.")]
    MemSize(usize),
    /// Less memory than the balloon is to have. Firecracker's words.
    #[error("The memory size (MiB) is smaller than the previously set balloon device target size.")]
    LessThanBalloon(usize),
    /// Pages of 2 MiB cannot be given back one by one. Firecracker's words.
    #[error("Firecracker's huge pages support is incompatible with memory ballooning.")]
    BalloonAndHugePages,
    /// A template for another architecture.
    #[error("cpu_template V1N1 is for ARM's Neoverse V1, and this is x86-64: name another, or \"None\"")]
    ArmTemplate,
}

impl MachineConfig {
    /// Whether it can be had. How much memory the host has is seen at Start.
    ///
    /// # Errors
    /// The first field at fault.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.vcpu_count == 0 || self.vcpu_count > MAX_VCPUS {
            return Err(ConfigError::VcpuCount(self.vcpu_count));
        }
        if self.smt && self.vcpu_count > 1 && self.vcpu_count % 2 == 1 {
            return Err(ConfigError::VcpuCount(self.vcpu_count));
        }
        let granule = if self.huge_pages == HugePages::Hugetlbfs2M {
            2
        } else {
            1
        };
        if self.mem_size_mib == 0 || !self.mem_size_mib.is_multiple_of(granule) {
            return Err(ConfigError::MemSize(self.mem_size_mib));
        }
        self.processor().map(|_| ())
    }

    /// What it says of the processor, if anything.
    ///
    /// # Errors
    /// A template for another architecture.
    pub fn processor(&self) -> Result<Option<Processor>, ConfigError> {
        self.cpu_template.map(CpuTemplate::processor).transpose()
    }

    /// With the fields that `update` has.
    #[must_use]
    pub fn updated(&self, update: &MachineConfigUpdate) -> Self {
        Self {
            vcpu_count: update.vcpu_count.unwrap_or(self.vcpu_count),
            mem_size_mib: update.mem_size_mib.unwrap_or(self.mem_size_mib),
            smt: update.smt.unwrap_or(self.smt),
            track_dirty_pages: update.track_dirty_pages.unwrap_or(self.track_dirty_pages),
            huge_pages: update.huge_pages.unwrap_or(self.huge_pages),
            cpu_template: update.cpu_template.or(self.cpu_template),
        }
    }
}

/// Huge pages behind guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum HugePages {
    /// Nothing asked for, which is no reason to start slowly: transparent huge pages where the host gives them on request.
    #[default]
    None,
    /// Transparent huge pages, asked for by `madvise(MADV_HUGEPAGE)`.
    Transparent,
    /// hugetlbfs pages of 2 MiB.
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

/// Firecracker's static CPU templates, by name. Whether this host is one that the template is for is seen at Start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, reason = "vcpu::setup::template says what each is for")]
pub enum CpuTemplate {
    C3,
    T2,
    T2S,
    T2CL,
    T2A,
    V1N1,
    /// All that KVM supports on this host.
    None,
}

impl CpuTemplate {
    fn processor(self) -> Result<Processor, ConfigError> {
        Ok(Processor::Template(match self {
            Self::C3 => Template::C3,
            Self::T2 => Template::T2,
            Self::T2S => Template::T2S,
            Self::T2CL => Template::T2CL,
            Self::T2A => Template::T2A,
            Self::V1N1 => return Err(ConfigError::ArmTemplate),
            Self::None => return Ok(Processor::Host),
        }))
    }

    /// The one that `processor` is made from.
    #[must_use]
    pub fn of(processor: &Processor) -> Option<Self> {
        match processor {
            Processor::Template(Template::C3) => Some(Self::C3),
            Processor::Template(Template::T2) => Some(Self::T2),
            Processor::Template(Template::T2S) => Some(Self::T2S),
            Processor::Template(Template::T2CL) => Some(Self::T2CL),
            Processor::Template(Template::T2A) => Some(Self::T2A),
            Processor::Host | Processor::Custom(_) => None,
        }
    }
}

/// `PATCH /machine-config`: the same fields, each optional.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
#[cfg_attr(feature = "schema", schemars(extend("minProperties" = 1)))]
#[expect(missing_docs, reason = "documented at MachineConfig, name for name")]
pub struct MachineConfigUpdate {
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = MAX_VCPUS)))]
    pub vcpu_count: Option<u8>,
    #[cfg_attr(feature = "schema", schemars(range(min = 1)))]
    pub mem_size_mib: Option<usize>,
    pub smt: Option<bool>,
    pub track_dirty_pages: Option<bool>,
    pub huge_pages: Option<HugePages>,
    pub cpu_template: Option<CpuTemplate>,
}

/// `/boot-source`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// An ELF vmlinux (64-bit protocol or PVH) or a bzImage.
    pub kernel_image_path: PathBuf,
    /// The kernel's command line; Firecracker's default where absent.
    #[serde(default)]
    pub boot_args: Option<String>,
    /// Initial RAM disk.
    #[serde(default)]
    pub initrd_path: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_machine_is_firecrackers() {
        let config = MachineConfig::default();
        assert_eq!(
            (config.vcpu_count, config.mem_size_mib, config.check()),
            (1, 128, Ok(()))
        );
    }

    #[test]
    fn a_machine_that_cannot_be_had_is_refused_with_what_is_wrong() {
        let refusal = |change: fn(&mut MachineConfig)| {
            let mut config = MachineConfig::default();
            change(&mut config);
            config.check().unwrap_err().to_string()
        };
        for vcpu_count in [0, 33] {
            let config = MachineConfig {
                vcpu_count,
                ..MachineConfig::default()
            };
            assert_eq!(config.check(), Err(ConfigError::VcpuCount(vcpu_count)));
        }
        assert!(
            refusal(|c| c.vcpu_count = 0).starts_with("The number of vCPUs must be greater than 0, less than 32 and")
        );
        for (mem_size_mib, huge_pages) in [(0, HugePages::None), (3, HugePages::Hugetlbfs2M)] {
            let config = MachineConfig {
                mem_size_mib,
                huge_pages,
                ..MachineConfig::default()
            };
            assert_eq!(config.check(), Err(ConfigError::MemSize(mem_size_mib)));
        }
        for vcpu_count in [3, 31] {
            let config = MachineConfig {
                vcpu_count,
                smt: true,
                ..MachineConfig::default()
            };
            assert_eq!(config.check(), Err(ConfigError::VcpuCount(vcpu_count)));
        }
        assert_eq!(
            refusal(|c| c.cpu_template = Some(CpuTemplate::V1N1)),
            "cpu_template V1N1 is for ARM's Neoverse V1, and this is x86-64: name another, or \"None\""
        );
    }

    #[test]
    fn whole_cores_and_a_lone_vcpu_may_have_smt() {
        for vcpu_count in [1, 2, 32] {
            let config = MachineConfig {
                vcpu_count,
                smt: true,
                track_dirty_pages: true,
                ..MachineConfig::default()
            };
            assert_eq!(config.check(), Ok(()), "{vcpu_count}");
        }
    }

    #[test]
    fn an_update_changes_what_it_names_and_nothing_else() {
        let update = MachineConfigUpdate {
            mem_size_mib: Some(256),
            ..Default::default()
        };
        let updated = MachineConfig::default().updated(&update);
        assert_eq!(
            updated,
            MachineConfig {
                mem_size_mib: 256,
                ..MachineConfig::default()
            }
        );
    }
}
