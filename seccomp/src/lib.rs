//! What each thread may ask of the kernel: a seccomp filter for each role, and the end of a process that asks for more.
//!
//! ```text
//!  resources/seccomp/x86_64.json ── build.rs ──► programs in the binary ─┐
//!                                                                        ├─ choose, once ─► enter, once a thread
//!  --seccomp-filter FILE ── Given::from_json ──► programs made at start ─┘                       │
//!                                                                                                ▼
//!                       a call that the role may not make: SIGSYS ─► violation.rs: a line, exit status 148
//! ```
//!
//! A filter is for good: neither the thread nor those that it starts can take it back, nor gain a privilege by execve(2)
//! (`PR_SET_NO_NEW_PRIVS`). A thread enters its role when all has been done that only a beginning needs:
//!
//! | role | threads | from |
//! |---|---|---|
//! | `api` | `api`, and those that it starts | before the first connection is accepted |
//! | `vcpu` | `vcpu0`, ... | before the first `KVM_RUN` |
//! | `vmm` | `vmm`, and those that it starts | before a vCPU is set running |
//! | `vmm` | the process's first, `signals`, `console` | before they wait for what they are there for |
//!
//! io_uring's workers are the kernel's, and make no system calls.
//!
//! This crate decides nothing about what is allowed: the policy does, and each of its lines says why.

mod compile;
mod violation;

use std::io;
use std::sync::OnceLock;

use seccompiler::{BpfProgram, BpfProgramRef, apply_filter, sock_filter};

pub use compile::ROLES;
pub use violation::{STATUS, log_to};

include!(concat!(env!("OUT_DIR"), "/programs.rs"));

/// What a thread is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The microVM: its events, its devices, its end.
    Vmm,
    /// REST.
    Api,
    /// A vCPU.
    Vcpu,
}

impl Role {
    /// All, in the order of [`ROLES`].
    pub const ALL: [Self; 3] = [Self::Vmm, Self::Api, Self::Vcpu];

    /// As in a policy.
    #[must_use]
    pub const fn name(self) -> &'static str {
        ROLES[self as usize]
    }
}

/// A process's policy.
#[derive(Debug)]
pub enum Policy {
    /// Everything is allowed (`--no-seccomp`).
    None,
    /// The one that ships.
    Shipped,
    /// Somebody's own (`--seccomp-filter`).
    Given(Given),
}

/// A policy that was given in JSON.
#[derive(Debug)]
pub struct Given {
    /// In the order of [`Role::ALL`].
    programs: [BpfProgram; 3],
}

/// Why a policy was refused. Where Firecracker has the same refusal, its words.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// Perhaps what Firecracker's compiler makes of it.
    #[error(
        "is not JSON: Firecracker's binary filters are not taken, only what they are compiled from; \
         resources/seccomp/x86_64.json in the source is one to begin with"
    )]
    Binary,
    /// It means nothing.
    #[error("is no seccomp policy: {0}")]
    Compile(seccompiler::Error),
    /// It names threads that there are not.
    #[error("Invalid thread categories: {0}; there are vmm, api and vcpu")]
    ThreadCategories(String),
    /// It says nothing of some threads.
    #[error("Missing thread category: {0}")]
    MissingThreadCategory(&'static str),
}

impl Given {
    /// The policy in `json`, which is in the format of Firecracker's own (its docs/seccompiler.md, and seccompiler's
    /// documentation).
    ///
    /// # Errors
    /// See [`PolicyError`].
    pub fn from_json(json: &[u8]) -> Result<Self, PolicyError> {
        if json.trim_ascii_start().first() != Some(&b'{') {
            return Err(PolicyError::Binary);
        }
        let mut programs = compile::compile(json).map_err(PolicyError::Compile)?;
        let mut take = |role| programs.remove(role).ok_or(PolicyError::MissingThreadCategory(role));
        let [vmm, api, vcpu] = ROLES;
        let taken = [take(vmm), take(api), take(vcpu)];
        if !programs.is_empty() {
            let mut others: Vec<_> = programs.into_keys().collect();
            others.sort();
            return Err(PolicyError::ThreadCategories(others.join(",")));
        }
        let [vmm, api, vcpu] = taken;
        Ok(Self {
            programs: [vmm?, api?, vcpu?],
        })
    }
}

impl Policy {
    fn program(&self, role: Role) -> Option<BpfProgramRef<'_>> {
        match self {
            Self::None => None,
            Self::Shipped => Some(match role {
                Role::Vmm => &VMM,
                Role::Api => &API,
                Role::Vcpu => &VCPU,
            }),
            Self::Given(given) => Some(&given.programs[role as usize]),
        }
    }
}

/// Chosen once, for a filter cannot be taken back.
static POLICY: OnceLock<Policy> = OnceLock::new();

/// From now on, threads that [`enter`] a role are held to `policy`. Where nothing is chosen nobody is held to anything, so that
/// the crates that call it can be used, and tested, by others. The first choice holds.
pub fn choose(policy: Policy) {
    let _ = POLICY.set(policy);
}

/// The calling thread makes no system call from now on but those of `role`; nor do the threads that it starts.
///
/// # Errors
/// What the kernel said; the thread is what it was.
pub fn enter(role: Role) -> io::Result<()> {
    let Some(program) = POLICY.get().and_then(|policy| policy.program(role)) else {
        return Ok(());
    };
    violation::listen()?;
    violation::this_thread_is(role);
    let_the_heap_shrink();
    apply_filter(program).map_err(|error| {
        io::Error::other(format!(
            "the seccomp filter of its {} threads cannot be installed: {error}; the kernel has to have \
             CONFIG_SECCOMP_FILTER, or choose --no-seccomp",
            role.name()
        ))
    })
}

/// Has the C library ask now what it else asks of the kernel on the first thread whose heap has much to give back: whether memory is
/// overcommitted, by opening a file (glibc, malloc/arena.c: check_may_shrink_heap). That may be a vCPU's thread, which frees what a
/// device held when its guest resets that, and opens no files.
fn let_the_heap_shrink() {
    // Each from the heap and not from mmap (M_MMAP_THRESHOLD), and together more than is kept for later (M_TRIM_THRESHOLD), both 128
    // KiB.
    let blocks: [Vec<u8>; 4] = std::array::from_fn(|_| Vec::with_capacity(100 << 10));
    drop(std::hint::black_box(blocks));
}

/// The calling thread's role, if it has one: for those that it starts.
#[must_use]
pub fn role() -> Option<Role> {
    violation::role()
}

/// The calling thread was started by one of `role`, and so is one: should it break the policy, that is what is said of it.
pub fn inherited(role: Option<Role>) {
    if let Some(role) = role {
        violation::this_thread_is(role);
    }
}

#[cfg(test)]
mod tests;
