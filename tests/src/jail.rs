//! A jail under test: `chronovisor jail`, in a folder of the test's own.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::bed::{self, Folder};
use crate::client::{self, Response};
use crate::flat::{Program, elf};
use crate::vm::{PATIENCE, Process};

/// Whom its program runs as: nobody's numbers on any host.
pub const UID: u32 = 61_234;
/// Likewise, and not the same, so that one cannot pass for the other.
pub const GID: u32 = 61_235;

/// A place for jails, and the one in it.
#[derive(Debug)]
pub struct Jail {
    base: Folder,
    kernel: PathBuf,
    id: String,
}

impl Jail {
    /// A place, with a kernel for `program` beside it. Its id is no other process's word.
    #[must_use]
    pub fn new(program: &Program) -> Self {
        let folder = Folder::new();
        let kernel = folder.write("kernel", elf(program));
        let id = folder
            .path()
            .file_name()
            .expect("it has one")
            .to_string_lossy()
            .into_owned();
        fs::create_dir(folder.join("base")).expect("a place");
        Self {
            base: folder,
            kernel,
            id,
        }
    }

    /// Where all jails are.
    #[must_use]
    pub fn base(&self) -> PathBuf {
        self.base.join("base")
    }

    /// The name of this one.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The kernel, on the host; in the jail it is /kernel.
    #[must_use]
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// Its root, on the host.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.base().join("chronovisor").join(&self.id).join("root")
    }

    /// `chronovisor jail` with `flags`, and `arguments` for the program.
    #[must_use]
    pub fn command(&self, flags: &[&str], arguments: &[&str]) -> Command {
        let mut command = Command::new(bed::file("chronovisor"));
        command.args([
            "jail",
            "--id",
            &self.id,
            "--uid",
            &UID.to_string(),
            "--gid",
            &GID.to_string(),
        ]);
        command.arg("--chroot-base-dir").arg(self.base());
        command
            .arg("--bind")
            .arg(format!("{}:/kernel:ro", self.kernel.display()));
        command.args(flags).arg("--").args(arguments);
        command
    }

    /// Likewise, for the guest of [`Jail::new`] to run, with the API at its usual place.
    #[must_use]
    pub fn guest(&self, flags: &[&str]) -> Command {
        let run = [
            "run",
            "--kernel",
            "/kernel",
            "--mem",
            "16M",
            "--api-sock",
            "/run/chronovisor.socket",
        ];
        self.command(flags, &run)
    }

    /// Starts the guest, where `flags` leave it in the foreground; returns once it runs.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn start(&self, flags: &[&str]) -> Process {
        let mut process = Process::spawn(self.guest(flags));
        let begun = Instant::now();
        while self.state().as_deref() != Some("Running") {
            assert!(begun.elapsed() < PATIENCE, "{}", process.stderr());
            if process.has_ended() {
                panic!("it ended: {:?}", process.wait());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        process
    }

    /// Starts the guest with `flags` that send it to the background, and returns once it runs.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn start_behind(&self, flags: &[&str]) -> Behind {
        // What stays behind keeps what it was given open: a pipe would not come to its end.
        let said = self.base.join("said");
        let output = || fs::File::create(&said).expect("a file");
        let mut command = self.guest(flags);
        command.stdin(Stdio::null()).stdout(output()).stderr(output());
        let status = command.status().expect("it starts");
        let stderr = fs::read_to_string(&said).expect("a file");
        assert_eq!(status.code(), Some(0), "{stderr}");
        let behind = Behind { pid: self.pid() };
        let begun = Instant::now();
        while self.state().as_deref() != Some("Running") {
            assert!(begun.elapsed() < PATIENCE && behind.is_there(), "{stderr}");
            std::thread::sleep(Duration::from_millis(5));
        }
        behind
    }

    /// What its file says of its process.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn pid(&self) -> u32 {
        let text = fs::read_to_string(self.root().join("chronovisor.pid")).expect("its number");
        text.parse().expect("a number")
    }

    /// Asks its API, from outside.
    ///
    /// # Errors
    /// Nobody answers.
    pub fn ask(&self, method: &str, path: &str, body: Option<&str>) -> std::io::Result<Response> {
        let socket = self.root().join("run/chronovisor.socket");
        client::request(&socket, method, path, body)
    }

    fn state(&self) -> Option<String> {
        let answer = self.ask("GET", "/", None).ok()?;
        answer.body["state"].as_str().map(str::to_owned)
    }
}

/// A process in the background, killed with this.
#[derive(Debug)]
pub struct Behind {
    /// Its number.
    pub pid: u32,
}

impl Behind {
    /// Whether it runs.
    #[must_use]
    pub fn is_there(&self) -> bool {
        Path::new(&format!("/proc/{}/exe", self.pid)).read_link().is_ok()
    }
}

impl Drop for Behind {
    fn drop(&mut self) {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        let _ = pid.map(|pid| kill_process(pid, Signal::KILL));
        let begun = Instant::now();
        while self.is_there() && begun.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// In the child, from exec on, the system call of each of these numbers says EIO instead of what it does.
#[expect(unsafe_code, reason = "pre_exec and seccomp")]
pub fn without(command: &mut Command, calls: &[libc::c_long]) {
    // struct seccomp_data has the number first (include/uapi/linux/seccomp.h).
    let statement = |code: u32, k: u32, jt: u8| libc::sock_filter {
        code: u16::try_from(code).expect("a code"),
        jt,
        jf: 0,
        k,
    };
    let mut filter = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0)];
    for (index, &call) in calls.iter().enumerate() {
        // To the last statement, past those between and the one that allows.
        let past = u8::try_from(calls.len() - index).expect("few calls");
        let number = u32::try_from(call).expect("a number");
        filter.push(statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, number, past));
    }
    let fail = libc::SECCOMP_RET_ERRNO | u32::try_from(libc::EIO).expect("a number");
    filter.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0));
    filter.push(statement(libc::BPF_RET | libc::BPF_K, fail, 0));
    let install = move || {
        let program = libc::sock_fprog {
            len: u16::try_from(filter.len()).expect("few statements"),
            filter: filter.as_ptr().cast_mut(),
        };
        // SAFETY: the program and its statements outlive the call, which copies them.
        match unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: one system call; nothing is allocated, and no lock is taken.
    unsafe { command.pre_exec(install) };
}

/// How many processes have `word` on their command line.
///
/// # Panics
/// Without procfs.
#[must_use]
pub fn processes_with(word: &str) -> usize {
    let processes = fs::read_dir("/proc").expect("procfs").flatten();
    let command_lines = processes.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    command_lines
        .filter(|line| String::from_utf8_lossy(line).contains(word))
        .count()
}
