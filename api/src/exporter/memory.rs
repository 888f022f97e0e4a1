//! What is remembered of sockets between scrapes: when each was there, and when it was good.
//!
//! ```text
//!             answers                    does not                     is not there
//!   new ------------------> Up <----------------------> Down <------------------------.
//!    |  answers as another                 is not there  |                            |
//!    |  program               Up, Down ------------------+-----------------> Gone ----+--> forgotten
//!    `------------------> Foreign (until it answers as a microVM)              after --forget
//! ```
//!
//! A socket that was never good and is gone is forgotten at once.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::scrape::Failure;

/// How a socket stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// It answered.
    Up,
    /// It is there and did not answer.
    Down,
    /// It was good once, and its file is not there any more.
    Gone,
    /// Another program answers there, and no microVM ever did.
    Foreign,
}

impl Standing {
    pub const ALL: [Self; 4] = [Self::Up, Self::Down, Self::Gone, Self::Foreign];

    pub fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
            Self::Gone => "gone",
            Self::Foreign => "foreign",
        }
    }
}

/// What is remembered of one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    pub standing: Standing,
    /// When it last answered.
    pub good: Option<Instant>,
    /// When it was last asked.
    pub seen: Instant,
    /// How long the answer took, or the failure.
    pub took: Duration,
}

/// One socket, asked.
#[derive(Debug)]
pub(super) struct Asked<T> {
    /// Its path, as in its label.
    pub socket: String,
    /// How long that took.
    pub took: Duration,
    pub answer: Result<T, Failure>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Memory {
    forget: Duration,
    sockets: BTreeMap<String, Known>,
    /// In the order of [`Failure::REASONS`].
    failures: [u64; Failure::REASONS.len()],
}

impl Memory {
    /// One that forgets who has been gone for `forget`.
    pub fn new(forget: Duration) -> Self {
        Self {
            forget,
            sockets: BTreeMap::new(),
            failures: [0; Failure::REASONS.len()],
        }
    }

    /// All sockets, in the order of their paths.
    pub fn sockets(&self) -> impl Iterator<Item = (&str, &Known)> {
        self.sockets.iter().map(|(socket, known)| (socket.as_str(), known))
    }

    /// How often what went wrong.
    pub fn failures(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Failure::REASONS.into_iter().zip(self.failures)
    }

    /// Takes in what became of all sockets that were there at `now`, and tells the log what has changed.
    pub fn note<T>(&mut self, now: Instant, asked: &[Asked<T>]) {
        for Asked { socket, took, answer } in asked {
            let before = self.sockets.get(socket);
            let was_good = before.and_then(|known| known.good);
            let standing = match answer {
                Ok(_) => Standing::Up,
                Err(failure) if was_good.is_none() && failure.is_of_another_program() => Standing::Foreign,
                Err(_) => Standing::Down,
            };
            if before.map(|known| known.standing) != Some(standing) {
                tell(socket, standing, answer.as_ref().err());
            }
            if let Err(failure) = answer {
                let mut counts = Failure::REASONS.iter().zip(&mut self.failures);
                if let Some((_, count)) = counts.find(|(reason, _)| **reason == failure.reason()) {
                    *count += 1;
                }
            }
            let known = Known {
                standing,
                good: if answer.is_ok() {
                    was_good.max(Some(now))
                } else {
                    was_good
                },
                seen: before.map_or(now, |known| known.seen.max(now)),
                took: *took,
            };
            self.sockets.insert(socket.clone(), known);
        }
        // Later than `now` is who was asked by another scrape meanwhile.
        for (socket, known) in &mut self.sockets {
            if known.seen < now && known.standing != Standing::Gone {
                known.standing = Standing::Gone;
                if known.good.is_some() {
                    tracing::info!("{socket}: gone");
                }
            }
        }
        let forget = self.forget;
        self.sockets
            .retain(|_, known| known.standing != Standing::Gone || known.good.is_some() && now - known.seen < forget);
    }
}

fn tell(socket: &str, standing: Standing, failure: Option<&Failure>) {
    match (standing, failure) {
        (Standing::Down, Some(failure)) => tracing::warn!("{socket}: {failure}"),
        (Standing::Foreign, Some(failure)) => tracing::info!("{socket}: left out: {failure}"),
        _ => tracing::info!("{socket}: {}", standing.name()),
    }
}

#[cfg(test)]
mod tests {
    use super::Standing::{Down, Foreign, Gone, Up};
    use super::*;

    fn asked(socket: &str, answer: Result<(), Failure>) -> Asked<()> {
        Asked {
            socket: socket.to_owned(),
            took: Duration::from_millis(1),
            answer,
        }
    }

    fn standings(memory: &Memory) -> Vec<(&str, Standing)> {
        memory
            .sockets()
            .map(|(socket, known)| (socket, known.standing))
            .collect()
    }

    #[test]
    fn one_that_was_good_is_told_of_when_it_is_not_and_for_a_while_when_it_has_gone() {
        let mut memory = Memory::new(Duration::from_secs(10));
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        memory.note(at(0), &[asked("a", Ok(())), asked("b", Ok(()))]);
        assert_eq!(standings(&memory), [("a", Up), ("b", Up)]);
        memory.note(at(1), &[asked("a", Err(Failure::Timeout)), asked("b", Ok(()))]);
        assert_eq!(standings(&memory), [("a", Down), ("b", Up)]);
        assert_eq!(memory.sockets["a"].good, Some(at(0)));
        memory.note(at(2), &[asked("b", Ok(()))]);
        assert_eq!(standings(&memory), [("a", Gone), ("b", Up)]);
        memory.note(at(10), &[asked("b", Ok(()))]);
        assert_eq!(standings(&memory), [("a", Gone), ("b", Up)]);
        memory.note(at(11), &[asked("b", Ok(()))]);
        assert_eq!(standings(&memory), [("b", Up)]);
        memory.note(at(12), &[asked("a", Ok(()))]);
        assert_eq!(standings(&memory), [("a", Up), ("b", Gone)]);
    }

    #[test]
    fn another_programs_socket_is_foreign_until_a_microvm_answers_there_and_down_from_then_on() {
        let mut memory = Memory::new(Duration::from_secs(10));
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let teapot = || Failure::Status(hyper::StatusCode::IM_A_TEAPOT);
        memory.note(at(0), &[asked("a", Err(teapot())), asked("b", Err(Failure::Timeout))]);
        assert_eq!(standings(&memory), [("a", Foreign), ("b", Down)]);
        memory.note(at(1), &[asked("a", Ok(()))]);
        assert_eq!(standings(&memory), [("a", Up)], "b was never good, and is forgotten");
        memory.note(at(2), &[asked("a", Err(teapot()))]);
        assert_eq!(standings(&memory), [("a", Down)]);
        let failures: BTreeMap<_, _> = memory.failures().collect();
        assert_eq!((failures["status"], failures["timeout"], failures["denied"]), (2, 1, 0));
    }

    #[test]
    fn of_two_scrapes_at_once_the_older_one_takes_nobody_for_gone() {
        let mut memory = Memory::new(Duration::from_secs(10));
        let start = Instant::now();
        memory.note(start + Duration::from_secs(1), &[asked("new", Ok(()))]);
        memory.note::<()>(start, &[]);
        assert_eq!(standings(&memory), [("new", Up)]);
    }
}
