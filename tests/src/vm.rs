//! A microVM under test: `chronovisor` as a child process, its output gathered, its API at hand.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use accounting::reading::Modes;
use accounting::{Reading, laws};

use crate::bed::{self, Folder};
use crate::client::{self, Response};
use crate::flat::{Program, elf};

/// How long anything may take before a test gives up: a guard, far above what the slowest bed needs.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A child process, its standard output and error gathered into one text each as they come.
#[derive(Debug)]
pub struct Process {
    /// What was started, for whom it disappoints.
    command: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Gathered,
    stderr: Gathered,
}

impl Process {
    /// Starts `chronovisor` with `arguments`.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn chronovisor<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> Self {
        let mut command = Command::new(bed::file("chronovisor"));
        command.args(arguments);
        Self::spawn(command)
    }

    /// Starts `command`.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn spawn(mut command: Command) -> Self {
        piped(&mut command);
        let child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        Self::of(format!("{command:?}"), child)
    }

    /// A child that somebody else has started, by `command`, its three streams [`piped`].
    ///
    /// # Panics
    /// When they are not.
    #[must_use]
    pub fn of(command: String, mut child: Child) -> Self {
        let stdout = Gathered::from(child.stdout.take().expect("piped"));
        let stderr = Gathered::from(child.stderr.take().expect("piped"));
        Self {
            command,
            stdin: child.stdin.take(),
            child,
            stdout,
            stderr,
        }
    }

    /// The process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Types `text` into its standard input.
    ///
    /// # Panics
    /// When it does not read.
    pub fn type_in(&mut self, text: &str) {
        let stdin = self.stdin.as_mut().expect("standard input is open");
        stdin
            .write_all(text.as_bytes())
            .and_then(|()| stdin.flush())
            .expect("it reads");
    }

    /// Its standard output so far, from byte `from` on.
    #[must_use]
    pub fn stdout_from(&self, from: usize) -> String {
        let text = self.stdout.text();
        text.get(from..).unwrap_or_default().to_owned()
    }

    /// Closes its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Waits until its standard output contains `text`, and returns the output up to there.
    ///
    /// # Panics
    /// When it ends, or patience does, before that.
    pub fn wait_for(&mut self, text: &str) -> String {
        self.stdout.wait_for(text).unwrap_or_else(|so_far| {
            let status = self.child.try_wait();
            panic!(
                "{text:?} never came ({status:?}) of {}; stdout:\n{so_far}\nstderr:\n{}",
                self.command,
                self.stderr.text()
            )
        })
    }

    /// Waits until its standard error contains `text`.
    ///
    /// # Panics
    /// As [`Process::wait_for`].
    pub fn wait_for_error(&mut self, text: &str) {
        if let Err(so_far) = self.stderr.wait_for(text) {
            panic!("{text:?} never came ({:?}); stderr:\n{so_far}", self.child.try_wait());
        }
    }

    /// Its standard output so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// Its standard error so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// When it is gone.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("it is there");
    }

    /// Kills it, if it is there still.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
    }

    /// Whether it has ended.
    ///
    /// # Panics
    /// Never: it is ours.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("it is ours").is_some()
    }

    /// Waits for its end and gives its status, and all it said.
    ///
    /// # Panics
    /// When patience ends first.
    pub fn wait(&mut self) -> (ExitStatus, String, String) {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("it is ours") {
                return (status, self.stdout.end(), self.stderr.end());
            }
            if begun.elapsed() > PATIENCE {
                panic!(
                    "it does not end; stdout:\n{}\nstderr:\n{}",
                    self.stdout(),
                    self.stderr()
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Has the three streams of `command` be pipes.
pub fn piped(command: &mut Command) {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A microVM with its API: `chronovisor run --api-sock`.
#[derive(Debug)]
pub struct Vm {
    /// The process.
    pub process: Process,
    socket: PathBuf,
    /// The last readings, to hold the next against.
    last: Vec<Reading>,
    _folder: Folder,
}

impl Vm {
    /// `chronovisor run` with `arguments`, and a socket of its own; returns once the API answers.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn run<S: Into<String>>(arguments: impl IntoIterator<Item = S>) -> Self {
        Self::run_after(":", arguments)
    }

    /// Likewise, in a process that has gone through `prelude`, commands of a shell, before it became `chronovisor`.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn run_after<S: Into<String>>(prelude: &str, arguments: impl IntoIterator<Item = S>) -> Self {
        let folder = Folder::new();
        let socket = folder.join("api.sock");
        let mut all = vec!["run".to_owned(), "--api-sock".into(), socket.display().to_string()];
        all.extend(arguments.into_iter().map(Into::into));
        let mut vm = Self {
            process: Process::spawn(after(prelude, &all)),
            socket,
            last: Vec::new(),
            _folder: folder,
        };
        vm.wait_until_started();
        vm
    }

    /// `chronovisor --api-sock --config-file` with Debian's kernel and our init, doing `what`, on two vCPUs, and `more` sections
    /// of a configuration as Firecracker has it.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn serve_debian(what: &str, more: serde_json::Value) -> Self {
        Self::serve_debian_with(what, more, [])
    }

    /// Likewise, with more flags.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn serve_debian_with<'a>(
        what: &str,
        more: serde_json::Value,
        flags: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        let path = |name| bed::file(name).display().to_string();
        let mut config = serde_json::json!({
            "boot-source": {
                "kernel_image_path": path("vmlinux"), "initrd_path": path("guest.cpio"), "boot_args": debian_cmdline(what),
            },
            "machine-config": { "vcpu_count": 2, "mem_size_mib": 256 },
        });
        let (Some(config_sections), serde_json::Value::Object(more)) = (config.as_object_mut(), more) else {
            panic!("sections are an object");
        };
        config_sections.extend(more);
        Self::serve(&config, flags)
    }

    /// `chronovisor --api-sock --config-file` with `config` and `flags`; returns once the guest runs.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn serve<'a>(config: &serde_json::Value, flags: impl IntoIterator<Item = &'a str>) -> Self {
        let folder = Folder::new();
        let socket = folder.join("api.sock");
        let file = folder.write("config.json", config.to_string());
        let arguments = ["--api-sock".into(), socket.clone(), "--config-file".into(), file];
        let flags = flags.into_iter().map(PathBuf::from);
        let mut vm = Self {
            process: Process::chronovisor(arguments.into_iter().chain(flags)),
            socket,
            last: Vec::new(),
            _folder: folder,
        };
        vm.wait_until_started();
        vm
    }

    fn wait_until_started(&mut self) {
        self.wait_until("the guest is started", |vm| {
            client::request(&vm.socket, "GET", "/", None).is_ok_and(|r| r.body["state"] == "Running")
        });
    }

    /// `chronovisor run` of a flat guest: `program` as its kernel.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn flat<'a>(program: &Program, arguments: impl IntoIterator<Item = &'a str>) -> Self {
        Self::flat_after(":", program, arguments)
    }

    /// [`Vm::flat`], as [`Vm::run_after`].
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn flat_after<'a>(prelude: &str, program: &Program, arguments: impl IntoIterator<Item = &'a str>) -> Self {
        let folder = Folder::new();
        let kernel = folder.write("kernel", elf(program)).display().to_string();
        let flat = ["--kernel".to_owned(), kernel, "--mem=16M".into()];
        // The kernel is read once, at the start: its folder may go.
        Self::run_after(prelude, flat.into_iter().chain(arguments.into_iter().map(Into::into)))
    }

    /// `chronovisor run` of Debian's kernel and our init, doing `what` (see `resources/guest-init`).
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn debian<'a>(what: &str, arguments: impl IntoIterator<Item = &'a str>) -> Self {
        let mut all = debian_arguments(what);
        all.extend(arguments.into_iter().map(Into::into));
        Self::run(all)
    }

    /// The path of its API socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Asks its API.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    pub fn ask(&self, method: &str, path: &str, body: Option<&str>) -> Response {
        client::request(&self.socket, method, path, body).unwrap_or_else(|e| {
            panic!("{method} {path}: {e}; stderr:\n{}", self.process.stderr());
        })
    }

    /// `GET /vcpus`, each reading held to the laws, by itself and against the last.
    ///
    /// # Panics
    /// When a law is broken.
    pub fn readings(&mut self) -> Vec<Reading> {
        let response = self.ask("GET", "/vcpus", None);
        let readings: Vec<Reading> = serde_json::from_value(response.body).expect("an array of readings");
        for reading in &readings {
            let held = match self.last.iter().find(|last| last.index == reading.index) {
                Some(last) => laws::check_pair(last, reading),
                None => laws::check(reading),
            };
            held.unwrap_or_else(|broken| panic!("{broken}\nbefore: {:?}\nafter: {reading:?}", self.last));
        }
        self.last.clone_from(&readings);
        readings
    }

    /// The reading of vCPU 0, held to the laws.
    ///
    /// # Panics
    /// When there is none.
    pub fn reading(&mut self) -> Reading {
        self.readings().swap_remove(0)
    }

    /// Has a line of metrics written to `file`, which its metrics go to, and returns all lines so far, that one last. A counter
    /// in one is what was counted since the line before.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn metrics(&self, file: &Path) -> Vec<serde_json::Value> {
        let flush = self.ask("PUT", "/actions", Some(r#"{"action_type": "FlushMetrics"}"#));
        assert_eq!(flush.status, 204, "{}", flush.fault());
        let text = std::fs::read_to_string(file).expect("metrics");
        let line = |line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        text.lines().map(line).collect()
    }

    /// What the counter at `pointer` (RFC 6901) of the metrics in `file` grows by in a second, over `time`.
    ///
    /// # Panics
    /// When it is no counter.
    #[must_use]
    pub fn rate(&self, file: &Path, pointer: &str, time: Duration) -> f64 {
        let number = |line: &serde_json::Value, pointer| {
            let number = line.pointer(pointer).and_then(serde_json::Value::as_u64);
            number.unwrap_or_else(|| panic!("no {pointer} in {line}"))
        };
        let before = self.metrics(file);
        std::thread::sleep(time);
        let after = self.metrics(file);
        // One that is due each minute may have come between.
        let since = &after[before.len()..];
        let grown: u64 = since.iter().map(|line| number(line, pointer)).sum();
        let at = |lines: &[serde_json::Value]| number(lines.last().expect("a line"), "/utc_timestamp_ms");
        grown as f64 * 1000.0 / (at(&after) - at(&before)) as f64
    }

    /// Pauses the guest for a tenth of a second, again and again, while `busy`. What `busy` tells of has to
    /// be long enough for one at least.
    ///
    /// # Panics
    /// When a pause is refused, or none fell into it.
    pub fn pause_while(&self, mut busy: impl FnMut() -> bool) {
        let mut pauses = 0;
        while busy() {
            for (state, time) in [("Paused", 100), ("Resumed", 400)] {
                let answer = self.ask("PATCH", "/vm", Some(&serde_json::json!({ "state": state }).to_string()));
                assert_eq!(answer.status, 204, "{}", answer.fault());
                std::thread::sleep(Duration::from_millis(time));
            }
            pauses += 1;
        }
        println!("{pauses} pauses");
        // The last may have come after the end.
        assert!(pauses > 1, "too short for a pause");
    }

    /// Asks again and again until `true`.
    ///
    /// # Panics
    /// When patience ends, or the process, before that.
    pub fn wait_until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let begun = Instant::now();
        while !done(self) {
            let ended = self.process.child.try_wait().expect("it is ours");
            if ended.is_some() || begun.elapsed() > PATIENCE {
                let (out, err) = (self.process.stdout(), self.process.stderr());
                panic!("never came: {what} ({ended:?}); stdout:\n{out}\nstderr:\n{err}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// `chronovisor` with `arguments`, once a shell has run `prelude`, in its place.
#[must_use]
pub fn after<S: AsRef<std::ffi::OsStr>>(prelude: &str, arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{prelude} && exec \"$0\" \"$@\"")]);
    command.arg(bed::file("chronovisor")).args(arguments);
    command
}

/// What each mode grew by from one reading to a later one.
#[must_use]
pub fn grown(first: &Reading, last: &Reading) -> Modes {
    let mut grown = last.modes.to_array();
    grown.iter_mut().zip(first.modes.to_array()).for_each(|(l, f)| *l -= f);
    Modes::from_array(grown)
}

/// The arguments of `chronovisor run` for Debian's kernel and our init, doing `what`.
#[must_use]
pub fn debian_arguments(what: &str) -> Vec<String> {
    let path = |name| bed::file(name).display().to_string();
    [
        "--kernel",
        &path("vmlinux"),
        "--initrd",
        &path("guest.cpio"),
        "--cmdline",
        &debian_cmdline(what),
        "--mem",
        "256M",
    ]
    .map(String::from)
    .into()
}

fn debian_cmdline(what: &str) -> String {
    format!("console=ttyS0 reboot=k panic=-1 quiet noxsave chronovisor.do={what}")
}

/// What came so far, and whether that is all.
type Text = (Mutex<(Vec<u8>, bool)>, Condvar);

/// A stream gathered by a thread.
#[derive(Debug)]
struct Gathered {
    text: Arc<Text>,
    thread: Option<JoinHandle<()>>,
}

impl Gathered {
    fn from(mut stream: impl Read + Send + 'static) -> Self {
        let text = Arc::new((Mutex::new((Vec::new(), false)), Condvar::new()));
        let shared = Arc::clone(&text);
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let n = stream.read(&mut buffer).unwrap_or(0);
                let mut state = shared.0.lock().expect("no panic holds it");
                state.0.extend_from_slice(&buffer[..n]);
                state.1 = n == 0;
                shared.1.notify_all();
                if n == 0 {
                    return;
                }
            }
        });
        Self {
            text,
            thread: Some(thread),
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.text.0.lock().expect("no panic holds it").0).into_owned()
    }

    /// All of it, once it has ended.
    fn end(&mut self) -> String {
        if let Some(thread) = self.thread.take() {
            thread.join().expect("it gathers");
        }
        self.text()
    }

    /// The text up to and with `wanted`; or all there was, when it ended or patience did.
    fn wait_for(&self, wanted: &str) -> Result<String, String> {
        let (lock, changed) = &*self.text;
        let state = lock.lock().expect("no panic holds it");
        let found = |bytes: &[u8]| {
            let text = String::from_utf8_lossy(bytes);
            text.find(wanted).map(|at| text[..at + wanted.len()].to_owned())
        };
        let waits = |state: &mut (Vec<u8>, bool)| found(&state.0).is_none() && !state.1;
        let (state, _) = changed
            .wait_timeout_while(state, PATIENCE, waits)
            .expect("no panic holds it");
        found(&state.0).ok_or_else(|| String::from_utf8_lossy(&state.0).into_owned())
    }
}
