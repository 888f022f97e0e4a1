//! A connection as the server, and the handler of an endless answer, see it: how far it is with a request and until
//! when it may be, whether it has to go, and how much is buffered for it.
//!
//! ```text
//!          first byte            whole head             answer made            last byte sent
//!   Idle ─────────────► Head ─────────────► Asked ─────────────────► Answer ─────────────────► Idle
//!    │ idle_time          │ head_time         │ (a body: body_time)     │ answer_time
//!    ▼                    ▼                   │                         ▼
//!  closed               closed                └─► Stream              closed
//! ```
//!
//! The times are [`Limits`]'. A slow client is one that says its head a byte at a time, or does not take what it asked
//! for: each stage is timed as a whole, so that a byte now and then buys no more time.
//!
//! A stream takes a connection for as long as its client likes, so it must not take the place of a request; and the
//! system would hold some 200 KiB in a socket's buffer (`net.core.wmem_default`) for each client that does not read.

use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::http::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::places::Peer;
use crate::routes::Limits;

/// How far a connection is with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// There is none.
    Idle,
    /// Some of its head is there.
    Head,
    /// It is read to its end, and answered.
    Asked,
    /// The answer is on its way.
    Answer,
    /// So it is, and will be.
    Stream,
}

impl Stage {
    /// How long it may last.
    const fn time(self, limits: &Limits) -> Option<Duration> {
        match self {
            Self::Idle => Some(limits.idle_time),
            Self::Head => Some(limits.head_time),
            Self::Answer => Some(limits.answer_time),
            Self::Asked | Self::Stream => None,
        }
    }
}

/// The connection that a request came by.
#[derive(Debug)]
pub(crate) struct Line {
    peer: Peer,
    limits: Limits,
    accepted: Instant,
    standing: Mutex<Standing>,
    away: Notify,
    /// Whether it has asked something in this turn.
    asked: AtomicBool,
    /// How many bytes the system shall buffer for it, once; 0 where that is as it should be.
    send_buffer: AtomicUsize,
}

#[derive(Debug)]
struct Standing {
    stage: Stage,
    since: Instant,
    /// Whether who asks is to be answered, rather than told that he brings no token.
    known: bool,
    /// When it had its last answer as one that is known.
    answered: Option<Instant>,
    #[cfg(test)]
    sent_away: bool,
}

impl Line {
    pub fn new(peer: Peer, limits: Limits) -> Arc<Self> {
        let accepted = Instant::now();
        Arc::new(Self {
            peer,
            limits,
            accepted,
            standing: Mutex::new(Standing {
                stage: Stage::Idle,
                since: accepted,
                known: false,
                answered: None,
                #[cfg(test)]
                sent_away: false,
            }),
            away: Notify::new(),
            asked: AtomicBool::new(false),
            send_buffer: AtomicUsize::new(0),
        })
    }

    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// The more, the longer it stays: an answer, the later the better. That a token is needed is none: else who has no
    /// token, and asks all the time, would outstay who has one and asks now and then.
    pub fn merit(&self) -> (Option<Instant>, Instant) {
        (self.standing().answered, self.accepted)
    }

    /// Its place is another's now.
    pub fn send_away(&self) {
        #[cfg(test)]
        {
            self.standing().sent_away = true;
        }
        self.away.notify_one();
    }

    #[cfg(test)]
    pub fn is_sent_away(&self) -> bool {
        self.standing().sent_away
    }

    /// Ends once it is sent away.
    pub async fn sent_away(&self) {
        self.away.notified().await;
    }

    /// It is its turn. To be said whenever its connection is polled.
    pub fn begin_turn(&self) {
        self.asked.store(false, Ordering::Relaxed);
    }

    /// Its head is there. Ends when it is its turn: of many requests that came at once, one is answered before others
    /// have theirs.
    pub async fn asked(&self) {
        self.enter(Stage::Asked);
        if self.asked.swap(true, Ordering::Relaxed) {
            tokio::task::yield_now().await;
            self.asked.store(true, Ordering::Relaxed);
        }
    }

