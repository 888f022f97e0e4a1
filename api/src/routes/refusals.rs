//! How many refusals are logged: a client that is refused as fast as it asks shall not fill the disk that the log is
//! on.
//!
//! Those of status 401 are counted apart: who has no token shall not hide what whoever has one is refused.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use axum::http::StatusCode;
use tokio::time::Instant;

/// Lines in a second, of either.
const LINES: u32 = 10;
const SECOND: Duration = Duration::from_secs(1);

/// What has been logged in this second.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    strangers: Mutex<Spent>,
    others: Mutex<Spent>,
}

#[derive(Debug)]
struct Spent {
    begun: Instant,
    lines: u32,
    /// Refusals since the last line.
    left_out: u64,
}

impl Default for Spent {
    fn default() -> Self {
        Self {
            begun: Instant::now(),
            lines: 0,
            left_out: 0,
        }
    }
}

impl Refusals {
    /// One more, of `status`: if it is to be logged, how many of its kind were left out before it.
    pub fn log(&self, status: StatusCode) -> Option<u64> {
        let kind = match status {
            StatusCode::UNAUTHORIZED => &self.strangers,
            _ => &self.others,
        };
        let mut spent = kind.lock().unwrap_or_else(PoisonError::into_inner);
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
            let logged: Vec<_> = (0..1000)
                .filter_map(|_| refusals.log(StatusCode::BAD_REQUEST))
                .collect();
            let left_out = if second == 0 { 0 } else { 990 };
            assert_eq!(logged, [[left_out].as_slice(), &[0; 9]].concat());
            tokio::time::advance(SECOND).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_no_token_uses_up_nobody_elses_lines() {
        let refusals = Refusals::default();
        let count = |status| (0..1000).filter_map(|_| refusals.log(status)).count();
        assert_eq!(count(StatusCode::UNAUTHORIZED), 10);
        assert_eq!(
            refusals.log(StatusCode::SERVICE_UNAVAILABLE),
            Some(0),
            "none of these was left out"
        );
        assert_eq!(count(StatusCode::BAD_REQUEST), 9);
        tokio::time::advance(SECOND).await;
        assert_eq!(refusals.log(StatusCode::BAD_REQUEST), Some(991));
        assert_eq!(refusals.log(StatusCode::UNAUTHORIZED), Some(990));
    }
}
