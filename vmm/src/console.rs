//! The console's bytes, moved by the VMM thread: the guest's output from the [`OutputRing`] to a file, typing from a file to
//! COM1.
//!
//! The VMM thread must stay able to answer while a reader of the console does not read, so it never blocks in `write`. A
//! terminal or a pipe is opened anew for that, through `/proc/self/fd`: O_NONBLOCK on the descriptor we were given would
//! change it for everybody who shares it, a shell for instance. While output cannot be written the ring is left alone, and fills.
//!
//! Input is read when there is some, and no further once the guest has no room, until it has. At its end, or an error, it is
//! forgotten: a closed terminal is no reason to end a guest.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FileType, Mode, OFlags};

use crate::Console;
use crate::config::{self, Serial};
use crate::devices::SerialPort;
use crate::devices::ring::OutputRing;
use crate::devices::virtio::rate_limiter::RateLimiter;
use crate::log::append_to;

/// How long the last words of a guest wait for a reader who does not read.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Other output than the console's, for a machine that is about to start; taken by [`ConsoleIo`].
pub(crate) type Redirect = Arc<Mutex<Option<Output>>>;

/// See [`Redirect`].
#[derive(Debug)]
pub(crate) struct Output {
    file: Option<File>,
    limit: Option<RateLimiter>,
}

impl Output {
    /// As `/serial` describes it.
    ///
    /// # Errors
    /// The file cannot be opened, or there is no descriptor for the limiter.
    pub(crate) fn open(serial: &Serial) -> std::io::Result<Self> {
        let limit = serial.rate_limiter.map(|bandwidth| {
            RateLimiter::new(Some(config::RateLimiter {
                bandwidth: Some(bandwidth),
                ops: None,
            }))
        });
        Ok(Self {
            file: serial.serial_out_path.as_deref().map(append_to).transpose()?,
            limit: limit.transpose()?,
        })
    }
}

/// Takes from `bytes`, behind `from`, what exceeds `limit`, as Firecracker does: the guest does not wait for its log. By pieces,
/// so that what there are tokens for gets through.
fn drop_excess(limit: &mut RateLimiter, bytes: &mut Vec<u8>, from: usize) {
    const PIECE: usize = 64;
    let mut end = from;
    while end < bytes.len() {
        let piece = PIECE.min(bytes.len() - end);
        if !limit.take(0, piece as u64, Instant::now()) {
            bytes.truncate(end);
        }
        end += piece;
    }
}

/// The VMM thread's side of the console.
#[derive(Debug)]
pub(crate) struct ConsoleIo {
    ring: Arc<OutputRing>,
    serial: Arc<SerialPort>,
    output: Option<File>,
    /// Writing failed: output is dropped. The file stays open, since epoll may know it.
    broken: bool,
    /// Where output is to go from now on.
    redirect: Redirect,
    limit: Option<RateLimiter>,
    /// What the output does not take at once is lost, rather than waited with.
    lossy: bool,
    /// Taken from the ring, not yet written.
    unwritten: Vec<u8>,
    input: Option<File>,
    /// Read from the input, not yet taken by the guest.
    unread: Vec<u8>,
    /// Which of the two are registered with epoll now.
    output_watched: bool,
    input_watched: bool,
    /// Why it cannot be waited for.
    pub(crate) unheard: Option<String>,
}

impl ConsoleIo {
    pub(crate) fn new(
        console: Console,
        ring: Arc<OutputRing>,
        serial: Arc<SerialPort>,
        redirect: Redirect,
    ) -> std::io::Result<Self> {
        let (input, output) = match console {
            Console::Files { input, output } => (
                input.map(|input| nonblocking(input, OFlags::RDONLY)).transpose()?,
                Some(nonblocking(output, OFlags::WRONLY)?),
            ),
            Console::None => (None, None),
        };
        Ok(Self {
            ring,
            serial,
            output,
            broken: false,
            redirect,
            limit: None,
            lossy: false,
            unwritten: Vec::new(),
            input,
            unread: Vec::new(),
            output_watched: false,
            input_watched: false,
            unheard: None,
        })
    }

    /// Writes what was left over, then what the ring holds now; what comes later is announced again. So a guest that never
    /// stops talking does not keep this thread from everything else. Whether anything is left.
    fn write(&mut self) -> bool {
        if self.flush() {
            return true;
        }
        let before = self.unwritten.len();
        self.ring.take(&mut self.unwritten);
        self.follow_redirect();
        if let Some(limit) = &mut self.limit {
            drop_excess(limit, &mut self.unwritten, before);
        }
        self.flush()
    }

    /// Before anything was written: epoll does not know the file that is replaced.
    fn follow_redirect(&mut self) {
        let new = self.redirect.lock().expect("no holder of this lock panics").take();
        if let Some(Output { file, limit }) = new {
            if file.is_some() {
                (self.output, self.lossy) = (file, true);
            }
            self.limit = limit;
        }
    }

