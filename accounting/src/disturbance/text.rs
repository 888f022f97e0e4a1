//! The texts that tell of disturbances, from bytes to figures. What is not as the kernel documents it is refused, never
//! guessed; formats are those of proc(5), `Documentation/filesystems/proc.rst` and `Documentation/admin-guide/cgroup-v2.rst`.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use crate::host::{CpuSet, parse_cpu_list};

/// Why a text was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// It should have this, and has not.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// This should be something else.
    #[error("{0} is not what it should be")]
    Malformed(&'static str),
}

use TextError::{Malformed, Missing};

/// Local timer interrupts since boot: the LOC line of `/proc/interrupts`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loc {
    /// On the CPU asked for.
    pub here: u64,
    /// On all others together.
    pub elsewhere: u64,
}

/// Parses `/proc/interrupts`. Its columns are the CPUs that are online, named in the first line.
///
/// # Errors
/// See [`TextError`]; [`Missing`] also where `cpu` has no column, being offline, or there are no local APICs.
pub fn parse_loc(text: &[u8], cpu: u32) -> Result<Loc, TextError> {
    let mut lines = text.split(|&b| b == b'\n');
    let head = words(lines.next().unwrap_or_default());
    let cpus = head.map(|word| word.strip_prefix(b"CPU").and_then(number));
    let cpus: Vec<u64> = cpus.collect::<Option<_>>().ok_or(Malformed("the line of CPUs"))?;
    let mut line = lines
        .map(words)
        .find_map(|mut line| (line.next() == Some(b"LOC:")).then_some(line))
        .ok_or(Missing("the LOC line"))?;
    let mut loc = Loc { here: 0, elsewhere: 0 };
    let mut found = false;
    for column in cpus {
        let count = line.next().ok_or(Missing("a count of the LOC line"))?;
        let count = number(count).ok_or(Malformed("a count of the LOC line"))?;
        if column == u64::from(cpu) {
            loc.here = count;
            found = true;
        } else {
            loc.elsewhere = loc.elsewhere.saturating_add(count);
        }
    }
    if found {
        Ok(loc)
    } else {
        Err(Missing("the CPU's column"))
    }
}

/// Whether the tick of `cpu` is stopped at this instant, idle or not: `.tick_stopped` of its section in `/proc/timer_list`
/// (`kernel/time/timer_list.c`). Takes lines, so that the rest need not be read: the kernel makes it CPU by CPU.
///
/// # Errors
/// See [`TextError`].
pub fn parse_tick_stopped<L: AsRef<[u8]>>(lines: impl IntoIterator<Item = L>, cpu: u32) -> Result<bool, TextError> {
    let mut here = false;
    for line in lines {
        let mut line = words(line.as_ref());
        match (line.next(), line.next(), line.next()) {
            (Some(b"cpu:"), Some(n), None) => {
                if here {
                    break;
                }
                here = number(n).ok_or(Malformed("a CPU's number"))? == u64::from(cpu);
            }
            (Some(b".tick_stopped"), Some(b":"), Some(value)) if here => {
                return match value {
                    b"0" => Ok(false),
                    b"1" => Ok(true),
                    _ => Err(Malformed(".tick_stopped")),
                };
            }
            _ => {}
        }
    }
    Err(Missing(".tick_stopped"))
}

/// What `/proc/PID/task/TID/status` says of a thread, of the fields used here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// `Cpus_allowed_list`: its affinity, within its cpuset.
    pub allowed: CpuSet,
    /// How often it gave up the CPU to sleep.
    pub voluntary: u64,
    /// How often it was taken off to let another task run.
    pub involuntary: u64,
}

