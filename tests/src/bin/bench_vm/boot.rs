//! `start`, `start_no_api`, `boot`, `memory` and `memory_bare`.
//!
//! The first three are from right before the fork to the first `KVM_RUN`, and to the first line of the guest's init, against
//! `floor`, the shortest loop there is (see `floor.rs`): the same kernel, initrd, command line, memory and host CPU for
//! the vCPU, by turns; medians. A start is over before anything averages out, so there are more of them: they are guests
//! that are ended as soon as they run.
//!
//! When a guest first ran is read over the API (`start`), or, where there is none (`start_no_api`), from the kernel's tracer: its
//! first `kvm_entry` comes a little after the `KVM_RUN` that it belongs to.
//!
//! `memory` is what is resident of the monitor after a boot and some requests, less the guest's memory, with a disk, a network
//! interface and the API up; `memory_bare` with none of them. `against` is the budget itself, 5 MiB and 4 MiB, so that `ratio`
//! is the part of it that is used.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use accounting::Reading;
use accounting::clock::{Instant, Scale, monotonic_raw_ns};
use accounting::host::HostCpus;
use anyhow::{Context, Result, ensure};
use tests::bed::Folder;
use tests::client;
use tests::connection::Connection;
use tests::row;
use tests::trace::{Trace, What};
use tests::vm::{PATIENCE, Process, debian_arguments};

const STARTS: usize = 15;
const BOOTS: usize = 9;
/// The first line of `resources/guest-init`.
const INIT: &str = "chronovisor guest: init";
/// After its init's first line the guest has nothing to do while it is read.
const GUEST_DOES: &str = "sleep:600000";
/// Between the end of one guest and the start of the next: the kernel takes a VM down when its process is gone already.
const SETTLE: Duration = Duration::from_millis(300);
/// Between two questions whether it runs: few enough not to delay what they ask for.
const POLL: Duration = Duration::from_millis(50);
const MEM_MIB: u64 = 256;
const MEMORY_BUDGET_MIB: f64 = 5.0;
const BARE_BUDGET_MIB: f64 = 4.0;
/// Monitors whose memory is looked at: they hardly differ.
const MEMORIES: usize = 3;

/// Prints the rows.
pub fn measure() -> Result<()> {
    let cpu = vcpu_cpu()?;
    // The first of each brings its files into the page cache, and its code into an emulator's.
    Ours::launch(cpu).start_ms()?;
    Floor::launch(cpu)?.start_ms()?;

    let [ours, against] = by_turns(STARTS, |side| match side {
        Side::Ours => Ours::launch(cpu).start_ms(),
        Side::Floor => Floor::launch(cpu)?.start_ms(),
    })?;
    row::print("start", ours, against, "ms", 1.3);
    let [ours, against] = by_turns(STARTS, |side| match side {
        Side::Ours => start_without_api_ms(cpu),
        Side::Floor => Floor::launch(cpu)?.start_ms(),
    })?;
    row::print("start_no_api", ours, against, "ms", 1.3);

    let [ours, against] = by_turns(BOOTS, |side| match side {
        Side::Ours => Ok(Ours::launch(cpu).guest.boot_ms()),
        Side::Floor => Ok(Floor::launch(cpu)?.guest.boot_ms()),
    })?;
    row::print("boot", ours, against, "ms", 1.05);

    let medians = |measure: fn(u32) -> Result<f64>| -> Result<f64> {
        let figures: Result<Vec<_>> = (0..MEMORIES).map(|_| measure(cpu)).collect();
        figures.map(row::median)
    };
    row::print("memory", medians(memory_with_devices)?, MEMORY_BUDGET_MIB, "MiB", 1.0);
    row::print("memory_bare", medians(memory_bare)?, BARE_BUDGET_MIB, "MiB", 1.0);
    Ok(())
}

#[derive(Clone, Copy)]
enum Side {
    Ours,
    Floor,
}

