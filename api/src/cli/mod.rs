//! The command line: what is accepted, and how its errors read.
//!
//! Without a command it is Firecracker's, flag for flag as its clients spawn it. Flags of Firecracker that only inform, or
//! that choose what we always do, are accepted and have no effect; flags whose loss would matter are refused.

mod devices;

use std::net::SocketAddr;
use std::path::PathBuf;

use accounting::GtimeSource;
use clap::{Args, Parser, Subcommand};
use tracing_subscriber::filter::LevelFilter;
use vmm::config::{MAX_VCPUS, Pinning, Vsock};

use crate::exit;
use crate::fleet::Pattern;
pub use devices::{Disk, Net};

/// Where the API's socket is unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/chronovisor.socket";

/// What a microVM is called unless told otherwise: as Firecracker's.
pub const DEFAULT_ID: &str = "anonymous-instance";

/// A microVM hypervisor on KVM that knows where every nanosecond of a vCPU went.
#[derive(Debug, Parser)]
#[command(
    name = "chronovisor",
    version,
    args_conflicts_with_subcommands = true,
    arg_required_else_help = true,
    after_help = exit::HELP,
    override_usage = "chronovisor --api-sock <PATH> [OPTIONS]\n       chronovisor <COMMAND> [OPTIONS]"
)]
pub struct Cli {
    /// What to do, instead of serving the API.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Serving the API.
    #[command(flatten)]
    pub serve: Serve,
}

/// Server mode by itself: a part of [`Cli`], whose errors and help are the ones shown.
#[derive(Debug, Parser)]
#[command(arg_required_else_help = true)]
struct Server {
    #[command(flatten)]
    serve: Serve,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a guest with its console on this terminal (Ctrl-A x ends it)
    #[command(after_help = exit::HELP)]
    Run(Box<Run>),
    /// Show where the vCPUs' time goes
    Times(Times),
    /// Show where the time of several microVMs' vCPUs goes, on the whole screen
    Top(Top),
    /// Say how well this host can run guests and tell their time, and what to change
    Check(Check),
    /// Serve the figures of all microVMs of this machine to Prometheus
    #[command(after_help = crate::exporter::HELP)]
    Exporter(Box<crate::exporter::Exporter>),
    /// Run a microVM in a jail: as another user, in a root of its own
    #[command(after_help = crate::jail::HELP)]
    Jail(Box<crate::jail::Jail>),
}

/// Server mode: Firecracker's flags.
#[derive(Args, Debug)]
pub struct Serve {
    /// Unix socket to serve the API on; made with mode 0600; what is there stays, but for a socket left behind
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    pub api_sock: PathBuf,
    /// And on TCP.
    #[command(flatten)]
    pub tcp: Tcp,
    /// Name of the microVM: 1 to 64 letters, digits and hyphens
    #[arg(long, default_value = DEFAULT_ID, value_parser = id)]
    pub id: String,
    /// Configure and start the microVM from this JSON file: the sections that GET /vm/config answers
    #[arg(long, value_name = "FILE")]
    pub config_file: Option<PathBuf>,
    /// Serve no API; needs --config-file
    #[arg(long, requires = "config_file", conflicts_with = "api_listen")]
    pub no_api: bool,
    /// Largest body of an API request, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 51_200)]
    pub http_api_max_payload_size: usize,
    /// What its threads may ask of the kernel.
    #[command(flatten)]
    pub seccomp: Seccomp,
    /// Metadata for the guest (MMDS), from this JSON file
    #[arg(long, value_name = "FILE")]
    pub metadata: Option<PathBuf>,
    /// Largest metadata, in bytes [default: as --http-api-max-payload-size]
    #[arg(long, value_name = "BYTES")]
    pub mmds_size_limit: Option<usize>,
    /// Write metrics to this file or fifo, a line of JSON every minute
    #[arg(long, value_name = "FILE")]
    pub metrics_path: Option<PathBuf>,
    /// Where guest time comes from.
    #[command(flatten)]
    pub gtime: Gtime,
    /// The log.
    #[command(flatten)]
    pub log: Log,
    /// What the jailer says.
    #[command(flatten)]
    pub started: StartTimes,
    /// Firecracker's flags without effect here.
    #[command(flatten)]
    pub ignored: Ignored,
}

