use proptest::prelude::*;

use super::*;

const INTERRUPTS: &str = "           CPU0       CPU2       CPU3
  0:         43          0          0   IO-APIC   2-edge      timer
  4:       1070          0          9   IO-APIC   4-edge      ttyS0
NMI:          0          0          0   Non-maskable interrupts
LOC:       2671         12         30   Local timer interrupts
ERR:          0
";

#[test]
fn loc_is_found_by_the_cpus_number_and_not_by_its_place() {
    let loc = |cpu| parse_loc(INTERRUPTS.as_bytes(), cpu);
    assert_eq!(
        loc(2),
        Ok(Loc {
            here: 12,
            elsewhere: 2701
        })
    );
    assert_eq!(loc(1), Err(Missing("the CPU's column")), "it is offline");
}

#[test]
fn what_is_not_an_interrupts_file_is_refused() {
    let with = |from: &str, to: &str| parse_loc(INTERRUPTS.replace(from, to).as_bytes(), 0);
    assert_eq!(with("LOC:", "LOX:"), Err(Missing("the LOC line")));
    assert_eq!(with("CPU2", "XPU2"), Err(Malformed("the line of CPUs")));
    assert_eq!(with(" 2671 ", " -2671 "), Err(Malformed("a count of the LOC line")));
    assert_eq!(with("LOC:       2671         12         30   Local", "LOC: 1 2"), {
        Err(Malformed("a count of the LOC line"))
    });
    assert_eq!(parse_loc(b"", 0), Err(Missing("the LOC line")));
}

const TIMER_LIST: &str = "Timer List Version: v0.9
cpu: 0
 clock 0:
active timers:
  .hres_active    : 1
  .tick_stopped   : 0
cpu: 1
 clock 0:
  .nohz_mode      : 2
  .tick_stopped   : 1
Tick Device: mode:     1
Per CPU device: 0
";

#[test]
fn the_tick_of_each_cpu_is_found_in_its_section() {
    let stopped = |cpu| parse_tick_stopped(TIMER_LIST.lines(), cpu);
    assert_eq!((stopped(0), stopped(1)), (Ok(false), Ok(true)));
    assert_eq!(stopped(2), Err(Missing(".tick_stopped")));
    let without = TIMER_LIST.replacen(".tick_stopped   : 0", "", 1);
    assert_eq!(
        parse_tick_stopped(without.lines(), 0),
        Err(Missing(".tick_stopped")),
        "the next CPU's is not taken for it"
    );
    let strange = TIMER_LIST.replace("stopped   : 1", "stopped   : 7");
    assert_eq!(parse_tick_stopped(strange.lines(), 1), Err(Malformed(".tick_stopped")));
}

const STATUS: &str = "Name:\tvcpu0\nState:\tR (running)\nCpus_allowed:\t6\nCpus_allowed_list:\t1-2\n\
                      voluntary_ctxt_switches:\t41\nnonvoluntary_ctxt_switches:\t5\n";

#[test]
fn a_threads_affinity_and_switches_are_found_by_name() {
    let status = parse_status(STATUS.as_bytes());
    let expected = Status {
        allowed: [1, 2].into(),
        voluntary: 41,
        involuntary: 5,
    };
    assert_eq!(status, Ok(expected));
    let with = |from, to| parse_status(STATUS.replace(from, to).as_bytes());
    assert_eq!(with("1-2", "2-1"), Err(Malformed("Cpus_allowed_list")));
    assert_eq!(
        with("\nvoluntary", "\nxvoluntary"),
        Err(Missing("voluntary_ctxt_switches"))
    );
    assert_eq!(with("41", "many"), Err(Malformed("voluntary_ctxt_switches")));
}

#[test]
fn migrations_are_found_by_name() {
    let text = "vcpu0 (1, #threads: 3)\n-----\nse.nr_migrations                :      7\nnr_switches   :  6\n";
    assert_eq!(parse_migrations(text.as_bytes()), Ok(7));
    assert_eq!(
        parse_migrations(b"se.nr_migrations : x"),
        Err(Malformed("se.nr_migrations"))
    );
    assert_eq!(parse_migrations(b"x"), Err(Missing("se.nr_migrations")));
}

#[test]
fn cgroups_are_found_in_both_versions() {
    let text = b"12:cpuset:/x\n4:cpu,cpuacct:/user.slice/a:b\n0::/user.slice\n";
    let cgroups = Cgroups {
        v2: Some("/user.slice".into()),
        v1_cpu: Some("/user.slice/a:b".into()),
    };
    assert_eq!(parse_cgroup(text), Ok(cgroups));
    assert_eq!(parse_cgroup(b""), Ok(Cgroups::default()), "a kernel without cgroups");
    assert_eq!(parse_cgroup(b"0:"), Err(Missing("a cgroup's path")));
    assert_eq!(parse_cgroup(b"0::x"), Err(Malformed("a cgroup's path")));
    assert_eq!(parse_cgroup(b"x::/"), Err(Malformed("a hierarchy's number")));
}

