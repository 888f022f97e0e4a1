//! Which of Firecracker's counters a request adds to.

use axum::http::Method;
use vmm::requests::Requests;

/// The counters of one method.
struct Section {
    name: &'static str,
    /// The first part of a path, and the counter's name.
    counters: &'static [(&'static str, &'static str)],
    /// Whether each has a second one for those that failed.
    fails: bool,
}

const GET: Section = Section {
    name: "get_api_requests",
    counters: &[
        ("", "instance_info"),
        ("machine-config", "machine_cfg"),
        ("mmds", "mmds"),
        ("version", "vmm_version"),
    ],
    fails: false,
};

const PUT: Section = Section {
    name: "put_api_requests",
    counters: &[
        ("actions", "actions"),
        ("boot-source", "boot_source"),
        ("cpu-config", "cpu_cfg"),
        ("drives", "drive"),
        ("logger", "logger"),
        ("machine-config", "machine_cfg"),
        ("metrics", "metrics"),
        ("mmds", "mmds"),
        ("network-interfaces", "network"),
        ("serial", "serial"),
        ("vsock", "vsock"),
    ],
    fails: true,
};

const PATCH: Section = Section {
    name: "patch_api_requests",
    counters: &[
        ("drives", "drive"),
        ("machine-config", "machine_cfg"),
        ("mmds", "mmds"),
        ("network-interfaces", "network"),
    ],
    fails: true,
};

impl Section {
    fn add(&self, requests: &Requests, name: &str, by: u64, failed: u64) {
        requests.count(self.name, &format!("{name}_count"), by);
        if self.fails {
            requests.count(self.name, &format!("{name}_fails"), failed);
        }
    }
}

/// Has every counter shown.
pub(super) fn begin(requests: &Requests) {
    for section in [GET, PUT, PATCH] {
        for (_, name) in section.counters {
            section.add(requests, name, 0, 0);
        }
    }
}

/// Counts a request that was answered.
pub(super) fn one(requests: &Requests, method: &Method, path: &str, failed: bool) {
    let section = match *method {
        Method::GET => GET,
        Method::PUT => PUT,
        Method::PATCH => PATCH,
        _ => return,
    };
    let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
    if let Some((_, name)) = section.counters.iter().find(|(path, _)| *path == first) {
        section.add(requests, name, 1, failed.into());
    }
}
