//! The microVM's cgroup: `<hierarchy>/<parent>/<id>`, in version 1 one for each controller that a setting is of, in
//! version 2 the one.
//!
//! It is made and set up from outside; the process that is to become the program then joins it by itself, so that
//! whoever waits for it does not count. In version 2 each cgroup above hands its controllers down
//! (`cgroup.subtree_control`): what a cgroup that was there before has begun to hand down, it goes on handing down.
//!
//! A quota (`cpu.max`, `cpu.cfs_quota_us`) restarts the tick of a tickless CPU: `chronovisor check` says so.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use accounting::disturbance::{Mount, parse_cgroup, parse_mountinfo};

use super::args::Plan;
use super::error::JailError;
use super::undo::{self, Undo};

/// Of cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// A hierarchy for each controller, or for some.
    One,
    /// One for all.
    Two,
}

/// A file of the cgroup, and what is written into it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// `cpuset.cpus`
    pub file: String,
    /// `cpuset`
    pub controller: String,
    /// `2-3`
    pub value: String,
}

/// A cgroup to join.
#[derive(Debug)]
pub struct Seat {
    path: PathBuf,
    /// Its list of processes, and that of the cgroup where this process is.
    lists: (File, File),
}

impl Seat {
    /// Puts this process there.
    pub fn join(self, undo: &mut Undo) -> Result<(), JailError> {
        let (mut list, home) = self.lists;
        list.write_all(b"0").map_err(|source| JailError::Cgroup {
            what: "put a process there".to_owned(),
            path: self.path,
            source,
        })?;
        undo.moved(home);
        Ok(())
    }
}

/// Makes and sets up what `plan` wants.
pub fn make(plan: &Plan, undo: &mut Undo) -> Result<Vec<Seat>, JailError> {
    let read = |path: &str| fs::read(path).map_err(JailError::io(format!("read {path}")));
    let of_this = read("/proc/self/cgroup")?;
    match plan.cgroups {
        Version::One if plan.settings.is_empty() => Ok(Vec::new()),
        Version::One => {
            let hierarchies = hierarchies(&read("/proc/self/mountinfo")?);
            let mut seats: Vec<Seat> = Vec::new();
            for Setting {
                file,
                controller,
                value,
            } in &plan.settings
            {
                let has = |options: &str| options.split(',').any(|option| option == controller);
                let mounted = hierarchies.iter().find(|(_, options)| has(options));
                let (top, _) = mounted.ok_or_else(|| match hierarchies.is_empty() {
                    true => JailError::CgroupHierarchy { version: 1, other: 2 },
                    false => JailError::CgroupController(controller.clone()),
                })?;
                let below = plan.parent_cgroup.join(&plan.id);
                let path = top.join(&below);
                undo::directories(&undo::open_real(top)?, &below, undo).map_err(|error| at(&path, error))?;
                if controller == "cpuset" {
                    inherit(top, &below)?;
                }
                write(&path.join(file), value)?;
                if seats.iter().all(|seat| seat.path != path) {
                    seats.push(seat(top, path, home(&of_this, Some(controller)))?);
                }
            }
            Ok(seats)
        }
        Version::Two => {
            let mounts = parse_mountinfo(&read("/proc/self/mountinfo")?).unwrap_or_default();
            let Some(top) = mounts
                .into_iter()
                .find(|mount| mount.v2)
                .map(|Mount { point, .. }| point)
            else {
                // Nothing was asked of it.
                let optional = plan.settings.is_empty();
                return if optional {
                    Ok(Vec::new())
                } else {
                    Err(JailError::CgroupHierarchy { version: 2, other: 1 })
                };
            };
            let mut path = top.join(&plan.parent_cgroup);
            if plan.settings.is_empty() {
                let there = path.is_dir();
                return if there {
                    Ok(vec![seat(&top, path, home(&of_this, None))?])
                } else {
                    Ok(Vec::new())
                };
            }
            let below = plan.parent_cgroup.join(&plan.id);
            path.push(&plan.id);
            undo::directories(&undo::open_real(&top)?, &below, undo).map_err(|error| at(&path, error))?;
            for Setting {
                file,
                controller,
                value,
            } in &plan.settings
            {
                // cgroup.freeze, cgroup.max.depth and so on are every cgroup's.
                if controller != "cgroup" {
                    hand_down(&top, &plan.parent_cgroup, controller)?;
                }
                write(&path.join(file), value)?;
            }
            Ok(vec![seat(&top, path, home(&of_this, None))?])
        }
    }
}

fn at(path: &Path, error: JailError) -> JailError {
    match error {
        JailError::Step { what, source } => JailError::Cgroup {
            what: format!("{what} there"),
            path: path.to_owned(),
            source,
        },
        other => other,
    }
}

fn write(path: &Path, value: &str) -> Result<(), JailError> {
    // Without O_CREAT: what is no file of the cgroup is refused by its name.
    let written = OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(value.as_bytes()));
    written.map_err(|source| JailError::Cgroup {
        what: format!("write {value:?}"),
        path: path.to_owned(),
        source,
    })
}

fn seat(top: &Path, path: PathBuf, home: Option<PathBuf>) -> Result<Seat, JailError> {
    let list = |directory: &Path| {
        let path = directory.join("cgroup.procs");
        let opened = OpenOptions::new().write(true).open(&path);
        opened.map_err(|source| JailError::Cgroup {
            what: "open it".to_owned(),
            path,
            source,
        })
    };
    // Where a namespace hides the cgroup that it is in, it goes back to the highest that it sees.
    let home = home.and_then(|home| list(&top.join(home)).ok());
    let lists = (list(&path)?, home.map_or_else(|| list(top), Ok)?);
    Ok(Seat { path, lists })
}

