//! The emulated host: a Debian kernel in QEMU's emulator, with CPUs 1 and 2 tickless and isolated, and a KVM of its own.
//!
//! It needs no /dev/kvm and no hardware. What goes in is an initramfs, kept in memory only; what comes out is what the job
//! printed, line by line, and its exit status. QEMU dies with us, however we end, and leaves no file behind.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Read, Seek};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::cpio::Archive;
use crate::layout::Layout;
use crate::modules::Modules;
use crate::process::bound_to_us;
use crate::progress::Progress;
use crate::setup::Kit;

/// Enough for the initramfs, twice while it is unpacked, for two guests of 256 MiB, and for a test's disk.
const MEMORY_MIB: &str = "2048";
const CPUS: &str = "3";
/// With QEMU's defaults for AMD's SVM; `tsc=reliable` because the emulator's TSCs agree and the watchdog that would doubt
/// them is a tick; `nowatchdog` and `rcu_nocbs` for the same reason; `panic=-1` ends QEMU (`-no-reboot`) at once.
const COMMAND_LINE: &str =
    "console=ttyS0 quiet panic=-1 nohz_full=1,2 isolcpus=1,2 rcu_nocbs=1,2 tsc=reliable nowatchdog mitigations=off";
/// KVM; the disk with the guest's root file system; taps. Each with what it depends on; what this kernel has built in is left out.
const MODULES: [&str; 4] = ["kvm_amd", "virtio_pci", "virtio_blk", "tun"];

/// The host's processor, for CPU templates to be judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Cpu {
    /// AMD's, and of no template's models.
    Any,
    /// AMD's Milan by its family and model, with what the emulator has of that which T2A takes away.
    Milan,
}

impl Cpu {
    /// As QEMU's `-cpu` has it.
    const fn model(self) -> &'static str {
        match self {
            Self::Any => "qemu64,+svm,+npt,+fsgsbase,+rdtscp",
            Self::Milan => {
                "qemu64,+svm,+npt,+fsgsbase,+rdtscp,family=25,model=1,stepping=1,+ssse3,+sse4.1,+sse4.2,+popcnt,+abm,+bmi1,\
                 +bmi2,+adx,+clflushopt,+clwb,+umip,+sse4a,+pdpe1gb"
            }
        }
    }
}

/// It takes 5 to 10 s on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// How many of the console's last lines a failure shows.
const LAST_LINES: usize = 40;

/// What to run in the host.
pub struct Job<'a> {
    /// A shell script.
    pub script: String,
    /// The `chronovisor` program.
    pub chronovisor: &'a Path,
    /// Executables to go with it: path in the host, path here.
    pub programs: Vec<(String, PathBuf)>,
    /// Its processor.
    pub cpu: Cpu,
    /// A disk image, `/dev/vda` in the host: what is written to it goes with the host.
    pub disk: Option<PathBuf>,
    /// The whole run is given up after this.
    pub limit: Duration,
}

/// How a job ended.
#[derive(Debug)]
pub struct Outcome {
    /// The script's exit status.
    pub status: i32,
    /// From starting QEMU to starting the script.
    pub boot: Duration,
}

/// Boots the host, runs `job`, gives each line it prints to `on_line`, and ends the host.
pub fn run(layout: &Layout, kit: &Kit, job: &Job, mut on_line: impl FnMut(&str)) -> Result<Outcome> {
    let initramfs = initramfs(layout, kit, job.chronovisor, &job.programs, Some(&job.script))?;
    let mut console = memory_file("console")?;
    let started = Instant::now();
    let mut qemu = Qemu(
        qemu(kit, &initramfs, job.cpu, job.disk.as_deref())
            .args(["-display", "none", "-chardev"])
            .arg(format!("file,id=console,path={}", path_of(&console)))
            .args(["-serial", "chardev:console", "-serial", "stdio"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run qemu-system-x86_64")?,
    );

    let output = qemu.0.stdout.take().context("QEMU has no stdout")?;
    let (lines, received) = channel();
    // Ends with QEMU, whose end closes its stdout.
    std::thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            if lines.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                break;
            }
        }
    });

    let mut progress = Some(Progress::new("booting the emulated host"));
    let mut boot = None;
    // The record that ends the run starts a line of its own, whether the job ended its last line or not: an empty line
    // right before it is not the job's.
    let mut empty = false;
    let why = loop {
        let (limit, doing) = if boot.is_some() {
            (job.limit, "run its job")
        } else {
            (BOOT_LIMIT, "boot")
        };
        match received.recv_timeout(limit.saturating_sub(started.elapsed())) {
            Ok(line) => match line.strip_prefix('\0') {
                Some("start") => {
                    boot = Some(started.elapsed());
                    progress = None;
                }
                Some(record) => match (record.strip_prefix("exit ").map(str::parse), boot) {
                    (Some(Ok(status)), Some(boot)) => return Ok(Outcome { status, boot }),
                    _ => break format!("it sent the unknown record {record:?}"),
                },
                None => {
                    if std::mem::replace(&mut empty, line.is_empty()) {
                        on_line("");
                    }
                    if !empty {
                        on_line(&line);
                    }
                }
            },
            Err(RecvTimeoutError::Timeout) => break format!("it did not {doing} within {} s", limit.as_secs()),
            Err(RecvTimeoutError::Disconnected) => {
                let status = qemu.0.wait()?;
                break format!("QEMU ended ({status}) before the job did");
            }
        }
    };
    drop(progress);
    drop(qemu);
    // What the job printed last, and did not end with a newline, tells where it was.
    received.iter().for_each(|line| on_line(&line));
    bail!("the emulated host failed: {why}\n{}", last_lines(&mut console)?);
}

