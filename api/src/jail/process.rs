//! The process that becomes the program: which one it is, what it may use, whom it belongs to.
//!
//! ```text
//!  neither             this process
//!  --new-pid-ns        this process ── its child, process 1 of a new namespace
//!  --daemonize         this process ── a child, leader of a new session ── its child (with --new-pid-ns, process 1)
//! ```
//!
//! The last one makes the jail and becomes the program. The first one waits until it has, and says what it is told
//! where that fails: a pipe that exec closes tells the one from the other.
//!
//! Capabilities are laid down by exec, not before it: until then they lie at hand, unused, for what has to be undone if
//! exec fails.

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;

use rustix::fs::{Gid, Mode, OFlags, Uid, fcntl_getfl, fcntl_setfl, open};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Resource, Rlimit, setrlimit, setsid};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout, stderr, stdin, stdout};
use rustix::thread::{
    CapabilitySet, CapabilitySets, UnshareFlags, capabilities, clear_ambient_capability_set, set_capabilities,
    set_keep_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid, unshare_unsafe,
};

use super::args::Plan;
use super::error::JailError;

/// Said right before exec.
const AT_EXEC: u8 = b'.';

/// Which process this is.
#[derive(Debug)]
pub enum Descent {
    /// The one that becomes the program, unless what had to be done for it to be that one failed.
    Last(Relay, Result<(), JailError>),
    /// The first, and what became of the last.
    First(Result<(), JailError>),
}

/// Where the last process tells the first one what fails, if they are two.
#[derive(Debug)]
pub struct Relay(Option<File>);

impl Relay {
    /// Says that exec is next.
    fn at_exec(&mut self) {
        if let Some(pipe) = &mut self.0 {
            let _ = pipe.write_all(&[AT_EXEC]);
        }
    }

    /// Ends this process with `error`; or gives it back, if the first one is this.
    pub fn tell(self, error: JailError) -> JailError {
        let Some(mut pipe) = self.0 else {
            return error;
        };
        let _ = pipe.write_all(error.to_string().as_bytes());
        std::process::exit(i32::from(crate::exit::FAILED))
    }
}

/// Goes down to the last process.
///
/// # Errors
/// What failed in the only process so far.
pub fn descend(plan: &Plan) -> Result<Descent, JailError> {
    if !plan.daemonize && !plan.new_pid_ns {
        return Ok(Descent::Last(Relay(None), Ok(())));
    }
    let (from, to) = pipe_with(PipeFlags::CLOEXEC).map_err(JailError::step("make a pipe"))?;
    if !plan.daemonize {
        new_pid_ns()?;
    }
    if fork()? == Side::Parent {
        drop(to);
        return Ok(Descent::First(outcome(from)));
    }
    drop(from);
    let relay = Relay(Some(File::from(to)));
    if !plan.daemonize {
        return Ok(Descent::Last(relay, Ok(())));
    }
    let second = || {
        // It leads no group: it was forked off.
        setsid().map_err(JailError::step("make a session"))?;
        if plan.new_pid_ns {
            new_pid_ns()?;
        }
        // Who leads no session gets no terminal by opening one.
        fork()
    };
    match second() {
        Ok(Side::Child) => Ok(Descent::Last(relay, Ok(()))),
        Ok(Side::Parent) => exit_at_once(),
        Err(error) => Ok(Descent::Last(relay, Err(error))),
    }
}

/// What the last process says until it becomes the program, or ends.
fn outcome(from: OwnedFd) -> Result<(), JailError> {
    let mut said = Vec::new();
    File::from(from)
        .read_to_end(&mut said)
        .map_err(JailError::io("hear of the program"))?;
    match &said[..] {
        [AT_EXEC] => Ok(()),
        [] => Err(JailError::Vanished),
        said => {
            let text = said.strip_prefix(&[AT_EXEC]).unwrap_or(said);
            Err(JailError::Told(String::from_utf8_lossy(text).into_owned()))
        }
    }
}

#[expect(unsafe_code, reason = "unshare can take away what a thread shares")]
fn new_pid_ns() -> Result<(), JailError> {
    // SAFETY: it is the next child's namespace that is new, and nothing of this process.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID) }.map_err(JailError::step("make a PID namespace"))
}

#[derive(Debug, PartialEq, Eq)]
enum Side {
    Parent,
    Child,
}

#[expect(unsafe_code, reason = "fork")]
fn fork() -> Result<Side, JailError> {
    // SAFETY: this process has one thread, so that the child has all that there is.
    match unsafe { libc::fork() } {
        -1 => Err(JailError::io("fork")(std::io::Error::last_os_error())),
        0 => Ok(Side::Child),
        _ => Ok(Side::Parent),
    }
}

/// Without undoing anything, which the child's is.
#[expect(unsafe_code, reason = "_exit")]
fn exit_at_once() -> ! {
    // SAFETY: nothing runs after it.
    unsafe { libc::_exit(0) }
}

