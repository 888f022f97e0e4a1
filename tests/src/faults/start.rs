//! A start that meets a fault, and what is promised of it.
//!
//! Either it is refused: a status that is not 0, one line that says what failed, within [`PATIENCE`]; or it goes on, and then the
//! microVM is as good as any: it answers, its readings keep the laws, it ends when its guest does, with the guest's status. Either way
//! nothing is left: no socket, no tap, no mount, no cgroup, no process; and nothing panicked.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use accounting::{Reading, laws};
use serde_json::json;

use super::calls::CALLS;
use super::notify::{self, Fault, Seen};
use crate::bed::{self, Folder};
use crate::client::{self, Response};
use crate::flat::{Program, elf};
use crate::vm::{PATIENCE, Process, piped};

/// How long an answer is waited for before it is asked for again: a connection of its own may be what met the fault.
const ANSWER: Duration = Duration::from_secs(5);

/// How a microVM is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// `chronovisor run`, with every device that it has flags for, and a log.
    Run,
    /// A server with a `--config-file`: every device, io_uring, rate limiters, files for log, metrics and the serial port.
    Serve,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Run, Self::Serve];

    /// For reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::Serve => "--config-file",
        }
    }

    /// The status when its guest reboots.
    fn status(self) -> i32 {
        match self {
            Self::Run => 3,
            Self::Serve => 0,
        }
    }
}

/// What became of a start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was refused, in this line.
    Refused(String),
    /// It went on.
    WentOn,
    /// Something that was promised did not hold.
    Broken(String),
}

/// What a start has, and where.
#[derive(Debug)]
struct Stage {
    folder: Folder,
    socket: PathBuf,
    /// What may be there in the end.
    kept: BTreeSet<String>,
    /// Whether this thread's network is its own, to make a tap in.
    tap: bool,
}

impl Stage {
    fn new(tap: bool) -> Self {
        let folder = Folder::new();
        folder.write("kernel", elf(&Program::reset_by_key()));
        folder.write("disk", [0; 1 << 16]);
        folder.write("config", "");
        let socket = folder.join("api.sock");
        let kept = ["kernel", "disk", "config", "log", "metrics", "serial"]
            .map(String::from)
            .into();
        Self {
            folder,
            socket,
            kept,
            tap,
        }
    }

    fn path(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    /// The microVM's name, which its folder has too, and nobody else's.
    fn id(&self) -> String {
        let name = self.folder.path().file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    fn command(&self, way: Way) -> Command {
        let mut command = Command::new(bed::file("chronovisor"));
        let socket = self.path("api.sock");
        match way {
            Way::Run => {
                let vsock = format!("cid=3,uds={}", self.path("vsock"));
                command.args(["run", "--mem", "16M", "--rng", "--kernel", &self.path("kernel")]);
                command.args(["--disk", &self.path("disk"), "--vsock", &vsock, "--api-sock", &socket]);
                command.args(["--log-path", &self.path("log"), "--id", &self.id()]);
                if self.tap {
                    command.args(["--net", "tap=fault0"]);
                }
            }
            Way::Serve => {
                self.folder.write("config", self.config().to_string());
                command.args(["--config-file", &self.path("config"), "--api-sock", &socket]);
                command.args(["--metrics-path", &self.path("metrics"), "--id", &self.id()]);
            }
        }
        command
    }

    fn config(&self) -> serde_json::Value {
        let limiter = json!({ "bandwidth": { "size": 1_000_000, "refill_time": 100 } });
        let mut config = json!({
            "boot-source": { "kernel_image_path": self.path("kernel"), "boot_args": "console=ttyS0" },
            "machine-config": { "vcpu_count": 1, "mem_size_mib": 16 },
            "drives": [{
                "drive_id": "disk", "path_on_host": self.path("disk"), "is_root_device": false, "io_engine": "Async",
                "rate_limiter": limiter, "cache_type": "Writeback",
            }],
            "vsock": { "guest_cid": 3, "uds_path": self.path("vsock") },
            "entropy": { "rate_limiter": limiter },
            "balloon": { "amount_mib": 1, "deflate_on_oom": true, "stats_polling_interval_s": 1 },
            "logger": { "log_path": self.path("log"), "level": "Debug" },
            "serial": { "serial_out_path": self.path("serial") },
        });
        if self.tap {
            config["network-interfaces"] = json!([{ "iface_id": "eth0", "host_dev_name": "fault0" }]);
            config["mmds-config"] = json!({ "version": "V2", "network_interfaces": ["eth0"] });
        }
        config
    }

    fn ask(&self, method: &str, path: &str, body: Option<&str>) -> Option<Response> {
        client::request_within(ANSWER, &self.socket, method, path, body).ok()
    }
}

/// What the machine has that a microVM may add to, and has to take away again.
#[derive(Debug, PartialEq, Eq)]
struct Surroundings {
    mounts: Vec<String>,
    taps: BTreeSet<String>,
    cgroups: BTreeSet<PathBuf>,
}

impl Surroundings {
    /// As far as it is of microVM `id`: others come and go.
    fn look(tap: bool, id: &str) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        // In a network that is not this thread's own they come and go too.
        let interfaces = if tap {
            read("/proc/thread-self/net/dev")
        } else {
            String::new()
        };
        let names = interfaces
            .lines()
            .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()));
        let mut cgroups = BTreeSet::new();
        folders(Path::new("/sys/fs/cgroup"), &mut cgroups);
        cgroups.retain(|path| path.to_string_lossy().contains(id));
        let mounts = read("/proc/thread-self/mounts");
        Self {
            mounts: mounts
                .lines()
                .filter(|mount| mount.contains(id))
                .map(String::from)
                .collect(),
            taps: names.collect(),
            cgroups,
        }
    }
}

