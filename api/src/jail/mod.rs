//! `chronovisor jail`: a microVM behind a second wall, should its guest get through the first. Command line and
//! directories are those of Firecracker's jailer.
//!
//! ```text
//!   as root, on the host      close what was inherited; check every argument; make <base>/<program>/<id>/root
//!                        │    and its cgroup
//!                        │    descend: --daemonize, --new-pid-ns (`process`)
//!                        ▼
//!   in the last process       join the cgroup, the network namespace; leave the host's mounts; pivot_root (`root`)
//!                        │    copy the program, mount /dev, /proc, /sys and what --bind names; write <program>.pid
//!                        ▼
//!   as the user               limits, no capabilities, no_new_privs, exec (`process`)
//! ```
//!
//! Whatever fails is said in one line, by the process that was started, with status 1; and all that had been made goes
//! again (`undo`). What a microVM has used stays when it has ended, as in Firecracker's jail: nobody is there any more
//! who could remove it. The next start with the same --id uses it again, unless `<program>.pid`, beside the root and
//! root's own, names a process that has that root.

mod args;
mod cgroup;
mod error;
pub mod handover;
mod process;
mod program;
mod root;
mod undo;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rustix::fs::{FlockOperation, Mode, OFlags, fchmod, flock, fstat, openat};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use rustix::time::{ClockId, clock_gettime};

pub use args::{HELP, Jail};

use args::Plan;
use error::JailError;
use handover::Handover;
use process::Descent;
use program::Program;
use undo::Undo;

/// `chronovisor jail`.
///
/// # Errors
/// What failed, and has been undone.
pub fn jail(jail: Jail) -> Result<u8> {
    let began_us = us(ClockId::Monotonic);
    if !rustix::process::geteuid().is_root() {
        return Err(JailError::NotRoot.into());
    }
    process::close_inherited()?;
    let handover = Handover::open();
    let plan = Plan::new(jail)?;
    let mut undo = Undo::default();
    let prepared = Prepared::new(&plan, &mut undo)?;
    match process::descend(&plan)? {
        Descent::First(outcome) => {
            undo.forget();
            outcome?;
            Ok(0)
        }
        Descent::Last(mut relay, descended) => {
            let settled = descended.and_then(|()| prepared.settle(&plan, &mut undo));
            let error = match settled
                .and_then(|libraries| Ok((arguments(&plan, began_us), environment(&handover, libraries)?)))
            {
                Ok((arguments, environment)) => process::exec(&plan, &arguments, &environment, &mut relay),
                Err(error) => error,
            };
            drop(undo);
            Err(relay.tell(error).into())
        }
    }
}

fn us(clock: ClockId) -> i64 {
    let time = clock_gettime(clock);
    time.tv_sec * 1_000_000 + time.tv_nsec / 1000
}

/// Whoever can open a directory can lock it, and keep every start waiting: nobody but root can. Others, as the jail's
/// user, go through.
const LOCKED: Mode = Mode::from_raw_mode(0o711);

/// What was made and opened on the host.
struct Prepared {
    program: Program,
    seats: Vec<cgroup::Seat>,
    netns: Option<File>,
    null: File,
    /// The directory that the jail's root is in: root's own, and locked as long as the jail is made.
    place: OwnedFd,
}

impl Prepared {
    fn new(plan: &Plan, undo: &mut Undo) -> Result<Self, JailError> {
        let open = |path: &Path| File::open(path).map_err(JailError::io(format!("open {}", path.display())));
        let netns = plan.netns.as_deref().map(open).transpose()?;
        let program = Program::open(&plan.program, &plan.name)?;
        let null = File::options().read(true).write(true).open("/dev/null");
        let null = null.map_err(JailError::io("open /dev/null"))?;
        let base = undo::open_real(&plan.base)?;
        let jails = undo::directories(&base, Path::new(&plan.name), undo)?;
        let place = undo::directories_with(&jails, Path::new(&plan.id), LOCKED, undo)?;
        // One that the operator made may be for all to open.
        fchmod(&place, LOCKED).map_err(JailError::step(format!("set the mode of {}", plan.place().display())))?;
        flock(&place, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            Errno::WOULDBLOCK => JailError::Busy(plan.root()),
            error => JailError::step(format!("lock {}", plan.root().display()))(error),
        })?;
        let root = undo::directories(&place, Path::new("root"), undo)?;
        if let Some(pid) = inmate(&root, &place, &pid_file(plan)) {
            return Err(JailError::InUse { root: plan.root(), pid });
        }
        Ok(Self {
            program,
            seats: cgroup::make(plan, undo)?,
            netns,
            null,
            place,
        })
    }

    /// Makes the jail around this process. Gives where the program's libraries are.
    fn settle(self, plan: &Plan, undo: &mut Undo) -> Result<OsString, JailError> {
        for seat in self.seats {
            seat.join(undo)?;
        }
        if let Some(netns) = &self.netns {
            let joined = move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network));
            joined.map_err(JailError::step("join network namespace: netns"))?;
        }
        if plan.new_net_ns {
            new_net_ns()?;
        }
        process::own_streams();
        // As the host knows it: this process's /proc is the host's still.
        let pid = fs::read_link("/proc/self").map_err(JailError::io("read /proc/self"))?;
        let pieces = root::leave_host(plan, undo)?;
        let root = root::pivot(&plan.root())?;
        root::furnish(&root, pieces, plan, undo)?;
        let search_path = self.program.search_path.clone();
        let install = self.program.install(&root, undo);
        install.map_err(|error| error.below(&plan.root()))?;
        // In the root is where those look for it who know Firecracker's jailer; beside it, where the inmate cannot
        // reach it, is the one that the next start goes by.
        for (directory, path) in [(&root, plan.root()), (&self.place, plan.place())] {
            let readable = Mode::RUSR | Mode::RGRP | Mode::ROTH;
            let written = undo::file(directory, &pid_file(plan), readable, undo, |file| {
                file.write_all(pid.as_os_str().as_encoded_bytes())
            });
            written.map_err(|error| error.below(&path))?;
        }
        process::limit(plan)?;
        process::become_user(plan)?;
        if plan.daemonize {
            process::silence(&self.null)?;
        }
        Ok(search_path)
    }
}

