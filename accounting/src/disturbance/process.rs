//! What disturbs every vCPU of this process: its CPU time limit, its CPU timers, its cgroup's quota.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use rustix::process::{Resource, getrlimit};

use super::Disturbance;
use super::text::{Cgroups, Mount, parse_cfs_quota, parse_cgroup, parse_cpu_max, parse_mountinfo, parse_timers};

/// What disturbs this process as a whole. What cannot be read, or understood, is not reported: `/proc/self/timers` is
/// missing without `CONFIG_CHECKPOINT_RESTORE`, cgroup files in a container that hides them.
///
/// Costs a dozen small reads. None of them reaches another CPU.
#[must_use]
pub fn of_process() -> Vec<Disturbance> {
    of_task(Path::new("/proc/self"))
}

/// Likewise, with the quota of one thread's cgroup: `task` is its directory in procfs.
pub(super) fn of_task(task: &Path) -> Vec<Disturbance> {
    let mut found = Vec::new();
    found.extend(
        getrlimit(Resource::Cpu)
            .current
            .map(|limit_s| Disturbance::RlimitCpu { limit_s }),
    );
    found.extend(armed_timers());
    found.extend(quotas(task));
    found
}

/// The quotas of a task's cgroup and of its ancestors, in both versions.
fn quotas(task: &Path) -> Vec<Disturbance> {
    let Some(cgroups) = fs::read(task.join("cgroup"))
        .ok()
        .and_then(|text| parse_cgroup(&text).ok())
    else {
        return Vec::new();
    };
    let mounts = fs::read("/proc/self/mountinfo").ok();
    let mounts = mounts.and_then(|text| parse_mountinfo(&text).ok()).unwrap_or_default();
    quotas_of(&cgroups, &mounts)
}

/// One hierarchy may be mounted in several places, which show the same cgroups: each quota is found once.
fn quotas_of(cgroups: &Cgroups, mounts: &[Mount]) -> Vec<Disturbance> {
    let (mut seen, mut found) = (BTreeSet::new(), Vec::new());
    for mount in mounts {
        let cgroup = if mount.v2 { &cgroups.v2 } else { &cgroups.v1_cpu };
        for cgroup in cgroup.iter() {
            for (cgroup, directory) in cgroup.ancestors().zip(mount.directories(cgroup)) {
                let which = (mount.v2, cgroup);
                if let Some(quota) = quota(&directory, mount.v2).filter(|_| seen.insert(which)) {
                    found.push(quota);
                }
            }
        }
    }
    found
}

fn quota(directory: &Path, v2: bool) -> Option<Disturbance> {
    let file = directory.join(if v2 { "cpu.max" } else { "cpu.cfs_quota_us" });
    // The root has no such file, nor has a cgroup whose parent does not hand the controller down.
    let text = fs::read(&file).ok()?;
    let (quota_us, period_us) = if v2 {
        parse_cpu_max(&text).ok()??
    } else {
        let period = fs::read(directory.join("cpu.cfs_period_us")).ok()?;
        (
            parse_cfs_quota(&text).ok()??,
            // Its format is that of a quota which is set.
            parse_cfs_quota(&period).ok()??,
        )
    };
    Some(Disturbance::CfsQuota {
        file,
        quota_us,
        period_us,
    })
}

/// The armed timers on CPU clocks.
fn armed_timers() -> Vec<Disturbance> {
    let mut found = Vec::new();
    for (which, name) in [
        (libc::ITIMER_PROF, "ITIMER_PROF"),
        (libc::ITIMER_VIRTUAL, "ITIMER_VIRTUAL"),
    ] {
        if itimer_is_armed(which) {
            found.push(Disturbance::CpuTimer { timer: name.to_owned() });
        }
    }
    let timers = fs::read("/proc/self/timers").ok();
    let timers = timers.and_then(|text| parse_timers(&text).ok()).unwrap_or_default();
    for (id, clock) in timers {
        if is_cpu_clock(clock) && timer_is_armed(id) {
            let timer = format!("POSIX timer {id}");
            found.push(Disturbance::CpuTimer { timer });
        }
    }
    found
}

/// Whether a clock counts CPU time (`include/linux/posix-timers.h`): the two fixed ones, or one of a process or thread,
/// whose id is negative and whose low two bits are not those of a clock that is a device.
const fn is_cpu_clock(clock: i32) -> bool {
    const CLOCKFD: i32 = 3;
    matches!(clock, libc::CLOCK_PROCESS_CPUTIME_ID | libc::CLOCK_THREAD_CPUTIME_ID) || clock < 0 && clock & 3 != CLOCKFD
}

#[expect(unsafe_code, reason = "rustix has no getitimer")]
fn itimer_is_armed(which: i32) -> bool {
    let zero = libc::timeval { tv_sec: 0, tv_usec: 0 };
    let mut timer = libc::itimerval {
        it_interval: zero,
        it_value: zero,
    };
    // SAFETY: the pointer is to an itimerval of ours; the kernel writes it or fails.
    let got = unsafe { libc::getitimer(which, &raw mut timer) };
    got == 0 && (timer.it_value.tv_sec, timer.it_value.tv_usec) != (0, 0)
}

