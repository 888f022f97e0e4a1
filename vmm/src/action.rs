//! Everything that can be asked of a microVM, and when each is legal.

use std::sync::Arc;

use accounting::Account;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::affinity::{AffinityError, Place};
use crate::boot::BootError;
use crate::config::{
    Balloon, BalloonRefused, BalloonStatsUpdate, BalloonUpdate, BootSource, ConfigError, CpuConfig, Drive,
    DriveRefused, DriveUpdate, Entropy, InterfaceRefused, Logger, MachineConfig, MachineConfigUpdate, Metrics,
    NetworkInterface, NetworkInterfaceUpdate, Pinning, Serial, VmConfig, Vsock, VsockRefused,
};
use crate::devices::i8042::KeysUnread;
pub use crate::devices::virtio::balloon::{BalloonError, BalloonStats, HintingStart, HintingStatus};
use crate::devices::virtio::block::BlockError;
use crate::devices::virtio::net::NetError;
use crate::host::KvmStatus;
use crate::log::LogError;
use crate::machine::StartError;
use crate::metrics::MetricsError;
use crate::mmds;
use crate::mmds::config::MmdsConfig;
use crate::mmds::data::UpdateError;

/// A request to the VMM thread.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// `GET /`. Always legal.
    GetInfo,
    /// For `GET /host`. Always legal; before the start, while no vCPU is disturbed by it, KVM is tried out, which takes its time.
    GetKvm,
    /// `GET /vm/config`. Always legal.
    GetConfig,
    /// `GET /machine-config`. Always legal.
    GetMachineConfig,
    /// `PUT /machine-config`. Before start.
    PutMachineConfig(MachineConfig),
    /// `PATCH /machine-config`. Before start.
    PatchMachineConfig(MachineConfigUpdate),
    /// `PUT /cpu-config`. Before start.
    PutCpuConfig(CpuConfig),
    /// `PUT /boot-source`. Before start.
    PutBootSource(BootSource),
    /// `PUT /drives/{id}`. Before start.
    PutDrive(Drive),
    /// `PATCH /drives/{id}`. After start.
    PatchDrive(DriveUpdate),
    /// `PUT /network-interfaces/{id}`. Before start.
    PutInterface(NetworkInterface),
    /// `PATCH /network-interfaces/{id}`. After start.
    PatchInterface(NetworkInterfaceUpdate),
    /// `PUT /vsock`. Before start.
    PutVsock(Vsock),
    /// `PUT /entropy`. Before start.
    PutEntropy(Entropy),
    /// `PUT /balloon`. Before start.
    PutBalloon(Balloon),
    /// `GET /balloon`. Always legal.
    GetBalloon,
    /// `PATCH /balloon`. After start.
    PatchBalloon(BalloonUpdate),
    /// `GET /balloon/statistics`. After start.
    GetBalloonStats,
    /// `PATCH /balloon/statistics`. After start.
    PatchBalloonStats(BalloonStatsUpdate),
    /// `PATCH /balloon/hinting/start`. After start.
    StartHinting(HintingStart),
    /// `GET /balloon/hinting/status`. After start.
    GetHintingStatus,
    /// `PATCH /balloon/hinting/stop`. After start.
    StopHinting,
    /// `GET /mmds`. Always legal.
    GetMmds,
    /// `PUT /mmds`. Always legal.
    PutMmds(Metadata),
    /// `PATCH /mmds`. Always legal, once there is something to be patched.
    PatchMmds(Metadata),
    /// `GET /mmds/config`. Always legal.
    GetMmdsConfig,
    /// `PUT /mmds/config`. Before start.
    PutMmdsConfig(MmdsConfig),
    /// `PUT /serial`. Before start.
    PutSerial(Serial),
    /// `PUT /logger`. Before start.
    PutLogger(Logger),
    /// `PUT /metrics`. Before start, once.
    PutMetrics(Metrics),
    /// `PUT /actions FlushMetrics`. After start.
    FlushMetrics,
    /// `run --pin`. Before start.
    SetPinning(Pinning),
    /// `PUT /actions InstanceStart`. Before start, with a boot source.
    Start,
    /// `PUT /actions SendCtrlAltDel`. After start.
    SendCtrlAltDel,
    /// `PATCH /vm Paused`. After start; no effect if paused already.
    Pause,
    /// `PATCH /vm Resumed`. After start; no effect if running already.
    Resume,
    /// SIGTERM. Has the guest end itself, by Ctrl-Alt-Del; where there is no guest, or none that could hear it, be it paused or
    /// without a keyboard driver, ends the VM now, as [`Action::Stop`]. Always legal.
    ShutDown,
    /// `PUT /vcpus/{index}/affinity`. After start.
    PutAffinity {
        /// The vCPU.
        index: u32,
        /// Where it is to be.
        place: Place,
    },
    /// End the VM now: vCPUs stopped, memory dropped. Always legal; the event loop ends with [`crate::End::Stopped`].
    Stop,
}

