//! `chronovisor jail`: its command line, as Firecracker's jailer has it, and what is made of it.
//!
//! That a flag is unknown or missing is the command line's to say, with its status of 2. What a value may be is checked
//! here, before anything is touched, in the jailer's words and with its status of 1.

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use clap::Args;

use super::cgroup::{Setting, Version};
use super::error::JailError;

/// `chronovisor jail`.
#[derive(Args, Debug)]
pub struct Jail {
    /// Name of the microVM and of its jail: 1 to 64 letters, digits and hyphens
    #[arg(long)]
    pub id: String,
    /// Program to run in the jail [default: this one]
    #[arg(long, value_name = "FILE")]
    pub exec_file: Option<PathBuf>,
    /// User to run it as: a number, best one that no other microVM has
    #[arg(long)]
    pub uid: String,
    /// Group to run it as: a number
    #[arg(long)]
    pub gid: String,
    /// Directory of all jails, which must exist; this one is in <program's name>/<id>/root
    #[arg(long, value_name = "DIR", default_value = "/srv/jailer")]
    pub chroot_base_dir: PathBuf,
    /// Version of the cgroups to place it in: 1 or 2
    #[arg(long, value_name = "VERSION", default_value = "1")]
    pub cgroup_version: String,
    /// Set a file of its cgroup, <parent>/<id>, as in cpuset.cpus=2-3; may be given again
    #[arg(long, value_name = "FILE=VALUE")]
    pub cgroup: Vec<String>,
    /// Where its cgroup is, below the hierarchy's root [default: the program's name]. With version 2 and no --cgroup it
    /// is put into this one itself, if that exists
    #[arg(long, value_name = "PATH")]
    pub parent_cgroup: Option<PathBuf>,
    /// Join this network namespace, as in /var/run/netns/NAME
    #[arg(long, value_name = "FILE")]
    pub netns: Option<PathBuf>,
    /// Run in a new network namespace, in which there is nothing
    #[arg(long, conflicts_with = "netns")]
    pub new_net_ns: bool,
    /// Run in a new PID namespace: it sees no other process. This one ends with status 0 once the program runs
    #[arg(long)]
    pub new_pid_ns: bool,
    /// Limit its resources: fsize, the largest file it may write, in bytes; no-file, how many descriptors it may have
    /// [default: no-file=2048]. May be given again
    #[arg(long, value_name = "RESOURCE=VALUE")]
    pub resource_limit: Vec<String>,
    /// Show it a file or directory of the host, under the same path unless another is given, ":ro" for read-only. May
    /// be given again
    #[arg(long, value_name = "PATH[:PATH][:ro]")]
    pub bind: Vec<String>,
    /// Run it in a session of its own, with /dev/null for standard input, output and error. This one ends with status 0
    /// once the program runs
    #[arg(long)]
    pub daemonize: bool,
    /// What the program is given besides --id: its flags, or a command such as "run" and its flags
    #[arg(last = true, value_name = "ARGUMENTS")]
    pub arguments: Vec<OsString>,
}

/// What `--help` says of it besides.
pub const HELP: &str = "\
The program finds itself in <chroot-base-dir>/<program's name>/<id>/root, as /: what it is to read, put there or show it by --bind.
It has the devices kvm, net/tun, null and urandom, its own entries of /proc, and of /sys what tells of CPUs. It has no capabilities,
and gains none (no_new_privs). Its API's socket is in there, too: by default run/chronovisor.socket.

  # chronovisor jail --id web1 --uid 12001 --gid 12001 --cgroup-version 2 --cgroup memory.max=600M \\
        --bind /images/vmlinux:/vmlinux:ro --bind /images/web1.ext4:/disk --daemonize --new-pid-ns -- \\
        --config-file /web1.json

Exit status: 1 where something failed, and nothing is left behind then; 2 where the command line is wrong; else the program's own, or
0 with --daemonize or --new-pid-ns.";

/// What its resources are limited to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Largest file, in bytes.
    pub file_size: Option<u64>,
    /// One more than the highest descriptor.
    pub open_files: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            file_size: None,
            open_files: 2048,
        }
    }
}

