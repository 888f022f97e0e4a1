//! Where every nanosecond of a vCPU went.
//!
//! On a CPU whose timer tick is stopped nobody samples, so the Linux kernel stamps CPU time at the context
//! boundaries, publishes stamp and context under a sequence count, and lets the reader add what is pending
//! (Frederic Weisbecker, "cputime: Safely read cputime of full dynticks CPUs", Linux 3.9; today
//! `kernel/sched/cputime.c`). This crate does at the `KVM_RUN` boundary what the kernel does at its own.
//!
//! A vCPU's life, from its thread's first stamp, is divided into disjoint modes:
//!
//! | mode | the vCPU thread is | Linux name |
//! |---|---|---|
//! | `guest` | on a CPU, in guest mode | gtime |
//! | `host_user` | on a CPU, in VMM user space | utime - gtime |
//! | `host_kernel` | on a CPU, in the host kernel | stime |
//! | `halted` | off the CPU because the guest executed HLT | |
//! | `waiting` | runnable, off the CPU: somebody else runs | run_delay, steal |
//! | `blocked` | off the CPU inside the VMM or the kernel: a lock, a disk, a full console | |
//! | `paused` | held by request, or not started | |
//!
//! In every reading the modes sum to the elapsed time, to the nanosecond, and no total is smaller than in an
//! earlier reading of the same vCPU, the running slice included in both.
//!
//! The road of a reading, one module each:
//!
//! ```text
//! vCPU thread            any other thread
//! -----------            ----------------
//! vtime::VtimeWriter --> vtime::VtimeReader -.
//!                        probe::Probes ------+--> split --> ledger --> reading::Reading
//!                        clock --------------'
//! ```
//!
//! [`vtime`] holds what the VMM knows: wall time inside `KVM_RUN`, outside it, and paused. [`probe`] asks the
//! kernel what it knows of the thread, by reads that disturb nobody. [`split`] makes modes and bounds of the
//! two, and [`ledger`] publishes them so that they sum and never step back. [`account`] ties the four together;
//! it is all a VMM needs to know. [`disturbance`] notices what on the host makes less of all this than was promised.
//!
//! `examples/kvm_loop.rs` accounts for a KVM loop that is not ours, in a dozen lines.
//!
//! Nothing here opens `/dev/kvm`, starts a lasting thread or speaks HTTP.

pub mod account;
pub mod clock;
pub mod disturbance;
pub mod host;
pub mod laws;
pub mod ledger;
pub mod probe;
pub mod reading;
pub mod split;
mod sync;
pub mod vtime;

pub use account::{Account, Explained, Gtime, GtimeSource, Open, OpenError};
pub use reading::Reading;