/// Mount points of version 1, and the options that name their controllers.
fn hierarchies(mountinfo: &[u8]) -> Vec<(PathBuf, String)> {
    let text = String::from_utf8_lossy(mountinfo);
    let hierarchy = |line: &str| {
        let (mount, kind) = line.split_once(" - ")?;
        let point = mount.split(' ').nth(4)?;
        let mut kind = kind.split(' ');
        (kind.next()? == "cgroup").then_some(())?;
        Some((PathBuf::from(point), kind.nth(1)?.to_owned()))
    };
    text.lines().filter_map(hierarchy).collect()
}

/// In which cgroup this process is, from the hierarchy's root: of `controller`'s, or of version 2.
fn home(of_this: &[u8], controller: Option<&str>) -> Option<PathBuf> {
    let text = String::from_utf8_lossy(of_this);
    let path = match controller {
        None => parse_cgroup(of_this).ok()?.v2?,
        Some(controller) => {
            let path = |line: &str| {
                let mut parts = line.splitn(3, ':').skip(1);
                let has = parts.next()?.split(',').any(|name| name == controller);
                parts.next().filter(|_| has).map(PathBuf::from)
            };
            text.lines().find_map(path)?
        }
    };
    path.strip_prefix("/").ok().map(Path::to_owned)
}

/// Fills the CPUs and memory nodes of each cgroup down to `below` from the one above: without them nobody may join
/// (cpusets, Documentation/admin-guide/cgroup-v1/cpusets.rst, 1.7).
fn inherit(top: &Path, below: &Path) -> Result<(), JailError> {
    let mut here = top.to_owned();
    for part in below {
        let above = here.clone();
        here.push(part);
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let read = |directory: &Path| fs::read_to_string(directory.join(file)).unwrap_or_default();
            if read(&here).trim().is_empty() {
                write(&here.join(file), read(&above).trim())?;
            }
        }
    }
    Ok(())
}

/// Has each cgroup from the root to `parent` hand `controller` down.
fn hand_down(top: &Path, parent: &Path, controller: &str) -> Result<(), JailError> {
    let words = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    let has = |path: &Path| words(path).split_whitespace().any(|word| word == controller);
    if !has(&top.join("cgroup.controllers")) {
        return Err(JailError::CgroupController(controller.to_owned()));
    }
    let mut here = top.to_owned();
    let parts = std::iter::once(OsStr::new("")).chain(parent);
    for part in parts {
        if !part.is_empty() {
            here.push(part);
        }
        let file = here.join("cgroup.subtree_control");
        if !has(&file) {
            write(&file, &format!("+{controller}"))?;
        }
    }
    Ok(())
}

/// The files by which the kernel says what CPU time this process's cgroup may use, and those above: what `accounting`
/// reads. Each with where it is shown, which is where it is, unless the host has its cgroups elsewhere than all others.
pub fn quotas() -> io::Result<Vec<(PathBuf, PathBuf)>> {
    let cgroups = parse_cgroup(&fs::read("/proc/self/cgroup")?).unwrap_or_default();
    let mounts = parse_mountinfo(&fs::read("/proc/self/mountinfo")?).unwrap_or_default();
    let mut files = Vec::new();
    for (v2, cgroup, usual, names) in [
        (true, &cgroups.v2, "/sys/fs/cgroup", &["cpu.max"][..]),
        (
            false,
            &cgroups.v1_cpu,
            "/sys/fs/cgroup/cpu",
            &["cpu.cfs_quota_us", "cpu.cfs_period_us"],
        ),
    ] {
        // One hierarchy may be mounted in several places.
        let mount = mounts.iter().find(|mount| mount.v2 == v2);
        let (Some(cgroup), Some(mount)) = (cgroup, mount) else {
            continue;
        };
        for directory in mount.directories(cgroup) {
            for name in names {
                let file = directory.join(name);
                let shown = match file.strip_prefix(&mount.point) {
                    Ok(below) if !file.starts_with("/sys") => Path::new(usual).join(below),
                    _ => file.clone(),
                };
                if file.exists() {
                    files.push((file, shown));
                }
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_of_version_1_are_found_by_their_controllers() {
        let mountinfo = b"24 1 0:22 / /sys rw - sysfs sysfs rw\n\
            30 24 0:26 / /sys/fs/cgroup/unified rw shared:4 - cgroup2 cgroup2 rw\n\
            31 24 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:5 master:1 - cgroup cgroup rw,cpu,cpuacct\n";
        let found = hierarchies(mountinfo);
        assert_eq!(
            found,
            [("/sys/fs/cgroup/cpu,cpuacct".into(), "rw,cpu,cpuacct".to_owned())]
        );
    }

    #[test]
    fn where_it_is_it_goes_back_to() {
        let text = b"4:cpu,cpuacct:/a\n2:cpuset:/b/c\n0::/d\n";
        let home = |controller| home(text, controller).map(|path| path.display().to_string());
        assert_eq!(home(Some("cpuacct")).as_deref(), Some("a"));
        assert_eq!(home(Some("cpuset")).as_deref(), Some("b/c"));
        assert_eq!(home(None).as_deref(), Some("d"));
        assert_eq!(home(Some("memory")), None);
    }
}
