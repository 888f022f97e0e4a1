//! The stack against a guest of smoltcp's, over frames in memory.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use serde_json::json;
use smoltcp::phy::{self, DeviceCapabilities, Medium};

use super::*;
use crate::mmds::Mmds;
use crate::mmds::config::{DEFAULT_IPV4, MmdsConfig, Version};
use crate::mmds::data::DEFAULT_LIMIT_BYTES;

const GUEST_MAC: EthernetAddress = EthernetAddress([0x02, 0, 0, 0, 0, 0x01]);
const GUEST_IPV4: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 2);

fn service(version: Version, document: serde_json::Value, now: Instant) -> SharedMmds {
    let mut mmds = Mmds::new(DEFAULT_LIMIT_BYTES, now).unwrap();
    mmds.data.put(document).unwrap();
    mmds.configure(&MmdsConfig {
        version,
        network_interfaces: vec!["eth0".into()],
        ipv4_address: DEFAULT_IPV4,
        imds_compat: false,
    });
    Arc::new(Mutex::new(mmds))
}

/// The guest's network card: what it sent, what came for it.
#[derive(Clone, Default)]
struct Card(Rc<RefCell<(Frames, Frames)>>);

type Frames = VecDeque<Vec<u8>>;

struct Came(Vec<u8>);
struct Send(Card);

impl phy::Device for Card {
    type RxToken<'a> = Came;
    type TxToken<'a> = Send;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Came, Send)> {
        let frame = self.0.borrow_mut().1.pop_front()?;
        Some((Came(frame), Send(self.clone())))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Send> {
        Some(Send(self.clone()))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

impl phy::RxToken for Came {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

impl phy::TxToken for Send {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, bytes: usize, fill: F) -> R {
        let mut frame = vec![0; bytes];
        let result = fill(&mut frame);
        self.0.0.borrow_mut().0.push_back(frame);
        result
    }
}

/// A guest, the stack it talks to, and the wire between, which may lose frames.
pub(super) struct Bench {
    pub(super) stack: Stack,
    start: Instant,
    pub(super) now: Instant,
    interface: Interface,
    sockets: SocketSet<'static>,
    card: Card,
    next_port: u16,
    /// Whether the guest sends its IPv4 to a MAC that is not ours.
    by_gateway: bool,
    /// How many of 100 frames are lost, either way.
    loss_percent: u64,
    random: u64,
}

impl Bench {
    pub(super) fn new(version: Version, document: serde_json::Value) -> Self {
        Self::with_guest(version, document, GUEST_IPV4)
    }

    fn with_guest(version: Version, document: serde_json::Value, guest: Ipv4Addr) -> Self {
        let start = Instant::now();
        let mut card = Card::default();
        let config = Config::new(HardwareAddress::Ethernet(GUEST_MAC));
        let mut interface = Interface::new(config, &mut card, smoltcp::time::Instant::ZERO);
        // As `ip route add 169.254.169.254 dev eth0`: on the wire, whatever the guest's own network is.
        interface.update_ip_addrs(|addresses| addresses.push(IpCidr::new(guest.into(), 0)).unwrap());
        Self {
            stack: Stack::with_seed(DEFAULT_IPV4, service(version, document, start), start, 4),
            start,
            now: start,
            interface,
            sockets: SocketSet::new(Vec::new()),
            card,
            next_port: 40_000,
            by_gateway: false,
            loss_percent: 0,
            random: 1,
        }
    }

    fn connect(&mut self) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 65_535]);
        let mut socket = Socket::new(buffer(), buffer());
        self.next_port += 1;
        socket
            .connect(self.interface.context(), (DEFAULT_IPV4, PORT), self.next_port)
            .unwrap();
        self.sockets.add(socket)
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn carries(&mut self) -> bool {
        // Knuth's MMIX generator, of which the upper bits are good.
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % 100 >= self.loss_percent
    }

