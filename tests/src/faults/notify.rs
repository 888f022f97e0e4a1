//! Has a system call of a child fail: the kernel asks us before it does one of [`CALLS`] for the child, by seccomp's user notification
//! (seccomp(2), `SECCOMP_RET_USER_NOTIF`), and we say what the call shall return, or that it be done.
//!
//! The child is any program, as it ships: nothing of it knows of this. The filter belongs to the thread that starts it and goes over to
//! the child with the fork; what that thread itself asks is let through.
#![allow(unsafe_code, reason = "seccomp has no safe wrapper")]

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::mem::{MaybeUninit, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};

use super::calls::{CALLS, Call, Effect, KVM_RUN, Of};

/// The one call that fails: the `nth` of its kind, from 0, in the order in which all threads of the child make them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Of which kind.
    pub call: &'static Call,
    /// Which one.
    pub nth: usize,
    /// What becomes of it.
    pub effect: Effect,
}

/// What was seen of a child's calls.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// How many of each kind.
    pub counts: BTreeMap<&'static str, usize>,
    /// Which the fault was: the thread's name, and what the call was about. None where the child made fewer of its kind.
    pub hit: Option<String>,
}

/// A child whose calls are watched.
#[derive(Debug)]
pub struct Watched {
    supervisor: JoinHandle<Seen>,
}

impl Watched {
    /// What was seen; waits until the child, which has to have been waited for, and all of its threads are gone.
    ///
    /// # Panics
    /// When the supervisor did.
    #[must_use]
    pub fn seen(self) -> Seen {
        self.supervisor.join().expect("it tells what it saw")
    }
}

/// Starts `command`, with `fault` for it, if any.
///
/// # Errors
/// The kernel has no user notification, or the command cannot be started.
pub fn spawn(mut command: Command, fault: Option<Fault>) -> io::Result<(Child, Watched)> {
    const NONE_YET: i32 = -1;
    // By a number in memory: a channel's memory might be asked for by a call that is watched, and nobody answers yet.
    let (listener, thread) = (AtomicI32::new(NONE_YET), AtomicI32::new(0));
    std::thread::scope(|scope| {
        let spawner = scope.spawn(|| {
            thread.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Relaxed);
            match filter() {
                Ok(fd) => listener.store(fd, Ordering::Release),
                Err(error) => {
                    // An error's number, below NONE_YET.
                    listener.store(
                        NONE_YET - error.raw_os_error().unwrap_or(libc::EINVAL),
                        Ordering::Release,
                    );
                    return Err(error);
                }
            }
            command.spawn()
        });
        let fd = loop {
            match listener.load(Ordering::Acquire) {
                NONE_YET => std::thread::yield_now(),
                fd => break fd,
            }
        };
        if fd < NONE_YET {
            return Err(io::Error::from_raw_os_error(NONE_YET - fd));
        }
        // SAFETY: the kernel has just given it to us, and nobody else has it.
        let listener = unsafe { OwnedFd::from_raw_fd(fd) };
        let spawner_id = thread.load(Ordering::Relaxed).cast_unsigned();
        let supervisor = std::thread::spawn(move || supervise(&listener, spawner_id, fault));
        let child = spawner.join().expect("it tells what failed")?;
        Ok((child, Watched { supervisor }))
    })
}

/// Filters the calling thread, and what it starts; the descriptor by which it is heard.
fn filter() -> io::Result<i32> {
    let statement = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: u16::try_from(code).expect("a BPF opcode"),
        jt,
        jf,
        k,
    };
    let mut numbers: Vec<u32> = CALLS.iter().map(|call| number(call.number)).collect();
    // Which child is ours is known by what it executes.
    numbers.push(number(libc::SYS_execve));
    numbers.dedup();
    // The number is the first field of `struct seccomp_data`.
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0)];
    for (at, nr) in numbers.iter().enumerate() {
        // Over those that follow, and over what lets through.
        let to_notify = u8::try_from(numbers.len() - at).expect("some dozens");
        program.push(statement(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            to_notify,
            0,
            *nr,
        ));
    }
    program.push(statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW));
    program.push(statement(
        libc::BPF_RET | libc::BPF_K,
        0,
        0,
        libc::SECCOMP_RET_USER_NOTIF,
    ));
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).expect("some dozens"),
        filter: program.as_mut_ptr(),
    };
    // SAFETY: neither call reads anything but the program, which lives until both have returned.
    unsafe {
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 {
            return Err(io::Error::last_os_error());
        }
        let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
        let fd = libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        );
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(i32::try_from(fd).expect("a descriptor"))
    }
}

fn number(number: libc::c_long) -> u32 {
    u32::try_from(number).expect("a system call's number")
}

