//! The service's end of the guest's wire: Ethernet frames in, Ethernet frames out, HTTP over smoltcp's TCP between.
//!
//! The network device of each interface that reaches MMDS holds one [`Stack`]:
//!
//! ```text
//!   for a frame that the guest sends, less its virtio-net header:
//!       if stack.takes(frame) { stack.receive(frame, now) } else { to the tap }
//!   then, and when the guest gives receive buffers, and when the timer fires:
//!       while the guest has a receive buffer: match stack.transmit(now) { Some(frame) => into it, None => done }
//!       if it was None: set the timer to stack.next_poll(now), or disarm it if that is None
//! ```
//!
//! The guest is taken for hostile. Whatever frames come, a call does a bounded amount of work and the stack keeps a bounded amount of
//! memory: [`MAX_CONNECTIONS`], each with its buffers of about 13 KiB and one response, which is at most the data store's limit and
//! a few hundred bytes; 32 frames on their way out; 16 guest MACs. A connection that is silent for [`IDLE`] is reset; when all
//! are taken, the one that was silent longest, and for [`EVICTABLE`] at least, makes room for a new one.
//!
//! Nothing here depends on the guest's address: it may be any, and may change.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, HardwareAddress, IpCidr, IpEndpoint, IpProtocol, Ipv4Cidr,
    Ipv4Packet, TcpPacket,
};

use super::SharedMmds;
use super::http::{self, Parsed, REQUEST_LIMIT_BYTES};
use super::metrics::MmdsMetrics;
use super::wire::{Outgoing, Port};
use crate::devices::virtio::count;

/// Connections at once, as in Firecracker.
pub const MAX_CONNECTIONS: usize = 30;

/// How long a guest may be silent before its connection is reset.
pub const IDLE: Duration = Duration::from_secs(60);

/// How long a guest must have been silent for its connection to make room for another, as in Firecracker.
pub const EVICTABLE: Duration = Duration::from_secs(10);

const PORT: u16 = 80;

/// What is sent and not yet acknowledged, a connection. A response is fed to it as it empties.
const TX_BUFFER_BYTES: usize = 8192;

/// The shortest wait that [`Stack::next_poll`] names: no guest makes the VMM thread spin.
const SHORTEST_POLL: Duration = Duration::from_millis(1);

/// Frames that the sockets may send in one [`SHORTEST_POLL`]: far more than a guest reads, and an end for what smoltcp would send on
/// and on. A hostile guest once had smoltcp 0.14 do that.
const BURST_FRAMES: usize = 256;

/// One interface's way to the service.
pub struct Stack {
    ipv4: Ipv4Addr,
    mmds: SharedMmds,
    metrics: Arc<MmdsMetrics>,
    /// smoltcp's instants count from here.
    epoch: Instant,
    interface: Interface,
    sockets: SocketSet<'static>,
    /// One a socket, the one that listens included.
    connections: Vec<Connection>,
    outgoing: Outgoing,
    /// When [`BURST_FRAMES`] began to be counted, and how many there were since.
    burst: (Instant, usize),
}

/// What is kept of a connection beside smoltcp's socket.
struct Connection {
    handle: SocketHandle,
    /// Bytes received and not yet answered, at most [`REQUEST_LIMIT_BYTES`].
    request: Vec<u8>,
    response: Vec<u8>,
    /// How many bytes of `response` the socket has taken.
    sent: usize,
    /// Nothing more is read; once the response is out, the connection closes.
    ending: bool,
    /// When a segment of its guest's came last.
    heard: Instant,
    /// A guest opened it: it is counted as created, and not yet as destroyed.
    opened: bool,
}

impl Stack {
    /// A stack that answers for `ipv4`, port 80, from `mmds`.
    #[must_use]
    pub fn new(ipv4: Ipv4Addr, mmds: SharedMmds, now: Instant) -> Self {
        // Whoever would guess initial sequence numbers is the guest itself, or inside it: any seed it cannot know will do.
        Self::with_seed(ipv4, mmds, now, RandomState::new().build_hasher().finish())
    }