/// The API on TCP.
#[derive(Args, Clone, Debug, Default)]
pub struct Tcp {
    /// Also serve the API on this loopback address; any user of this host can reach it, unless there is a token
    #[arg(long, value_name = "ADDR:PORT")]
    pub api_listen: Option<SocketAddr>,
    /// Have who asks over TCP bring the token in this file (Authorization: Bearer TOKEN); it must be this user's, with mode 0600
    #[arg(long, value_name = "FILE", requires = "api_listen")]
    pub api_token_file: Option<PathBuf>,
    /// Let --api-listen be any address. Nothing is encrypted: who listens on the way has the token
    #[arg(long, requires_all = ["api_listen", "api_token_file"])]
    pub api_listen_anywhere: bool,
}

/// Flags of Firecracker that are accepted for its clients' sake.
#[derive(Args, Debug)]
pub struct Ignored {
    #[arg(long, hide = true)]
    enable_pci: bool,
    #[arg(long, hide = true)]
    boot_timer: bool,
}

/// What the jailer says of the start, for the metrics. In microseconds.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct StartTimes {
    /// When it was begun, on CLOCK_MONOTONIC.
    #[arg(long, hide = true, value_name = "US")]
    pub start_time_us: Option<u64>,
    /// How much CPU time the process had used by then.
    #[arg(long, hide = true, value_name = "US")]
    pub start_time_cpu_us: Option<u64>,
    /// How much CPU time the jailer itself used.
    #[arg(long, hide = true, value_name = "US")]
    pub parent_cpu_time_us: Option<u64>,
}

impl Ignored {
    /// Those given whose absence of effect somebody may notice.
    pub fn noticeable(&self) -> impl Iterator<Item = &'static str> {
        let flags = [(self.enable_pci, "--enable-pci"), (self.boot_timer, "--boot-timer")];
        flags.into_iter().filter_map(|(given, flag)| given.then_some(flag))
    }
}

/// Where guest time comes from.
#[derive(Args, Debug)]
pub struct Gtime {
    /// What guest time is derived from: "bpf" (stamps at KVM's tracepoints, by a BPF program: to a few microseconds; needs
    /// root, and runs at every exit of every guest of the host), "vtime" (the kernel's own, on a nohz_full CPU: to 14 ms), "oncpu" (any host) or
    /// "auto", the first of them that this host has. One that it lacks gives way to the next; each reading names its own
    #[arg(long = "gtime-source", value_name = "SOURCE", default_value = "vtime")]
    pub source: GtimeSource,
}

/// What the threads of a microVM may ask of the kernel.
#[derive(Args, Debug, Default)]
pub struct Seccomp {
    /// Let every thread make any system call; without this flag, one that its thread has no need for ends the microVM
    #[arg(long)]
    pub no_seccomp: bool,
    /// Which system calls each thread may make, from this JSON file, instead of the policy that is built in
    #[arg(long, value_name = "FILE", conflicts_with = "no_seccomp")]
    pub seccomp_filter: Option<PathBuf>,
}

/// The log's flags.
#[derive(Args, Debug)]
pub struct Log {
    /// Write the log to this file or fifo, instead of stderr
    #[arg(long, value_name = "FILE")]
    pub log_path: Option<PathBuf>,
    /// Off, Error, Warning, Info, Debug or Trace [default: Info with --log-path, Warning without]
    #[arg(long, value_parser = level)]
    pub level: Option<LevelFilter>,
    /// Write each line's level into the log file
    #[arg(long)]
    pub show_level: bool,
    /// Write into the log file where in the source each line comes from
    #[arg(long)]
    pub show_log_origin: bool,
    /// Log only what comes from this module of the source, and from those in it
    #[arg(long, value_name = "MODULE")]
    pub module: Option<String>,
}