/// Boots the host with a shell on this terminal.
pub fn shell(
    layout: &Layout,
    kit: &Kit,
    chronovisor: &Path,
    programs: &[(String, PathBuf)],
    cpu: Cpu,
    disk: Option<&Path>,
) -> Result<()> {
    let initramfs = initramfs(layout, kit, chronovisor, programs, None)?;
    let status = qemu(kit, &initramfs, cpu, disk)
        .args(["-nographic", "-serial", "mon:stdio"])
        .status();
    let status = status.context("cannot run qemu-system-x86_64")?;
    ensure!(status.success(), "QEMU: {status}");
    Ok(())
}

/// QEMU without its serial ports.
fn qemu(kit: &Kit, initramfs: &File, cpu: Cpu, disk: Option<&Path>) -> Command {
    let mut command = bound_to_us("KILL", "qemu-system-x86_64");
    command.args([
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-machine",
        "q35",
        "-accel",
        "tcg,thread=multi",
    ]);
    command.args(["-cpu", cpu.model()]);
    command.args(["-smp", CPUS, "-m", MEMORY_MIB, "-append", COMMAND_LINE]);
    command
        .arg("-kernel")
        .arg(&kit.bzimage)
        .arg("-initrd")
        .arg(path_of(initramfs));
    if let Some(disk) = disk {
        // A comma in a name is written twice.
        let file = disk.display().to_string().replace(',', ",,");
        command.args(["-device", "virtio-blk-pci,drive=disk", "-drive"]);
        command.arg(format!("if=none,id=disk,format=raw,snapshot=on,file={file}"));
    }
    command
}

/// QEMU, killed when dropped.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn initramfs(
    layout: &Layout,
    kit: &Kit,
    chronovisor: &Path,
    programs: &[(String, PathBuf)],
    script: Option<&str>,
) -> Result<File> {
    let mut archive = Archive::new(BufWriter::new(memory_file("initramfs")?));
    for dir in [
        "bed", "bin", "dev", "modules", "proc", "root", "run", "sys", "tests", "tmp",
    ] {
        archive.dir(dir)?;
    }
    let mut add = |to: &str, permissions: u32, from: &Path| -> Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        Ok(archive.file(to, permissions, &content)?)
    };
    add("init", 0o755, &layout.root.join("resources/host/init"))?;
    add("bin/busybox", 0o755, &kit.busybox)?;
    add("bed/chronovisor", 0o755, chronovisor)?;
    add("bed/jailed", 0o755, &layout.jailed())?;
    add("bed/bzImage", 0o644, &kit.bzimage)?;
    add("bed/vmlinux", 0o644, &kit.vmlinux)?;
    add("bed/guest.cpio", 0o644, &kit.initramfs)?;
    for (to, from) in programs {
        add(to, 0o755, from)?;
    }
    add("bin/e2fsck", 0o755, &kit.e2fsck)?;
    let modules = Modules::of(&kit.modules)?;
    let mut order: Vec<String> = Vec::new();
    for module in MODULES {
        for (name, content) in modules.closure(module)? {
            if !order.contains(&name) {
                archive.file(&format!("modules/{name}.ko"), 0o644, &content)?;
                order.push(name);
            }
        }
    }
    archive.file("modules/order", 0o644, order.join("\n").as_bytes())?;
    archive.symlink("bin/sh", "busybox")?;
    if let Some(script) = script {
        archive.file("job", 0o644, script.as_bytes())?;
    }
    Ok(archive
        .finish()?
        .into_inner()
        .map_err(std::io::IntoInnerError::into_error)?)
}

/// A file that is gone when nobody has it open.
fn memory_file(name: &str) -> Result<File> {
    Ok(File::from(
        memfd_create(name, MemfdFlags::CLOEXEC).context("cannot make a file in memory")?,
    ))
}

/// How QEMU, a process of the same user, opens `file`.
fn path_of(file: &File) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
}

fn last_lines(console: &mut File) -> Result<String> {
    let mut text = Vec::new();
    console.rewind()?;
    console.read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    if lines.is_empty() {
        return Ok("its console is empty".to_owned());
    }
    let last = &lines[lines.len().saturating_sub(LAST_LINES)..];
    Ok(format!("its console ends in:\n  {}", last.join("\n  ")))
}
