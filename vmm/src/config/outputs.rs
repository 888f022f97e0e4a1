//! Where what the VMM and the guest say goes: the shapes of Firecracker's `/logger`, `/metrics` and `/serial`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::TokenBucket;

/// `/logger`. What is left out stays as it was, but for the level, which is then `Info`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// A file or fifo for the log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<PathBuf>,
    /// The least important lines to be logged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<Level>,
    /// Whether a line has its level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Whether a line has the place in the source that it comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Where in the source logged lines must come from: a module's path, or its beginning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

/// How important a line of the log is. Firecracker takes capitals, small letters and both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, reason = "the names say it")]
pub enum Level {
    #[serde(alias = "OFF", alias = "off")]
    Off,
    #[serde(alias = "ERROR", alias = "error")]
    Error,
    #[serde(alias = "WARNING", alias = "warning", alias = "WARN", alias = "Warn", alias = "warn")]
    Warning,
    #[default]
    #[serde(alias = "INFO", alias = "info")]
    Info,
    #[serde(alias = "DEBUG", alias = "debug")]
    Debug,
    #[serde(alias = "TRACE", alias = "trace")]
    Trace,
}

/// `/metrics`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// A file or fifo that gets a line of JSON every 60 s, and at each `FlushMetrics`.
    pub metrics_path: PathBuf,
}

/// `/serial`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// A file or fifo for the output of `ttyS0`, instead of standard output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<PathBuf>,
    /// Bytes of output that get through; what exceeds them is dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<TokenBucket>,
}