    /// The answer is made, and has that status.
    pub fn answers(&self, status: StatusCode) {
        let mut standing = self.standing();
        standing.known = status != StatusCode::UNAUTHORIZED;
        if standing.stage != Stage::Stream {
            standing.enter(Stage::Answer);
        }
    }

    /// The answer has been taken.
    pub fn answered(&self) {
        let mut standing = self.standing();
        standing.enter(Stage::Idle);
        if standing.known {
            standing.answered = Some(standing.since);
        }
    }

    /// From now on it is a stream, of messages of some `bytes`: the system buffers a message or two for it. It needs no
    /// place any more, which is up to whoever gave it one.
    pub fn becomes_stream(&self, bytes: usize) {
        self.enter(Stage::Stream);
        self.send_buffer.store(bytes, Ordering::Relaxed);
    }

    /// Whether it is one.
    pub fn is_stream(&self) -> bool {
        self.standing().stage == Stage::Stream
    }

    /// Ends, with the stage, once that has taken too long. To be polled whenever the connection has been.
    pub async fn overdue(&self) -> Stage {
        let mut sleep = std::pin::pin!(tokio::time::sleep_until(self.accepted + self.limits.idle_time));
        std::future::poll_fn(|context| {
            loop {
                let (stage, due) = self.due();
                let Some(due) = due else { return Poll::Pending };
                // One that has become later is looked at when the sooner one has come: most requests set no timer.
                if due < sleep.deadline() {
                    sleep.as_mut().reset(due);
                }
                if sleep.as_mut().poll(context).is_pending() {
                    return Poll::Pending;
                }
                if due <= Instant::now() {
                    return Poll::Ready(stage);
                }
                sleep.as_mut().reset(due);
            }
        })
        .await
    }

    fn due(&self) -> (Stage, Option<Instant>) {
        let standing = self.standing();
        (
            standing.stage,
            standing.stage.time(&self.limits).map(|time| standing.since + time),
        )
    }

    fn enter(&self, stage: Stage) {
        self.standing().enter(stage);
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `io` with its line's wishes fulfilled.
    pub fn socket<IO>(self: Arc<Self>, io: IO) -> Socket<IO> {
        Socket { io, line: self }
    }
}

impl Standing {
    fn enter(&mut self, stage: Stage) {
        self.stage = stage;
        self.since = Instant::now();
    }
}

/// A connection's socket.
#[derive(Debug)]
pub(crate) struct Socket<IO> {
    io: IO,
    line: Arc<Line>,
}

impl<IO: AsFd + Unpin> Socket<IO> {
    /// The socket, about to be written to.
    fn writable(self: Pin<&mut Self>) -> Pin<&mut IO> {
        let this = self.get_mut();
        if this.line.send_buffer.load(Ordering::Relaxed) != 0 {
            // The system doubles it, for its own bookkeeping (socket(7), SO_SNDBUF).
            let bytes = this.line.send_buffer.swap(0, Ordering::Relaxed);
            if let Err(error) = rustix::net::sockopt::set_socket_send_buffer_size(this.io.as_fd(), bytes) {
                tracing::debug!("a stream's socket buffers as much as any: {error}");
            }
        }
        Pin::new(&mut this.io)
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Socket<IO> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let (this, before) = (self.get_mut(), buf.filled().len());
        let read = Pin::new(&mut this.io).poll_read(context, buf);
        if buf.filled().len() > before {
            let mut standing = this.line.standing();
            if standing.stage == Stage::Idle {
                standing.enter(Stage::Head);
            }
        }
        read
    }
}

impl<IO: AsyncWrite + AsFd + Unpin> AsyncWrite for Socket<IO> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.writable().poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.writable().poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    /// Called by hyper once the socket has taken all that is written so far. All of an answer is, by the first time
    /// that this is called once it is made: an answer that is no stream is in one piece.
    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = Pin::new(&mut this.io).poll_flush(context);
        if matches!(flushed, Poll::Ready(Ok(()))) && this.line.standing().stage == Stage::Answer {
            this.line.answered();
        }
        flushed
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    use super::*;

