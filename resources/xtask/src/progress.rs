//! Says what is going on, when it takes more than two seconds and somebody looks on.

use std::io::{IsTerminal, Write, stderr};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const QUIET: Duration = Duration::from_secs(2);
const STEP: Duration = Duration::from_secs(1);
/// Back to the first column, and the line cleared.
const CLEAR: &str = "\r\x1b[K";

/// A line on the terminal, `what` and the seconds so far, from two seconds on until dropped. None where stderr is no terminal.
pub struct Progress(Option<(Sender<()>, JoinHandle<()>)>);

impl Progress {
    pub fn new(what: impl Into<String>) -> Self {
        if !stderr().is_terminal() {
            return Self(None);
        }
        let what = what.into();
        let (stop, stopped) = channel::<()>();
        let thread = std::thread::spawn(move || {
            let start = Instant::now();
            let mut wait = QUIET;
            while stopped.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                let _ = write!(stderr(), "{CLEAR}{what} ... {} s", start.elapsed().as_secs());
                wait = STEP;
            }
            if wait == STEP {
                let _ = write!(stderr(), "{CLEAR}");
            }
        });
        Self(Some((stop, thread)))
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.0.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}