/// A file or directory of the host that is seen in the jail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// There.
    pub source: PathBuf,
    /// Here, from the jail's root.
    pub target: PathBuf,
    /// Not to be written.
    pub read_only: bool,
}

/// A command line that has been checked.
#[derive(Debug)]
pub struct Plan {
    /// The microVM's.
    pub id: String,
    /// Real path of the program.
    pub program: PathBuf,
    /// Its last part.
    pub name: OsString,
    /// Real path of the directory of all jails.
    pub base: PathBuf,
    /// User that it runs as.
    pub uid: u32,
    /// Group that it runs as, and the only one.
    pub gid: u32,
    /// Of which version its cgroup is.
    pub cgroups: Version,
    /// Above its cgroup.
    pub parent_cgroup: PathBuf,
    /// Files of its cgroup to set, with their values.
    pub settings: Vec<Setting>,
    /// The network namespace to join.
    pub netns: Option<PathBuf>,
    /// Whether it has a new network namespace.
    pub new_net_ns: bool,
    /// Whether it has a new PID namespace.
    pub new_pid_ns: bool,
    /// What it may use.
    pub limits: Limits,
    /// What it sees.
    pub binds: Vec<Bind>,
    /// Whether it is in the background.
    pub daemonize: bool,
    /// What it is given.
    pub arguments: Vec<OsString>,
}

impl Plan {
    /// Checks `jail`.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn new(jail: Jail) -> Result<Self, JailError> {
        id(&jail.id)?;
        let program = match &jail.exec_file {
            Some(path) => real(path)?,
            None => real(Path::new("/proc/self/exe"))?,
        };
        if !program.is_file() {
            return Err(JailError::NotAFile(program));
        }
        let Some(name) = program.file_name().map(ToOwned::to_owned) else {
            return Err(JailError::NotAFile(program));
        };
        let base = real(&jail.chroot_base_dir)?;
        if !base.is_dir() {
            return Err(JailError::NotADirectory(base));
        }
        let uid = number(&jail.uid).ok_or_else(|| JailError::Uid(jail.uid.clone()))?;
        let gid = number(&jail.gid).ok_or_else(|| JailError::Gid(jail.gid.clone()))?;
        let parent_cgroup = jail.parent_cgroup.unwrap_or_else(|| PathBuf::from(&name));
        if !is_below(&parent_cgroup) {
            return Err(JailError::CgroupParent);
        }
        let cgroups = match &*jail.cgroup_version {
            "1" => Version::One,
            "2" => Version::Two,
            other => return Err(JailError::CgroupVersion(other.to_owned())),
        };
        Ok(Self {
            settings: jail.cgroup.iter().map(|text| setting(text)).collect::<Result<_, _>>()?,
            limits: limits(&jail.resource_limit)?,
            binds: jail.bind.iter().map(|text| bind(text)).collect::<Result<_, _>>()?,
            id: jail.id,
            program,
            name,
            base,
            uid,
            gid,
            cgroups,
            parent_cgroup,
            netns: jail.netns,
            new_net_ns: jail.new_net_ns,
            new_pid_ns: jail.new_pid_ns,
            daemonize: jail.daemonize,
            arguments: jail.arguments,
        })
    }

    /// What is root's own of the jail, on the host: its root is in there.
    pub fn place(&self) -> PathBuf {
        self.base.join(&self.name).join(&self.id)
    }

    /// Where the jail's root is, on the host.
    pub fn root(&self) -> PathBuf {
        self.place().join("root")
    }
}

fn real(path: &Path) -> Result<PathBuf, JailError> {
    path.canonicalize().map_err(|source| JailError::Canonicalize {
        path: path.to_owned(),
        source,
    })
}

fn id(text: &str) -> Result<(), JailError> {
    let refuse = |why: String| Err(JailError::Id(why));
    if let Some((at, other)) = text
        .char_indices()
        .find(|(_, c)| !c.is_ascii_alphanumeric() && *c != '-')
    {
        return refuse(format!("Invalid char ({other}) at position {at}"));
    }
    match text.len() {
        1..=64 => Ok(()),
        length => refuse(format!("Invalid len ({length}); the length must be between 1 and 64")),
    }
}

