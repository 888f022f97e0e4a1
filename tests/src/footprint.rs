//! What a process, and a host, have in use: what whoever starts and ends things has to give back.

use std::fs;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::memory::resident_kib;

/// What a process has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Open file descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// Resident memory, a guest's included, in KiB.
    pub resident_kib: u64,
}

impl Footprint {
    /// That of process `pid`.
    ///
    /// # Errors
    /// It is gone.
    ///
    /// # Panics
    /// Likewise.
    pub fn of(pid: u32) -> Result<Self> {
        let count = |what| -> Result<usize> {
            let folder = format!("/proc/{pid}/{what}");
            Ok(fs::read_dir(&folder).with_context(|| folder.clone())?.count())
        };
        Ok(Self {
            descriptors: count("fd")?,
            threads: count("task")?,
            resident_kib: resident_kib(pid),
        })
    }

    /// As a row tells it.
    #[must_use]
    pub fn json(&self) -> Value {
        let Self {
            descriptors,
            threads,
            resident_kib,
        } = self;
        json!({ "descriptors": descriptors, "threads": threads, "resident_kib": resident_kib })
    }
}

/// What all of a host has in use, of what a microVM could leave behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// Open files (`/proc/sys/fs/file-nr`).
    pub files: u64,
    /// Threads (`/proc/loadavg`).
    pub threads: u64,
    /// microVMs that KVM knows of (`/sys/kernel/debug/kvm`); `None` where debugfs cannot be read.
    pub kvm: Option<usize>,
    /// Mounts that this process sees.
    pub mounts: usize,
    /// The kernel's memory that it cannot take back by itself, in KiB: `SUnreclaim`, `KernelStack`, `PageTables`.
    pub kernel_kib: u64,
}

impl Host {
    /// This one.
    ///
    /// # Errors
    /// No procfs.
    pub fn look() -> Result<Self> {
        let read = |path: &str| fs::read_to_string(path).with_context(|| path.to_owned());
        let files = read("/proc/sys/fs/file-nr")?;
        let loads = read("/proc/loadavg")?;
        let memory = read("/proc/meminfo")?;
        let threads = loads
            .split_whitespace()
            .nth(3)
            .and_then(|tasks| tasks.split('/').nth(1));
        let folders = fs::read_dir("/sys/kernel/debug/kvm").ok();
        Ok(Self {
            files: files.split_whitespace().next().context("file-nr is empty")?.parse()?,
            threads: threads.context("loadavg has its tasks fourth")?.parse()?,
            kvm: folders.map(|all| all.flatten().filter(|entry| entry.path().is_dir()).count()),
            mounts: read("/proc/self/mounts")?.lines().count(),
            kernel_kib: ["SUnreclaim:", "KernelStack:", "PageTables:"]
                .iter()
                .filter_map(|name| kib(&memory, name))
                .sum(),
        })
    }

    /// As a row tells it.
    #[must_use]
    pub fn json(&self) -> Value {
        let Self {
            files,
            threads,
            kvm,
            mounts,
            kernel_kib,
        } = self;
        json!({ "files": files, "threads": threads, "kvm": kvm, "mounts": mounts, "kernel_kib": kernel_kib })
    }
}

/// The figure of the line that starts with `name`.
fn kib(text: &str, name: &str) -> Option<u64> {
    let figure = text.lines().find_map(|line| line.strip_prefix(name))?;
    figure.trim().strip_suffix(" kB")?.parse().ok()
}