/// Answers until nobody is left to ask.
fn supervise(listener: &OwnedFd, spawner: u32, fault: Option<Fault>) -> Seen {
    let mut seen = Seen::default();
    let (mut executed, mut begun) = (false, false);
    loop {
        let mut ready = [PollFd::new(listener, PollFlags::IN)];
        if poll(&mut ready, None).is_err() {
            continue;
        }
        if !ready[0].revents().contains(PollFlags::IN) {
            return seen;
        }
        let Some(asked) = receive(listener) else { continue };
        let is = |call: libc::c_long| libc::c_long::from(asked.data.nr) == call;
        let ours = asked.pid != spawner;
        executed |= ours && is(libc::SYS_execve);
        let effect = (begun && ours).then(|| decide(&asked, fault, &mut seen)).flatten();
        answer(listener, &asked, effect);
        // The last thing that may fail before `main` of a Rust program: what comes before is its C library's and its runtime's,
        // and ends in a signal of theirs.
        begun |= ours && executed && is(libc::SYS_sigaltstack) && asked.data.args[0] != 0;
    }
}

/// What is to become of a call; none where it is to be done.
fn decide(asked: &libc::seccomp_notif, fault: Option<Fault>, seen: &mut Seen) -> Option<Effect> {
    let is_run = asked.data.args[1] == KVM_RUN && asked.data.nr == i32::try_from(libc::SYS_ioctl).expect("a number");
    let of_kind = |call: &&Call| {
        libc::c_long::from(asked.data.nr) == call.number
            && (call.number != libc::SYS_ioctl || is_run == (call.name == "KVM_RUN"))
    };
    let call = CALLS.iter().find(of_kind)?;
    if matches!(call.name, "read" | "write") && descriptor(asked).starts_with("anon_inode") {
        return None;
    }
    let count = seen.counts.entry(call.name).or_default();
    let nth = *count;
    *count += 1;
    let fault = fault.filter(|fault| fault.call.name == call.name && fault.nth == nth)?;
    let thread = std::fs::read_to_string(format!("/proc/{}/comm", asked.pid)).unwrap_or_default();
    let about = match call.of {
        Of::Nothing => String::new(),
        Of::Descriptor => descriptor(asked),
        Of::FirstPath => path(asked, asked.data.args[0]),
        Of::Path => path(asked, asked.data.args[1]),
    };
    let request = if call.name == "ioctl" {
        format!(" {:#x}", asked.data.args[1])
    } else {
        String::new()
    };
    seen.hit = Some(
        format!("{}: {}{request} {about}", thread.trim(), call.name)
            .trim_end()
            .to_owned(),
    );
    Some(fault.effect)
}

/// What the descriptor is that is the call's first argument.
fn descriptor(asked: &libc::seccomp_notif) -> String {
    let link = std::fs::read_link(format!("/proc/{}/fd/{}", asked.pid, asked.data.args[0]));
    link.map(|link| link.display().to_string()).unwrap_or_default()
}

/// The path at `address`; the descriptor's that is the first argument, where it is empty.
fn path(asked: &libc::seccomp_notif, address: u64) -> String {
    let mut bytes = [0; 256];
    let read = File::open(format!("/proc/{}/mem", asked.pid)).and_then(|mem| mem.read_at(&mut bytes, address));
    let bytes = &bytes[..read.unwrap_or(0)];
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    if text.is_empty() {
        descriptor(asked)
    } else {
        String::from_utf8_lossy(text).into_owned()
    }
}

/// The next question; none where who asked is gone.
fn receive(listener: &OwnedFd) -> Option<libc::seccomp_notif> {
    // All zeros, as the kernel wants it.
    let mut asked = MaybeUninit::<libc::seccomp_notif>::zeroed();
    // SAFETY: the kernel fills all of it where it succeeds, and zeros are numbers too.
    unsafe {
        let done = libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_RECV as _,
            asked.as_mut_ptr(),
        );
        (done == 0).then(|| asked.assume_init())
    }
}

fn answer(listener: &OwnedFd, asked: &libc::seccomp_notif, effect: Option<Effect>) {
    // SAFETY: a structure of numbers.
    let mut reply: libc::seccomp_notif_resp = unsafe { zeroed() };
    reply.id = asked.id;
    let written = match effect {
        None => Err(0),
        Some(Effect::Error(errno)) => Err(errno),
        Some(Effect::Short) => half(asked).map_err(|_| 0),
        Some(Effect::Hang) => return,
    };
    match written {
        Ok(written) => reply.val = written,
        Err(0) => reply.flags = u32::try_from(libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE).expect("a flag"),
        Err(errno) => reply.error = -errno,
    }
    // SAFETY: the reply is read, and nothing else. Who asked may be gone by now.
    unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_SEND as _,
            &raw mut reply,
        )
    };
}

/// Writes half of what a write(2) of the child's should, in its stead; how much that was.
///
/// # Errors
/// It cannot be halved, or not by us.
fn half(asked: &libc::seccomp_notif) -> io::Result<i64> {
    let [_, from, length, ..] = asked.data.args;
    let half = usize::try_from(length / 2).map_err(io::Error::other)?;
    if half == 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut bytes = vec![0; half];
    File::open(format!("/proc/{}/mem", asked.pid))?.read_exact_at(&mut bytes, from)?;
    let path = format!("/proc/{}/fd/{}", asked.pid, asked.data.args[0]);
    let mut file = OpenOptions::new()
        .append(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    Ok(i64::try_from(file.write(&bytes)?).expect("half a length"))
}
