//! Kills microVMs at random moments: `kill TIMES SEED`, by `cargo xtask kill`. Prints a line of JSON.

use anyhow::{Context, Result};
use serde_json::json;
use tests::kill::{Dice, Tally, kill};
use tests::network;

fn main() -> Result<()> {
    let mut numbers = std::env::args().skip(1).map(|number| number.parse::<u64>());
    let mut number = || {
        numbers
            .next()
            .context("usage: kill TIMES SEED")?
            .context("TIMES and SEED are numbers")
    };
    let (times, seed) = (u32::try_from(number()?)?, number()?);
    let tap = network::own()
        .inspect_err(|why| eprintln!("without a tap: {why}"))
        .is_ok();
    let Tally {
        unanswered,
        booting,
        writing,
        flushed,
    } = kill(times, Dice::new(seed), tap);
    println!(
        "{}",
        json!({ "times": times, "seed": seed, "unanswered": unanswered, "booting": booting, "writing": writing, "flushed": flushed })
    );
    Ok(())
}
