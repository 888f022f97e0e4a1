//! Faults, on purpose: a `chronovisor` whose system calls fail when a test says so.
//!
//! [`calls`] is the table of what can fail and how, [`notify`] has a call of a child fail, [`start`] holds a start to what is
//! promised of one that meets a fault: a clear refusal that leaves nothing behind, or a microVM that is as good as any.

pub mod calls;
pub mod notify;
pub mod start;