/// The medians of both sides over `rounds`. They take turns at being first (ABBA), so that what a slow machine grows
/// slower by, or a busy one less busy, is shared.
fn by_turns(rounds: usize, mut measure: impl FnMut(Side) -> Result<f64>) -> Result<[f64; 2]> {
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let order = [Side::Ours, Side::Floor];
        for side in [order[round % 2], order[1 - round % 2]] {
            let figures = match side {
                Side::Ours => &mut ours,
                Side::Floor => &mut floor,
            };
            figures.push(measure(side)?);
        }
    }
    Ok([row::median(ours), row::median(floor)])
}

/// The host CPU for the vCPU: one that nothing else runs on, if there is any.
fn vcpu_cpu() -> Result<u32> {
    let host = HostCpus::read()?;
    let tickless = host.nohz_full.as_ref().and_then(|cpus| cpus.iter().next());
    let cpu = tickless.or_else(|| host.affinity.iter().last());
    cpu.copied().context("no CPU")
}

/// A guest, ended when dropped, and when it was launched.
struct Guest {
    process: Process,
    begun: u64,
}

impl Guest {
    fn launch(command: Command) -> Self {
        std::thread::sleep(SETTLE);
        let begun = monotonic_raw_ns();
        Self {
            process: Process::spawn(command),
            begun,
        }
    }

    /// From the launch until now, or until it was `at`.
    fn ms_until(&self, at: u64) -> f64 {
        Duration::from_nanos(at.saturating_sub(self.begun)).as_secs_f64() * 1e3
    }

    fn boot_ms(&mut self) -> f64 {
        self.process.wait_for(INIT);
        self.ms_until(monotonic_raw_ns())
    }
}

struct Ours {
    guest: Guest,
    socket: PathBuf,
    _folder: Folder,
}

/// `chronovisor run` of the guest, on host CPU `cpu`.
fn ours(cpu: u32) -> Command {
    let mut command = Command::new(tests::bed::file("chronovisor"));
    command.arg("run").args(debian_arguments(GUEST_DOES));
    command.args(["--pin", &cpu.to_string()]);
    command
}

/// From the launch of a monitor without an API to its guest's first entry.
fn start_without_api_ms(cpu: u32) -> Result<f64> {
    let trace = Trace::start_for_children()?;
    let before = Instant::now();
    let guest = Guest::launch(ours(cpu));
    let tid = loop {
        std::thread::sleep(POLL);
        if let Some(tid) = thread(guest.process.id(), "vcpu0")? {
            break tid;
        }
        let waited = Duration::from_nanos(monotonic_raw_ns() - guest.begun);
        ensure!(waited < PATIENCE, "the guest never ran: {}", guest.process.stderr());
    };
    // From the thread to its first entry is a matter of microseconds: it is in there already, but for bad luck.
    std::thread::sleep(POLL);
    let events = trace.stop(tid)?;
    let entry = events.iter().find(|event| event.what == What::Entry);
    let entry = entry.context("the guest did not run within 50 ms of its thread's start")?;
    let ns = Scale::of(before, Instant::now()).to_ns(entry.tsc.saturating_sub(before.ticks));
    Ok(guest.ms_until(before.ns + ns))
}

/// The thread of process `pid` that is called `name`.
fn thread(pid: u32, name: &str) -> Result<Option<i32>> {
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?;
        // It may have ended meanwhile.
        if fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name) {
            return Ok(Some(task.file_name().to_string_lossy().parse()?));
        }
    }
    Ok(None)
}

/// Resident beside a booted guest's memory, in MiB, with a disk, an interface and the API up.
fn memory_with_devices(cpu: u32) -> Result<f64> {
    let folder = Folder::new();
    let disk = folder.join("disk");
    File::create(&disk)?.set_len(1 << 20)?;
    let mut ours = Ours::with(cpu, |command| {
        command.arg("--disk").arg(&disk).args(["--net", "tap=bench0"]);
    });
    ours.guest.boot_ms();
    ours.ask_around()?;
    memory_mib(ours.guest.process.id())
}

