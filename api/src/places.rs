//! Places for connections: how many there are, and who gives one up for who comes next.
//!
//! Nobody waits for a place and nobody is refused one. Were newcomers refused, whoever opened as many connections as
//! there are places, and said nothing on them, would keep everybody out for as long as a connection may stay silent.
//! Instead, when all are taken, of the process that holds the most of them (by SO_PEERCRED; all who come over TCP count
//! as one, and so do all of other PID namespaces), that connection goes that has had no answer for the longest time,
//! those first that never had one (to be told that a token is needed is to have none). So a flood takes its places from
//! itself, however it is made: a client of another process keeps its connection, and so does over TCP who has the token,
//! and a new one is in at once.
//!
//! A change whose client is sent away meanwhile is made all the same: see `routes`.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::line::Line;

/// Who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Peer {
    /// The process that connected to the unix socket.
    Process(i32),
    /// Whoever asks over TCP.
    Tcp,
    /// A process of another PID namespace.
    Unknown,
}

/// The places.
#[derive(Debug)]
pub(crate) struct Places {
    most: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    lines: Vec<Arc<Line>>,
    /// How many of them each peer has.
    by_peer: BTreeMap<Peer, usize>,
}

/// A connection's place, until it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    line: Arc<Line>,
    places: Arc<Places>,
}

impl Place {
    /// Gives it up.
    pub fn leave(&self) {
        self.places.leave(&self.line);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Places {
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            taken: Mutex::default(),
        })
    }

    /// A place for `line`; that of another, which is told, where there is no other.
    pub fn enter(self: &Arc<Self>, line: &Arc<Line>) -> Place {
        let mut taken = self.taken();
        if taken.lines.len() >= self.most {
            taken.send_one_away();
        }
        taken.lines.push(line.clone());
        *taken.by_peer.entry(line.peer()).or_default() += 1;
        drop(taken);
        Place {
            line: line.clone(),
            places: self.clone(),
        }
    }

    fn leave(&self, line: &Arc<Line>) {
        let mut taken = self.taken();
        if let Some(index) = taken.lines.iter().position(|other| Arc::ptr_eq(other, line)) {
            taken.remove(index);
        }
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Taken {
    fn send_one_away(&mut self) {
        let greed = |line: &Line| self.by_peer.get(&line.peer()).copied();
        let lines = self.lines.iter().enumerate();
        let last = lines.max_by_key(|(_, line)| (greed(line), Reverse(line.merit())));
        if let Some(index) = last.map(|(index, _)| index) {
            self.remove(index).send_away();
        }
    }

    fn remove(&mut self, index: usize) -> Arc<Line> {
        let line = self.lines.swap_remove(index);
        if let Some(count) = self.by_peer.get_mut(&line.peer()) {
            *count -= 1;
            if *count == 0 {
                self.by_peer.remove(&line.peer());
            }
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use axum::http::StatusCode;

    use super::*;
    use crate::routes::Limits;

    struct Room {
        places: Arc<Places>,
        taken: Vec<(Arc<Line>, Place)>,
    }

    impl Room {
        fn of(most: usize) -> Self {
            Self {
                places: Places::new(most),
                taken: Vec::new(),
            }
        }

        /// One of `peer` comes in, after all before it.
        async fn enter(&mut self, peer: Peer) -> Arc<Line> {
            tokio::time::advance(Duration::from_millis(1)).await;
            let line = Line::new(peer, Limits::default());
            let place = self.places.enter(&line);
            self.taken.push((line.clone(), place));
            line
        }

        fn sent_away(&self) -> Vec<usize> {
            let lines = self.taken.iter().enumerate();
            lines
                .filter_map(|(n, (line, _))| line.is_sent_away().then_some(n))
                .collect()
        }
    }

    /// It has an answer, and takes it.
    fn answer(line: &Line, status: StatusCode) {
        line.answers(status);
        line.answered();
    }

    const FLOOD: Peer = Peer::Process(1);
    const GOOD: Peer = Peer::Process(2);

    #[tokio::test(start_paused = true)]
    async fn a_flood_takes_its_places_from_itself() {
        let mut room = Room::of(8);
        room.enter(GOOD).await;
        for _ in 0..100 {
            room.enter(FLOOD).await;
        }
        // It comes last and has said nothing, and its process has had one all the time.
        room.enter(GOOD).await;
        let away = room.sent_away();
        assert_eq!(away.len(), 102 - 8);
        assert!(!away.contains(&0) && !away.contains(&101), "{away:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn of_one_process_goes_who_never_had_an_answer_and_then_who_had_none_for_longest() {
        let mut room = Room::of(3);
        for _ in 0..3 {
            room.enter(FLOOD).await;
        }
        for n in [2, 0] {
            tokio::time::advance(Duration::from_millis(1)).await;
            answer(&room.taken[n].0, StatusCode::OK);
        }
        room.enter(FLOOD).await;
        assert_eq!(room.sent_away(), [1]);
        answer(&room.taken[3].0, StatusCode::OK);
        room.enter(FLOOD).await;
        assert_eq!(room.sent_away(), [1, 2]);
    }

    #[tokio::test(start_paused = true)]
    async fn over_tcp_who_brought_the_token_outstays_a_flood_that_is_told_to_bring_one() {
        let mut room = Room::of(8);
        let client = room.enter(Peer::Tcp).await;
        answer(&client, StatusCode::NO_CONTENT);
        for _ in 0..100 {
            room.enter(Peer::Tcp).await;
            // All of them, each time: their answers are the later ones.
            let strangers = room.taken.iter().skip(1).map(|(line, _)| line);
            strangers.for_each(|line| answer(line, StatusCode::UNAUTHORIZED));
        }
        assert!(!client.is_sent_away());
        assert_eq!(room.sent_away().len(), 101 - 8);
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_is_free_once_its_connection_is_gone_or_is_a_stream() {
        let mut room = Room::of(2);
        for _ in 0..2 {
            room.enter(FLOOD).await;
        }
        room.taken.pop();
        room.enter(FLOOD).await;
        room.taken[0].1.leave();
        room.enter(FLOOD).await;
        assert_eq!(room.sent_away(), [] as [usize; 0]);
        // It was left before: dropping it frees no other's.
        room.taken.remove(0);
        room.enter(FLOOD).await;
        assert_eq!(room.sent_away(), [0]);
    }
}