/// `chronovisor run`.
#[derive(Args, Debug)]
pub struct Run {
    /// Kernel: an ELF vmlinux or a bzImage
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, default_value = "console=ttyS0 reboot=k panic=-1", allow_hyphen_values = true)]
    pub cmdline: String,
    /// A raw disk image or a block device, ":ro" for read-only; may be given again. The first one is the root, unless the command
    /// line names another (root=)
    #[arg(long, value_name = "FILE[:ro]", value_parser = devices::disk)]
    pub disk: Vec<Disk>,
    /// A network interface on a tap device of the host; may be given again. Its id is eth0, eth1, ... unless given
    #[arg(long, value_name = "tap=NAME[,mac=MAC][,id=ID]", value_parser = devices::net)]
    pub net: Vec<Net>,
    /// Sockets between guest and host: the guest's context id, from 3 up, and a unix socket that is made for the host's side
    #[arg(long, value_name = "cid=CID,uds=PATH", value_parser = devices::vsock)]
    pub vsock: Option<Vsock>,
    /// Give the guest a source of randomness (virtio-rng)
    #[arg(long)]
    pub rng: bool,
    /// Number of vCPUs, 1 to 32
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_VCPUS)))]
    pub cpus: u8,
    /// Guest memory, in MiB or with a unit: 256M, 4G
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = mem_mib)]
    pub mem: usize,
    /// Host CPUs for the vCPUs, one each, in order: a list (2,3 or 2-5), "auto" (nohz_full ones first) or "none"
    #[arg(long, value_name = "CPUS", default_value = "auto", value_parser = pinning)]
    pub pin: Pinning,
    /// Serve the API on this unix socket; made with mode 0600; what is there stays, but for a socket left behind
    #[arg(long, value_name = "PATH")]
    pub api_sock: Option<PathBuf>,
    /// And on TCP.
    #[command(flatten)]
    pub tcp: Tcp,
    /// Name of the microVM: 1 to 64 letters, digits and hyphens
    #[arg(long, default_value = DEFAULT_ID, value_parser = id)]
    pub id: String,
    /// What its threads may ask of the kernel.
    #[command(flatten)]
    pub seccomp: Seccomp,
    /// Where guest time comes from.
    #[command(flatten)]
    pub gtime: Gtime,
    /// The log.
    #[command(flatten)]
    pub log: Log,
}

/// `chronovisor times`.
#[derive(Args, Debug)]
pub struct Times {
    /// The microVM's API socket
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    pub api_sock: PathBuf,
    /// One line of JSON for each reading of all vCPUs
    #[arg(long)]
    pub json: bool,
    /// Go on until the microVM ends; shares are of the interval, not of all time
    #[arg(long)]
    pub watch: bool,
    /// Milliseconds between readings
    #[arg(long, value_name = "MS", default_value_t = 1000, requires = "watch", value_parser = clap::value_parser!(u64).range(1..))]
    pub interval: u64,
    /// End after this many readings
    #[arg(long, value_name = "N", requires = "watch", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
}

/// `chronovisor top`.
#[derive(Args, Debug)]
pub struct Top {
    /// API sockets of microVMs: a path, a directory of them, or a quoted glob; may be given again
    /// [default: /run/chronovisor.socket and /run/chronovisor/*.socket]
    #[arg(long, value_name = "PATTERN")]
    pub api_sock: Vec<Pattern>,
    /// Milliseconds between readings, 100 to 60000
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(100..=60_000))]
    pub interval: u64,
    /// Print two readings' difference as plain text, and end
    #[arg(long)]
    pub once: bool,
}

