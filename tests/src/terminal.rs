//! A pseudo-terminal, with `chronovisor` at the one end and the test at the other.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};

use crate::vm::PATIENCE;

/// As a terminal of old.
pub const SIZE: Winsize = Winsize {
    ws_col: 80,
    ws_row: 24,
    ws_xpixel: 0,
    ws_ypixel: 0,
};

/// A child on a terminal of its own.
#[derive(Debug)]
pub struct Terminal {
    child: Child,
    keyboard: File,
    /// Kept open, so that the terminal's modes can be looked at when the child is gone.
    line: OwnedFd,
    screen: Receiver<Vec<u8>>,
    shown: Vec<u8>,
}

impl Terminal {
    /// Starts `command` as the leader of a session with a new terminal.
    ///
    /// # Panics
    /// When that fails.
    #[must_use]
    #[expect(unsafe_code, reason = "pre_exec")]
    pub fn spawn(mut command: Command) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a pseudo-terminal");
        grantpt(&master)
            .and_then(|()| unlockpt(&master))
            .expect("its other end");
        let name = ptsname(&master, Vec::new()).expect("its name");
        let line = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())
            .expect("its other end");
        tcsetwinsize(&line, SIZE).expect("a terminal");
        let end = || line.try_clone().expect("a descriptor");
        command.stdin(end()).stdout(end()).stderr(end());
        // SAFETY: both calls are async-signal-safe and touch no memory of the parent's.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                // Standard input is the terminal's line end by now.
                rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
                Ok(())
            });
        }
        let child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        drop(command);
        let keyboard = File::from(master);
        let mut reader = keyboard.try_clone().expect("a descriptor");
        let (show, screen) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // EIO: the last holder of the line end is gone.
            while let Ok(n) = reader.read(&mut buffer) {
                if n == 0 || show.send(buffer[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            keyboard,
            line,
            screen,
            shown: Vec::new(),
        }
    }

    /// Types `text`.
    ///
    /// # Panics
    /// When the terminal is gone.
    pub fn type_in(&mut self, text: &str) {
        self.keyboard.write_all(text.as_bytes()).expect("the terminal is there");
    }

    /// Waits until the screen has shown `text` since the last wait.
    ///
    /// # Panics
    /// When patience ends before that.
    pub fn wait_for(&mut self, text: &str) {
        let begun = Instant::now();
        loop {
            let shown = String::from_utf8_lossy(&self.shown).into_owned();
            if let Some(at) = shown.find(text) {
                self.shown = shown.as_bytes()[at + text.len()..].to_vec();
                return;
            }
            match self.screen.recv_timeout(PATIENCE.saturating_sub(begun.elapsed())) {
                Ok(bytes) => self.shown.extend(bytes),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    panic!("{text:?} never came; the screen since:\n{shown}")
                }
            }
        }
    }

    /// Some of what it is written, if anything comes soon.
    pub fn some(&mut self) -> Vec<u8> {
        let soon = Duration::from_millis(100);
        self.screen.recv_timeout(soon).unwrap_or_default()
    }

    /// Gives it another size, in columns and rows.
    ///
    /// # Panics
    /// When it is gone.
    pub fn resize(&self, columns: u16, rows: u16) {
        let size = Winsize {
            ws_col: columns,
            ws_row: rows,
            ..SIZE
        };
        tcsetwinsize(&self.line, size).expect("the terminal is there");
    }

    /// The terminal's modes.
    ///
    /// # Panics
    /// When they cannot be read.
    #[must_use]
    pub fn modes(&self) -> Termios {
        tcgetattr(&self.line).expect("the terminal is there")
    }

    /// Whether a line is edited and echoed by the terminal: how a shell wants to find it.
    #[must_use]
    pub fn is_cooked(&self) -> bool {
        self.modes()
            .local_modes
            .contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    /// Sends the child a signal.
    ///
    /// # Panics
    /// When it is gone.
    pub fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal).expect("it is there");
    }

    /// Waits for the child's end.
    ///
    /// # Panics
    /// When patience ends first.
    pub fn wait(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("it is ours") {
                return status;
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "it does not end; the screen:\n{}",
                String::from_utf8_lossy(&self.shown)
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
