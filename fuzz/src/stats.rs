//! Every parser of figures: what the kernel says of threads, CPUs, cgroups and KVM, and what a microVM says to the exporter.
//!
//! The input's first byte is which one, a letter; the rest is the text.

use std::fs::File;
use std::io::Write;

use accounting::disturbance::{
    parse_cfs_quota, parse_cgroup, parse_cpu_max, parse_loc, parse_migrations, parse_mountinfo, parse_status,
    parse_tick_stopped, parse_timers,
};
use accounting::host::{cpu_list, parse_cpu_list};
use accounting::probe::{KvmStats, parse_schedstat, parse_stat};
use rustix::fs::{MemfdFlags, memfd_create};

const CPU: u32 = 1;

pub fn run(data: &[u8]) {
    let Some((which, text)) = data.split_first() else {
        return;
    };
    match which {
        b'a' => drop(parse_stat(text)),
        b'b' => drop(parse_schedstat(text)),
        b'c' => {
            let text = String::from_utf8_lossy(text);
            // What was accepted is written and read back.
            if let Ok(set) = parse_cpu_list(&text) {
                assert_eq!(parse_cpu_list(&cpu_list(&set)), Ok(set));
            }
        }
        b'd' => drop(parse_loc(text, CPU)),
        b'e' => drop(parse_tick_stopped(text.split(|&byte| byte == b'\n'), CPU)),
        b'f' => drop(parse_status(text)),
        b'g' => drop(parse_migrations(text)),
        b'h' => {
            // The first line is the cgroups, all others the mounts under which they are looked for.
            let cut = text.iter().position(|&byte| byte == b'#').unwrap_or(text.len());
            let (cgroup, mounts) = text.split_at(cut);
            let cgroups = parse_cgroup(cgroup);
            let mounts = parse_mountinfo(mounts.strip_prefix(b"#").unwrap_or(mounts));
            drop((cgroups, mounts));
        }
        b'i' => drop(parse_cpu_max(text)),
        b'j' => drop(parse_cfs_quota(text)),
        b'k' => drop(parse_timers(text)),
        b'l' => {
            // No claim on the figures: a spoilt figure is a figure.
            let _ = KvmStats::open(memory(text)).and_then(|mut stats| stats.read());
        }
        _ => api::fuzz::exporter(text),
    }
}

/// A file of these bytes that is nowhere.
fn memory(bytes: &[u8]) -> File {
    let mut file = File::from(memfd_create("statistics", MemfdFlags::CLOEXEC).expect("there are descriptors"));
    file.write_all(bytes).expect("a file in memory takes it");
    file
}