    fn with_seed(ipv4: Ipv4Addr, mmds: SharedMmds, now: Instant, seed: u64) -> Self {
        let mut outgoing = Outgoing::default();
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut port = Port {
            incoming: None,
            outgoing: &mut outgoing,
        };
        let mut interface = Interface::new(config, &mut port, smoltcp::time::Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            // Every address is on our network: whoever sent the packet is reached over the wire it came by.
            let everywhere = IpCidr::Ipv4(Ipv4Cidr::new(ipv4, 0));
            addresses
                .push(everywhere)
                .expect("a new interface has room for an address");
        });
        let metrics = Arc::clone(mmds.lock().expect("no holder of this lock panics").metrics());
        let mut stack = Self {
            ipv4,
            mmds,
            metrics,
            epoch: now,
            interface,
            sockets: SocketSet::new(Vec::new()),
            connections: Vec::new(),
            outgoing,
            burst: (now, 0),
        };
        stack.listen(now);
        stack
    }

    /// The address it answers for.
    #[must_use]
    pub fn ipv4(&self) -> Ipv4Addr {
        self.ipv4
    }

    /// Whether `frame`, sent by the guest, is for the service: ARP about its address, or IPv4 to it. Such a frame must reach no tap.
    /// Cheap: a look at three fields at fixed places, as nothing but plain Ethernet carries them.
    #[must_use]
    pub fn takes(&self, frame: &[u8]) -> bool {
        const ARP_TARGET: usize = 14 + 24;
        const IPV4_DESTINATION: usize = 14 + 16;
        let ours = self.ipv4.octets();
        let at = |offset: usize| frame.get(offset..offset + 4) == Some(&ours[..]);
        match frame.get(12..14) {
            Some([0x08, 0x06]) => at(ARP_TARGET),
            Some([0x08, 0x00]) => at(IPV4_DESTINATION),
            _ => false,
        }
    }

    /// Takes a frame of the guest's. What is not for the service, makes no sense or finds the queue of answers full, is dropped.
    pub fn receive(&mut self, frame: &[u8], now: Instant) {
        if !self.takes(frame) {
            return;
        }
        count(&self.metrics.rx_accepted, 1);
        if self.outgoing.is_full() {
            count(&self.metrics.rx_accepted_err, 1);
            return;
        }
        let Ok(frame) = EthernetFrame::new_checked(frame) else {
            return;
        };
        match frame.ethertype() {
            EthernetProtocol::Arp => self.outgoing.answer_arp(frame.payload(), self.ipv4),
            EthernetProtocol::Ipv4 => {
                let counted = match self.receive_ipv4(frame.src_addr(), frame.payload(), now) {
                    Ipv4::Tcp => &self.metrics.rx_count,
                    Ipv4::Other => &self.metrics.rx_accepted_unusual,
                    Ipv4::Senseless => &self.metrics.rx_accepted_err,
                };
                count(counted, 1);
            }
            _ => {}
        }
    }

    /// The next frame for the guest, if one is due at `now`. A frame that is asked for and not delivered is lost like any on a wire.
    pub fn transmit(&mut self, now: Instant) -> Option<Vec<u8>> {
        let frame = self.next_frame(now)?;
        self.metrics.frame_sent(frame.len());
        Some(frame)
    }

    fn next_frame(&mut self, now: Instant) -> Option<Vec<u8>> {
        if let Some(frame) = self.outgoing.pop() {
            return Some(frame);
        }
        if now.saturating_duration_since(self.burst.0) >= SHORTEST_POLL {
            self.burst = (now, 0);
        } else if self.burst.1 >= BURST_FRAMES {
            return None;
        }
        // A round of all sockets, one segment each: none starves another.
        let mut port = Port {
            incoming: None,
            outgoing: &mut self.outgoing,
        };
        let at = smoltcp_instant(self.epoch, now);
        self.interface.poll_egress(at, &mut port, &mut self.sockets);
        self.burst.1 += self.outgoing.len();
        self.reap(now);
        self.outgoing.pop()
    }

    /// How long from `now` until [`Stack::transmit`] may have something of itself: a retransmission, a reset. To be asked after
    /// `transmit` gave `None`; frames that wait for the guest's buffers need no timer. `None`: nothing before the next frame comes.
    #[must_use]
    pub fn next_poll(&mut self, now: Instant) -> Option<Duration> {
        let at = smoltcp_instant(self.epoch, now);
        let delay = self.interface.poll_delay(at, &self.sockets)?;
        Some(Duration::from(delay).max(SHORTEST_POLL))
    }

    fn receive_ipv4(&mut self, from: EthernetAddress, packet: &[u8], now: Instant) -> Ipv4 {
        let Ok(ipv4) = Ipv4Packet::new_checked(packet) else {
            return Ipv4::Senseless;
        };
        // From no host there is. smoltcp 0.12 took a SYN from 0.0.0.0, and panicked when it answered.
        let source = ipv4.src_addr();
        if source.is_unspecified() || source.is_broadcast() || source.is_multicast() || source == self.ipv4 {
            return Ipv4::Senseless;
        }
        self.outgoing.learn(source, from);
        let mut opening = None;
        let tcp = ipv4.next_header() == IpProtocol::Tcp;
        if tcp {
            let Ok(segment) = TcpPacket::new_checked(ipv4.payload()) else {
                return Ipv4::Senseless;
            };
            let peer = IpEndpoint::new(source.into(), segment.src_port());
            let opens = segment.syn() && !segment.ack();
            match self.heard_from(peer, opens, now) {
                Heard::Again => return Ipv4::Tcp,
                Heard::New if opens => {
                    self.make_room(now);
                    opening = Some(peer);
                }
                Heard::New | Heard::Known => {}
            }
        }
        let mut port = Port {
            incoming: Some(packet),
            outgoing: &mut self.outgoing,
        };
        let at = smoltcp_instant(self.epoch, now);
        self.interface.poll_ingress_single(at, &mut port, &mut self.sockets);
        if let Some(peer) = opening {
            self.note_opened(peer);
        }
        for connection in &mut self.connections {
            let socket = self.sockets.get_mut::<Socket>(connection.handle);
            connection.serve(socket, &self.mmds, now);
        }
        self.reap(now);
        if tcp { Ipv4::Tcp } else { Ipv4::Other }
    }

    /// A SYN of `peer`'s came: counts the connection, if a socket listened for it and took it.
    fn note_opened(&mut self, peer: IpEndpoint) {
        let sockets = &self.sockets;
        let with_peer = |c: &&mut Connection| sockets.get::<Socket>(c.handle).remote_endpoint() == Some(peer);
        if let Some(connection) = self.connections.iter_mut().find(with_peer) {
            connection.opened = true;
            count(&self.metrics.connections_created, 1);
        }
    }

    /// Notes the segment in its connection. A SYN is for a new connection, and the listening socket would make a second one of a SYN
    /// that came twice: it is dropped while the first waits for its acknowledgement, and takes the place of any other connection
    /// between the same ends, for a guest that opens it anew has forgotten the old one.
    fn heard_from(&mut self, peer: IpEndpoint, opens: bool, now: Instant) -> Heard {
        let with_peer = |c: &Connection| self.sockets.get::<Socket>(c.handle).remote_endpoint() == Some(peer);
        let Some(index) = self.connections.iter().position(with_peer) else {
            return Heard::New;
        };
        self.connections[index].heard = now;
        if !opens {
            return Heard::Known;
        }
        let handle = self.connections[index].handle;
        if self.sockets.get::<Socket>(handle).state() == State::SynReceived {
            return Heard::Again;
        }
        self.remove(index);
        Heard::New
    }

    /// Frees a socket for a new connection, if all are taken and one of them can go. If none can, the guest's SYN meets no socket
    /// that listens and is answered by a reset.
    fn make_room(&mut self, now: Instant) {
        if self.connections.len() < MAX_CONNECTIONS || self.listens() {
            return;
        }
        // TIME-WAIT only guards against late segments, and a late segment is answered by a reset all the same.
        let may_go = |c: &Connection| {
            let state = self.sockets.get::<Socket>(c.handle).state();
            state == State::TimeWait || now.saturating_duration_since(c.heard) >= EVICTABLE
        };
        let candidates = self.connections.iter().enumerate().filter(|(_, c)| may_go(c));
        if let Some((index, _)) = candidates.min_by_key(|(_, c)| c.heard) {
            self.remove(index);
            self.listen(now);
        }
    }

    fn listens(&self) -> bool {
        let listens = |c: &Connection| self.sockets.get::<Socket>(c.handle).state() == State::Listen;
        self.connections.iter().any(listens)
    }

    /// Sees to it that a socket listens, if there is room for one.
    fn listen(&mut self, now: Instant) {
        if self.connections.len() >= MAX_CONNECTIONS || self.listens() {
            return;
        }
        let mut socket = Socket::new(
            SocketBuffer::new(vec![0; REQUEST_LIMIT_BYTES]),
            SocketBuffer::new(vec![0; TX_BUFFER_BYTES]),
        );
        socket.set_timeout(Some(IDLE.into()));
        // A response is written whole: holding back its last segment only adds the guest's delayed acknowledgement to its time.
        socket.set_nagle_enabled(false);
        socket
            .listen(PORT)
            .expect("a new socket can listen on a port that is not 0");
        self.connections.push(Connection {
            handle: self.sockets.add(socket),
            request: Vec::new(),
            response: Vec::new(),
            sent: 0,
            ending: false,
            heard: now,
            opened: false,
        });
    }

    /// Removes what is over: closed, with no reset left to send. A socket that a reset took back to listening is kept if it is the
    /// only one that does.
    fn reap(&mut self, now: Instant) {
        let mut listening = false;
        for index in (0..self.connections.len()).rev() {
            let socket = self.sockets.get::<Socket>(self.connections[index].handle);
            let over = match socket.state() {
                State::Closed => socket.remote_endpoint().is_none(),
                State::Listen => {
                    self.close(index);
                    std::mem::replace(&mut listening, true)
                }
                _ => false,
            };
            if over {
                self.remove(index);
            }
        }
        self.listen(now);
    }

    /// Counts the end of a connection, if there was one.
    fn close(&mut self, index: usize) {
        if std::mem::take(&mut self.connections[index].opened) {
            count(&self.metrics.connections_destroyed, 1);
        }
    }

    fn remove(&mut self, index: usize) {
        self.close(index);
        let connection = self.connections.swap_remove(index);
        self.sockets.remove(connection.handle);
    }
}

