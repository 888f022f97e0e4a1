//! `kill -9` at random moments: see `tests::kill`. `cargo xtask kill` does so 200 times, and writes docs/kill.md.

use tests::kill::{Dice, kill};
use tests::seed::seed;
use tests::{network, require_bed};

#[test]
fn after_a_kill_at_any_moment_the_next_start_works_and_no_flushed_write_is_lost() {
    require_bed!(kvm);
    let tap = network::own()
        .inspect_err(|why| println!("without a tap: {why}"))
        .is_ok();
    let seed = seed();
    let tally = kill(20, Dice::new(seed), tap);
    println!("{tally:?}");
    assert!(tally.flushed > 0);
}
