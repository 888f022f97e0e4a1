//! One microVM. Interface agreed between the rooms; bodies to come.

pub mod action;
pub mod config;

pub use action::{Accounts, Action, Info, Reply, RunState};

use std::os::fd::OwnedFd;

/// How a microVM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest powered off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset (i8042 or the ACPI reset register).
    Reboot,
    /// A vCPU triple-faulted.
    TripleFault,
    /// KVM could not go on: one line for the user, what happened on which vCPU, and what to do.
    KvmError(String),
    /// Stopped by [`Action::Stop`].
    Stopped,
}

/// Why a request was refused. `Display` is the one line the user, or Firecracker's `fault_message`, gets.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ActionError {
    /// Not legal in this state.
    #[error("{0}")]
    NotNow(&'static str),
    /// The VMM has ended.
    #[error("the microVM has ended")]
    Ended,
}

/// The guest's serial console.
#[derive(Debug)]
pub enum Console {
    /// Output to `output`; input read from `input` by the VMM thread, when there is one. The caller sets terminal modes,
    /// and filters its escape keys before they reach `input` (a pipe).
    Files {
        /// Where the guest's typing comes from.
        input: Option<OwnedFd>,
        /// Where the guest's output goes.
        output: OwnedFd,
    },
    /// Output dropped, no input.
    None,
}

/// What is known before any request.
#[derive(Debug)]
pub struct Options {
    /// `--id`.
    pub id: String,
    /// The guest's serial console.
    pub console: Console,
}

/// Asks the VMM thread. Cheap to clone; may be used from any thread.
#[derive(Clone, Debug)]
pub struct VmmHandle {}

impl VmmHandle {
    /// Sends `action`; `reply` is called on the VMM thread with the answer (it must not block).
    pub fn send(&self, action: Action, reply: impl FnOnce(Result<Reply, ActionError>) + Send + 'static) {
        let _ = (action, reply);
        todo!()
    }

    /// Sends `action` and waits.
    ///
    /// # Errors
    /// See [`ActionError`].
    pub fn request(&self, action: Action) -> Result<Reply, ActionError> {
        let _ = action;
        todo!()
    }

    /// The vCPUs' accounts.
    #[must_use]
    pub fn accounts(&self) -> &Accounts {
        todo!()
    }
}

/// The VMM thread's handle: join it to learn how the VM ended.
#[derive(Debug)]
pub struct Vmm {}

impl Vmm {
    /// Starts the VMM thread (named `vmm`).
    ///
    /// # Errors
    /// The thread or its epoll could not be made.
    pub fn spawn(options: Options) -> std::io::Result<(Self, VmmHandle)> {
        let _ = options;
        todo!()
    }

    /// Waits for the microVM's end.
    #[must_use]
    pub fn join(self) -> End {
        todo!()
    }
}