    /// A millisecond: what the guest sends arrives, and what is due for it.
    fn step(&mut self) {
        self.now += Duration::from_millis(1);
        let at = smoltcp_instant(self.start, self.now);
        self.interface.poll(at, &mut self.card, &mut self.sockets);
        let sent = std::mem::take(&mut self.card.0.borrow_mut().0);
        for mut frame in sent {
            if self.by_gateway && frame[12..14] == [8, 0] {
                frame[..6].copy_from_slice(&[0x0a; 6]);
            }
            if self.carries() && self.stack.takes(&frame) {
                self.stack.receive(&frame, self.now);
            }
        }
        while let Some(frame) = self.stack.transmit(self.now) {
            if self.carries() {
                self.card.0.borrow_mut().1.push_back(frame);
            }
        }
        self.interface.poll(at, &mut self.card, &mut self.sockets);
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        for _ in 0..200_000 {
            if done(self) {
                return;
            }
            self.step();
        }
        panic!("{what}: not after 200 s of the guest's time");
    }

    pub(super) fn wait(&mut self, duration: Duration) {
        // One great leap, once what is in flight has arrived, acknowledgements that were held back included.
        for _ in 0..50 {
            self.step();
        }
        self.now += duration;
        self.step();
    }

    pub(super) fn open(&mut self) -> SocketHandle {
        let handle = self.connect();
        self.until("a connection", |bench| {
            bench.socket(handle).state() == State::Established
        });
        handle
    }

    /// One response: what the connection brings until its body is whole.
    fn response(&mut self, handle: SocketHandle) -> (String, String) {
        let mut bytes = Vec::new();
        self.until("a response", |bench| {
            let socket = bench.socket(handle);
            while socket.can_recv() && whole(&bytes).is_none() {
                // A byte at a time, to leave the next response where it is.
                let mut byte = [0];
                socket.recv_slice(&mut byte).unwrap();
                bytes.push(byte[0]);
            }
            whole(&bytes).is_some()
        });
        whole(&bytes).unwrap()
    }

    pub(super) fn ask(&mut self, handle: SocketHandle, request: &str) -> (String, String) {
        let sent = self.socket(handle).send_slice(request.as_bytes()).unwrap();
        assert_eq!(sent, request.len());
        self.response(handle)
    }

    fn gone(&mut self, handle: SocketHandle) -> bool {
        matches!(
            self.socket(handle).state(),
            State::Closed | State::TimeWait | State::CloseWait
        )
    }
}

/// Status line and body, once both are there.
fn whole(bytes: &[u8]) -> Option<(String, String)> {
    let text = std::str::from_utf8(bytes).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    let length: usize = head
        .split("Content-Length: ")
        .nth(1)?
        .split("\r\n")
        .next()?
        .parse()
        .ok()?;
    let status = head.split("\r\n").next()?.strip_prefix("HTTP/1.1 ")?;
    (body.len() == length).then(|| (status.to_owned(), body.to_owned()))
}

pub(super) fn ok(body: &str) -> (String, String) {
    ("200 OK".into(), body.into())
}

pub(super) const GET_NAME: &str = "GET /name HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n";

pub(super) fn named() -> serde_json::Value {
    json!({ "name": "chronovisor" })
}

#[test]
fn a_stack_may_move_between_threads() {
    fn send<T: std::marker::Send>() {}
    send::<Stack>();
}

#[test]
fn a_guest_gets_metadata_over_arp_tcp_and_http() {
    let mut bench = Bench::new(Version::V1, named());
    let connection = bench.open();
    assert_eq!(bench.ask(connection, GET_NAME), ok("chronovisor"));
    // The connection stays for the next one.
    assert_eq!(bench.ask(connection, GET_NAME), ok("chronovisor"));
    let not_found = bench.ask(connection, "GET /none HTTP/1.1\r\n\r\n");
    assert_eq!(not_found, ("404 Not Found".into(), "Resource not found: /none.".into()));
    bench.socket(connection).close();
    bench.until("the end", |bench| bench.socket(connection).state() == State::TimeWait);
    bench.step();
    // One socket is left, which listens.
    assert_eq!(bench.stack.connections.len(), 1);
}

