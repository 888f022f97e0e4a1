//! `cargo xtask`: sets up, builds, tries and tests everything.
//!
//! What it downloads and makes is kept in target/chronovisor; nothing outside the target directory is written, but for the
//! Debian packages that it installs as root.

mod accuracy;
mod bed;
mod bench;
mod build;
mod chromium;
mod clients;
mod cpio;
mod debian;
mod demo;
#[cfg(test)]
mod documents;
mod faults;
mod flood;
mod fuzz;
mod host;
mod instructions;
mod kill;
mod layout;
mod libtest;
mod machine;
mod measured;
mod modules;
mod openapi;
mod process;
mod progress;
mod prometheus;
mod quick_start;
mod rootfs;
mod screenshots;
mod setup;
mod soak;
mod streams;
mod testing;
mod vmlinux;

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};

use layout::{Layout, cargo};

/// Sets up, builds, tries and tests Chronovisor.
///
/// Works on Debian 12 with a Rust toolchain. What it downloads and makes is kept in target/chronovisor, which may be
/// removed at any time.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Get what the others need: Debian packages, the kernel, the guest's initramfs, Firecracker's Python clients, a browser, Prometheus
    ///
    /// As root, installs the packages that this machine lacks; else prints the line that does. The kernel, busybox and
    /// Prometheus are only downloaded and unpacked. A second run touches no network.
    Setup,
    /// Make a Debian root file system for guests: systemd, a login on the serial console, sshd
    ///
    /// As root. It takes about a minute the first time. Prints where the image is; run with --disk, and with the initramfs of
    /// `cargo xtask setup`, which loads the disk's driver.
    Rootfs,
    /// Boot a Debian guest pinned to a tickless CPU, and show where its time goes, live
    ///
    /// On this machine if its /dev/kvm can boot a stock kernel, otherwise in the emulated host. The last line is the last
    /// reading, as JSON.
    Demo,
    /// Type the commands of docs/quick-start.md, as a newcomer would
    ///
    /// Here, and in the emulated host where the page says so. The first command that fails ends it.
    QuickStart,
    /// Run the tests, each on the bed it is made for
    ///
    /// Ends with a line for each bed and one for all: "N passed, N failed, N skipped". The exit status is 0 if none failed.
    Test {
        /// This bed's tests only
        #[arg(long)]
        bed: Option<testing::Bed>,
        /// With every microVM in a jail, where there are any: on the beds kvm, nohz-full and milan
        ///
        /// What cannot be in one is skipped by name. As root.
        #[arg(long)]
        jail: bool,
        /// Tests whose names contain this only
        filter: Option<String>,
    },
    /// Measure what stamps, readings, the API and a start cost, as ratios
    ///
    /// Prints a table, and writes it to bench.json and bench.md in the target directory. A row over its limit says so;
    /// the exit status is 0 all the same. Takes a few minutes.
    Bench,
    /// Hold readings against the truth, and against what the kernel says: docs/accuracy.md
    ///
    /// Guests that know what they burned run in the emulated host, on a CPU whose tick samples and on one whose tick is
    /// stopped, and on this machine if it has a /dev/kvm. Writes a table and a plot.
    Accuracy,
    /// Have a thousand clients listen to a microVM's stream of readings, and an exporter ask it: docs/streams.md
    ///
    /// Eight minutes, on this machine's /dev/kvm. What matters is how long others wait for a reading meanwhile, that the vCPU does not wait,
    /// and that it costs no memory but what each connection takes. Fails where a figure is over its limit: for a quiet machine.
    Streams,
    /// Read, stream and scrape a microVM for twenty minutes: docs/soak.md
    ///
    /// On this machine's /dev/kvm. Resident memory shall be flat, no law broken, and the ledger's clock the system's; others
    /// may use the machine meanwhile.
    Soak {
        /// How long it lasts.
        #[arg(long, default_value_t = 20)]
        minutes: u64,
    },
    /// Start, pause, resume and end two dozen microVMs fifty times over: docs/churn.md
    ///
    /// On this machine's /dev/kvm. Descriptors, threads and memory shall be afterwards what they were before.
    Churn {
        /// How many times.
        #[arg(long, default_value_t = 50)]
        rounds: u64,
    },
    /// Flood a microVM's API with ten thousand connections: docs/flood.md
    ///
    /// Two minutes, on this machine's /dev/kvm. What matters is how long who behaves waits for a reading, how much memory it takes, and
    /// that the guest goes on. Fails where a figure is over its limit: for a quiet machine.
    Flood,
    /// Have every system call of a start fail, one at a time: docs/faults.md
    ///
    /// Some 1,600 starts of flat guests on this machine's /dev/kvm, which take a quarter of an hour. Ends with status 1 if one of them
    /// left something behind, hung, or was no clear refusal.
    Faults {
        /// Of the points only every so many-th
        #[arg(long, default_value_t = 1)]
        every: u32,
    },
    /// Kill microVMs with SIGKILL at random moments of boot and I/O: docs/kill.md
    ///
    /// With flat guests on this machine's /dev/kvm, a minute or two. Ends with status 1 if one does not start after a kill, or if a
    /// write is lost that its guest was told is flushed.
    Kill(kill::Kill),
    /// Fuzz what takes apart the bytes of others, each target for a while: fuzz/README.md
    ///
    /// Ends with a line for each target: how long it ran, inputs tried, what of the program they reached. The exit status is 0 if
    /// none broke; what did is told with the input that did it. With 0 seconds the targets are built only.
    Fuzz(fuzz::Fuzz),
    /// Write resources/openapi.json from the code
    ///
    /// What it says are the routes of api/src/routes/list.rs and the types that they read and write; a test compares it.
    Openapi,
    /// Take pictures of the page GET /ui and of chronovisor top, for docs/screenshots
    ///
    /// Of a guest on this machine's /dev/kvm, by Chromium and tmux. Look at them before they are kept.
    Screenshots,
    /// Open a shell in the emulated host, where CPUs 1 and 2 are tickless, or run a script there
    ///
    /// The chronovisor program and the Debian guest are in /bed, the test programs in /tests. Leave the shell with exit,
    /// or with Ctrl-A x. A script's output and exit status are this command's.
    Host(host::Host),
    /// Check formatting and lints, warnings denied
    Lint,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("cargo xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The exit status; what went wrong has been told.
fn run(task: Task) -> Result<u8> {
    const DONE: u8 = 0;
    const FAILED: u8 = 1;
    let layout = Layout::find()?;
    match task {
        Task::Setup => {
            debian::install_missing()?;
            let kit = setup::setup(&layout)?;
            let clients = clients::install(&layout)?;
            let chromium = chromium::install()?;
            println!("guest kernel     {}", kit.vmlinux.display());
            println!("guest initramfs  {}", kit.initramfs.display());
            println!("Python clients   {}", clients.display());
            println!("browser          {}", chromium.display());
            println!("Prometheus       {}", prometheus::unpack(&layout)?.display());
            Ok(DONE)
        }
        Task::Rootfs => {
            debian::install_missing()?;
            let kit = setup::setup(&layout)?;
            println!("{}", rootfs::make(&layout, &kit)?.display());
            Ok(DONE)
        }
        Task::Demo => demo::demo(&layout).map(|()| DONE),
        Task::Test { bed, jail, filter } => {
            let all_well = testing::test(&layout, bed, jail, filter.as_deref())?;
            Ok(if all_well { DONE } else { FAILED })
        }
        Task::QuickStart => quick_start::quick_start(&layout).map(|()| DONE),
        Task::Bench => bench::bench(&layout).map(|()| DONE),
        Task::Accuracy => accuracy::accuracy(&layout).map(|()| DONE),
        Task::Streams => streams::streams(&layout).map(|()| DONE),
        Task::Soak { minutes } => soak::soak(&layout, minutes).map(|()| DONE),
        Task::Churn { rounds } => soak::churn(&layout, rounds).map(|()| DONE),
        Task::Flood => flood::flood(&layout).map(|()| DONE),
        Task::Faults { every } => faults::faults(&layout, every).map(|()| DONE),
        Task::Kill(kill) => kill::kill(&layout, &kill).map(|()| DONE),
        Task::Fuzz(fuzz) => Ok(if fuzz.run(&layout)? { DONE } else { FAILED }),
        Task::Openapi => openapi::write(&layout).map(|()| DONE),
        Task::Screenshots => screenshots::screenshots(&layout).map(|()| DONE),
        Task::Host(host) => host.run(&layout),
        Task::Lint => lint(&layout).map(|()| DONE),
    }
}

fn lint(layout: &Layout) -> Result<()> {
    let run = |args: &[&str]| -> Result<()> {
        let status = cargo()
            .current_dir(&layout.root)
            .args(args)
            .status()
            .context("cannot run cargo")?;
        ensure!(status.success(), "cargo {} failed", args[0]);
        Ok(())
    };
    run(&["fmt", "--all", "--check"])?;
    run(&["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"])
}