/// Parses `/proc/PID/task/TID/status`.
///
/// # Errors
/// See [`TextError`].
pub fn parse_status(text: &[u8]) -> Result<Status, TextError> {
    let field = |name: &'static str| {
        text.split(|&b| b == b'\n')
            .find_map(|line| line.strip_prefix(name.as_bytes())?.strip_prefix(b":"))
            .map(<[u8]>::trim_ascii)
            .ok_or(Missing(name))
    };
    let count = |name| number(field(name)?).ok_or(Malformed(name));
    let allowed = std::str::from_utf8(field("Cpus_allowed_list")?).ok();
    Ok(Status {
        allowed: allowed
            .and_then(|list| parse_cpu_list(list).ok())
            .ok_or(Malformed("Cpus_allowed_list"))?,
        voluntary: count("voluntary_ctxt_switches")?,
        involuntary: count("nonvoluntary_ctxt_switches")?,
    })
}

/// How often a thread was moved to another CPU: `se.nr_migrations` of `/proc/PID/task/TID/sched`.
///
/// # Errors
/// See [`TextError`].
pub fn parse_migrations(text: &[u8]) -> Result<u64, TextError> {
    const NAME: &str = "se.nr_migrations";
    for line in text.split(|&b| b == b'\n') {
        let mut line = words(line);
        if line.next() == Some(NAME.as_bytes()) {
            return match (line.next(), line.next().and_then(number), line.next()) {
                (Some(b":"), Some(count), None) => Ok(count),
                _ => Err(Malformed(NAME)),
            };
        }
    }
    Err(Missing(NAME))
}

/// Where a task is in the hierarchies that cap CPU time: `/proc/PID/cgroup` (cgroups(7)).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cgroups {
    /// Its path in the unified hierarchy.
    pub v2: Option<PathBuf>,
    /// Its path in the version 1 hierarchy of the `cpu` controller.
    pub v1_cpu: Option<PathBuf>,
}

/// Parses `/proc/PID/cgroup`.
///
/// # Errors
/// See [`TextError`].
pub fn parse_cgroup(text: &[u8]) -> Result<Cgroups, TextError> {
    let mut cgroups = Cgroups::default();
    for line in text.split(|&b| b == b'\n').filter(|line| !line.is_empty()) {
        let mut parts = line.splitn(3, |&b| b == b':');
        let (Some(id), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(Missing("a cgroup's path"));
        };
        number(id).ok_or(Malformed("a hierarchy's number"))?;
        if !path.starts_with(b"/") {
            return Err(Malformed("a cgroup's path"));
        }
        let path = PathBuf::from(OsStr::from_bytes(path));
        if controllers.is_empty() {
            cgroups.v2 = Some(path);
        } else if controllers.split(|&b| b == b',').any(|name| name == b"cpu") {
            cgroups.v1_cpu = Some(path);
        }
    }
    Ok(cgroups)
}

/// A mounted hierarchy that caps CPU time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Version 2, or 1 with the `cpu` controller.
    pub v2: bool,
    /// The cgroup that is mounted.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
}

impl Mount {
    /// The directories of `cgroup` and of its ancestors, as far up as the mount shows them; the cgroup's own first. None
    /// where the mount does not show it.
    #[must_use]
    pub fn directories(&self, cgroup: &Path) -> Vec<PathBuf> {
        let Ok(inside) = cgroup.strip_prefix(&self.root) else {
            return Vec::new();
        };
        // "/.." is a cgroup above the namespace's root.
        if inside.components().any(|part| !matches!(part, Component::Normal(_))) {
            return Vec::new();
        }
        inside.ancestors().map(|inside| self.point.join(inside)).collect()
    }
}

