//! The end of a process one of whose threads made a system call that it may not make: a line that names the call, and status
//! [`STATUS`].
//!
//! All of it happens in a signal handler, on the thread that made the call and under its filter: nothing is allocated, no lock is
//! taken, and the only system calls are poll(2), write(2), exit_group(2) and, where the vDSO does not tell the time, clock_gettime(2). A
//! policy without them ends the process all the same, by SIGSYS.
//!
//! Nothing is cleaned up: whoever made that call may be somebody who has taken the thread over, so nothing more is done on its
//! behalf. The files of sockets stay, and a terminal stays as it is.

#![expect(unsafe_code, reason = "a signal handler, and what it is told")]

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::fmt::{self, Write};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use libc::{siginfo_t, ucontext_t};
use syscalls::Sysno;

use crate::Role;

/// The process's exit status: Firecracker's for the same end.
pub const STATUS: u8 = 148;

/// asm-generic/siginfo.h: the code of a SIGSYS that is seccomp's.
const SYS_SECCOMP: c_int = 1;

/// What SIGSYS tells: asm-generic/siginfo.h, `_sigsys`.
#[repr(C)]
struct SigSys {
    signal: c_int,
    errno: c_int,
    code: c_int,
    _pad: c_int,
    call_address: *mut c_void,
    call: c_int,
    architecture: u32,
}

/// Who the calling thread is. Without a destructor and with no need to be made, it can be read in a handler.
#[derive(Clone, Copy)]
struct Thread {
    role: Option<Role>,
    /// Cut to what the kernel keeps of it, 15 bytes (pthread_setname_np(3)).
    name: [u8; 15],
    length: usize,
}

thread_local! {
    static THREAD: Cell<Thread> = const { Cell::new(Thread { role: None, name: [0; 15], length: 0 }) };
}

pub(crate) fn this_thread_is(role: Role) {
    let current = std::thread::current();
    let name = current.name().unwrap_or_default().as_bytes();
    let mut thread = Thread {
        role: Some(role),
        name: [0; 15],
        length: name.len().min(15),
    };
    thread.name[..thread.length].copy_from_slice(&name[..thread.length]);
    THREAD.set(thread);
}

pub(crate) fn role() -> Option<Role> {
    THREAD.get().role
}

/// The log's descriptor; -1 where it is stderr.
static LOG: AtomicI32 = AtomicI32::new(-1);
/// The microVM's name, for the log.
static ID: OnceLock<String> = OnceLock::new();

/// Where the log of microVM `id` is written from now on, if not to stderr: a descriptor that is open for as long as it is the log's.
pub fn log_to(file: Option<BorrowedFd<'_>>, id: &str) {
    ID.get_or_init(|| id.to_owned());
    LOG.store(file.map_or(-1, |file| file.as_raw_fd()), Ordering::Release);
}

/// Has the calling thread's violations told, and those of the threads that it starts.
///
/// # Errors
/// What the system says.
pub(crate) fn listen() -> io::Result<()> {
    let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = on_sigsys;
    // SAFETY: a sigaction of zeroes is a valid one; its handler takes what SA_SIGINFO has it given, and does only what a handler
    // may. The set is initialised by sigemptyset. The old ones are not asked for.
    let errno = unsafe {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigfillset(&raw mut action.sa_mask);
        if libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut set = MaybeUninit::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGSYS);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), std::ptr::null_mut())
    };
    if errno == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(errno))
    }
}

extern "C" fn on_sigsys(_: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO both, and they live as long as it runs. A SIGSYS's siginfo_t begins as
    // SigSys does, and is larger; of one that somebody sent, only the first three fields are looked at.
    let (info, context) = unsafe { (&*info.cast::<SigSys>(), &*context.cast::<ucontext_t>()) };
    if info.code == SYS_SECCOMP {
        tell(info, context);
    } else {
        let mut line = Line::new();
        let _ = writeln!(line, "chronovisor: error: ended by SIGSYS, which somebody sent");
        line.write_to(libc::STDERR_FILENO);
    }
    // SAFETY: it returns to nobody, and runs nothing of this process.
    unsafe { libc::_exit(STATUS.into()) }
}

