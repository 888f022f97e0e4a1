//! The budgets that take a microVM to measure: how soon the API answers, what a reading over HTTP costs, how soon a guest
//! starts, how soon it has booted, how much memory its monitor takes. `bench_vm api` needs `/dev/kvm`; `bench_vm boot`, with the other three,
//! one that runs a stock kernel, and both want to be told if the host is an emulated one.
//!
//! Prints one row of JSON a line, as soon as it is known; `cargo xtask bench` makes the table.

mod api;
mod boot;
mod first_answer;
mod quiet;

use anyhow::{Result, bail};

const USAGE: &str = "usage: bench_vm first-answer|api|boot [--emulated]";

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (measure, rest): (fn() -> Result<()>, _) = match arguments.split_first() {
        Some((what, rest)) if what == "first-answer" => (first_answer::measure, rest),
        Some((what, rest)) if what == "api" => (api::measure, rest),
        Some((what, rest)) if what == "boot" => (boot::measure, rest),
        _ => bail!("{USAGE}"),
    };
    if rest == ["--emulated"] {
        quiet::touch_free_memory()?;
        quiet::without_aslr()?;
    } else if !rest.is_empty() {
        bail!("{USAGE}");
    }
    measure()
}