/// `chronovisor check`.
#[derive(Args, Debug)]
pub struct Check {
    /// Also say what disturbs the vCPUs of the microVM that serves its API on this socket
    #[arg(long, value_name = "PATH")]
    pub api_sock: Option<PathBuf>,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// As Firecracker checks it.
fn id(text: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-';
    match text.len() {
        1..=64 if text.chars().all(allowed) => Ok(text.to_owned()),
        1..=64 => Err("only letters, digits and hyphens are allowed".to_owned()),
        length => Err(format!("it has {length} characters, where 1 to 64 are allowed")),
    }
}

fn level(text: &str) -> Result<LevelFilter, String> {
    Ok(match text.to_ascii_lowercase().as_str() {
        "off" => LevelFilter::OFF,
        "error" => LevelFilter::ERROR,
        "warn" | "warning" => LevelFilter::WARN,
        "info" => LevelFilter::INFO,
        "debug" => LevelFilter::DEBUG,
        "trace" => LevelFilter::TRACE,
        _ => return Err("use Off, Error, Warning, Info, Debug or Trace".to_owned()),
    })
}

/// A size in whole MiB: `512`, `512M`, `4G`, `1T`, also with `iB` after the letter.
fn mem_mib(text: &str) -> Result<usize, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = text[digits.len()..].to_ascii_lowercase();
    let mib_each: usize = match unit.strip_suffix("ib").unwrap_or(&unit) {
        "" | "m" => 1,
        "g" => 1 << 10,
        "t" => 1 << 20,
        _ => return Err("give a size in MiB, or with a unit: 256M, 4G".to_owned()),
    };
    let number: usize = digits
        .parse()
        .map_err(|_| "give a size in MiB, or with a unit: 256M, 4G".to_owned())?;
    match number.checked_mul(mib_each) {
        Some(0) => Err("a guest needs some memory: give at least 1M; a Linux guest wants 64M or more".to_owned()),
        Some(mib) => Ok(mib),
        None => Err("that is more than can be counted".to_owned()),
    }
}

/// `auto`, `none`, or host CPUs in the order of the vCPUs. That they exist, and are not given twice, is the VMM's to say.
fn pinning(text: &str) -> Result<Pinning, String> {
    let number = |text: &str| {
        text.parse::<u32>()
            .map_err(|_| "give host CPUs as in 2,3 or 2-5, or \"auto\", or \"none\"".to_owned())
    };
    match text {
        "auto" => return Ok(Pinning::Auto),
        "none" => return Ok(Pinning::None),
        _ => {}
    }
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(part)?, number(part)?),
        };
        if first > last {
            return Err(format!("{part} runs backwards"));
        }
        cpus.extend((first..=last).take(usize::from(MAX_VCPUS) + 1));
        if cpus.len() > usize::from(MAX_VCPUS) {
            return Err(format!("that is more than {MAX_VCPUS} CPUs, the most a microVM has"));
        }
    }
    Ok(Pinning::Cpus(cpus))
}

/// Reads the command line.
///
/// # Errors
/// The exit status, once help, the version, or the one line that says what is wrong has been printed.
pub fn parse(arguments: impl IntoIterator<Item = std::ffi::OsString>) -> Result<Cli, u8> {
    let arguments: Vec<_> = arguments.into_iter().collect();
    // A program that spawns a microVM waits for its API, and building every command's grammar is a tenth of that wait.
    if let Ok(Server { serve }) = Server::try_parse_from(&arguments) {
        return Ok(Cli { command: None, serve });
    }
    Cli::try_parse_from(arguments).map_err(|error| {
        use clap::error::ErrorKind::{DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion};
        match error.kind() {
            DisplayHelp | DisplayVersion | DisplayHelpOnMissingArgumentOrSubcommand => {
                // A closed stdout is not worth another error.
                let _ = error.print();
                if error.use_stderr() { exit::USAGE } else { 0 }
            }
            _ => {
                exit::say(&one_line(&error));
                exit::USAGE
            }
        }
    })
}

