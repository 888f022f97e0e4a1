//! Two dozen microVMs that come and go and pause, so many times: `churn ROUNDS`, by `cargo xtask churn`. Prints one line of JSON for
//! each row.

use anyhow::{Context, Result};
use tests::churn;

fn main() -> Result<()> {
    let rounds = std::env::args().nth(1).context("usage: churn ROUNDS")?.parse()?;
    println!("{}", churn::pauses(rounds)?.json("pauses"));
    println!("{}", churn::starts(rounds)?.json("starts"));
    println!("{}", churn::in_one_process(rounds)?.json("in one process"));
    Ok(())
}
