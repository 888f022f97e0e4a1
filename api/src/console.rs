//! The guest's console on this process's standard streams.
//!
//! On a terminal: every key goes to the guest, but for the escape Ctrl-A, as in QEMU (`Ctrl-A x` ends the microVM, `Ctrl-A h` lists the
//! keys, `Ctrl-A Ctrl-A` sends one). The terminal is raw until [`restore`], which may be called from anywhere, any number of times. What
//! the guest does not take in time is lost, as on a serial line, so that the escape always works.
//!
//! On anything else: the input goes to the guest byte for byte, at the pace the guest takes it. Its end is not the guest's end.

use std::fs::File;
use std::io::{self, BufRead, Read, Write};
use std::sync::{Mutex, PoisonError};

use rustix::pipe::PipeFlags;
use rustix::termios::{InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios};

/// The terminal's modes as they were, while it is raw.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// What standard input is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// A terminal of ours.
    Terminal,
    /// A terminal that another job has: reading it, or setting its modes, would stop this process.
    Background,
    /// A pipe, a file, /dev/null.
    Stream,
}

/// Gives the terminal its modes back, if it is raw.
pub fn restore() {
    let mut saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(modes) = saved.take() {
        // A terminal that has gone has no modes left to restore.
        let _ = rustix::termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &modes);
    }
}

/// Makes the terminal raw, until [`restore`].
fn make_raw() -> io::Result<()> {
    let stdin = rustix::stdio::stdin();
    let mut modes = rustix::termios::tcgetattr(stdin)?;
    let mut saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
    *saved = Some(modes.clone());
    // Every key is the guest's: no echo, no lines, no signals, no flow control, no translation. Output processing stays
    // as it is: our own messages go to the same terminal.
    modes.input_modes -= InputModes::IGNBRK
        | InputModes::BRKINT
        | InputModes::PARMRK
        | InputModes::ISTRIP
        | InputModes::INLCR
        | InputModes::IGNCR
        | InputModes::ICRNL
        | InputModes::IXON;
    modes.local_modes -=
        LocalModes::ECHO | LocalModes::ECHONL | LocalModes::ICANON | LocalModes::ISIG | LocalModes::IEXTEN;
    modes.special_codes[SpecialCodeIndex::VMIN] = 1;
    modes.special_codes[SpecialCodeIndex::VTIME] = 0;
    Ok(rustix::termios::tcsetattr(stdin, OptionalActions::Now, &modes)?)
}

/// The way from standard input to the guest, not yet open.
#[derive(Debug)]
pub struct Typing {
    typed: File,
}

/// A console on standard input and output. Nothing is read, and no mode changed, before [`Typing::start`].
///
/// # Errors
/// No pipe could be made, or standard output is closed.
pub fn open() -> io::Result<(Typing, vmm::Console)> {
    let (input, typed) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let output = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)?;
    Ok((
        Typing {
            typed: File::from(typed),
        },
        vmm::Console::Files {
            input: Some(input),
            output,
        },
    ))
}

impl Typing {
    /// Starts passing standard input on, on a thread named `console`, and makes a terminal raw. `quit` is called at Ctrl-A x.
    ///
    /// # Errors
    /// The terminal's modes could not be set, or the thread not started.
    pub fn start(self, quit: impl FnMut() + Send + 'static) -> io::Result<()> {
        let source = source();
        match source {
            Source::Terminal => make_raw()?,
            Source::Stream => {}
            Source::Background => {
                tracing::warn!("in the background: nothing typed here reaches the guest");
                return Ok(());
            }
        }
        let role = seccomp::role();
        vmm::thread("console").spawn(move || {
            seccomp::inherited(role);
            match source {
                Source::Terminal => pass_keys(self.typed, quit),
                _ => pass_bytes(self.typed),
            }
        })?;
        Ok(())
    }
}

fn source() -> Source {
    let stdin = rustix::stdio::stdin();
    if !rustix::termios::isatty(stdin) {
        return Source::Stream;
    }
    match rustix::termios::tcgetpgrp(stdin) {
        Ok(foreground) if foreground != rustix::process::getpgrp() => Source::Background,
        _ => Source::Terminal,
    }
}

