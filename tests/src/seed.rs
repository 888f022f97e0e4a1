//! Where a test's dice begin: each run elsewhere, and again where `CHRONOVISOR_SEED` says.

use std::time::{SystemTime, UNIX_EPOCH};

/// The seed, which is printed.
///
/// # Panics
/// Before 1970.
#[must_use]
pub fn seed() -> u64 {
    let given = std::env::var("CHRONOVISOR_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
        now.as_secs()
    });
    println!("CHRONOVISOR_SEED={seed}");
    seed
}
