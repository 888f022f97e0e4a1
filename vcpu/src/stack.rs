//! How large a thread's stack is.

use std::thread::Builder;

/// Bytes: far more than any of our threads uses, and less than a huge page. Rust's 2 MiB may by chance be aligned to one, and where
/// `transparent_hugepage` is `always` the kernel then makes all of it resident at the first touch: a third of all that a
/// microVM's process has beside its guest.
pub const STACK: usize = 1 << 20;

/// A thread to be, whose name is `name`.
pub fn thread(name: impl Into<String>) -> Builder {
    Builder::new().name(name.into()).stack_size(STACK)
}