/// Passes everything on, at the guest's pace, until the input or the microVM ends.
fn pass_bytes(mut typed: File) {
    // Not by io::copy, which has the kernel do it, by calls that nothing else needs.
    let mut pass = || -> io::Result<()> {
        let mut stdin = io::stdin().lock();
        loop {
            let count = match stdin.fill_buf() {
                Ok([]) => return Ok(()),
                Ok(bytes) => {
                    typed.write_all(bytes)?;
                    bytes.len()
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            stdin.consume(count);
        }
    };
    if let Err(error) = pass() {
        tracing::debug!("the console's input ended: {error}");
    }
}

/// Passes keys on, the escape's taken out, until the terminal or the microVM ends.
fn pass_keys(mut typed: File, mut quit: impl FnMut()) {
    if let Err(error) = rustix::io::ioctl_fionbio(&typed, true) {
        tracing::warn!("a guest that reads no input will hold the console up: {error}");
    }
    let (mut escape, mut keys, mut out) = (Escape::default(), [0; 256], Vec::new());
    loop {
        let count = match io::stdin().lock().read(&mut keys) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return tracing::debug!("the console's input ended: {error}"),
        };
        out.clear();
        for &key in &keys[..count] {
            match escape.key(key) {
                Key::Pass(key) => out.push(key),
                Key::Nothing => {}
                Key::Help => crate::exit::say(HELP),
                Key::Quit => quit(),
            }
        }
        match typed.write_all(&out) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return tracing::debug!("the guest's console has closed: {error}"),
            Ok(()) => {}
        }
    }
}

const HELP: &str = "Ctrl-A x ends the microVM, Ctrl-A Ctrl-A sends Ctrl-A, Ctrl-A h shows this";

/// What becomes of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    Pass(u8),
    Nothing,
    Help,
    Quit,
}

/// Ctrl-A.
const ESCAPE: u8 = 0x01;

/// Whether the last key was the escape.
#[derive(Debug, Default)]
struct Escape {
    pending: bool,
}

impl Escape {
    fn key(&mut self, key: u8) -> Key {
        match (std::mem::take(&mut self.pending), key) {
            (false, ESCAPE) => {
                self.pending = true;
                Key::Nothing
            }
            (false, key) => Key::Pass(key),
            (true, ESCAPE) => Key::Pass(ESCAPE),
            (true, b'x') => Key::Quit,
            (true, b'h' | b'?') => Key::Help,
            // As in QEMU: a key that means nothing after the escape is the guest's.
            (true, key) => Key::Pass(key),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the guest gets of `keys`, and what else happened.
    fn filter(keys: &[u8]) -> (Vec<u8>, Vec<Key>) {
        let mut escape = Escape::default();
        let (mut passed, mut others) = (Vec::new(), Vec::new());
        for &key in keys {
            match escape.key(key) {
                Key::Pass(key) => passed.push(key),
                Key::Nothing => {}
                other => others.push(other),
            }
        }
        (passed, others)
    }

    #[test]
    fn the_guest_gets_every_key_but_the_escapes() {
        let table: [(&[u8], &[u8], &[Key]); 8] = [
            (b"ls\r", b"ls\r", &[]),
            (b"\x03\x1a\x1c\x04\x11\x13", b"\x03\x1a\x1c\x04\x11\x13", &[]), // ^C ^Z ^\ ^D ^Q ^S
            (b"a\x01xb", b"ab", &[Key::Quit]),
            (b"\x01h", b"", &[Key::Help]),
            (b"\x01\x01", b"\x01", &[]),
            (b"\x01\x01x", b"\x01x", &[]),
            (b"\x01\x01\x01x", b"\x01", &[Key::Quit]),
            (b"\x01qx", b"qx", &[]),
        ];
        for (keys, passed, others) in table {
            assert_eq!(filter(keys), (passed.to_vec(), others.to_vec()), "{keys:?}");
        }
    }
}