fn folders(path: &Path, into: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            folders(&entry.path(), into);
            into.insert(entry.path());
        }
    }
}

/// Starts a microVM in `way`, has `fault` happen to it, and holds it to what is promised. `tap`: whether it gets a network interface, for
/// which the calling thread has a network of its own.
///
/// # Panics
/// When the fault cannot be made to happen.
#[must_use]
pub fn start(way: Way, tap: bool, fault: Option<Fault>) -> (Outcome, Seen) {
    let stage = Stage::new(tap);
    let before = Surroundings::look(tap, &stage.id());
    let mut command = stage.command(way);
    piped(&mut command);
    let text = format!("{command:?}");
    let (child, watched) = notify::spawn(command, fault).expect("seccomp's user notification, of Linux 5.9");
    let mut process = Process::of(text, child);
    let lived = live(&stage, &mut process);
    if lived.is_err() {
        // It may hang.
        process.kill();
    }
    let (status, _, stderr) = process.wait();
    let seen = watched.seen();
    let ended = lived.and_then(|started| judge(started, way, status, &stderr, seen.hit.as_deref(), &stage, &before));
    let outcome = ended.unwrap_or_else(|why| Outcome::Broken(format!("{why}; {status}; stderr: {stderr}")));
    (outcome, seen)
}

/// Follows a microVM from its start to its end, which is its guest's. Whether it came so far.
fn live(stage: &Stage, process: &mut Process) -> Result<bool, String> {
    let begun = Instant::now();
    let wait_for = |what: &str, process: &mut Process, done: &mut dyn FnMut() -> bool| -> Result<bool, String> {
        loop {
            if process.has_ended() {
                return Ok(false);
            }
            if done() {
                return Ok(true);
            }
            if begun.elapsed() > PATIENCE {
                return Err(format!("it hangs: {what} never came"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    let mut running = || {
        stage
            .ask("GET", "/", None)
            .is_some_and(|r| r.body["state"] == "Running")
    };
    if !wait_for("its start", process, &mut running)? {
        return Ok(false);
    }
    let mut readings: Vec<Reading> = Vec::new();
    let mut read = || {
        let answer = stage.ask("GET", "/vcpus/0/cputime", None);
        readings.extend(answer.and_then(|answer| serde_json::from_value(answer.body).ok()));
        readings.len() == 2
    };
    if !wait_for("two readings", process, &mut read)? {
        return Ok(false);
    }
    laws::check_pair(&readings[0], &readings[1]).map_err(|broken| format!("{broken}: {readings:?}"))?;
    let mut asked = None;
    let mut end = || {
        // Again where the answer was lost; not while the guest is still to look at its keys.
        if asked.is_none_or(|at: Instant| at.elapsed() > ANSWER) {
            let keys = stage.ask("PUT", "/actions", Some(r#"{"action_type": "SendCtrlAltDel"}"#));
            asked = keys.is_some().then(Instant::now);
        }
        false
    };
    wait_for("its guest's end", process, &mut end)?;
    Ok(true)
}

fn judge(
    started: bool,
    way: Way,
    status: std::process::ExitStatus,
    stderr: &str,
    hit: Option<&str>,
    stage: &Stage,
    before: &Surroundings,
) -> Result<Outcome, String> {
    if stderr.contains("panicked") || stderr.contains("a defect of chronovisor") {
        return Err("it panicked".into());
    }
    // A look that fails at whose the file is, when it is to be removed, is as a removal that fails: it stays, for the next
    // start.
    let unseen = |name: &String| started && hit.is_some_and(|hit| hit.ends_with(&format!(": newfstatat {name}")));
    let left: Vec<_> = stage
        .folder
        .names()
        .into_iter()
        .filter(|name| !stage.kept.contains(name) && !unseen(name))
        .collect();
    if !left.is_empty() {
        return Err(format!("files are left: {left:?}"));
    }
    let after = Surroundings::look(stage.tap, &stage.id());
    if after != *before {
        return Err(format!("something is left: {before:?} became {after:?}"));
    }
    if let Some(process) = process_with(&stage.path("api.sock")) {
        return Err(format!("a process is left: {process}"));
    }
    let said =
        |line: &&str| !line.starts_with("chronovisor: warning: ") && !line.starts_with("chronovisor: error: drive ");
    let lines: Vec<_> = stderr.lines().filter(said).collect();
    let line = match lines[..] {
        [line] => line
            .strip_prefix("chronovisor: ")
            .ok_or("its last word is not its own")?,
        // Its standard error may be what met the fault.
        [] => "",
        _ => return Err("it says more than one line".into()),
    };
    match status.code() {
        Some(code) if started && code == way.status() => Ok(Outcome::WentOn),
        Some(1 | 5) if !line.is_empty() => {
            // The same line for the same fault, wherever it was.
            let folder = stage.folder.path().display().to_string();
            Ok(Outcome::Refused(line.replace(&folder, "FOLDER")))
        }
        _ => Err("that is no status of its".into()),
    }
}

/// A process that has `word` on its command line.
fn process_with(word: &str) -> Option<String> {
    let processes = fs::read_dir("/proc").expect("procfs").flatten();
    let mut command_lines = processes.filter_map(|entry| fs::read_to_string(entry.path().join("cmdline")).ok());
    command_lines
        .find(|line| line.contains(word))
        .map(|line| line.replace('\0', " "))
}

/// Every fault that a start can meet which made these calls.
#[must_use]
pub fn points(seen: &Seen) -> Vec<Fault> {
    let mut points = Vec::new();
    for call in CALLS {
        for nth in 0..seen.counts.get(call.name).copied().unwrap_or(0) {
            points.extend(call.effects.iter().map(|&effect| Fault { call, nth, effect }));
        }
    }
    points
}
