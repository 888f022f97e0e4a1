//! One microVM: memory, boot, devices, event loop, lifecycle.
//!
//! ```text
//!                   send / request                     resume, pause, stop
//!  VmmHandle ──────────────────────► the VMM thread ──────────────────────► vCPU threads
//!     │                                lifecycle.rs ◄────────────────────── (the vcpu crate)
//!     │ accounts()                     console.rs     exits, MachineEvent      │
//!     ▼                                     ▲                                  ▼
//!  readings, which never                    └──────── OutputRing ◄──────── devices/
//!  enter the VMM thread
//! ```
//!
//! [`Vmm::spawn`] makes the VMM thread and nothing else; a machine exists between a successful [`Action::Start`] and the
//! [`End`] ([`lifecycle`]). Building it reads top to bottom in [`machine`]: memory, devices, ACPI tables, kernel, KVM, vCPUs.
//! After that the VMM thread ([`event_loop`]) moves console bytes, does the devices' work and answers requests.
//!
//! This crate knows nothing of HTTP, command lines or terminals: those are `api`'s. It keeps no time: that is `accounting`'s.

pub mod acpi;
pub mod action;
pub mod affinity;
pub mod attach;
mod attached;
pub mod boot;
pub mod config;
mod console;
mod devices;
mod end;
mod event_loop;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
#[cfg(feature = "fuzzing")]
pub mod fuzz;
pub mod host;
pub mod kvm;
pub mod layout;
mod lifecycle;
pub mod log;
pub mod machine;
mod machinery;
pub mod memory;
pub mod metrics;
pub mod mmds;
pub mod requests;
#[cfg(feature = "schema")]
mod schema;
#[cfg(test)]
mod testing;
pub mod unix_socket;

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use accounting::GtimeSource;
use accounting::host::HostCpus;
use vmm_sys_util::eventfd::EventFd;

pub use action::{
    Accounts, Action, ActionError, BalloonError, BalloonStats, HintingStart, HintingStatus, Info, Metadata, Reply,
    RunState,
};
pub use devices::i8042::KeysUnread;
pub use devices::virtio::block::BlockError;
pub use devices::virtio::net::{NetError, TapError};
pub use devices::virtio::vsock::VsockError;
pub use end::End;
pub use vcpu::{STACK, thread};

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
    /// What guest time is to be derived from.
    pub gtime_source: GtimeSource,
    /// What configures the log.
    pub log: log::LogSink,
    /// Largest metadata, in bytes.
    pub mmds_limit_bytes: usize,
}

/// What the VMM thread publishes for any thread to read.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    pub accounts: Accounts,
    pub warnings: Mutex<Vec<String>>,
    pub requests: requests::Requests,
}

/// Asks the VMM thread. Cheap to clone; may be used from any thread.
#[derive(Clone, Debug)]
pub struct VmmHandle {
    requests: Sender<Request>,
    wake: Arc<EventFd>,
    shared: Arc<Shared>,
    id: Arc<str>,
}

impl VmmHandle {
    /// Sends `action`; `reply` is called exactly once with the answer: on the VMM thread, where it must not block, or, once
    /// that has ended, on whichever thread notices.
    pub fn send(&self, action: Action, reply: impl FnOnce(Result<Reply, ActionError>) + Send + 'static) {
        let request = Request {
            action,
            reply: ReplyTo(Some(Box::new(reply))),
        };
        // Without a VMM thread the request comes back and is dropped, which answers it.
        if self.requests.send(request).is_ok() {
            // Fails only where the counter is full, and then the VMM thread is awake.
            let _ = self.wake.write(1);
        }
    }

    /// Sends `action` and waits.
    ///
    /// # Errors
    /// See [`ActionError`].
    pub fn request(&self, action: Action) -> Result<Reply, ActionError> {
        let (answer, answered) = channel();
        self.send(action, move |result| {
            let _ = answer.send(result);
        });
        answered.recv().unwrap_or(Err(ActionError::Ended))
    }

    /// The microVM's name, as [`Options`] gave it.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The vCPUs' accounts.
    #[must_use]
    pub fn accounts(&self) -> &Accounts {
        &self.shared.accounts
    }

    /// Where the API counts its requests.
    #[must_use]
    pub fn requests(&self) -> &requests::Requests {
        &self.shared.requests
    }

    /// What the user should know of the machine that was started, a line each: vCPUs on CPUs that tick, for instance. Logged
    /// at Start as well.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        self.shared
            .warnings
            .lock()
            .expect("no holder of this lock panics")
            .clone()
    }
}

/// A request on its way to the VMM thread.
#[derive(Debug)]
pub(crate) struct Request {
    pub action: Action,
    pub reply: ReplyTo,
}

type Answer = Box<dyn FnOnce(Result<Reply, ActionError>) + Send>;

/// Whom to answer. Dropped without an answer, it says that the microVM has ended: nobody is left waiting.
pub(crate) struct ReplyTo(Option<Answer>);

impl ReplyTo {
    pub(crate) fn answer(mut self, result: Result<Reply, ActionError>) {
        if let Some(answer) = self.0.take() {
            answer(result);
        }
    }
}

impl Drop for ReplyTo {
    fn drop(&mut self) {
        if let Some(answer) = self.0.take() {
            answer(Err(ActionError::Ended));
        }
    }
}

impl std::fmt::Debug for ReplyTo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ReplyTo")
    }
}

/// A microVM whose thread is not running yet: what its handles send waits.
#[derive(Debug)]
pub struct Unstarted {
    options: Options,
    inbox: event_loop::Inbox,
    shared: Arc<Shared>,
}

impl Unstarted {
    /// A microVM and a handle of it.
    ///
    /// # Errors
    /// A descriptor could not be made.
    pub fn new(options: Options) -> std::io::Result<(Self, VmmHandle)> {
        let shared = Arc::new(Shared::default());
        let (requests, incoming) = channel();
        let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let handle = VmmHandle {
            requests,
            wake: Arc::clone(&wake),
            shared: Arc::clone(&shared),
            id: options.id.as_str().into(),
        };
        let inbox = event_loop::Inbox { incoming, wake };
        let unstarted = Self { options, inbox, shared };
        Ok((unstarted, handle))
    }

    /// Starts the VMM thread (named `vmm`). The calling thread's affinity is taken for the process's.
    ///
    /// # Errors
    /// The thread, or one of its descriptors, could not be made, or the host's CPUs not be read.
    pub fn start(self) -> std::io::Result<Vmm> {
        let cpus = Arc::new(HostCpus::read()?);
        let end = event_loop::spawn(self.options, cpus, self.inbox, self.shared)?;
        Ok(Vmm { end })
    }
}

/// The VMM thread: wait for it to learn how the VM ended.
#[derive(Debug)]
pub struct Vmm {
    end: Receiver<End>,
}

impl Vmm {
    /// [`Unstarted::new`] and [`Unstarted::start`].
    ///
    /// # Errors
    /// As theirs.
    pub fn spawn(options: Options) -> std::io::Result<(Self, VmmHandle)> {
        let (unstarted, handle) = Unstarted::new(options)?;
        Ok((unstarted.start()?, handle))
    }

    /// Waits for the microVM's end: its vCPUs and devices are gone then, and all that its guest wrote to the console is out.
    #[must_use]
    pub fn join(self) -> End {
        let panicked = |_| End::KvmError("the VMM thread panicked: an error of ours; report the message above".into());
        self.end.recv().unwrap_or_else(panicked)
    }
}

#[cfg(test)]
#[path = "vm_tests.rs"]
mod vm_tests;
