//! The test guest's init: does what the kernel's command line says, and tells the console at each step.
//!
//! The first line is `chronovisor guest: init, N CPUs` (or `1 CPU`); each step starts with `chronovisor guest: STEP`. See [`plan`] for
//! what `chronovisor.do=` may hold. Without it: the init of the disk that `root=` names (see [`root`]), or a shell. It is linked
//! statically, and expects /bin/busybox for its shell.

mod disk;
mod memory;
mod modules;
mod net;
mod plan;
mod random;
mod root;
mod vsock;

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::process::{Command, exit};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount};
use rustix::process::{WaitOptions, wait};
use rustix::system::{RebootCommand, reboot};

use plan::{Plan, Step};
use root::Root;

fn main() {
    // A mount can fail only if the kernel has mounted the same already, as it may have /dev.
    let _ = mount("proc", "/proc", "proc", MountFlags::empty(), None);
    let _ = mount("sysfs", "/sys", "sysfs", MountFlags::empty(), None);
    let _ = mount("devtmpfs", "/dev", "devtmpfs", MountFlags::empty(), None);
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    println!(
        "chronovisor guest: init, {cpus} CPU{}",
        if cpus == 1 { "" } else { "s" }
    );

    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    match (
        Plan::of_command_line(&command_line),
        Root::of_command_line(&command_line),
    ) {
        (Ok(None), Some(root)) => println!("chronovisor guest: {}", root.switch()),
        (Ok(plan), _) => plan
            .unwrap_or_else(Plan::shell)
            .steps()
            .for_each(|step| run(step, cpus)),
        (Err(error), _) => println!("chronovisor guest: {error}"),
    }
    end("poweroff", RebootCommand::PowerOff);
}

fn run(step: Step, cpus: usize) {
    println!("chronovisor guest: {step}");
    match step {
        Step::Spin(time) => spin(time, cpus),
        Step::Sleep(time) => std::thread::sleep(time),
        Step::DiskVerify(time) => say(
            step,
            disk::verify(time).map(|tally| {
                let disk::Tally { written, read, wrong } = tally;
                format!("{written} pages written, {read} read, {wrong} wrong")
            }),
        ),
        Step::DiskRead(time) => say(step, disk::read_for(time).map(disk::Moved::text)),
        Step::DiskWrite(time) => say(step, disk::write_for(time).map(disk::Moved::text)),
        Step::Chatter(time) => chatter(time),
        Step::Hwrng(bytes) => say(
            step,
            random::read(bytes).map(|random| {
                let random::Random { bytes, values } = random;
                format!("{bytes} bytes of {values} values")
            }),
        ),
        Step::VsockEcho(port) => say(
            step,
            vsock::echo(port).map(|sum| format!("{} bytes, {:016x}", sum.bytes, sum.fnv)),
        ),
        Step::VsockSend(port) => say(
            step,
            vsock::send(port, 4 << 20).map(|(there, back)| {
                let (sent, came) = ((there.bytes, there.fnv), (back.bytes, back.fnv));
                format!(
                    "{} bytes, {:016x}; back {} bytes, {:016x}",
                    sent.0, sent.1, came.0, came.1
                )
            }),
        ),
        Step::NetUp => say(step, net::up().map(|mtu| format!("up, with an MTU of {mtu}"))),
        Step::NetReceive(port) => say(
            step,
            net::receive(port).map(|sum| format!("{} bytes, {sum:016x}", net::TOTAL)),
        ),
        Step::NetSend(port) => say(
            step,
            net::send(port).map(|sum| format!("{} bytes, {sum:016x}", net::TOTAL)),
        ),
        Step::NetFlood(time) => say(step, net::flood(time).map(|bytes| format!("{bytes} bytes"))),
        Step::Metadata => say(step, net::metadata("/latest/meta-data/instance-id")),
        Step::Touch(mib) => memory::touch(mib),
        Step::Balloon => say(step, memory::load_balloon().map(|()| "loaded".to_owned())),
        Step::CpuFlags => say(
            step,
            fs::read_to_string("/proc/cpuinfo").map(|cpuinfo| {
                let flags = cpuinfo.lines().find(|line| line.starts_with("flags"));
                flags.unwrap_or_default().to_owned()
            }),
        ),
        Step::Topology => topology(cpus),
        Step::PowerOff => end("poweroff", RebootCommand::PowerOff),
        Step::Reboot => end("reboot", RebootCommand::Restart),
        Step::Shell => shell(),
        // The kernel panics when its init ends.
        Step::Panic => exit(1),
    }
}

/// What came of a step.
fn say(step: Step, outcome: std::io::Result<String>) {
    match outcome {
        Ok(outcome) => println!("chronovisor guest: {step}: {outcome}"),
        Err(error) => println!("chronovisor guest: {step}: failed: {error}"),
    }
}

/// Keeps every CPU busy.
fn spin(time: Duration, cpus: usize) {
    let start = Instant::now();
    let spin = || while start.elapsed() < time {};
    std::thread::scope(|scope| {
        for _ in 1..cpus {
            scope.spawn(spin);
        }
        spin();
    });
}

/// Talks to the console for `time`, from a thread of its own. Past this process's standard output, whose lock it would hold nearly
/// all the time: the steps that follow want to be heard as well.
fn chatter(time: Duration) {
    let start = Instant::now();
    std::thread::spawn(move || {
        let line = "chatter ".repeat(8) + "\n";
        let written = OpenOptions::new()
            .write(true)
            .open("/dev/console")
            .and_then(|mut console| {
                while start.elapsed() < time {
                    console.write_all(line.as_bytes())?;
                    // A console is written to with the processor held: other steps are to have some of it.
                    std::thread::sleep(Duration::from_millis(10));
                }
                Ok(())
            });
        if let Err(error) = written {
            println!("chronovisor guest: /dev/console: {error}");
        }
    });
}

/// Tells which CPUs the kernel takes for threads of one core.
fn topology(cpus: usize) {
    for cpu in 0..cpus {
        let file = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        let siblings = fs::read_to_string(&file).unwrap_or_else(|error| format!("{file}: {error}"));
        println!("cpu{cpu} shares its core with {}", siblings.trim());
    }
}

/// A shell on the console, as the leader of a session that has the console as its terminal: so Ctrl-C reaches what it runs.
fn shell() {
    // /dev/console cannot be a controlling terminal; the device behind it can.
    let active = fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
    let terminal = format!("/dev/{}", active.split_whitespace().last().unwrap_or("console"));
    let open = || OpenOptions::new().read(true).write(true).open(&terminal);
    let shell = (|| {
        let mut command = Command::new("/bin/busybox");
        command.args(["setsid", "-c", "busybox", "sh"]);
        command
            .env_clear()
            .envs([("PATH", "/bin"), ("HOME", "/"), ("TERM", "vt100"), ("PS1", "guest# ")]);
        command.stdin(open()?).stdout(open()?).stderr(open()?).spawn()
    })();
    match shell {
        Ok(shell) => reap_until(shell.id()),
        Err(error) => println!("chronovisor guest: cannot start a shell on {terminal}: {error}"),
    }
}

/// Waits for the child `pid`, and for the orphans that come to init meanwhile.
fn reap_until(pid: u32) {
    while let Ok(ended) = wait(WaitOptions::empty()) {
        if ended.is_some_and(|(ended, _)| u32::try_from(ended.as_raw_nonzero().get()) == Ok(pid)) {
            return;
        }
    }
}

fn end(what: &str, command: RebootCommand) -> ! {
    let error = reboot(command);
    println!("chronovisor guest: {what} failed: {error:?}");
    exit(1)
}
