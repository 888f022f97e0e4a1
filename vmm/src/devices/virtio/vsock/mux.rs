//! All connections of a guest, and the sockets behind them.
//!
//! ```text
//!  connect(uds_path) ──► Greeting ── "CONNECT port\n" ──► Connected: Requested ── "OK port\n" ──► Established
//!  guest's REQUEST ──► connect(uds_path_PORT) ─────────► Connected: Established
//!  Connected, the guest is through with it, its last bytes not taken yet ──► Parting ──► gone
//! ```
//!
//! One epoll descriptor waits for every socket, edge-triggered: what it says is kept in the connection until an attempt
//! shows otherwise, and no socket is ever registered anew. Who has something to tell the guest stands in one line and
//! says one packet at a time, so that none keeps another waiting.
//!
//! What the guest can have us keep is bounded: [`MAX_CONNECTIONS`] connections, greetings and partings included, with
//! [`BUFFER`](super::connection::BUFFER) bytes each, [`MAX_RESETS`] answers to packets that belong to none, and a line of
//! [`MAX_LINE`] places. Whoever is to answer, a client its greeting, the guest a REQUEST or a SHUTDOWN, has [`PATIENCE`]; the host's
//! end of a parting, which is to take what is held for it, has [`PARTING_PATIENCE`] from when it last took some: after that its place is
//! another's, and what it did not take is lost. None of these times runs while the guest is held.

mod clients;

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::fd::OwnedFd;

use super::connection::{Connection, Next, Verdict};
use super::metrics::{VsockMetrics, count};
use super::packet::{HOST_CID, Header, Op, Ports, STREAM};
use super::socket::Socket;
use super::stream::{flush, read_into, write_through};
use crate::devices::virtio::queue::Buffers;
use crate::devices::virtio::timer::Timer;

/// As Firecracker's.
pub const MAX_CONNECTIONS: usize = 1023;
/// As many as the guest's queue has room for: what is beyond that it cannot have waited for.
const MAX_RESETS: usize = 256;
/// Places in the line of those with something to tell the guest, at most.
pub const MAX_LINE: usize = 2 * MAX_CONNECTIONS;
/// How long one waits for an answer, as Firecracker.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// How long the host's end of a connection that the guest is through with may take nothing of what is held for it. A program that
/// is alive reads sooner; one that is not would have the place for good.
pub const PARTING_PATIENCE: Duration = Duration::from_secs(60);
/// The first port of the host's given to connections by the host; the last is one less than twice that. As
/// Firecracker's.
const FIRST_PORT: u32 = 1 << 30;
/// Sockets looked at, and clients accepted, in one turn.
const A_TURN: usize = 64;

#[derive(Debug)]
enum Stage {
    /// Has connected, and not said yet to what.
    Greeting,
    /// Stands in [`Mux::by_ports`].
    Connected(Ports, Connection),
    /// For the guest it is over; bytes are still held for the host's end.
    Parting(Connection),
}

#[derive(Debug)]
struct Entry {
    stream: UnixStream,
    stage: Stage,
    /// When it is ended, unless it is answered.
    deadline: Option<Instant>,
    /// Stands in [`Mux::speakers`].
    speaks: bool,
}

/// The connections and their sockets.
#[derive(Debug)]
pub struct Mux {
    guest_cid: u64,
    socket: Socket,
    epoll: OwnedFd,
    timer: Timer,
    /// When the timer goes off.
    timer_set: Option<Instant>,
    /// By tokens, which are never used again: an event that comes late finds nothing.
    entries: HashMap<u64, Entry>,
    by_ports: HashMap<Ports, u64>,
    /// Those with something to tell the guest, each once, in their turn; some may be gone.
    speakers: VecDeque<u64>,
    resets: VecDeque<Header>,
    next_token: u64,
    next_port: u32,
    listening: bool,
    metrics: Arc<VsockMetrics>,
}

/// The listener's token; those of entries follow.
const LISTENER: u64 = 0;