#[test]
fn a_guest_of_version_2_gets_metadata_with_the_token_it_put() {
    let mut bench = Bench::new(Version::V2, named());
    let connection = bench.open();
    assert_eq!(bench.ask(connection, GET_NAME).0, "401 Unauthorized");
    let put = "PUT /latest/api/token HTTP/1.1\r\nX-aws-ec2-metadata-token-ttl-seconds: 30\r\n\r\n";
    let (status, token) = bench.ask(connection, put);
    assert_eq!(status, "200 OK");
    let get = format!("GET /name HTTP/1.1\r\nX-aws-ec2-metadata-token: {token}\r\n\r\n");
    assert_eq!(bench.ask(connection, &get), ok("chronovisor"));
    bench.wait(Duration::from_secs(30));
    assert_eq!(
        bench.ask(connection, &get),
        ("401 Unauthorized".into(), "MMDS token not valid.".into())
    );
}

#[test]
fn a_guest_of_any_address_is_answered() {
    for guest in [
        [10, 0, 0, 1],
        [169, 254, 7, 7],
        [192, 168, 255, 254],
        [8, 8, 8, 8],
        [223, 255, 255, 1],
    ] {
        let mut bench = Bench::with_guest(Version::V1, named(), guest.into());
        let connection = bench.open();
        assert_eq!(bench.ask(connection, GET_NAME), ok("chronovisor"), "{guest:?}");
    }
}

#[test]
fn a_packet_that_took_the_gateways_mac_is_answered_to_the_one_that_sent_it() {
    let mut bench = Bench::new(Version::V1, named());
    bench.by_gateway = true;
    let connection = bench.open();
    // The guest's card takes no frame that is not for its own MAC.
    assert_eq!(bench.ask(connection, GET_NAME), ok("chronovisor"));
}

#[test]
fn a_document_as_large_as_may_be_arrives_whole_also_over_a_wire_that_loses() {
    let document = json!({ "a": "x".repeat(DEFAULT_LIMIT_BYTES - 8) });
    for loss_percent in [0, 5, 20] {
        let mut bench = Bench::new(Version::V1, document.clone());
        bench.loss_percent = loss_percent;
        let connection = bench.open();
        let (status, body) = bench.ask(connection, "GET / HTTP/1.1\r\nAccept: application/json\r\n\r\n");
        assert_eq!(status, "200 OK");
        assert_eq!(body, document.to_string());
    }
}

#[test]
fn connections_are_answered_side_by_side_up_to_their_limit() {
    let mut bench = Bench::new(Version::V1, named());
    let connections: Vec<_> = (0..MAX_CONNECTIONS).map(|_| bench.connect()).collect();
    for &connection in &connections {
        bench.until("a connection", |bench| {
            bench.socket(connection).state() == State::Established
        });
    }
    // Half a request each, then the other half in reverse.
    let (first, second) = GET_NAME.split_at(20);
    for &connection in &connections {
        bench.socket(connection).send_slice(first.as_bytes()).unwrap();
        bench.step();
    }
    for &connection in connections.iter().rev() {
        assert_eq!(bench.ask(connection, second), ok("chronovisor"));
    }

    // None of them has been silent long enough to give way ...
    let refused = bench.connect();
    bench.until("a reset", |bench| bench.socket(refused).state() == State::Closed);
    assert_eq!(bench.stack.connections.len(), MAX_CONNECTIONS);

    // ... until one has: the one that was silent longest.
    bench.wait(EVICTABLE);
    for &connection in &connections[1..] {
        assert_eq!(bench.ask(connection, GET_NAME), ok("chronovisor"));
    }
    let late = bench.open();
    assert_eq!(bench.ask(late, GET_NAME), ok("chronovisor"));
    bench.socket(connections[0]).send_slice(GET_NAME.as_bytes()).unwrap();
    bench.until("a reset", |bench| bench.socket(connections[0]).state() == State::Closed);
    assert_eq!(bench.stack.connections.len(), MAX_CONNECTIONS);
}

#[test]
fn a_connection_left_open_is_reset_and_its_room_is_free() {
    let mut bench = Bench::new(Version::V1, named());
    let silent = bench.open();
    bench.socket(silent).send_slice(b"GET /na").unwrap();
    bench.wait(Duration::ZERO);
    let delay = bench.stack.next_poll(bench.now).unwrap();
    assert!(delay <= IDLE && delay > IDLE - Duration::from_secs(1), "{delay:?}");
    bench.wait(delay);
    assert_eq!(bench.socket(silent).state(), State::Closed);
    assert_eq!(bench.stack.connections.len(), 1);
    assert_eq!(bench.stack.next_poll(bench.now), None);
}

