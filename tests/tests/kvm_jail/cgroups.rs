//! The jail's cgroup, of either version, with the values given.

use super::*;

/// A hierarchy of `kind`, with what is said of it in `options`: one that is mounted, or mounted for the test.
pub(super) struct Hierarchy {
    pub(super) path: PathBuf,
    ours: Option<Folder>,
}

impl Hierarchy {
    pub(super) fn of(kind: &str, option: &str) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts").expect("procfs");
        for line in mounts.lines() {
            let fields: Vec<_> = line.split(' ').collect();
            if fields[2] == kind && (option.is_empty() || fields[3].split(',').any(|has| has == option)) {
                return Some(Self {
                    path: fields[1].into(),
                    ours: None,
                });
            }
        }
        let folder = Folder::new();
        let options = std::ffi::CString::new(option).expect("no NUL");
        mount("none", folder.path(), kind, MountFlags::empty(), &*options).ok()?;
        Some(Self {
            path: folder.path().to_owned(),
            ours: Some(folder),
        })
    }
}

impl Drop for Hierarchy {
    fn drop(&mut self) {
        if self.ours.is_some() {
            let _ = unmount(&self.path, UnmountFlags::DETACH);
        }
    }
}

/// Of a process: its cgroup in the hierarchy of `controller`, or in version 2.
pub(super) fn cgroup_of(pid: u32, controller: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("it runs");
    let found = text.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        controllers
            .split(',')
            .any(|name| name == controller)
            .then(|| path.to_owned())
    });
    found.unwrap_or_else(|| panic!("no {controller:?} in {text}"))
}

pub(super) fn remove_cgroups(paths: &[&Path]) {
    for path in paths {
        let begun = std::time::Instant::now();
        // A process that has ended leaves its cgroup a moment later.
        while fs::remove_dir(path).is_err() && path.exists() {
            assert!(begun.elapsed() < tests::vm::PATIENCE, "{} stays", path.display());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

#[test]
fn it_is_placed_in_cgroups_of_version_1_with_the_values_given() {
    require_jail!();
    let Some(cpuset) = Hierarchy::of("cgroup", "cpuset") else {
        return bed::skipped("kvm", "this host has no cpuset cgroups of version 1");
    };
    let jail = Jail::new(&Program::spin_forever());
    let flags = ["--parent-cgroup", "chronovisor-test/inner", "--cgroup", "cpuset.cpus=0"];
    let process = jail.start(&flags);
    let inner = cpuset.path.join("chronovisor-test/inner");
    let own = inner.join(jail.id());
    let read = |path: &Path, file: &str| fs::read_to_string(path.join(file)).expect(file).trim().to_owned();
    assert_eq!(
        cgroup_of(process.id(), "cpuset"),
        format!("/chronovisor-test/inner/{}", jail.id())
    );
    assert_eq!(read(&own, "cpuset.cpus"), "0");
    assert_eq!(
        read(&own, "cpuset.mems"),
        read(&cpuset.path, "cpuset.mems"),
        "inherited"
    );
    // Beside it, a thread of the kernel's that works for its KVM.
    assert!(
        read(&own, "cgroup.procs")
            .lines()
            .any(|pid| pid == process.id().to_string())
    );
    drop(process);
    remove_cgroups(&[&own, &inner, inner.parent().expect("chronovisor-test")]);
}

#[test]
fn it_is_placed_in_a_cgroup_of_version_2_with_the_values_given() {
    require_jail!();
    let Some(unified) = Hierarchy::of("cgroup2", "") else {
        return bed::skipped("kvm", "this host has no cgroups of version 2");
    };
    let controllers = fs::read_to_string(unified.path.join("cgroup.controllers")).expect("version 2 has it");
    let mut flags = vec![
        "--cgroup-version",
        "2",
        "--parent-cgroup",
        "chronovisor-test",
        "--cgroup",
        "cgroup.max.depth=3",
    ];
    let has_pids = controllers.split_whitespace().any(|name| name == "pids");
    if has_pids {
        flags.extend(["--cgroup", "pids.max=77"]);
    }
    let jail = Jail::new(&Program::spin_forever());
    let process = jail.start(&flags);
    let parent = unified.path.join("chronovisor-test");
    let own = parent.join(jail.id());
    let read = |file: &str| fs::read_to_string(own.join(file)).expect(file).trim().to_owned();
    assert_eq!(cgroup_of(process.id(), ""), format!("/chronovisor-test/{}", jail.id()));
    assert_eq!(read("cgroup.max.depth"), "3");
    assert!(read("cgroup.procs").lines().any(|pid| pid == process.id().to_string()));
    if has_pids {
        assert_eq!(read("pids.max"), "77");
    }
    drop(process);
    remove_cgroups(&[&own, &parent]);

    // Without --cgroup: into the parent itself, if it is there.
    fs::create_dir(&parent).expect("a cgroup");
    let jail = Jail::new(&Program::spin_forever());
    let process = jail.start(&flags[..4]);
    assert_eq!(cgroup_of(process.id(), ""), "/chronovisor-test");
    drop(process);
    remove_cgroups(&[&parent]);
}