    fn flush(&mut self) -> bool {
        while !self.unwritten.is_empty() {
            let (Some(output), false) = (&mut self.output, self.broken) else {
                self.unwritten.clear();
                break;
            };
            match output.write(&self.unwritten) {
                Ok(written) => drop(self.unwritten.drain(..written)),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock && self.lossy => self.unwritten.clear(),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return true,
                Err(e) => {
                    tracing::warn!("cannot write the guest's console output: {e}; dropping it from now on");
                    self.broken = true;
                }
            }
        }
        false
    }

    /// Writes what the guest said last, for as long as somebody reads it.
    pub(crate) fn last_words(&mut self) {
        let deadline = Instant::now() + LAST_WORDS;
        while self.write() {
            let left = deadline.saturating_duration_since(Instant::now());
            let (Some(output), false) = (&self.output, left.is_zero()) else {
                return;
            };
            let timeout = rustix::time::Timespec::try_from(left).expect("a second at most");
            // A signal, or no time left: the loop looks again.
            let _ = poll(&mut [PollFd::new(output, PollFlags::OUT)], Some(&timeout));
        }
    }

    fn move_output(&mut self, ops: &mut EventOps) {
        let left = self.write();
        if let Some(output) = &self.output {
            self.output_watched = watch(
                ops,
                output.as_raw_fd(),
                OUTPUT,
                EventSet::OUT,
                self.output_watched,
                left,
            );
        }
    }

    fn move_input(&mut self, ops: &mut EventOps) {
        let Some(input) = &mut self.input else { return };
        // One chunk an event: a file that never ends must not keep this thread from everything else.
        let mut chunk = [0; 256];
        let mut open = true;
        if self.unread.is_empty() {
            match input.read(&mut chunk) {
                Ok(0) => open = false,
                Ok(len) => self.unread.extend_from_slice(&chunk[..len]),
                Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
                Err(e) => {
                    tracing::warn!("cannot read the guest's console input: {e}; the guest gets none from now on");
                    open = false;
                }
            }
        }
        let given = self.serial.give(&self.unread);
        self.unread.drain(..given);
        let wanted = open && self.unread.is_empty();
        self.input_watched = watch(ops, input.as_raw_fd(), INPUT, EventSet::IN, self.input_watched, wanted);
        if !open {
            self.input = None;
        } else if wanted && !self.input_watched {
            // A regular file: epoll does not take it, and it is always ready. The guest's next free FIFO asks for more; a
            // full one now would too, so ask ourselves.
            let _ = self.serial.room().write(1);
        }
    }
}

/// What an event is about.
const READY: u32 = 0;
const OUTPUT: u32 = 1;
const ROOM: u32 = 2;
const INPUT: u32 = 3;

impl MutEventSubscriber for ConsoleIo {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            READY => {
                let _ = self.ring.ready().read();
                // While the file is full its own event is waited for.
                if !self.output_watched {
                    self.move_output(ops);
                }
            }
            OUTPUT => self.move_output(ops),
            ROOM => {
                let _ = self.serial.room().read();
                self.move_input(ops);
            }
            INPUT => self.move_input(ops),
            _ => {}
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        for (fd, data) in [(self.ring.ready(), READY), (self.serial.room(), ROOM)] {
            if let Err(e) = ops.add(Events::with_data(fd, data, EventSet::IN)) {
                self.unheard = Some(crate::event_loop::unheard("the guest's console", &e));
            }
        }
    }
}

/// Registers or removes `fd`. Removed rather than masked: epoll reports a hang-up whatever the mask, and would spin. Says
/// whether it is registered now: regular files cannot be.
fn watch(ops: &mut EventOps, fd: RawFd, data: u32, set: EventSet, watched: bool, wanted: bool) -> bool {
    let events = Events::with_data_raw(fd, data, set);
    match (watched, wanted) {
        (false, true) => ops.add(events).is_ok(),
        (true, false) => {
            let _ = ops.remove(events);
            false
        }
        (watched, _) => watched,
    }
}

/// `file` such that neither reading from it nor writing to it ever waits; `access` is what it was opened for.
fn nonblocking(file: OwnedFd, access: OFlags) -> std::io::Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode);
    // Opening the master of a pseudo-terminal would make a new one.
    let terminal = || rustix::termios::isatty(&file) && !std::fs::read_link(&path).is_ok_and(|to| to.ends_with("ptmx"));
    match kind {
        // A file does not wait for anybody; and one opened anew would be at its start.
        FileType::RegularFile => return Ok(file.into()),
        FileType::Fifo => {}
        FileType::CharacterDevice if terminal() => {}
        _ => return set_nonblocking(file),
    }
    let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    match rustix::fs::open(path.as_str(), flags, Mode::empty()) {
        Ok(anew) => Ok(anew.into()),
        // No /proc, or another user's pipe: shared or not, it must not block.
        Err(_) => set_nonblocking(file),
    }
}

fn set_nonblocking(file: OwnedFd) -> std::io::Result<File> {
    let flags = rustix::fs::fcntl_getfl(file.as_fd())?;
    rustix::fs::fcntl_setfl(file.as_fd(), flags | OFlags::NONBLOCK)?;
    Ok(file.into())
}

#[cfg(test)]
#[path = "console_tests.rs"]
mod tests;