/// Resident beside a booted guest's memory, in MiB, with nothing but its vCPU and console.
fn memory_bare(cpu: u32) -> Result<f64> {
    let mut guest = Guest::launch(ours(cpu));
    guest.boot_ms();
    memory_mib(guest.process.id())
}

impl Ours {
    fn launch(cpu: u32) -> Self {
        Self::with(cpu, |_| {})
    }

    fn with(cpu: u32, more: impl FnOnce(&mut Command)) -> Self {
        let folder = Folder::new();
        let socket = folder.join("api.sock");
        let mut command = ours(cpu);
        command.arg("--api-sock").arg(&socket);
        more(&mut command);
        Self {
            guest: Guest::launch(command),
            socket,
            _folder: folder,
        }
    }

    fn start_ms(self) -> Result<f64> {
        let begun = monotonic_raw_ns();
        loop {
            std::thread::sleep(POLL);
            if let Some(at) = first_run(&self.socket)? {
                return Ok(self.guest.ms_until(at));
            }
            let waited = Duration::from_nanos(monotonic_raw_ns() - begun);
            ensure!(
                waited < PATIENCE,
                "the guest never ran: {}",
                self.guest.process.stderr()
            );
        }
    }

    /// Some use of the API.
    fn ask_around(&self) -> Result<()> {
        let mut connection = Connection::open(&self.socket)?;
        for path in [
            "/",
            "/version",
            "/vm/config",
            "/machine-config",
            "/host",
            "/vcpus",
            "/vcpus/0/cputime",
        ] {
            connection.get(path)?;
        }
        Ok(())
    }
}

/// When `KVM_RUN` was first entered, `CLOCK_MONOTONIC_RAW`; `None` while it has not been, or the API does not answer yet.
fn first_run(socket: &Path) -> Result<Option<u64>> {
    let Ok(answer) = client::request(socket, "GET", "/vcpus/0/cputime", None) else {
        return Ok(None);
    };
    if answer.status != 200 {
        return Ok(None);
    }
    let reading: Reading = serde_json::from_value(answer.body)?;
    // Held until it was first set running, and never since: what is not paused time began right before the first KVM_RUN.
    let ran = reading.elapsed_ns - reading.modes.paused_ns;
    Ok((reading.exits.total > 0).then(|| reading.at_ns - ran))
}

struct Floor {
    guest: Guest,
}

impl Floor {
    fn launch(cpu: u32) -> Result<Self> {
        let arguments = debian_arguments(GUEST_DOES);
        let mut command = Command::new(std::env::current_exe()?.with_file_name("floor"));
        command.args([&arguments[1], &arguments[3], &arguments[5]]);
        command.args([MEM_MIB.to_string(), cpu.to_string()]);
        Ok(Self {
            guest: Guest::launch(command),
        })
    }

    /// It tells the time itself.
    fn start_ms(mut self) -> Result<f64> {
        let process = &mut self.guest.process;
        process.wait_for_error("\n");
        let said = process.stderr();
        let at = said.trim().parse();
        Ok(self
            .guest
            .ms_until(at.with_context(|| format!("the floor said {said:?}"))?))
    }
}

/// What is resident of process `pid`, less its guest's memory: the mapping that is as large as that.
fn memory_mib(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps");
    let smaps = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let kib =
        |line: &str, field: &str| -> Option<u64> { line.strip_prefix(field)?.trim().strip_suffix(" kB")?.parse().ok() };
    let (mut guests, mut is_guest, mut resident) = (0, false, 0);
    for line in smaps.lines() {
        if let Some(size) = kib(line, "Size:") {
            is_guest = size == MEM_MIB << 10;
            guests += u32::from(is_guest);
        }
        if let (Some(size), false) = (kib(line, "Rss:"), is_guest) {
            resident += size;
        }
    }
    ensure!(
        guests == 1,
        "{guests} mappings of {MEM_MIB} MiB in {path}: guest memory is one"
    );
    Ok(resident as f64 / 1024.0)
}