fn tell(info: &SigSys, context: &ucontext_t) {
    let thread = THREAD.get();
    let name = std::str::from_utf8(&thread.name[..thread.length]).unwrap_or("?");
    let role = thread.role.map_or("?", Role::name);
    let message = |line: &mut Line| -> fmt::Result {
        let call = usize::try_from(info.call).ok().and_then(Sysno::new);
        let call = call.map_or("unknown", |call| call.name());
        write!(
            line,
            "seccomp: thread {name} made a system call that {role} threads may not make: {call} ({})",
            info.call
        )?;
        // The System V ABI's registers for a system call's arguments (AMD64 supplement, A.2.1).
        use libc::{REG_R8, REG_R9, REG_R10, REG_RDI, REG_RDX, REG_RSI};
        let registers = [REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8, REG_R9];
        let mut separator = ", arguments";
        for register in registers {
            let value = usize::try_from(register)
                .ok()
                .and_then(|at| context.uc_mcontext.gregs.get(at));
            write!(line, "{separator} {:#x}", value.copied().unwrap_or_default())?;
            separator = "";
        }
        writeln!(
            line,
            ", at {:p}; the microVM has ended. A call that it needs is a defect: please report it",
            info.call_address
        )
    };
    let mut line = Line::new();
    let _ = line.write_str("chronovisor: error: ").and_then(|()| message(&mut line));
    // First: what follows may need a call more.
    line.write_to(libc::STDERR_FILENO);
    let log = LOG.load(Ordering::Acquire);
    if log >= 0 {
        let mut line = Line::new();
        let id = ID.get().map_or("", String::as_str);
        let _ = write!(line, "{} [{id}:{name}] ", Now).and_then(|()| message(&mut line));
        line.write_to(log);
    }
}

/// The time of day in UTC, as the log has it.
struct Now;

impl fmt::Display for Now {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: it writes a timespec of ours.
        unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &raw mut now) };
        let (days, seconds) = (now.tv_sec.div_euclid(86_400), now.tv_sec.rem_euclid(86_400));
        let (year, month, day) = date(days);
        let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        let micros = now.tv_nsec / 1000;
        write!(
            f,
            "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z"
        )
    }
}

/// The date `days` after 1970-01-01, by years that begin in March: "chrono-Compatible Low-Level Date Algorithms" (Hinnant),
/// civil_from_days.
const fn date(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400;
    (if month <= 2 { year + 1 } else { year }, month, day)
}

/// A line on the stack. What does not fit is left out, but for its end.
struct Line {
    bytes: [u8; 640],
    length: usize,
}

impl Line {
    const fn new() -> Self {
        Self {
            bytes: [0; 640],
            length: 0,
        }
    }

    fn write_to(&mut self, fd: c_int) {
        if let Some(last) = self.length.checked_sub(1).and_then(|last| self.bytes.get_mut(last)) {
            *last = b'\n';
        }
        let mut asked = libc::pollfd {
            fd,
            events: libc::POLLOUT,
            revents: 0,
        };
        // A pipe that nobody reads would hold up the end, and this thread only: the line is lost then. One that can be written to has
        // room for a page (pipe(7), poll(2)).
        // SAFETY: it reads and writes that one structure.
        if unsafe { libc::poll(&raw mut asked, 1, 0) } != 1 {
            return;
        }
        // SAFETY: the bytes are ours, and there are as many. Nothing can be done about a failure.
        let _ = unsafe { libc::write(fd, self.bytes.as_ptr().cast(), self.length) };
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = &mut self.bytes[self.length..];
        let count = text.len().min(room.len());
        room[..count].copy_from_slice(&text.as_bytes()[..count]);
        self.length += count;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_the_calendars() {
        for (days, expected) in [
            (0, (1970, 1, 1)),
            (-1, (1969, 12, 31)),
            (11_016, (2000, 2, 29)),
            (11_017, (2000, 3, 1)),
            (20_782, (2026, 11, 25)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
        ] {
            assert_eq!(date(days), expected, "{days}");
        }
    }

    #[test]
    fn a_line_that_does_not_fit_is_still_a_line() {
        let mut line = Line::new();
        write!(line, "{:700}", "long").unwrap();
        let (read, write) = io::pipe().unwrap();
        line.write_to(write.as_raw_fd());
        drop(write);
        let text = io::read_to_string(read).unwrap();
        assert!(
            text.starts_with("long") && text.ends_with('\n') && text.len() == 640,
            "{text}"
        );
    }
}