#[test]
fn a_guest_that_vanished_with_its_response_unread_is_given_up() {
    let mut bench = Bench::new(Version::V1, json!({ "a": "x".repeat(40_000) }));
    let connection = bench.open();
    bench.socket(connection).send_slice(b"GET /a HTTP/1.1\r\n\r\n").unwrap();
    bench.step();
    // From here on the guest is gone; the timer alone drives the stack.
    let mut frames = 0;
    while let Some(delay) = bench.stack.next_poll(bench.now) {
        bench.now += delay;
        while bench.stack.transmit(bench.now).is_some() {
            frames += 1;
        }
    }
    assert!(bench.now - bench.start < IDLE + Duration::from_secs(1));
    // 8 KiB in 6 segments, sent again at intervals that double from 1 s or so on: some dozens in a minute.
    assert!(frames < 200, "{frames}");
    assert_eq!(bench.stack.connections.len(), 1);
}

#[test]
fn requests_sent_in_one_go_are_answered_in_their_order() {
    let mut bench = Bench::new(Version::V1, json!({ "a": "1", "b": "2" }));
    let connection = bench.open();
    let both = "GET /a HTTP/1.1\r\n\r\nGET /b HTTP/1.1\r\n\r\n";
    assert_eq!(bench.ask(connection, both), ok("1"));
    assert_eq!(bench.response(connection), ok("2"));
}

#[test]
fn a_connection_ends_after_the_response_when_that_was_asked_or_the_request_was_unreadable() {
    for (request, status) in [
        ("GET /name HTTP/1.1\r\nConnection: close\r\n\r\n", "200 OK"),
        ("GET /name HTTP/1.0\r\n\r\n", "200 OK"),
        (
            "PUT /name HTTP/1.1\r\nContent-Length: 40\r\n\r\nGET /name HTTP/1.1\r\n\r\n",
            "400 Bad Request",
        ),
        ("BREW /name HTTP/1.1\r\n\r\n", "501 Not Implemented"),
    ] {
        let mut bench = Bench::new(Version::V1, named());
        let connection = bench.open();
        assert_eq!(bench.ask(connection, request).0, status);
        bench.until("the end", |bench| bench.gone(connection));
        assert_eq!(bench.socket(connection).recv_queue(), 0, "nothing but the one response");
        // More of the guest's is not read as a request.
        let _ = bench.socket(connection).send_slice(GET_NAME.as_bytes());
        bench.socket(connection).close();
        bench.until("both ends", |bench| {
            bench.socket(connection).state() != State::CloseWait
        });
        bench.wait(EVICTABLE + Duration::from_secs(1));
        assert_eq!(bench.stack.connections.len(), 1, "{request}");
    }
}

#[test]
fn connections_that_ended_give_way_at_once() {
    let mut bench = Bench::new(Version::V1, named());
    // The server closes first, so each stays in TIME-WAIT for a while.
    for _ in 0..3 * MAX_CONNECTIONS {
        let connection = bench.open();
        assert_eq!(bench.ask(connection, "GET /name HTTP/1.0\r\n\r\n"), ok("chronovisor"));
        bench.until("the end", |bench| bench.gone(connection));
        bench.socket(connection).close();
        bench.step();
        bench.step();
        assert!(bench.stack.connections.len() <= MAX_CONNECTIONS);
    }
}

#[test]
fn a_request_too_large_resets_its_connection() {
    let mut bench = Bench::new(Version::V1, named());
    let connection = bench.open();
    let request = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(REQUEST_LIMIT_BYTES));
    bench.socket(connection).send_slice(request.as_bytes()).unwrap();
    bench.until("a reset", |bench| bench.socket(connection).state() == State::Closed);
    // The largest that is not too large is answered.
    let connection = bench.open();
    let path = "x".repeat(REQUEST_LIMIT_BYTES - "GET / HTTP/1.1\r\n\r\n".len());
    let request = format!("GET /{path} HTTP/1.1\r\n\r\n");
    assert_eq!(bench.ask(connection, &request).0, "404 Not Found");
}