impl Mux {
    /// For the guest `guest_cid`; nobody is accepted yet.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn new(guest_cid: u64, socket: Socket) -> io::Result<Self> {
        Ok(Self {
            guest_cid,
            socket,
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            timer: Timer::new()?,
            timer_set: None,
            entries: HashMap::new(),
            by_ports: HashMap::new(),
            speakers: VecDeque::new(),
            resets: VecDeque::new(),
            next_token: LISTENER + 1,
            next_port: FIRST_PORT,
            listening: false,
            metrics: Arc::default(),
        })
    }

    /// What it did so far.
    #[must_use]
    pub fn metrics(&self) -> &Arc<VsockMetrics> {
        &self.metrics
    }

    /// Readable when [`Mux::ready`] has something to do, and when [`Mux::expired`] has.
    #[must_use]
    pub fn sources(&self) -> [RawFd; 2] {
        [self.epoll.as_raw_fd(), self.timer.as_raw_fd()]
    }

    /// Takes in clients. Those who connected before have waited in the socket's queue.
    pub fn listen(&mut self) {
        if !self.listening {
            // Not edge-triggered: who does not get his turn in this one gets it in the next.
            let data = EventData::new_u64(LISTENER);
            match epoll::add(&self.epoll, self.socket.listener(), data, EventFlags::IN) {
                Ok(()) => self.listening = true,
                Err(error) => tracing::warn!("vsock: cannot wait for connections by the host: {error}"),
            }
        }
    }

    fn stop_listening(&mut self) {
        if std::mem::replace(&mut self.listening, false) {
            // It is registered: there is nothing to refuse.
            let _ = epoll::delete(&self.epoll, self.socket.listener());
        }
    }

    /// Ends every connection, and takes in no more clients.
    pub fn close(&mut self) {
        self.stop_listening();
        count(&self.metrics.conns_removed, self.by_ports.len() as u64);
        self.entries.clear();
        self.by_ports.clear();
        self.speakers.clear();
        self.resets.clear();
    }

    /// Connections, greetings and partings there are.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn sockets(&self) -> usize {
        self.entries.len()
    }

    /// Places taken in the line of those with something to tell the guest.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn line(&self) -> usize {
        self.speakers.len()
    }

    /// Of one of the connections.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn some_ports(&self) -> Option<Ports> {
        self.by_ports
            .keys()
            .copied()
            .min_by_key(|ports| (ports.guest, ports.host))
    }

    /// Whether there is something to tell the guest. It may turn out that there is not.
    #[must_use]
    pub fn has_news(&self) -> bool {
        !self.resets.is_empty() || !self.speakers.is_empty()
    }

    // From the guest.

    /// The guest sent a packet: `header`, and behind it `data`, all of the chain's.
    pub fn take(&mut self, header: &Header, mut data: Buffers<'_>, now: Instant) {
        count(&self.metrics.tx_packets_count, 1);
        // The guest is alone on its side: what is from or to others is nobody's, and is dropped, as vhost drops it.
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return;
        }
        let ports = header.ports_from_guest();
        if header.kind != STREAM {
            self.reset(ports, header);
            return;
        }
        let Some(&token) = self.by_ports.get(&ports) else {
            match Op::from_number(header.op) {
                Some(Op::Request) => self.request(ports, header),
                // Two that answer a RST by a RST would never end.
                Some(Op::Reset) => {}
                _ => self.reset(ports, header),
            }
            return;
        };
        let Some(entry) = self.entries.get_mut(&token) else {
            return;
        };
        let Stage::Connected(_, connection) = &mut entry.stage else {
            return;
        };
        match connection.hear(header) {
            Verdict::Noted => {}
            Verdict::Accepted => {
                entry.deadline = None;
                // A socket that has not been written to has room for it.
                let told = entry.stream.write(format!("OK {}\n", ports.host).as_bytes());
                if told.is_err() {
                    connection.hung_up();
                }
            }
            Verdict::Data(len) if data.len() < len as usize => return self.kill(token),
            Verdict::Data(len) => {
                count(&self.metrics.tx_bytes_count, len.into());
                let data = data.take_front(len as usize);
                if write_through(&entry.stream, connection, data) {
                    count(&self.metrics.tx_write_fails, 1);
                }
            }
            Verdict::Closed => {
                self.reset(ports, header);
                return self.part(token, now);
            }
            Verdict::Gone => return self.remove(token),
            Verdict::Broken => return self.kill(token),
        }
        self.settle(token, now);
    }

    /// The guest asks for a connection.
    fn request(&mut self, ports: Ports, header: &Header) {
        let stream = if self.entries.len() < MAX_CONNECTIONS {
            self.socket.connect(ports.host)
        } else {
            Err(ErrorKind::QuotaExceeded.into())
        };
        let added = stream.and_then(|stream| {
            let connection = Connection::by_guest(header);
            self.add(stream, Stage::Connected(ports, connection))
        });
        match added {
            Ok(token) => {
                self.by_ports.insert(ports, token);
                count(&self.metrics.conns_added, 1);
                self.speak(token);
            }
            Err(error) => {
                tracing::debug!(
                    "vsock: the guest's connection to port {} is refused: {error}",
                    ports.host
                );
                self.reset(ports, header);
            }
        }
    }

    /// Answers a packet of the guest's by a RST, of its own type.
    fn reset(&mut self, ports: Ports, to: &Header) {
        let kind = to.kind;
        self.push_reset(Header {
            kind,
            ..Header::to_guest(self.guest_cid, ports, Op::Reset)
        });
    }

    fn push_reset(&mut self, header: Header) {
        // A guest that does not take them needs no more of them.
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(header);
        }
    }

    // To the guest.

    /// The next packet for the guest: its header, its data in `room`. [`None`] if there is none; nothing was written
    /// then.
    pub fn give(&mut self, room: &Buffers<'_>, now: Instant) -> Option<Header> {
        let header = self.resets.pop_front().or_else(|| self.speech(room, now))?;
        count(&self.metrics.rx_packets_count, 1);
        count(&self.metrics.rx_bytes_count, header.len.into());
        Some(header)
    }

    fn speech(&mut self, room: &Buffers<'_>, now: Instant) -> Option<Header> {
        // Each in line once: an entry that has no more to say leaves the line.
        while let Some(token) = self.speakers.pop_front() {
            let Some(entry) = self.entries.get_mut(&token) else {
                continue;
            };
            entry.speaks = false;
            let Stage::Connected(ports, connection) = &mut entry.stage else {
                continue;
            };
            let ports = *ports;
            // Ends: a read that gives nothing is not due again.
            let said = loop {
                match connection.next() {
                    None => break None,
                    Some(Next::Say(op, flags)) => {
                        connection.said(op, flags);
                        break Some((op, flags, 0));
                    }
                    Some(Next::Read(most)) => match read_into(&entry.stream, room, most) {
                        Ok(0) => connection.end_of_file(),
                        Ok(len) => {
                            connection.sent(len);
                            break Some((Op::Data, 0, len));
                        }
                        Err(error) if error.kind() == ErrorKind::WouldBlock => connection.drained(),
                        // The host's end closed without reading all that was for it.
                        Err(_) => {
                            count(&self.metrics.rx_read_fails, 1);
                            connection.hung_up();
                            connection.end_of_file();
                        }
                    },
                }
            };
            let header = said.map(|(op, flags, len)| {
                let mut header = Header {
                    flags,
                    len,
                    ..Header::to_guest(self.guest_cid, ports, op)
                };
                connection.fill(&mut header);
                header
            });
            self.settle(token, now);
            if header.is_some() {
                return header;
            }
        }
        None
    }

    // Events.

    /// The epoll descriptor was readable.
    pub fn ready(&mut self, now: Instant) {
        let mut events: Vec<Event> = Vec::with_capacity(A_TURN);
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let buffer = rustix::buffer::spare_capacity(&mut events);
        if let Err(error) = epoll::wait(&self.epoll, buffer, Some(&at_once)) {
            tracing::debug!("vsock: {error}");
        }
        for Event { flags, data } in events {
            match data.u64() {
                LISTENER => self.accept(now),
                token => self.happened(token, flags, now),
            }
        }
    }

    fn add(&mut self, stream: UnixStream, stage: Stage) -> io::Result<u64> {
        let token = self.next_token;
        self.next_token += 1;
        let all = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.epoll, &stream, EventData::new_u64(token), all)?;
        let entry = Entry {
            stream,
            stage,
            deadline: None,
            speaks: false,
        };
        self.entries.insert(token, entry);
        Ok(token)
    }

    fn happened(&mut self, token: u64, flags: EventFlags, now: Instant) {
        let Some(entry) = self.entries.get_mut(&token) else {
            return;
        };
        let gone = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        match &mut entry.stage {
            Stage::Greeting => self.greeting(token, now),
            Stage::Connected(_, connection) => {
                if flags.intersects(EventFlags::IN | EventFlags::RDHUP) {
                    connection.readable();
                }
                if flags.contains(EventFlags::OUT) {
                    connection.writable();
                }
                if gone && connection.is_requested() {
                    return self.kill(token);
                }
                if gone {
                    connection.hung_up();
                } else if flush(&entry.stream, connection) {
                    count(&self.metrics.tx_write_fails, 1);
                }
                self.settle(token, now);
            }
            Stage::Parting(connection) => {
                if gone {
                    connection.hung_up();
                }
                self.write_parting(token, now);
            }
        }
    }

    /// Has the host's end of a parting take what it can; the parting is over when it has all. False if it took nothing, or there is
    /// no such parting.
    fn write_parting(&mut self, token: u64, now: Instant) -> bool {
        let Some(Entry {
            stream,
            stage: Stage::Parting(connection),
            ..
        }) = self.entries.get_mut(&token)
        else {
            return false;
        };
        let before = connection.held();
        // There is room a good while before there is an event of it.
        connection.writable();
        let gone = flush(stream, connection);
        if gone || connection.is_flushed() {
            self.entries.remove(&token);
        } else if connection.held() < before {
            self.set_deadline(token, PARTING_PATIENCE, now);
        } else {
            return false;
        }
        true
    }

    /// As [`Mux::expired`], while the guest is held: nobody is late, and the timer is set anew by [`Mux::was_held`].
    pub fn put_off(&self) {
        self.timer.expired();
    }

    /// The guest was held for `time` and can answer again: nobody's time has run meanwhile.
    pub fn was_held(&mut self, time: Duration, now: Instant) {
        for deadline in self.entries.values_mut().filter_map(|entry| entry.deadline.as_mut()) {
            *deadline += time;
        }
        if let Some(set) = &mut self.timer_set {
            *set += time;
        }
        if let Some(set) = self.timer_set {
            self.timer
                .after(set.saturating_duration_since(now).max(Duration::from_nanos(1)));
        }
    }

    /// The timer's descriptor was readable: whoever has not answered by `now` is ended.
    pub fn expired(&mut self, now: Instant) {
        self.timer.expired();
        self.timer_set = None;
        let late = |entry: &Entry| entry.deadline.is_some_and(|deadline| deadline <= now);
        let late: Vec<_> = self
            .entries
            .iter()
            .filter(|(_, entry)| late(entry))
            .map(|(&token, _)| token)
            .collect();
        for token in late {
            if !self.write_parting(token, now) {
                self.kill(token);
            }
        }
        if let Some(first) = self.entries.values().filter_map(|entry| entry.deadline).min() {
            self.set_timer(first, now);
        }
    }

    // What follows.

    /// A connection has changed: does to its socket what is due, and has it stand in line if it has something to say.
    fn settle(&mut self, token: u64, now: Instant) {
        let Some(entry) = self.entries.get_mut(&token) else {
            return;
        };
        let Stage::Connected(_, connection) = &mut entry.stage else {
            return;
        };
        // Fails only where the host's end is gone, of which there is an event.
        if connection.shuts_sending() {
            let _ = entry.stream.shutdown(Shutdown::Write);
        }
        if connection.shuts_receiving() {
            let _ = entry.stream.shutdown(Shutdown::Read);
        }
        let (speaks, over) = (connection.next().is_some(), connection.awaits_reset());
        if over && entry.deadline.is_none() {
            self.set_deadline(token, PATIENCE, now);
        }
        if speaks {
            self.speak(token);
        }
    }

    fn speak(&mut self, token: u64) {
        // Those who went while they stood in line are in it until the guest listens, which it need not ever do. There are at
        // most MAX_CONNECTIONS who have not gone, so that this comes once in as many calls at most.
        if self.speakers.len() >= MAX_LINE {
            self.speakers.retain(|token| self.entries.contains_key(token));
        }
        if let Some(entry) = self.entries.get_mut(&token)
            && !std::mem::replace(&mut entry.speaks, true)
        {
            self.speakers.push_back(token);
        }
    }

    fn set_deadline(&mut self, token: u64, patience: Duration, now: Instant) {
        if let Some(entry) = self.entries.get_mut(&token) {
            let deadline = now + patience;
            entry.deadline = Some(deadline);
            self.set_timer(deadline, now);
        }
    }

    /// Has the timer go off at `deadline`, if it does not sooner.
    fn set_timer(&mut self, deadline: Instant, now: Instant) {
        if self.timer_set.is_none_or(|set| deadline < set) {
            self.timer_set = Some(deadline);
            // No wait at all would not set it but stop it.
            self.timer
                .after(deadline.saturating_duration_since(now).max(Duration::from_nanos(1)));
        }
    }

    /// The guest is through with a connection. Its socket is closed when the host's end has taken what is held for it.
    fn part(&mut self, token: u64, now: Instant) {
        let Some(mut entry) = self.entries.remove(&token) else {
            return;
        };
        if let Stage::Connected(ports, connection) = entry.stage {
            self.by_ports.remove(&ports);
            count(&self.metrics.conns_removed, 1);
            if !connection.is_flushed() {
                let _ = entry.stream.shutdown(Shutdown::Read);
                entry.stage = Stage::Parting(connection);
                self.entries.insert(token, entry);
                self.set_deadline(token, PARTING_PATIENCE, now);
            }
        }
    }

    /// Ends a connection, with what it holds.
    fn remove(&mut self, token: u64) {
        if let Some(entry) = self.entries.remove(&token)
            && let Stage::Connected(ports, _) = entry.stage
        {
            self.by_ports.remove(&ports);
            count(&self.metrics.conns_removed, 1);
        }
    }

    /// As [`Mux::remove`], and the guest is told by a RST.
    fn kill(&mut self, token: u64) {
        count(&self.metrics.conns_killed, 1);
        if let Some(Entry {
            stage: Stage::Connected(ports, _),
            ..
        }) = self.entries.get(&token)
        {
            self.push_reset(Header::to_guest(self.guest_cid, *ports, Op::Reset));
        }
        self.remove(token);
    }
}
