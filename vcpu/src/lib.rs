//! One vCPU: its thread, its `KVM_RUN` loop, its two stamps an exit.
//!
//! ```text
//!    spawn                    resume                KVM_RUN returned EINTR
//!   ───────► pin, open the ──────────► ┌─────────────────────────────────┐
//!            account; held             │ guest_enter  ┐                  │ pause
//!                 ▲                    │ KVM_RUN      │ again, for each  │ ─────► held
//!                 │       resume       │ guest_exit   │ exit we handle   │
//!                 └─────────────────── │ handle(exit) ┘                  │ stop
//!                                      └──────────────┬──────────────────┘ ─────► ended
//!                                                     │ an exit we cannot go on from
//!                                                     ▼
//!                                        close the account, ExitHandler::ended
//! ```
//!
//! The exit path is `thread.rs`'s inner loop and `exit.rs`'s match, and nothing else: two stamps, one call of the
//! [`ExitHandler`]. There is no lock, allocation, system call of ours or log line on it, and no look at what others
//! want of the vCPU. Who wants something takes the thread out of `KVM_RUN` (`kick.rs`); only then does it look. A vCPU
//! that nobody asks anything of is never disturbed: on a tickless CPU it stays in the guest for as long as the guest
//! lets it.
//!
//! This crate does not know what devices there are, loads no kernel and sets no general registers: that is the VMM's.
//! What every monitor must tell KVM of a vCPU before it runs (CPUID, MSRs, local APIC) is in [`setup`], and which host
//! CPU it should get in [`pin`].

mod exit;
mod kick;
mod others;
pub mod pin;
mod run_page;
pub mod setup;
mod signal;
mod stack;
mod stats;
mod thread;

use std::sync::Arc;

use accounting::Gtime;
use accounting::host::HostCpus;

pub use others::confine_others;
pub use stack::{STACK, thread};
pub use thread::Vcpu;

/// What a vCPU hands its exits to: the devices, seen through a keyhole. Called on vCPU threads, from several at once.
/// An address nobody claims reads as all ones and swallows writes.
///
/// `data` is one access of 1, 2, 4 or 8 bytes, little-endian; a string instruction arrives as its single accesses.
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
        /// The guest's instruction pointer; 0 where KVM would not tell.
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
    /// The vCPU thread panicked: an error of ours, or of the [`ExitHandler`]'s. The panic message is on standard error.
    Panicked,
}

/// How to make a [`Vcpu`].
#[derive(Debug)]
pub struct VcpuConfig {
    /// Its index, from 0; names the thread `vcpu{index}`.
    pub index: u32,
    /// The host CPU to pin the thread to; `None` leaves it the affinity of the thread that calls [`Vcpu::spawn`].
    pub pin: Option<u32>,
    /// The host's CPUs.
    pub host: Arc<HostCpus>,
    /// What guest time is to be derived from.
    pub gtime: Gtime,
}

/// Why a vCPU could not be made.
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
    /// What takes the thread out of `KVM_RUN` could not be set up.
    #[error("cannot {what} for vCPU {index}: {source}")]
    Prepare {
        /// The vCPU.
        index: u32,
        /// Which step.
        what: &'static str,
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