/// Closes what the caller of this program may have left open, but for standard input, output and error.
#[expect(unsafe_code, reason = "close_range closes what others may own")]
pub fn close_inherited() -> Result<(), JailError> {
    const FIRST: libc::c_uint = 3;
    // SAFETY: nothing has been opened here yet.
    match unsafe { libc::close_range(FIRST, libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        _ => Err(JailError::io("close what it inherited")(std::io::Error::last_os_error())),
    }
}

/// Opens anew what standard input, output and error lead to, where it is a terminal or a pipe: the program sets them
/// not to block, on what it alone has open (`vmm::console`), and another user cannot open them. One that cannot be
/// opened stays what it is.
pub fn own_streams() {
    for number in 0..3 {
        let path = format!("/proc/self/fd/{number}");
        let Ok(metadata) = std::fs::metadata(&path) else {
            continue;
        };
        // A device that is no terminal may do more, when opened, than to be open.
        let terminal = std::fs::read_link(&path).is_ok_and(|to| to.starts_with("/dev/pts/"));
        if !terminal && !metadata.file_type().is_fifo() {
            continue;
        }
        let stream = match number {
            0 => fcntl_getfl(stdin()),
            1 => fcntl_getfl(stdout()),
            _ => fcntl_getfl(stderr()),
        };
        let Ok(access) = stream.map(|flags| flags & OFlags::ACCMODE) else {
            continue;
        };
        // Not to wait for the other end of a pipe, and then to wait as before.
        let flags = access | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let opened = open(&*path, flags, Mode::empty());
        let _ = opened.and_then(|anew| {
            fcntl_setfl(&anew, access)?;
            match number {
                0 => dup2_stdin(anew),
                1 => dup2_stdout(anew),
                _ => dup2_stderr(anew),
            }
        });
    }
}

/// Has standard input, output and error lead to `null`.
pub fn silence(null: &File) -> Result<(), JailError> {
    dup2_stdin(null)
        .and_then(|()| dup2_stdout(null))
        .and_then(|()| dup2_stderr(null))
        .map_err(JailError::step("lead its output to /dev/null"))
}

/// Limits what this process, and the program, may use.
pub fn limit(plan: &Plan) -> Result<(), JailError> {
    let set = |what: &str, resource, limit: u64| {
        let limit = Some(limit);
        let limits = Rlimit {
            current: limit,
            maximum: limit,
        };
        setrlimit(resource, limits).map_err(JailError::step(format!("Failed to set limit for resource: {what}")))
    };
    if let Some(bytes) = plan.limits.file_size {
        set("fsize", Resource::Fsize, bytes)?;
    }
    set("no-file", Resource::Nofile, plan.limits.open_files)
}

/// Becomes the user of `plan`, with no way back once the program runs: it has no capability, whoever the user is, and
/// gains none.
pub fn become_user(plan: &Plan) -> Result<(), JailError> {
    let (uid, gid) = (Uid::from_raw(plan.uid), Gid::from_raw(plan.gid));
    drop_bounding_set()?;
    clear_ambient_capability_set().map_err(JailError::step("lay down ambient capabilities"))?;
    set_thread_groups(&[]).map_err(JailError::step("leave its groups"))?;
    set_thread_res_gid(gid, gid, gid).map_err(JailError::step(format!("become group {gid:?}")))?;
    set_keep_capabilities(true).map_err(JailError::step("keep what undoing takes"))?;
    set_thread_res_uid(uid, uid, uid).map_err(JailError::step(format!("become user {uid:?}")))?;
    let permitted = capabilities(None)
        .map_err(JailError::step("see its capabilities"))?
        .permitted;
    let unused = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, unused).map_err(JailError::step("lay down its capabilities"))?;
    set_no_new_privs(true).map_err(JailError::step("set no_new_privs"))
}

/// What is not in it no exec gives, not even root's.
#[expect(unsafe_code, reason = "rustix knows the capabilities of its own time only")]
fn drop_bounding_set() -> Result<(), JailError> {
    for capability in 0..64_u64 {
        // SAFETY: it takes a number, and memory has no part in it.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            let error = std::io::Error::last_os_error();
            // One more than this kernel has.
            let past = error.raw_os_error() == Some(libc::EINVAL) && capability > 0;
            return if past {
                Ok(())
            } else {
                Err(JailError::io("give up capabilities")(error))
            };
        }
    }
    Ok(())
}

/// Becomes the program; gives what the system says where that fails.
#[expect(unsafe_code, reason = "execve and signal")]
pub fn exec(plan: &Plan, arguments: &[OsString], environment: &[OsString], relay: &mut Relay) -> JailError {
    let mut path = OsString::from("/");
    path.push(&plan.name);
    let what = format!("Failed to exec into {}", plan.program.display());
    let string = |text: &OsStr| CString::new(text.as_bytes()).ok();
    let strings = |texts: &[OsString]| texts.iter().map(|text| string(text)).collect::<Option<Vec<_>>>();
    let (Some(path), Some(arguments), Some(environment)) = (string(&path), strings(arguments), strings(environment))
    else {
        return JailError::io(what)(std::io::ErrorKind::InvalidInput.into());
    };
    let pointers = |strings: &[CString]| {
        let all = strings.iter().map(|string| string.as_ptr());
        all.chain([std::ptr::null()]).collect::<Vec<_>>()
    };
    let (argv, envp) = (pointers(&arguments), pointers(&environment));
    relay.at_exec();
    // What is ignored stays so over exec, and Rust's runtime ignores SIGPIPE: the program is to find it as any other
    // does.
    // SAFETY: no handler is installed, and none was.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    // Not by std::process::Command, which takes blocked signals for a mistake.
    // SAFETY: both arrays end in a null pointer, and all that they point to outlives the call.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    let error = std::io::Error::last_os_error();
    // Whoever was to be told may have gone.
    // SAFETY: as above.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    JailError::io(what)(error)
}
