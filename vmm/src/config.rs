//! What a microVM is made of: the shapes of Firecracker's `/machine-config` and `/boot-source`, and what each may hold.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
pub use vcpu::pin::Pinning;

/// Largest number of vCPUs.
pub const MAX_VCPUS: u8 = 32;

/// `/machine-config`, as Firecracker has it; fields we do not have yet may only hold their default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// 1 to [`MAX_VCPUS`].
    pub vcpu_count: u8,
    /// Guest memory, in MiB.
    pub mem_size_mib: usize,
    /// Whether vCPUs are presented as hardware threads of shared cores.
    #[serde(default)]
    pub smt: bool,
    /// Whether KVM logs dirty pages.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Huge pages behind guest memory.
    #[serde(default)]
    pub huge_pages: HugePages,
}

/// Huge pages behind guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// As the host is set.
    #[default]
    None,
    /// `madvise(MADV_HUGEPAGE)`.
    Transparent,
    /// hugetlbfs pages of 2 MiB.
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

/// `PATCH /machine-config`: the same fields, each optional.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "documented at MachineConfig, name for name")]
pub struct MachineConfigUpdate {
    pub vcpu_count: Option<u8>,
    pub mem_size_mib: Option<usize>,
    pub smt: Option<bool>,
    pub track_dirty_pages: Option<bool>,
    pub huge_pages: Option<HugePages>,
}

/// `/boot-source`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// An ELF vmlinux (64-bit protocol or PVH) or a bzImage.
    pub kernel_image_path: PathBuf,
    /// The kernel's command line; Firecracker's default where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
    /// Initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<PathBuf>,
}

/// `GET /vm/config`: everything configured, kebab-case keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VmConfig {
    /// The machine.
    pub machine_config: Option<MachineConfig>,
    /// What it boots.
    pub boot_source: Option<BootSource>,
}
