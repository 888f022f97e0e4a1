//! Prometheus's text format, version 0.0.4
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format>): how it is written, and which metrics a
//! microVM has. `GET /metrics` answers with it; the exporter reads what many microVMs answer, and writes it again.
//!
//! Written by hand: a client library keeps values of its own as floats, and here every figure is an integer of nanoseconds that
//! somebody else keeps, to be written digit for digit.

pub mod text;
pub mod vcpus;

/// The content type of version 0.0.4.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The text of one microVM is shorter, whatever it is called and however many vCPUs it has. In bytes.
pub const MAX_BYTES: usize = 1 << 20;
