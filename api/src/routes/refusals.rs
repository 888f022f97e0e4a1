//! How many refusals are logged: a client that is refused as fast as it asks shall not fill the disk that the log is on.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Lines in a second.
const LINES: u32 = 10;
const SECOND: Duration = Duration::from_secs(1);

/// What has been logged in this second.
#[derive(Debug)]
pub(super) struct Refusals(Mutex<Spent>);

#[derive(Debug)]
struct Spent {
    begun: Instant,
    lines: u32,
    /// Refusals since the last line.
    left_out: u64,
}

impl Default for Refusals {
    fn default() -> Self {
        Self(Mutex::new(Spent {
            begun: Instant::now(),
            lines: 0,
            left_out: 0,
        }))
    }
}

impl Refusals {
    /// One more: if it is to be logged, how many were left out before it.
    pub fn log(&self) -> Option<u64> {
        let mut spent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if spent.begun.elapsed() >= SECOND {
            (spent.begun, spent.lines) = (Instant::now(), 0);
        }
        if spent.lines == LINES {
            spent.left_out += 1;
            return None;
        }
        spent.lines += 1;
        Some(std::mem::take(&mut spent.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_refusals_makes_ten_lines_a_second_and_the_next_says_how_many_there_were() {
        let refusals = Refusals::default();
        for second in 0..3 {
            let logged: Vec<_> = (0..1000).filter_map(|_| refusals.log()).collect();
            let left_out = if second == 0 { 0 } else { 990 };
            assert_eq!(logged, [[left_out].as_slice(), &[0; 9]].concat());
            tokio::time::advance(SECOND).await;
        }
    }
}