    fn limits() -> Limits {
        Limits {
            idle_time: Duration::from_secs(60),
            head_time: Duration::from_secs(5),
            answer_time: Duration::from_secs(30),
            ..Limits::default()
        }
    }

    /// The stage that took too long, and how many seconds after its first instant; `then` is done every second.
    async fn overdue(line: &Line, mut then: impl AsyncFnMut()) -> (Stage, u64) {
        let begin = Instant::now();
        let mut overdue = std::pin::pin!(line.overdue());
        loop {
            tokio::select! {
                biased;
                stage = &mut overdue => return (stage, begin.elapsed().as_secs()),
                () = tokio::time::sleep(Duration::from_secs(1)) => then().await,
            }
            assert!(begin.elapsed() < Duration::from_secs(3600), "it never is");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_byte_now_and_then_buys_a_head_no_time() {
        let (mut client, server) = UnixStream::pair().unwrap();
        let line = Line::new(Peer::Unknown, limits());
        let mut socket = line.clone().socket(server);
        client.write_all(b"G").await.unwrap();
        socket.read_u8().await.unwrap();
        let byte = async || {
            client.write_all(b"x").await.unwrap();
            socket.read_u8().await.unwrap();
        };
        assert_eq!(overdue(&line, byte).await, (Stage::Head, 5));
    }

    #[tokio::test(start_paused = true)]
    async fn each_stage_has_its_time_and_some_have_all() {
        let line = Line::new(Peer::Unknown, limits());
        assert_eq!(overdue(&line, async || ()).await, (Stage::Idle, 60));
        line.answers(StatusCode::OK);
        assert_eq!(overdue(&line, async || ()).await, (Stage::Answer, 30));
        for stage in [Stage::Asked, Stage::Stream] {
            line.enter(stage);
            let never = tokio::time::timeout(Duration::from_secs(3600), line.overdue()).await;
            assert!(never.is_err());
            line.answers(StatusCode::OK);
        }
        assert!(line.is_stream(), "it is, whatever its handler's answer is");
    }

    #[tokio::test]
    async fn of_many_requests_that_came_at_once_others_have_their_turn_after_each() {
        let line = Line::new(Peer::Unknown, limits());
        let mut others = 0;
        for turns in 0..3 {
            line.begin_turn();
            for request in 0..4 {
                let mut asked = std::pin::pin!(line.asked());
                let waits =
                    std::future::poll_fn(|context| Poll::Ready(asked.as_mut().poll(context).is_pending())).await;
                others += usize::from(waits);
                assert_eq!(waits, request > 0, "turn {turns}, request {request}");
            }
        }
        assert_eq!(others, 3 * 3);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_taken_once_it_is_flushed_and_its_line_idle_from_then_on() {
        let (_client, server) = UnixStream::pair().unwrap();
        let line = Line::new(Peer::Unknown, limits());
        let mut socket = line.clone().socket(server);
        line.asked().await;
        socket.flush().await.unwrap();
        assert_eq!(line.merit().0, None, "there was no answer to take");
        tokio::time::advance(Duration::from_secs(100)).await;
        line.answers(StatusCode::OK);
        socket.flush().await.unwrap();
        assert_eq!(line.merit().0, Some(Instant::now()));
        assert_eq!(overdue(&line, async || ()).await, (Stage::Idle, 60));
    }

    #[tokio::test(start_paused = true)]
    async fn to_be_told_that_a_token_is_needed_gives_no_merit_and_takes_none() {
        let (_client, server) = UnixStream::pair().unwrap();
        let line = Line::new(Peer::Tcp, limits());
        let mut socket = line.clone().socket(server);
        let mut first = None;
        for (status, has_merit) in [(401, false), (400, true), (401, true)] {
            tokio::time::advance(Duration::from_secs(1)).await;
            line.asked().await;
            line.answers(StatusCode::from_u16(status).unwrap());
            socket.flush().await.unwrap();
            assert_eq!(line.standing().stage, Stage::Idle, "it is an answer all the same");
            first = first.or(line.merit().0);
            assert_eq!(line.merit().0.is_some(), has_merit, "{status}");
        }
        assert_eq!(line.merit().0, first);
    }
}
