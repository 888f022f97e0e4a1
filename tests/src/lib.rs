//! What the end-to-end suites share: the beds, a microVM under test, a client, a terminal, a browser.
//!
//! A suite is a file of `tests/tests/`, named for its bed: `kvm_*` wants `/dev/kvm`, `nohz_full_*` wants to be inside
//! the emulated `nohz_full` host, the rest run anywhere. A test whose bed is missing says so in one line and ends;
//! `cargo xtask test` counts such lines by name.

pub mod bed;
pub mod browser;
pub mod bystander;
pub mod churn;
pub mod client;
pub mod connection;
pub mod crowd;
pub mod failure;
pub mod faults;
pub mod flat;
pub mod fleet;
pub mod flood;
pub mod footprint;
pub mod full;
pub mod interrupts;
pub mod jail;
pub mod kernel;
pub mod kill;
pub mod memory;
pub mod network;
pub mod over;
pub mod prometheus;
pub mod python;
pub mod row;
pub mod screen;
pub mod seed;
pub mod terminal;
pub mod thread_io;
pub mod trace;
pub mod vm;
pub mod workload;