/// What became of a packet.
enum Ipv4 {
    /// A segment of TCP.
    Tcp,
    /// Something else: echo requests are answered.
    Other,
    /// Dropped.
    Senseless,
}

/// Which connection a segment belongs to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Heard {
    /// One that there is.
    Known,
    /// None yet.
    New,
    /// One that is being opened, by the same SYN.
    Again,
}

impl Connection {
    /// Reads what came and answers it, as far as the socket's buffers go. What does not fit goes on when the guest acknowledges.
    fn serve(&mut self, socket: &mut Socket<'_>, mmds: &SharedMmds, now: Instant) {
        loop {
            self.send(socket);
            if self.sent < self.response.len() {
                return;
            }
            self.response = Vec::new();
            self.sent = 0;
            self.read(socket);
            if self.ending || !self.answer(mmds, now) {
                break;
            }
        }
        if self.request.len() == REQUEST_LIMIT_BYTES {
            socket.abort();
        } else if self.ending || socket.state() == State::CloseWait {
            socket.close();
        }
    }

    fn send(&mut self, socket: &mut Socket<'_>) {
        if socket.can_send() {
            self.sent += socket.send_slice(&self.response[self.sent..]).unwrap_or(0);
        }
    }

    fn read(&mut self, socket: &mut Socket<'_>) {
        while socket.can_recv() {
            let room = if self.ending {
                usize::MAX
            } else {
                REQUEST_LIMIT_BYTES - self.request.len()
            };
            if room == 0 {
                return;
            }
            let taken = socket.recv(|bytes| {
                let taken = bytes.len().min(room);
                if !self.ending {
                    self.request.extend_from_slice(&bytes[..taken]);
                }
                (taken, taken)
            });
            if taken.is_err() {
                return;
            }
        }
    }