/// Neither a sign nor the number that means "leave it as it is" (setresuid(2)).
fn number(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|&number| digits && number != u32::MAX)
}

/// Whether `path` stays below whatever it is joined to.
fn is_below(path: &Path) -> bool {
    let mut parts = path.components().peekable();
    parts.peek().is_some() && parts.all(|part| matches!(part, Component::Normal(_)))
}

fn setting(text: &str) -> Result<Setting, JailError> {
    let Some((file, value)) = text.split_once('=').filter(|(_, value)| !value.is_empty()) else {
        return Err(JailError::CgroupFormat(text.to_owned()));
    };
    // A file of the cgroup itself, <controller>.<property>.
    match file.split_once('.') {
        Some((controller, property)) if ![controller, property].contains(&"") && !file.contains('/') => Ok(Setting {
            file: file.to_owned(),
            controller: controller.to_owned(),
            value: value.to_owned(),
        }),
        _ => Err(JailError::CgroupFile(file.to_owned())),
    }
}

fn limits(texts: &[String]) -> Result<Limits, JailError> {
    let mut limits = Limits::default();
    for text in texts {
        let (name, value) = text
            .split_once('=')
            .ok_or_else(|| JailError::LimitFormat(text.clone()))?;
        let limit = value.parse().map_err(|source| JailError::LimitValue {
            value: value.to_owned(),
            source,
        })?;
        match name {
            "fsize" => limits.file_size = Some(limit),
            "no-file" => limits.open_files = limit,
            _ => return Err(JailError::Limit(name.to_owned())),
        }
    }
    Ok(limits)
}