#[expect(unsafe_code, reason = "unshare can take away what a thread shares")]
fn new_net_ns() -> Result<(), JailError> {
    // SAFETY: a network namespace of its own takes nothing from the process that memory or descriptors rely on.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.map_err(JailError::step("make a network namespace"))
}

fn pid_file(plan: &Plan) -> PathBuf {
    let mut name = plan.name.clone();
    name.push(".pid");
    PathBuf::from(name)
}

/// The process that has `root` for its own, by what `file` in `place` says: which may be long ago, and its number
/// another's by now.
fn inmate(root: &OwnedFd, place: &OwnedFd, file: &Path) -> Option<u32> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(openat(place, file, flags, Mode::empty()).ok()?);
    let mut text = String::new();
    file.take(16).read_to_string(&mut text).ok()?;
    let pid: u32 = text.trim().parse().ok()?;
    let (its, this) = (fs::metadata(format!("/proc/{pid}/root")).ok()?, fstat(root).ok()?);
    ((its.dev(), its.ino()) == (this.st_dev, this.st_ino)).then_some(pid)
}

/// What the program is given: as Firecracker's jailer does, and `run` the name only, which is all that it takes.
fn arguments(plan: &Plan, began_us: i64) -> Vec<OsString> {
    let mut program = OsString::from("/");
    program.push(&plan.name);
    let id = [OsString::from("--id"), OsString::from(&plan.id)];
    let rest = &plan.arguments[..];
    let is_command = |word: &OsString| !word.as_encoded_bytes().starts_with(b"-");
    match rest {
        [run, rest @ ..] if run == "run" => [program, run.clone()]
            .into_iter()
            .chain(id)
            .chain(rest.iter().cloned())
            .collect(),
        [command, ..] if is_command(command) => std::iter::once(program).chain(rest.iter().cloned()).collect(),
        _ => {
            let times = [
                ("--start-time-us", began_us),
                ("--start-time-cpu-us", 0),
                ("--parent-cpu-time-us", us(ClockId::ProcessCPUTime)),
            ];
            let times = times
                .iter()
                .flat_map(|(flag, us)| [OsString::from(flag), us.to_string().into()]);
            let ours = std::iter::once(program).chain(id).chain(times);
            ours.chain(rest.iter().cloned()).collect()
        }
    }
}

/// All that its environment has.
fn environment(handover: &Handover, libraries: OsString) -> Result<Vec<OsString>, JailError> {
    let mut all = handover.environment()?;
    if !libraries.is_empty() {
        let mut variable = OsString::from("LD_LIBRARY_PATH=");
        variable.push(libraries);
        all.push(variable);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(arguments: &[&str]) -> Plan {
        Plan {
            id: "web-1".to_owned(),
            program: "/usr/bin/chronovisor".into(),
            name: "chronovisor".into(),
            base: "/srv/jailer".into(),
            uid: 1,
            gid: 1,
            cgroups: cgroup::Version::Two,
            parent_cgroup: "chronovisor".into(),
            settings: Vec::new(),
            netns: None,
            new_net_ns: false,
            new_pid_ns: false,
            limits: args::Limits::default(),
            binds: Vec::new(),
            daemonize: false,
            arguments: arguments.iter().map(OsString::from).collect(),
        }
    }

    #[test]
    fn the_program_is_given_its_name_and_what_the_jailer_tells_firecracker() {
        let line = |given: &[&str]| {
            let all = arguments(&plan(given), 7);
            all.iter()
                .map(|word| word.to_str().unwrap().to_owned())
                .collect::<Vec<_>>()
                .join(" ")
        };
        let served = line(&["--api-sock", "/s"]);
        let begins = "/chronovisor --id web-1 --start-time-us 7 --start-time-cpu-us 0 --parent-cpu-time-us ";
        assert!(
            served.starts_with(begins) && served.ends_with(" --api-sock /s"),
            "{served}"
        );
        assert_eq!(
            line(&["run", "--kernel", "k"]),
            "/chronovisor run --id web-1 --kernel k"
        );
        assert_eq!(line(&["check", "--json"]), "/chronovisor check --json");
        assert!(line(&[]).starts_with(begins));
    }

    #[test]
    fn what_says_that_somebody_is_in_there_is_believed_of_who_has_that_root_only() {
        let scratch = crate::scratch::Scratch::new();
        let place = undo::open_real(&scratch.path("")).unwrap();
        let root = undo::open_real(&scratch.path("")).unwrap();
        let file = Path::new("chronovisor.pid");
        assert_eq!(inmate(&root, &place, file), None);
        let this = std::process::id();
        for text in ["", "no number", "0", "-1", &this.to_string()] {
            fs::write(scratch.path(file), text).unwrap();
            assert_eq!(inmate(&root, &place, file), None, "{text}");
        }
        // This process has this root.
        let root = undo::open_real(Path::new("/proc/self/root/")).unwrap();
        let link = scratch.path("link");
        std::os::unix::fs::symlink(scratch.path(file), &link).unwrap();
        assert_eq!(inmate(&root, &place, file), Some(this));
        assert_eq!(
            inmate(&root, &place, Path::new("link")),
            None,
            "by a link it is somebody else's word"
        );
    }
}
