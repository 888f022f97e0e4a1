//! All of a microVM's configuration: what `GET /vm/config` answers, and what `--config-file` holds.

use serde::Serialize;

use crate::mmds::config::MmdsConfig;

use super::{
    Balloon, BootSource, CpuConfig, Drive, Entropy, Logger, MachineConfig, Metrics, NetworkInterface, Serial, Vsock,
};

/// `GET /vm/config`: Firecracker's sections, in its order; one that is not configured is null or empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub struct VmConfig {
    /// The balloon.
    pub balloon: Option<Balloon>,
    /// Drives, the root first, the others in the order they were put.
    pub drives: Vec<Drive>,
    /// What it boots.
    pub boot_source: Option<BootSource>,
    /// What is changed of the processor, in place of a template.
    pub cpu_config: Option<CpuConfig>,
    /// The log, as far as the API or the configuration file chose it.
    pub logger: Option<Logger>,
    /// The machine.
    pub machine_config: Option<MachineConfig>,
    /// The metrics' file.
    pub metrics: Option<Metrics>,
    /// The metadata service.
    pub mmds_config: Option<MmdsConfig>,
    /// Interfaces, in the order they were put.
    pub network_interfaces: Vec<NetworkInterface>,
    /// The socket device.
    pub vsock: Option<Vsock>,
    /// The source of randomness.
    pub entropy: Option<Entropy>,
    /// The serial port's output.
    pub serial: Option<Serial>,
}
