//! One scrape: the sockets there are, all asked at once, each until the deadline.
//!
//! The deadline is the whole scrape's: a socket that hangs costs the page that long and no more, and the others nothing. What
//! they answered is held until the page is written, at most [`MAX_BYTES`](crate::prometheus::MAX_BYTES) of each; so two scrapes
//! go on at a time, for two Prometheis, and more wait for their turn.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{timeout, timeout_at};

use super::memory::{Asked, Memory};
use super::page::{self, Own};
use super::parse::Metrics;
use super::scrape::{Failure, scrape};
use crate::fleet::Fleet;

/// Scrapes at a time.
const AT_ONCE: usize = 2;

/// What scrapes share.
#[derive(Debug)]
pub(super) struct Rounds {
    fleet: Arc<Fleet>,
    timeout: Duration,
    turns: Semaphore,
    /// Held by whoever looks for sockets, on a thread that a file system may hold up.
    looking: Arc<tokio::sync::Mutex<()>>,
    kept: Mutex<Kept>,
    begun: SystemTime,
}

#[derive(Debug)]
struct Kept {
    memory: Memory,
    found: Found,
    scrapes: u64,
}

/// What the last look found.
#[derive(Clone, Debug, Default)]
struct Found {
    sockets: Vec<PathBuf>,
    unreadable: Vec<PathBuf>,
}

/// All turns are taken, and none came in time.
#[derive(Debug)]
pub(super) struct Busy;

impl Rounds {
    /// Scrapes of `fleet` that wait for nobody longer than `timeout`, and forget who has been gone for `forget`.
    pub fn new(fleet: Fleet, timeout: Duration, forget: Duration) -> Self {
        Self {
            fleet: Arc::new(fleet),
            timeout,
            turns: Semaphore::new(AT_ONCE),
            looking: Arc::default(),
            kept: Mutex::new(Kept {
                memory: Memory::new(forget),
                found: Found::default(),
                scrapes: 0,
            }),
            begun: SystemTime::now(),
        }
    }

    /// The longest that a page takes, but for writing it.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// The page, within the timeout, or within `patience` where that is less.
    pub async fn page(&self, patience: Option<Duration>) -> Result<String, Busy> {
        let patience = patience.map_or(self.timeout, |patience| patience.min(self.timeout));
        let begun = Instant::now();
        let deadline = begun + patience;
        let turn = timeout_at(deadline.into(), self.turns.acquire()).await;
        let Ok(Ok(_turn)) = turn else { return Err(Busy) };
        let seen_at = Instant::now();
        // A file system that hangs is not to take the sockets' time too.
        let found = self.find(deadline.saturating_duration_since(seen_at) / 2).await;
        let unreadable = found.unreadable.len();
        let asked = ask_all(found.sockets, deadline).await;
        let mut kept = self.kept();
        kept.scrapes += 1;
        kept.memory.note(seen_at, &asked);
        let own = Own {
            unreadable,
            scrapes: kept.scrapes,
            took: begun.elapsed(),
            begun: self.begun,
        };
        Ok(page::write(&kept.memory, &asked, &own))
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sockets there are; those of the last look, where this one takes longer than `patience`.
    async fn find(&self, patience: Duration) -> Found {
        let look = async {
            let looking = self.looking.clone().lock_owned().await;
            let fleet = self.fleet.clone();
            let look = move || {
                let found = fleet.find();
                drop(looking);
                found
            };
            tokio::task::spawn_blocking(look).await
        };
        let Ok(Ok(found)) = timeout(patience, look).await else {
            tracing::warn!("looking for sockets takes too long: those of the last look are asked");
            return self.kept().found.clone();
        };
        let mut kept = self.kept();
        let known = std::mem::take(&mut kept.found.unreadable);
        for (path, error) in &found.unreadable {
            if !known.contains(path) {
                tracing::warn!("{}: cannot be read: {error}", path.display());
            }
        }
        kept.found = Found {
            sockets: found.sockets,
            unreadable: found.unreadable.into_iter().map(|(path, _)| path).collect(),
        };
        kept.found.clone()
    }
}

/// Asks each, until `deadline`; gives the answers in the order of the sockets.
async fn ask_all(sockets: Vec<PathBuf>, deadline: Instant) -> Vec<Asked<Metrics>> {
    let mut asking = JoinSet::new();
    let mut asked: Vec<Option<Asked<Metrics>>> = Vec::new();
    for (index, path) in sockets.into_iter().enumerate() {
        asked.push(None);
        asking.spawn(async move {
            let begun = Instant::now();
            let answer = timeout_at(deadline.into(), scrape(&path)).await;
            let one = Asked {
                socket: label(&path),
                took: begun.elapsed(),
                answer: answer.unwrap_or(Err(Failure::Timeout)),
            };
            (index, one)
        });
    }
    while let Some(one) = asking.join_next().await {
        // One that panicked has been reported by the panic hook.
        if let Ok((index, one)) = one {
            asked[index] = Some(one);
        }
    }
    asked.into_iter().flatten().collect()
}

/// A path as a label. One that is not UTF-8, or has control characters or backslashes, is escaped, byte by byte. Two paths have two labels:
/// what is escaped has a backslash in it, and what is not has none.
fn label(path: &Path) -> String {
    match path.to_str() {
        Some(path) if !path.contains(|c: char| c.is_control() || c == '\\') => path.to_owned(),
        _ => path.as_os_str().as_encoded_bytes().escape_ascii().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn paths_that_are_no_text_stay_apart_and_others_stay_as_they_are() {
        let of = |bytes: &[u8]| label(Path::new(OsStr::from_bytes(bytes)));
        assert_eq!(of("/run/ä \"b\".socket".as_bytes()), "/run/ä \"b\".socket");
        let odd: [&[u8]; 7] = [
            b"/a\xfe", b"/a\xff", b"/a\n", b"/a\\xfe", b"/a\\n", b"/a\\\n", b"/a\\\\n",
        ];
        let labels = odd.map(of);
        assert_eq!(labels[..4], ["/a\\xfe", "/a\\xff", "/a\\n", "/a\\\\xfe"]);
        let apart: std::collections::BTreeSet<_> = labels.iter().collect();
        assert_eq!(apart.len(), odd.len(), "{labels:?}");
    }
}