fn bind(text: &str) -> Result<Bind, JailError> {
    let refuse = || JailError::Bind(text.to_owned());
    let (paths, read_only) = text.strip_suffix(":ro").map_or((text, false), |paths| (paths, true));
    let (source, target) = paths.split_once(':').unwrap_or((paths, paths));
    // From the jail's root, whether it says so or not.
    let below = target.strip_prefix('/').map(Path::new).filter(|path| is_below(path));
    let target = below.ok_or_else(refuse)?;
    let of_the_kernel = ["proc", "sys"].iter().any(|system| target.starts_with(system));
    if of_the_kernel || target == Path::new("dev") || target.to_str().is_none() {
        return Err(refuse());
    }
    Ok(Bind {
        source: real(Path::new(source))?,
        target: target.to_owned(),
        read_only,
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        jail: Jail,
    }

    const GOOD: &str = "jail --id a --uid 1 --gid 2 --chroot-base-dir /tmp";

    fn plan(more: &str) -> Result<Plan, JailError> {
        let line = format!("{GOOD} {more}");
        let mut words: Vec<&str> = line.split_whitespace().collect();
        // What is given again replaces what was given first.
        for flag in ["--id", "--uid", "--gid", "--chroot-base-dir"] {
            while words.iter().filter(|word| **word == flag).count() > 1 {
                let at = words.iter().position(|word| *word == flag).unwrap();
                words.drain(at..at + 2);
            }
        }
        Plan::new(Line::parse_from(words).jail)
    }

    #[test]
    fn a_value_that_cannot_be_is_refused_in_the_jailers_words() {
        let long = format!("--id {}", "a".repeat(65));
        let table = [
            ("--id a_b", "Invalid instance ID: Invalid char (_) at position 1"),
            ("--id ../x", "Invalid instance ID: Invalid char (.) at position 0"),
            (
                &long,
                "Invalid instance ID: Invalid len (65); the length must be between 1 and 64",
            ),
            ("--uid zzz", "Invalid uid: zzz"),
            ("--uid +1", "Invalid uid: +1"),
            ("--uid 4294967295", "Invalid uid: 4294967295"),
            ("--uid 4294967296", "Invalid uid: 4294967296"),
            ("--gid x", "Invalid gid: x"),
            (
                "--exec-file /no/such/file",
                "Failed to canonicalize path /no/such/file: No such file",
            ),
            ("--exec-file /tmp", "/tmp is not a file"),
            ("--exec-file /", "/ is not a file"),
            (
                "--chroot-base-dir /no/such",
                "Failed to canonicalize path /no/such: No such file",
            ),
            ("--chroot-base-dir /proc/self/exe", "is not a directory"),
            (
                "--parent-cgroup /x",
                "Parent cgroup path is invalid. Path should not be absolute or contain '..' or '.'",
            ),
            ("--parent-cgroup a/../b", "Parent cgroup path is invalid"),
            ("--parent-cgroup .", "Parent cgroup path is invalid"),
            ("--cgroup-version 3", "3 is an invalid cgroup version specifier"),
            ("--cgroup cpu.shares", "Invalid format for cgroups: cpu.shares"),
            ("--cgroup cpu.shares=", "Invalid format for cgroups: cpu.shares="),
            ("--cgroup shares=1", "Cgroup invalid file: shares"),
            ("--cgroup ../cpu.shares=1", "Cgroup invalid file: ../cpu.shares"),
            (
                "--cgroup a/../../cpu.shares=1",
                "Cgroup invalid file: a/../../cpu.shares",
            ),
            ("--resource-limit fsize", "Invalid format for resources limits: fsize"),
            (
                "--resource-limit fsize=many",
                "Invalid limit value for resource: many: invalid digit",
            ),
            (
                "--resource-limit no-file=-1",
                "Invalid limit value for resource: -1: invalid digit",
            ),
            ("--resource-limit cpu=1", "Invalid resource argument: cpu"),
            ("--bind /no/such", "Failed to canonicalize path /no/such: No such file"),
            ("--bind /tmp:/a/../b", "--bind /tmp:/a/../b"),
            ("--bind /tmp:b", "--bind /tmp:b"),
            ("--bind /tmp:/", "--bind /tmp:/"),
            ("--bind /tmp:/proc/1", "--bind /tmp:/proc/1"),
            ("--bind /tmp:/dev", "--bind /tmp:/dev"),
        ];
        for (more, says) in table {
            let said = plan(more).expect_err(more).to_string();
            assert!(
                said.starts_with(says) || said.contains(says) && !says.starts_with("Inv"),
                "{more}: {said}"
            );
        }
    }

    #[test]
    fn what_is_not_given_is_as_the_jailer_has_it() {
        let plan = plan("").unwrap();
        let name = std::env::current_exe().unwrap().file_name().unwrap().to_owned();
        assert_eq!(plan.name, name);
        assert_eq!(plan.root(), Path::new("/tmp").join(&name).join("a/root"));
        assert_eq!((plan.uid, plan.gid, plan.cgroups), (1, 2, Version::One));
        assert_eq!(plan.parent_cgroup, Path::new(&name));
        assert_eq!(
            plan.limits,
            Limits {
                file_size: None,
                open_files: 2048
            }
        );
        let default = Line::parse_from("jail --id a --uid 1 --gid 2".split(' ')).jail;
        assert_eq!(default.chroot_base_dir, Path::new("/srv/jailer"));
    }

    #[test]
    fn flags_that_may_be_given_again_add_up() {
        let plan = plan(
            "--cgroup cpuset.cpus=1-2 --cgroup io.max=8:0,rbps=1 --resource-limit fsize=9 --resource-limit no-file=64 --bind /tmp \
             --bind /usr:/a/b:ro --bind /dev/null:/dev/vda -- run --kernel k",
        )
        .unwrap();
        let settings: Vec<_> = plan
            .settings
            .iter()
            .map(|s| (&*s.controller, &*s.file, &*s.value))
            .collect();
        assert_eq!(
            settings,
            [("cpuset", "cpuset.cpus", "1-2"), ("io", "io.max", "8:0,rbps=1")]
        );
        assert_eq!(
            plan.limits,
            Limits {
                file_size: Some(9),
                open_files: 64
            }
        );
        let binds: Vec<_> = plan
            .binds
            .iter()
            .map(|b| (b.target.to_str().unwrap(), b.read_only))
            .collect();
        assert_eq!(binds, [("tmp", false), ("a/b", true), ("dev/vda", false)]);
        assert_eq!(plan.arguments, ["run", "--kernel", "k"]);
    }
}
