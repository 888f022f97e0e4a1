//! One row of `cargo xtask bench`: printed as a line of JSON, which the task makes a table of.

use serde_json::json;

/// Prints the row `key`: `ours` beside `against`, both in `unit`, whose ratio should be at most `limit`.
pub fn print(key: &str, ours: f64, against: f64, unit: &str, limit: f64) {
    println!(
        "{}",
        json!({ "key": key, "ours": ours, "against": against, "unit": unit, "ratio": ours / against, "limit": limit })
    );
}

/// The middle of `values`: a few rounds that something interrupted do not move it.
///
/// # Panics
/// When there are none.
#[must_use]
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
