//! One vCPU: its thread, its `KVM_RUN` loop, its two stamps an exit.
//!
//! Interface agreed between the rooms; bodies to come.
use std::sync::Arc;

use accounting::Account;
use accounting::host::HostCpus;
use kvm_ioctls::VcpuFd;

/// What a vCPU hands its exits to: the devices, seen through a keyhole. Called on vCPU threads, from several at once.
/// An address nobody claims reads as all ones and swallows writes.
pub trait ExitHandler: Send + Sync + 'static {
    /// The guest reads `data.len()` bytes from `port`.
    fn io_read(&self, port: u16, data: &mut [u8]);
    /// The guest writes `data` to `port`.
    fn io_write(&self, port: u16, data: &[u8]);
    /// The guest reads `data.len()` bytes at guest physical address `addr`, which is not memory.
    fn mmio_read(&self, addr: u64, data: &mut [u8]);
    /// The guest writes `data` at guest physical address `addr`, which is not memory.
    fn mmio_write(&self, addr: u64, data: &[u8]);
    /// vCPU `index`'s loop has ended. Called once, last, on its thread; never on the exit path.
    fn ended(&self, index: u32, end: VcpuEnd);
}

/// How a vCPU's loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuEnd {
    /// It was told to.
    Stopped,
    /// Triple fault (`KVM_EXIT_SHUTDOWN`).
    TripleFault,
    /// HLT came back to us: there is no in-kernel interrupt controller, so nothing can wake the guest.
    Halted,
    /// `KVM_EXIT_SYSTEM_EVENT`, with its type.
    SystemEvent(u32),
    /// `KVM_EXIT_INTERNAL_ERROR`: the backend could not go on. `suberror` 1 is an instruction it cannot emulate.
    InternalError {
        /// KVM's suberror.
        suberror: u32,
        /// The guest's instruction pointer.
        rip: u64,
        /// The instruction's first bytes, where KVM gives them.
        insn: [u8; 15],
        /// How many of them are valid.
        insn_len: u8,
    },
    /// `KVM_EXIT_FAIL_ENTRY`: the processor refused the guest's state.
    FailEntry {
        /// The hardware's reason.
        reason: u64,
    },
    /// `KVM_RUN` failed with this errno.
    Run(i32),
    /// An exit that we do not handle, by KVM's number.
    Unhandled(u32),
}

/// How to make a [`Vcpu`].
#[derive(Debug)]
pub struct VcpuConfig {
    /// Its index, from 0; names the thread `vcpu{index}`.
    pub index: u32,
    /// The host CPU to pin the thread to.
    pub pin: Option<u32>,
    /// The host's CPUs.
    pub host: Arc<HostCpus>,
}

/// Why a vCPU could not be made or told something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VcpuError {
    /// The thread could not be pinned.
    #[error("cannot pin vCPU {index} to host CPU {cpu}: {source}")]
    Pin {
        /// The vCPU.
        index: u32,
        /// The host CPU.
        cpu: u32,
        /// What the system said.
        source: std::io::Error,
    },
    /// The thread could not be started.
    #[error("cannot start the thread of vCPU {index}: {source}")]
    Spawn {
        /// The vCPU.
        index: u32,
        /// What the system said.
        source: std::io::Error,
    },
    /// Its account could not be opened.
    #[error("cannot open the account of vCPU {index}: {source}")]
    Account {
        /// The vCPU.
        index: u32,
        /// What accounting said.
        source: accounting::OpenError,
    },
}

/// A vCPU thread, seen from outside. Dropping it stops and joins the thread.
#[derive(Debug)]
pub struct Vcpu {}

impl Vcpu {
    /// Starts the thread, pinned and paused: [`Vcpu::resume`] sets it running. `fd` has its registers, CPUID, MSRs and LAPIC set.
    ///
    /// # Errors
    /// See [`VcpuError`].
    pub fn spawn<H: ExitHandler>(config: VcpuConfig, fd: VcpuFd, handler: Arc<H>) -> Result<Self, VcpuError> {
        let _ = (config, fd, handler);
        todo!()
    }

    /// Its account.
    #[must_use]
    pub fn account(&self) -> &Arc<Account> {
        todo!()
    }

    /// Takes the vCPU out of the guest and holds it. Returns when it is held.
    pub fn pause(&self) {
        todo!()
    }

    /// Lets it run (again).
    pub fn resume(&self) {
        todo!()
    }

    /// Ends its loop and joins the thread.
    pub fn stop(&mut self) {
        todo!()
    }
}
