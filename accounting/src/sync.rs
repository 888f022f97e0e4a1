//! The atomics that stamps are published by: the standard ones, or the model checker's, which runs a test over every
//! interleaving, and over every value that each load may return, of those that the C11 memory model allows.

#[cfg(all(test, loom))]
pub(crate) use loom::sync::atomic::{AtomicU64, Ordering, fence};
#[cfg(not(all(test, loom)))]
pub(crate) use std::sync::atomic::{AtomicU64, Ordering, fence};
