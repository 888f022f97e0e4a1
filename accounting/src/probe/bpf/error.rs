//! Why the BPF probe is not to be had.

use std::ffi::CStr;
use std::io;

use super::sys::LoadError;

/// Why the programs could not be attached, or a thread not tracked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BpfError {
    /// `EPERM`.
    #[error(
        "cannot {what}: {source}: it takes root in the initial user namespace, or CAP_BPF and CAP_PERFMON (before Linux \
         5.8, CAP_SYS_ADMIN); no sysctl replaces them"
    )]
    NoPrivilege {
        /// What was refused.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// `ENOENT`: the tracepoint is not there.
    #[error("the kernel has no tracepoint {tracepoint}: is the kvm module loaded?")]
    NoTracepoint {
        /// Its name.
        tracepoint: String,
    },
    /// `ENOSYS`, or `EINVAL` without a word of the verifier's: a kernel without BPF, or older than Linux 5.7.
    #[error(
        "cannot {what}: {source}: the kernel has no BPF (CONFIG_BPF_SYSCALL, CONFIG_BPF_EVENTS), or is older than \
         Linux 5.7"
    )]
    Unsupported {
        /// What was refused.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// The verifier does not accept a program: an error of ours, or a kernel that lacks a function it calls.
    #[error("the kernel's verifier refuses program {program}: {source}: {log}")]
    Refused {
        /// The program.
        program: &'static str,
        /// What the system said.
        source: io::Error,
        /// The end of what the verifier said.
        log: String,
    },
    /// The figures could not be mapped.
    #[error("cannot map the BPF map of the vCPUs' figures: {0}")]
    Mmap(io::Error),
    /// Which PID namespace this process is in could not be told.
    #[error("cannot look at /proc/self/ns/pid: {0}")]
    Namespace(io::Error),
    /// The thread is tracked already.
    #[error("thread {tid} is tracked already")]
    Tracked {
        /// Its id.
        tid: i32,
    },
    /// No thread has such an id.
    #[error("{tid} is no thread's id")]
    NoThread {
        /// What was given.
        tid: i32,
    },
    /// As many threads are tracked as there is room for.
    #[error("{limit} threads are tracked already, which is the most")]
    Full {
        /// How many.
        limit: u32,
    },
    /// Anything else.
    #[error("cannot {what}: {source}")]
    System {
        /// What failed.
        what: String,
        /// What the system said.
        source: io::Error,
    },
}

impl BpfError {
    pub(super) fn of(what: impl Into<String>, source: io::Error) -> Self {
        let what = what.into();
        match source.raw_os_error() {
            // EACCES is a security module's way to say it.
            Some(libc::EPERM | libc::EACCES) => Self::NoPrivilege { what, source },
            Some(libc::ENOSYS | libc::EINVAL) => Self::Unsupported { what, source },
            _ => Self::System { what, source },
        }
    }

    pub(super) fn of_load(program: &'static str, error: LoadError) -> Self {
        let LoadError { source, log } = error;
        if log.trim().is_empty() {
            return Self::of(format!("load the BPF program {program}"), source);
        }
        let log = end_of(&log);
        Self::Refused { program, source, log }
    }

    pub(super) fn of_link(tracepoint: &CStr, source: io::Error) -> Self {
        let tracepoint = tracepoint.to_string_lossy().into_owned();
        match source.raw_os_error() {
            Some(libc::ENOENT) => Self::NoTracepoint { tracepoint },
            _ => Self::of(format!("attach to the tracepoint {tracepoint}"), source),
        }
    }
}

/// The last lines of a verifier's log, where it gives its reason, as one line.
fn end_of(log: &str) -> String {
    const LINES: usize = 3;
    // Its very last lines are statistics.
    let lines: Vec<_> = log
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with("processed "))
        .collect();
    lines[lines.len().saturating_sub(LINES)..].join("; ")
}

#[cfg(test)]
mod tests {
    use super::super::insn::{Assembler, Reg};
    use super::super::sys;
    use super::*;

    fn errno(code: i32) -> io::Error {
        io::Error::from_raw_os_error(code)
    }

    #[test]
    fn privilege_tracepoint_and_kernel_are_told_apart() {
        let entry = c"kvm_entry";
        assert!(matches!(
            BpfError::of("x", errno(libc::EPERM)),
            BpfError::NoPrivilege { .. }
        ));
        assert!(matches!(
            BpfError::of("x", errno(libc::ENOSYS)),
            BpfError::Unsupported { .. }
        ));
        assert!(matches!(
            BpfError::of("x", errno(libc::ENOMEM)),
            BpfError::System { .. }
        ));
        assert!(matches!(
            BpfError::of_link(entry, errno(libc::EPERM)),
            BpfError::NoPrivilege { .. }
        ));
        let missing = BpfError::of_link(entry, errno(libc::ENOENT));
        assert_eq!(
            missing.to_string(),
            "the kernel has no tracepoint kvm_entry: is the kvm module loaded?"
        );
    }

    #[test]
    fn a_refusal_ends_in_the_verifiers_reason() {
        let log = "0: (95) exit\nR0 !read_ok\nprocessed 1 insns (limit 1000000) max_states_per_insn 0\n\n".to_owned();
        let source = errno(libc::EACCES);
        let error = BpfError::of_load("p", LoadError { source, log }).to_string();
        assert!(error.ends_with("0: (95) exit; R0 !read_ok"), "{error}");
    }

    /// A program that leaves its result unset, where the kernel lets us ask.
    #[test]
    fn a_program_that_is_wrong_is_refused_with_a_reason() {
        let mut a = Assembler::default();
        a.mov(Reg::R6, Reg::R0);
        a.exit();
        let error = sys::load("cv_wrong", &a.finish()).expect_err("R0 is unset");
        match BpfError::of_load("cv_wrong", error) {
            BpfError::Refused { log, .. } => assert!(log.contains("R0 !read_ok"), "{log}"),
            error @ (BpfError::NoPrivilege { .. } | BpfError::Unsupported { .. }) => println!("not asked: {error}"),
            error => panic!("{error}"),
        }
    }
}