    /// Answers the request at the beginning of what was read, if it is whole; says whether there was one.
    fn answer(&mut self, mmds: &SharedMmds, now: Instant) -> bool {
        let (response, taken) = match http::parse(&self.request) {
            Parsed::Partial => return false,
            Parsed::Refused(response) => (response, self.request.len()),
            Parsed::Whole(request, length) => {
                let mut response = mmds
                    .lock()
                    .expect("no holder of this lock panics")
                    .respond(&request, now);
                response.close |= !request.keep_alive;
                (response, length)
            }
        };
        self.request.drain(..taken);
        self.ending = response.close;
        self.response = response.to_bytes();
        true
    }
}

fn smoltcp_instant(epoch: Instant, now: Instant) -> smoltcp::time::Instant {
    let elapsed = now.saturating_duration_since(epoch);
    smoltcp::time::Instant::from_micros(i64::try_from(elapsed.as_micros()).unwrap_or(i64::MAX))
}

impl std::fmt::Debug for Stack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stack")
            .field("ipv4", &self.ipv4)
            .field("sockets", &self.connections.len())
            .finish_non_exhaustive()
    }
}

#[cfg(any(test, feature = "fuzzing"))]
#[path = "stack_bounds.rs"]
mod bounds;

#[cfg(feature = "fuzzing")]
#[path = "fuzz.rs"]
pub(crate) mod fuzz;

#[cfg(test)]
#[path = "stack_tests.rs"]
mod stack_tests;

#[cfg(test)]
#[path = "metrics_tests.rs"]
mod metrics_tests;

#[cfg(test)]
#[path = "hostile_tests.rs"]
mod hostile_tests;