#[test]
fn a_guest_that_opens_the_same_port_anew_gets_a_new_connection() {
    let mut bench = Bench::new(Version::V1, named());
    let forgotten = bench.open();
    bench.sockets.remove(forgotten);
    bench.next_port -= 1;
    let again = bench.open();
    assert_eq!(bench.ask(again, GET_NAME), ok("chronovisor"));
    assert_eq!(
        bench.stack.connections.len(),
        2,
        "one connection, and the socket that listens"
    );
}

#[test]
fn a_syn_that_comes_twice_opens_one_connection() {
    let mut bench = Bench::new(Version::V1, named());
    let first = bench.open();
    bench.socket(first).close();
    bench.until("the end", |bench| bench.socket(first).state() == State::TimeWait);
    bench.step();
    let connection = bench.connect();
    let at = smoltcp_instant(bench.start, bench.now);
    bench.interface.poll(at, &mut bench.card, &mut bench.sockets);
    let syn = bench.card.0.borrow().0.back().cloned().unwrap();
    bench.stack.receive(&syn, bench.now);
    bench.stack.receive(&syn, bench.now);
    assert_eq!(
        bench.stack.connections.len(),
        2,
        "one connection, and the socket that listens"
    );
    assert_eq!(bench.ask_when_open(connection), ok("chronovisor"));
}

impl Bench {
    fn ask_when_open(&mut self, connection: SocketHandle) -> (String, String) {
        self.until("a connection", |bench| {
            bench.socket(connection).state() == State::Established
        });
        self.ask(connection, GET_NAME)
    }
}

#[test]
fn another_port_is_refused_at_once() {
    let mut bench = Bench::new(Version::V1, named());
    let buffer = || SocketBuffer::new(vec![0; 64]);
    let mut socket = Socket::new(buffer(), buffer());
    socket
        .connect(bench.interface.context(), (DEFAULT_IPV4, 443), 50_000)
        .unwrap();
    let refused = bench.sockets.add(socket);
    bench.until("a reset", |bench| bench.socket(refused).state() == State::Closed);
    // The reset came for a SYN that did arrive.
    assert!(bench.now - bench.start < Duration::from_secs(1));
}

#[test]
fn what_is_for_others_is_not_taken() {
    let bench = Bench::new(Version::V1, named());
    let arp = |target: [u8; 4]| [&[0xff; 12][..], &[8, 6], &[0; 24], &target].concat();
    let ipv4 = |destination: [u8; 4]| [&[0xff; 12][..], &[8, 0], &[0x45; 16], &destination].concat();
    let ours = DEFAULT_IPV4.octets();
    assert!(bench.stack.takes(&arp(ours)) && bench.stack.takes(&ipv4(ours)));
    for other in [[169, 254, 169, 253], [172, 16, 0, 1], [255; 4], [0; 4]] {
        assert!(!bench.stack.takes(&arp(other)) && !bench.stack.takes(&ipv4(other)));
    }
    let mut ipv6 = ipv4(ours);
    ipv6[12..14].copy_from_slice(&[0x86, 0xdd]);
    assert!(!bench.stack.takes(&ipv6));
    for frame in [arp(ours), ipv4(ours)] {
        for end in 0..frame.len() {
            assert!(!bench.stack.takes(&frame[..end]), "{end}");
        }
    }
}

#[test]
fn answers_that_the_guest_does_not_fetch_are_dropped_beyond_the_queue() {
    let mut bench = Bench::new(Version::V1, named());
    let ours = DEFAULT_IPV4.octets();
    let request = [
        &[0xff; 6][..],
        GUEST_MAC.as_bytes(),
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        GUEST_MAC.as_bytes(),
        &GUEST_IPV4.octets(),
        &[0; 6],
        &ours,
    ]
    .concat();
    for _ in 0..1000 {
        bench.stack.receive(&request, bench.now);
    }
    let replies: Vec<_> = std::iter::from_fn(|| bench.stack.transmit(bench.now)).collect();
    assert_eq!(replies.len(), 32);
    let expected = [
        GUEST_MAC.as_bytes(),
        &[0x06, 0x01, 0x23, 0x45, 0x67, 0x01],
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2],
        &[0x06, 0x01, 0x23, 0x45, 0x67, 0x01],
        &ours,
        GUEST_MAC.as_bytes(),
        &GUEST_IPV4.octets(),
    ]
    .concat();
    assert!(replies.iter().all(|reply| *reply == expected));
}