/// Clap's first paragraph, on one line, without its "error: ".
fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let paragraph: Vec<&str> = text
        .lines()
        .take_while(|line| !line.trim().is_empty())
        .map(str::trim)
        .collect();
    let line = paragraph.join(" ");
    format!(
        "{}; see chronovisor --help",
        line.strip_prefix("error: ").unwrap_or(&line)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_in_mib_unless_they_say_otherwise() {
        let good = [
            ("256M", 256),
            ("256", 256),
            ("1G", 1024),
            ("2g", 2048),
            ("64MiB", 64),
            ("1T", 1 << 20),
        ];
        for (text, mib) in good {
            assert_eq!(mem_mib(text), Ok(mib), "{text}");
        }
        for text in [
            "",
            "0",
            "0G",
            "M",
            "-1",
            "1.5G",
            "256K",
            "256MB",
            "lots",
            "99999999999999999999",
            "9999999999999999T",
        ] {
            assert!(mem_mib(text).is_err(), "{text}");
        }
    }

    #[test]
    fn pins_are_lists_and_ranges_in_the_order_given() {
        let good = [
            ("auto", Pinning::Auto),
            ("none", Pinning::None),
            ("3", Pinning::Cpus(vec![3])),
            ("3,2", Pinning::Cpus(vec![3, 2])),
            ("2-4,0", Pinning::Cpus(vec![2, 3, 4, 0])),
            // Refused by the VMM, which names the CPU.
            ("1,1", Pinning::Cpus(vec![1, 1])),
        ];
        for (text, pinning_) in good {
            assert_eq!(pinning(text), Ok(pinning_), "{text}");
        }
        for text in [
            "",
            ",",
            "1,",
            "a",
            "1-",
            "-1",
            "4-2",
            "0-4294967295",
            "0-32",
            "1 2",
            "Auto",
        ] {
            assert!(pinning(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ids_are_firecrackers() {
        let longest = "a".repeat(64);
        for text in ["a", "0", "-", "550e8400-e29b-41d4-a716-446655440000", &longest] {
            assert!(id(text).is_ok(), "{text}");
        }
        for text in ["", "a_b", "a b", "ä", "a/b", &"a".repeat(65)] {
            assert!(id(text).is_err(), "{text}");
        }
    }

    #[test]
    fn levels_are_firecrackers_in_any_case() {
        for text in ["Off", "error", "WARNING", "Warn", "Info", "debug", "Trace"] {
            assert!(level(text).is_ok(), "{text}");
        }
        assert!(level("loud").is_err());
    }

    fn try_parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn what_firecrackers_clients_spawn_is_accepted() {
        let lines = [
            "chronovisor --api-sock /tmp/s --id 550e8400-e29b-41d4-a716-446655440000 --no-seccomp",
            "chronovisor --api-sock /tmp/s --id i --log-path /tmp/l",
            "chronovisor --api-sock /tmp/s --config-file c.json --enable-pci",
            "chronovisor --config-file c.json --no-api --boot-timer --level Debug --show-level --show-log-origin",
            "chronovisor --api-sock /tmp/s --seccomp-filter /tmp/f",
            "chronovisor --id i --start-time-us 1 --start-time-cpu-us 2 --parent-cpu-time-us 3 --api-sock /s",
        ];
        for line in lines {
            let cli = try_parse(line).unwrap_or_else(|error| panic!("{line}: {error}"));
            assert!(cli.command.is_none(), "{line}");
        }
        let cli = try_parse(lines[2]).unwrap();
        assert_eq!(cli.serve.ignored.noticeable().collect::<Vec<_>>(), ["--enable-pci"]);
    }

    #[test]
    fn a_wrong_command_line_is_told_in_one_line_that_names_the_flag() {
        let table = [
            ("chronovisor run", "--kernel"),
            ("chronovisor run --kernel k --cpus 0", "--cpus"),
            ("chronovisor run --kernel k --cpus 33", "--cpus"),
            ("chronovisor run --kernel k --mem 0", "--mem"),
            ("chronovisor run --kernel k --mem lots", "lots"),
            ("chronovisor run --kernel k --pin x", "--pin"),
            ("chronovisor run --kernel k --disk :ro", "--disk"),
            ("chronovisor run --kernel k --net mac=1", "--net"),
            ("chronovisor run --kernel k --vsock cid=3", "--vsock"),
            ("chronovisor --no-api", "--config-file"),
            ("chronovisor --id a_b", "--id"),
            ("chronovisor --level loud", "--level"),
            ("chronovisor --api-listen here", "--api-listen"),
            ("chronovisor --no-seccomp --seccomp-filter f", "--seccomp-filter"),
            (
                "chronovisor run --kernel k --seccomp-filter f --no-seccomp",
                "--seccomp-filter",
            ),
            ("chronovisor times --count 2", "--watch"),
            ("chronovisor top --interval 99", "--interval"),
            ("chronovisor top --api-sock [", "--api-sock"),
            ("chronovisor run --kernel k --gtime-source tsc", "--gtime-source"),
            ("chronovisor frobnicate", "frobnicate"),
        ];
        for (line, names) in table {
            let said = one_line(&try_parse(line).expect_err(line));
            assert!(!said.contains('\n') && said.contains(names), "{line}: {said}");
            assert!(!said.starts_with("error"), "{line}: {said}");
        }
    }
}