/// By the kernel's id, which is not libc's `timer_t`. A timer deleted meanwhile is not armed.
#[expect(unsafe_code, reason = "libc's timer_gettime takes its own ids")]
fn timer_is_armed(id: i32) -> bool {
    let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let mut timer = libc::itimerspec {
        it_interval: zero,
        it_value: zero,
    };
    // SAFETY: the pointer is to an itimerspec of ours; the kernel writes it or fails.
    let got = unsafe { libc::syscall(libc::SYS_timer_gettime, id, &raw mut timer) };
    got == 0 && (timer.it_value.tv_sec, timer.it_value.tv_nsec) != (0, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_clocks_are_told_from_others() {
        // MAKE_PROCESS_CPUCLOCK and MAKE_THREAD_CPUCLOCK of 1234; FD_TO_CLOCKID of 5.
        for clock in [2, 3, !1234 << 3, !1234 << 3 | 2, !1234 << 3 | 4 | 2] {
            assert!(is_cpu_clock(clock), "{clock}");
        }
        for clock in [0, 1, 4, 7, 11, !5 << 3 | 3] {
            assert!(!is_cpu_clock(clock), "{clock}");
        }
    }

    #[test]
    fn a_timer_that_nobody_made_is_not_armed() {
        assert!(!timer_is_armed(i32::MAX));
    }

    #[test]
    fn quotas_are_read_in_both_versions_and_their_absence_is_none() {
        let folder = std::env::temp_dir().join(format!("chronovisor-quota-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let write = |name: &str, text: &str| fs::write(folder.join(name), text).expect("a file");
        assert_eq!(quota(&folder, true), None);
        write("cpu.max", "max 100000\n");
        assert_eq!(quota(&folder, true), None);
        write("cpu.max", "50000 100000\n");
        write("cpu.cfs_quota_us", "20000\n");
        assert_eq!(quota(&folder, false), None, "without a period it is not understood");
        write("cpu.cfs_period_us", "40000\n");
        let of = |name: &str, quota_us, period_us| Disturbance::CfsQuota {
            file: folder.join(name),
            quota_us,
            period_us,
        };
        assert_eq!(quota(&folder, true), Some(of("cpu.max", 50_000, 100_000)));
        assert_eq!(quota(&folder, false), Some(of("cpu.cfs_quota_us", 20_000, 40_000)));
        fs::remove_dir_all(&folder).expect("it is ours");
    }

    #[test]
    fn a_quota_is_reported_once_wherever_its_hierarchy_is_mounted() {
        let folder = std::env::temp_dir().join(format!("chronovisor-mounts-{}", std::process::id()));
        let cgroup = |path: &str, file: &str, text: &str| {
            let directory = folder.join(path);
            fs::create_dir_all(&directory).expect("a folder");
            fs::write(directory.join(file), text).expect("a file");
        };
        // The unified hierarchy whole, whole again, and from /a down; version 1 with a cgroup of the same path.
        for point in ["one", "two"] {
            cgroup(&format!("{point}/a"), "cpu.max", "50000 100000\n");
            cgroup(&format!("{point}/a/b"), "cpu.max", "20000 100000\n");
        }
        cgroup("bound", "cpu.max", "50000 100000\n");
        cgroup("bound/b", "cpu.max", "20000 100000\n");
        cgroup("v1/a/b", "cpu.cfs_quota_us", "20000\n");
        cgroup("v1/a/b", "cpu.cfs_period_us", "100000\n");
        let mount = |v2, root: &str, point: &str| Mount {
            v2,
            root: root.into(),
            point: folder.join(point),
        };
        let cgroups = Cgroups {
            v2: Some("/a/b".into()),
            v1_cpu: Some("/a/b".into()),
        };
        let files = |mounts: &[Mount]| -> Vec<_> {
            let found = quotas_of(&cgroups, mounts).into_iter().map(|quota| match quota {
                Disturbance::CfsQuota { file, .. } => file,
                other => panic!("{other}"),
            });
            found
                .map(|file| file.strip_prefix(&folder).expect("ours").display().to_string())
                .collect()
        };
        let (one, two) = (mount(true, "/", "one"), mount(true, "/", "two"));
        let (bound, v1) = (mount(true, "/a", "bound"), mount(false, "/", "v1"));
        assert_eq!(
            files(&[one.clone(), two, bound.clone(), v1]),
            ["one/a/b/cpu.max", "one/a/cpu.max", "v1/a/b/cpu.cfs_quota_us"]
        );
        assert_eq!(
            files(&[bound.clone(), one.clone()]),
            ["bound/b/cpu.max", "bound/cpu.max"]
        );
        // A mount that hides its files hides nothing that another shows.
        assert_eq!(files(&[mount(true, "/", "none"), one]).len(), 2);
        fs::remove_dir_all(&folder).expect("it is ours");
    }
}
