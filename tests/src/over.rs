//! How threads of a test that go on until told are told, on the way out of a failure too: else the test would never end.

use std::sync::atomic::{AtomicBool, Ordering};

/// Sets it when dropped.
#[derive(Debug)]
pub struct SetWhenDropped<'a>(pub &'a AtomicBool);

impl Drop for SetWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}
