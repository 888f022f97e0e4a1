//! Where what is not trusted enters this room, given whatever a fuzzer likes: see fuzz/README.md, and `vmm::fuzz`, which has the
//! rules. With the feature `fuzzing` only.

use vmm::Action;
use vmm::config::Metrics;

use crate::{config_file, exporter, routes};

/// Requests, of any method, path and body, one after the other.
pub fn http(data: &[u8]) {
    routes::fuzz::run(data);
}

/// A configuration file.
pub fn config_file(data: &[u8]) {
    config_file::fuzz::run(data);
}

/// What a socket answered to the exporter.
pub fn exporter(data: &[u8]) {
    exporter::fuzz::run(data);
}

/// `action`, but for the file that it would have a microVM without a machine open: one of metrics, wherever it is asked for, goes
/// nowhere. All others are the machine's to open.
pub(crate) fn tame(action: Action) -> Action {
    match action {
        Action::PutMetrics(_) => Action::PutMetrics(Metrics {
            metrics_path: "/dev/null".into(),
        }),
        other => other,
    }
}