/// Parses `/proc/PID/mountinfo`, and gives the cgroup hierarchies of interest.
///
/// # Errors
/// See [`TextError`].
pub fn parse_mountinfo(text: &[u8]) -> Result<Vec<Mount>, TextError> {
    let mut mounts = Vec::new();
    for line in text.split(|&b| b == b'\n').filter(|line| !line.is_empty()) {
        let mut fields = words(line).skip(3);
        let (root, point) = (fields.next(), fields.next());
        // Optional fields, as many as there are, end in a hyphen.
        let mut rest = fields.skip_while(|&word| word != b"-").skip(1);
        let (kind, _source, options) = (rest.next(), rest.next(), rest.next().unwrap_or_default());
        let (Some(root), Some(point), Some(kind)) = (root, point, kind) else {
            return Err(Missing("a mount's type"));
        };
        let v2 = match kind {
            b"cgroup2" => true,
            b"cgroup" if options.split(|&b| b == b',').any(|option| option == b"cpu") => false,
            _ => continue,
        };
        let (mut root, mut point) = (unescape(root)?, unescape(point)?);
        // Where no more is to be seen of a cgroup, its quota alone is mounted.
        let quota = if v2 { "cpu.max" } else { "cpu.cfs_quota_us" };
        if root.ends_with(quota) && point.ends_with(quota) {
            root.pop();
            point.pop();
        }
        mounts.push(Mount { v2, root, point });
    }
    Ok(mounts)
}

/// Parses `cpu.max`: the quota and its period, in microseconds; `None` where there is no quota.
///
/// # Errors
/// See [`TextError`].
pub fn parse_cpu_max(text: &[u8]) -> Result<Option<(u64, u64)>, TextError> {
    let mut fields = words(text);
    match (fields.next(), fields.next().and_then(number), fields.next()) {
        (Some(b"max"), Some(_), None) => Ok(None),
        (Some(quota), Some(period), None) => number(quota)
            .map(|quota| Some((quota, period)))
            .ok_or(Malformed("cpu.max")),
        _ => Err(Malformed("cpu.max")),
    }
}

/// Parses `cpu.cfs_quota_us`, in microseconds; `None` where there is no quota, which the kernel writes as -1.
///
/// # Errors
/// See [`TextError`].
pub fn parse_cfs_quota(text: &[u8]) -> Result<Option<u64>, TextError> {
    match text.trim_ascii() {
        b"-1" => Ok(None),
        quota => number(quota).map(Some).ok_or(Malformed("cpu.cfs_quota_us")),
    }
}

/// Parses `/proc/PID/timers`: each POSIX timer's id and clock.
///
/// # Errors
/// See [`TextError`].
pub fn parse_timers(text: &[u8]) -> Result<Vec<(i32, i32)>, TextError> {
    let mut timers = Vec::new();
    let mut id = None;
    for line in text.split(|&b| b == b'\n') {
        if let Some(value) = line.strip_prefix(b"ID:") {
            id = Some(signed(value).ok_or(Malformed("a timer's ID"))?);
        } else if let Some(value) = line.strip_prefix(b"ClockID:") {
            let clock = signed(value).ok_or(Malformed("a timer's ClockID"))?;
            timers.push((id.take().ok_or(Missing("a timer's ID"))?, clock));
        }
    }
    if id.is_some() {
        return Err(Missing("a timer's ClockID"));
    }
    Ok(timers)
}

fn words(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty())
}

fn number(word: &[u8]) -> Option<u64> {
    let digits = !word.is_empty() && word.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(word).ok().filter(|_| digits)?.parse().ok()
}

fn signed(value: &[u8]) -> Option<i32> {
    let value = value.trim_ascii();
    let magnitude = i64::try_from(number(value.strip_prefix(b"-").unwrap_or(value))?).ok()?;
    let negative = value.starts_with(b"-");
    i32::try_from(if negative { -magnitude } else { magnitude }).ok()
}

/// Spaces, tabs, newlines and backslashes in a path are written as `\` and three octal digits.
fn unescape(word: &[u8]) -> Result<PathBuf, TextError> {
    let mut path = Vec::with_capacity(word.len());
    let mut rest = word;
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'\\' {
            path.push(*first);
            continue;
        }
        let ([a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7'], tail) =
            tail.split_first_chunk::<3>().ok_or(Malformed("a mount's path"))?
        else {
            return Err(Malformed("a mount's path"));
        };
        path.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
        rest = tail;
    }
    Ok(PathBuf::from(OsStr::from_bytes(&path)))
}

#[cfg(test)]
#[path = "text_tests.rs"]
mod tests;