/// The guest's metadata, or a patch of it: any JSON. It may hold secrets, so no log line shows it.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Metadata(pub Value);

impl std::fmt::Debug for Metadata {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metadata(..)")
    }
}

/// What a request was answered with.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// Done; nothing to say (204).
    Done,
    /// To `ShutDown`, where the guest was asked.
    GuestAsked,
    /// To `GetInfo`.
    Info(Info),
    /// To `GetKvm`.
    Kvm(Box<KvmStatus>),
    /// To `GetConfig`.
    Config(Box<VmConfig>),
    /// To `GetMachineConfig`.
    MachineConfig(MachineConfig),
    /// To `GetBalloon`.
    Balloon(Balloon),
    /// To `GetBalloonStats`.
    BalloonStats(Box<BalloonStats>),
    /// To `GetHintingStatus`.
    HintingStatus(HintingStatus),
    /// To `GetMmds`: null before the first put.
    Mmds(Metadata),
    /// To `GetMmdsConfig`.
    MmdsConfig(Option<MmdsConfig>),
}

/// Why a request was refused. `Display` is the one line the user, or Firecracker's `fault_message`, gets.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ActionError {
    /// Not legal in this state.
    #[error("{0}")]
    NotNow(&'static str),
    /// A machine that cannot be had.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A boot source that cannot be booted, as far as that shows before Start.
    #[error(transparent)]
    BootSource(#[from] BootError),
    /// A drive that does not go with the others.
    #[error(transparent)]
    Drive(#[from] DriveRefused),
    /// A drive that cannot be had.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// A drive that cannot be what it was to become; it is what it was.
    #[error(transparent)]
    PatchDrive(BlockError),
    /// An interface that does not go with the others.
    #[error(transparent)]
    Interface(#[from] InterfaceRefused),
    /// A socket device that cannot be had.
    #[error(transparent)]
    Vsock(#[from] VsockRefused),
    /// A balloon that cannot be had.
    #[error(transparent)]
    Balloon(#[from] BalloonRefused),
    /// The balloon cannot do it.
    #[error(transparent)]
    AskBalloon(#[from] BalloonError),
    /// The balloon cannot tell it.
    #[error(transparent)]
    ReadBalloon(BalloonError),
    /// An interface that cannot be had.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The metadata cannot be that.
    #[error(transparent)]
    Mmds(#[from] UpdateError),
    /// The metadata service cannot be reached so.
    #[error(transparent)]
    MmdsConfig(#[from] mmds::config::ConfigError),
    /// There is no metadata service.
    #[error("the metadata service cannot be made: {0}")]
    NoMmds(std::io::Error),
    /// The log cannot be written there.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The metrics cannot be written there.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// Start without a boot source. Firecracker's words.
    #[error("Cannot start microvm without kernel configuration.")]
    NoKernel,
    /// Start failed; nothing is left of it.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Ctrl-Alt-Del cannot be sent.
    #[error("cannot send Ctrl-Alt-Del: {0}")]
    Keys(#[from] KeysUnread),
    /// A vCPU cannot be put there.
    #[error(transparent)]
    Affinity(#[from] AffinityError),
    /// The VMM has ended.
    #[error("the microVM has ended")]
    Ended,
}

impl ActionError {
    /// Asked too late. Firecracker's words.
    pub const AFTER_START: Self = Self::NotNow("The requested operation is not supported after starting the microVM.");
    /// Asked too early. Firecracker's words.
    pub const BEFORE_START: Self =
        Self::NotNow("The requested operation is not supported before starting the microVM.");
}

/// `GET /`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Info {
    /// `--id`.
    pub id: String,
    /// "Not started", "Running" or "Paused".
    pub state: RunState,
    /// This build's version.
    pub vmm_version: String,
    /// "Chronovisor".
    pub app_name: String,
}

/// A microVM's state, as the API names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, reason = "the names say it")]
pub enum RunState {
    #[serde(rename = "Not started")]
    NotStarted,
    Running,
    Paused,
}

/// The vCPUs' accounts: empty until the VM is started, then one for each vCPU, for good. The reading path of the API:
/// it never enters the VMM thread.
pub type Accounts = Arc<std::sync::OnceLock<Vec<Arc<Account>>>>;