#[test]
fn mounted_hierarchies_are_found_whatever_their_optional_fields() {
    let text = br"22 1 0:20 / /sys rw,relatime - sysfs sysfs rw
30 22 0:26 / /sys/fs/cgroup rw shared:4 master:1 - cgroup2 cgroup2 rw,nsdelegate
31 22 0:27 /docker/1 /c\040pu rw - cgroup cgroup rw,cpu,cpuacct
32 22 0:28 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset
";
    let mount = |v2, root: &str, point: &str| Mount {
        v2,
        root: root.into(),
        point: point.into(),
    };
    let mounts = [mount(true, "/", "/sys/fs/cgroup"), mount(false, "/docker/1", "/c pu")];
    assert_eq!(parse_mountinfo(text).as_deref(), Ok(&mounts[..]));
    assert_eq!(parse_mountinfo(b"1 2 3 / /x rw"), Err(Missing("a mount's type")));
    assert_eq!(
        parse_mountinfo(br"1 2 3 / /x\9 rw - cgroup2 c rw"),
        Err(Malformed("a mount's path"))
    );
}

#[test]
fn a_cgroups_ancestors_are_those_the_mount_shows() {
    let of = |root: &str, cgroup: &str| {
        let mount = Mount {
            v2: true,
            root: root.into(),
            point: "/m".into(),
        };
        let directories = mount.directories(Path::new(cgroup));
        directories
            .iter()
            .map(|d| d.display().to_string().trim_end_matches('/').to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(of("/", "/a/b"), ["/m/a/b", "/m/a", "/m"]);
    assert_eq!(of("/", "/"), ["/m"]);
    assert_eq!(of("/a", "/a/b"), ["/m/b", "/m"]);
    assert_eq!(of("/x", "/a/b"), [""; 0]);
    assert_eq!(of("/", "/../b"), [""; 0]);
}

#[test]
fn quotas_are_told_from_their_absence() {
    assert_eq!(parse_cpu_max(b"max 100000\n"), Ok(None));
    assert_eq!(parse_cpu_max(b"50000 100000\n"), Ok(Some((50_000, 100_000))));
    for text in ["", "50000", "50000 x", "-1 100000", "1 2 3"] {
        assert_eq!(parse_cpu_max(text.as_bytes()), Err(Malformed("cpu.max")), "{text:?}");
    }
    assert_eq!(parse_cfs_quota(b"-1\n"), Ok(None));
    assert_eq!(parse_cfs_quota(b"20000\n"), Ok(Some(20_000)));
    assert_eq!(parse_cfs_quota(b"-2"), Err(Malformed("cpu.cfs_quota_us")));
}

#[test]
fn timers_come_with_their_clocks() {
    let text = b"ID: 0\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n\
                 ID: 1\nsignal: 0/0\nnotify: none/pid.1\nClockID: -22\n";
    assert_eq!(parse_timers(text), Ok(vec![(0, 0), (1, -22)]));
    assert_eq!(parse_timers(b""), Ok(vec![]));
    assert_eq!(parse_timers(b"ID: 0\n"), Err(Missing("a timer's ClockID")));
    assert_eq!(parse_timers(b"ClockID: 0\n"), Err(Missing("a timer's ID")));
    assert_eq!(
        parse_timers(b"ID: 0\nClockID: x\n"),
        Err(Malformed("a timer's ClockID"))
    );
}

/// A good text, damaged here and there.
fn damaged() -> impl Strategy<Value = Vec<u8>> {
    const TEXTS: [&str; 6] = [
        INTERRUPTS,
        TIMER_LIST,
        STATUS,
        "0::/a/b\n",
        "30 22 0:26 / /sys/fs/cgroup rw - cgroup2 c rw\n",
        "ID: 1\nClockID: -6\n",
    ];
    let damage = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
    (prop::sample::select(&TEXTS[..]), damage).prop_map(|(text, damage)| {
        let mut bytes = text.as_bytes().to_vec();
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes
    })
}

fn parse_all(text: &[u8]) {
    let _ = parse_loc(text, 1);
    let _ = parse_tick_stopped(text.split(|&b| b == b'\n'), 1);
    let _ = parse_status(text);
    let _ = parse_migrations(text);
    let _ = parse_cgroup(text);
    for mount in parse_mountinfo(text).unwrap_or_default() {
        let _ = mount.directories(Path::new("/a/b"));
    }
    let _ = (parse_cpu_max(text), parse_cfs_quota(text), parse_timers(text));
}

proptest! {
    #[test]
    fn no_bytes_make_a_parser_panic(text in prop::collection::vec(any::<u8>(), 0..400), damaged in damaged()) {
        parse_all(&text);
        parse_all(&damaged);
    }
}

#[test]
fn a_quota_that_is_mounted_alone_shows_its_cgroup() {
    let mountinfo = b"40 30 0:26 /a/b/cpu.max /sys/fs/cgroup/a/b/cpu.max ro - cgroup2 cgroup2 rw\n\
        41 30 0:27 /c/cpu.cfs_quota_us /sys/fs/cgroup/cpu/c/cpu.cfs_quota_us ro - cgroup cgroup rw,cpu\n";
    let mounts = parse_mountinfo(mountinfo).expect("two mounts");
    assert_eq!(
        mounts[0].directories("/a/b".as_ref())[..1],
        [Path::new("/sys/fs/cgroup/a/b")]
    );
    assert_eq!(
        mounts[1].directories("/c".as_ref()),
        [Path::new("/sys/fs/cgroup/cpu/c")]
    );
    assert!(mounts[0].directories("/c".as_ref()).is_empty());
}
