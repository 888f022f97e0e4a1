//! A driver and the other end of its wire, which is a socket here: each message a frame with its header.

use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use super::spec::{HEADER_LEN, MAX_FRAME_LEN};
use super::*;
use crate::devices::virtio::testing::{BUFFERS, Buffer, Driver, for_driver, from_driver};

mod hostile;

const MAC: [u8; 6] = [6, 0, 0xac, 0x10, 0, 2];
const ALL: u64 = u64::MAX;

fn config(more: serde_json::Value) -> NetworkInterface {
    let mut config = serde_json::json!({ "iface_id": "eth0", "host_dev_name": "test" });
    config
        .as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    serde_json::from_value(config).unwrap()
}

struct Wire {
    net: Arc<Mutex<Net>>,
    driver: Driver,
    /// The host's end.
    host: Option<OwnedFd>,
}

impl Wire {
    fn with(more: serde_json::Value, features: u64, change: impl FnOnce(&mut Net)) -> Self {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (host, device) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let mut net = Net::with_tap(&config(more), Tap::of(device)).unwrap();
        change(&mut net);
        let net = Arc::new(Mutex::new(net));
        let driver = Driver::start(net.clone(), features);
        let host = Some(host);
        let mut wire = Self { net, driver, host };
        wire.turn();
        wire
    }

    fn new(features: u64) -> Self {
        Self::with(serde_json::json!({}), features, |_| {})
    }

    /// Turns the device until it has nothing to do. The wire counts as ready while it is readable, so that is bounded.
    fn turn(&mut self) {
        self.driver.turn(20);
        assert!(!self.driver.needs_reset());
    }

    /// The host sends; the header that a tap would write says `mark`.
    fn host_sends(&self, mark: u8, payload: &[u8]) {
        let message = [&[mark; HEADER_LEN], payload].concat();
        let sent = send(self.host.as_ref().unwrap(), &message, SendFlags::empty()).unwrap();
        assert_eq!(sent, message.len());
    }

    /// What the host hears next, its header apart.
    fn host_hears(&self) -> Option<(Vec<u8>, Vec<u8>)> {
        let mut message = vec![0; MAX_FRAME_LEN + 1];
        match recv(self.host.as_ref().unwrap(), &mut message, RecvFlags::empty()) {
            Ok((len, _)) => {
                let payload = message[HEADER_LEN..len].to_vec();
                message.truncate(HEADER_LEN);
                Some((message, payload))
            }
            Err(Errno::AGAIN) => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// The driver puts `count` buffers of `len` bytes in; where they are.
    fn offer(&mut self, count: u32, len: u32) -> Vec<(u32, u64)> {
        let at = |place| BUFFERS + u64::from(place) * u64::from(len.next_multiple_of(16));
        let put = |place| (u32::from(self.driver.put(RX, &[for_driver(at(place), len)])), at(place));
        (0..count).map(put).collect()
    }

    /// The driver sends `frame` from one buffer.
    fn sends(&mut self, frame: &[u8]) {
        self.driver.write(BUFFERS, &[7; HEADER_LEN]);
        self.driver.write(BUFFERS + HEADER_LEN as u64, frame);
        let len = u32::try_from(HEADER_LEN + frame.len()).unwrap();
        self.driver.put(TX, &[from_driver(BUFFERS, len)]);
        self.driver.notify(TX);
    }

    fn metric(&self, of: impl Fn(&NetMetrics) -> &AtomicU64) -> u64 {
        of(self.net.lock().unwrap().metrics()).load(Ordering::Relaxed)
    }
}

/// A frame of `len` bytes that begins with whom it is for and from.
fn frame(to: u8, from: [u8; 6], len: usize) -> Vec<u8> {
    let mut frame = [[to; 6], from].concat();
    frame.extend((12..len).map(|at| u8::try_from(at % 251).unwrap()));
    frame
}

#[test]
fn what_the_driver_sends_is_one_frame_on_the_wire_however_it_is_cut() {
    let mut wire = Wire::new(ALL);
    for len in [14, 60, 1514, MAX_FRAME_LEN - HEADER_LEN] {
        let frame = frame(1, MAC, len);
        wire.driver.write(BUFFERS, &[5; HEADER_LEN]);
        wire.driver.write(BUFFERS + HEADER_LEN as u64, &frame);
        let whole = HEADER_LEN + len;
        // In the header, and behind it.
        let mut pieces = Vec::new();
        for (from, to) in [(0, 5), (5, 13), (13, 20), (20, whole)] {
            let len = u32::try_from(to - from).unwrap();
            pieces.push(from_driver(BUFFERS + from as u64, len));
        }
        let head = wire.driver.put(TX, &pieces);
        wire.driver.notify(TX);
        wire.turn();
        assert_eq!(wire.host_hears(), Some((vec![5; HEADER_LEN], frame)), "{len}");
        assert_eq!(wire.driver.used(TX), [(head.into(), 0)]);
        assert!(wire.driver.interrupted());
    }
    assert_eq!(wire.metric(|m| &m.tx_packets_count), 4);
    assert_eq!(
        wire.metric(|m| &m.tx_bytes_count),
        (14 + 60 + 1514 + MAX_FRAME_LEN - HEADER_LEN) as u64
    );
}

#[test]
fn what_comes_by_the_wire_takes_as_many_buffers_as_it_needs_and_says_how_many() {
    let mut wire = Wire::new(ALL);
    let buffers = wire.offer(100, 1536);
    wire.driver.notify(RX);
    wire.turn();
    assert_eq!(wire.driver.used(RX), []);
    let mut next = 0;
    for len in [60, 1524, 1525, 4000, MAX_FRAME_LEN - HEADER_LEN, 60] {
        let payload = frame(1, MAC, len);
        wire.host_sends(0xee, &payload);
        wire.turn();
        let whole = HEADER_LEN + len;
        let chains = whole.div_ceil(1536);
        let used = wire.driver.used(RX);
        assert!(wire.driver.interrupted());
        let mut received = Vec::new();
        for (&(head, at), &(used, len)) in buffers[next..].iter().zip(&used) {
            assert_eq!(used, head);
            received.extend(wire.driver.read(at, len.try_into().unwrap()));
        }
        next += chains;
        assert_eq!((used.len(), received.len()), (chains, whole));
        let num_buffers = u16::try_from(chains).unwrap().to_le_bytes();
        assert_eq!(
            (&received[..10], &received[10..12]),
            (&[0xee; 10][..], &num_buffers[..])
        );
        assert!(received[HEADER_LEN..] == payload);
    }
    assert_eq!(wire.metric(|m| &m.rx_packets_count), 6);
}

#[test]
fn a_frame_in_several_chains_is_seen_whole_or_not_at_all() {
    // The used index is read from another thread all the while, as a driver that polls does.
    let mut wire = Wire::new(ALL);
    wire.offer(200, 1536);
    let memory = Arc::clone(&wire.driver.memory);
    let index_at = wire.driver.rings[RX].used + 2;
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let watcher = std::thread::spawn({
        let done = Arc::clone(&done);
        move || {
            let mut seen = std::collections::BTreeSet::new();
            while !done.load(Ordering::Relaxed) {
                let index =
                    vm_memory::Bytes::load::<u16>(memory.view(), vm_memory::GuestAddress(index_at), Ordering::Acquire);
                seen.insert(index.unwrap());
            }
            seen
        }
    });
    for _ in 0..3 {
        wire.host_sends(0, &[1; 60_000]);
        wire.turn();
    }
    done.store(true, Ordering::Relaxed);
    // 60,012 bytes are 40 buffers.
    assert!(watcher.join().unwrap().iter().all(|index| index % 40 == 0));
    assert_eq!(wire.driver.used(RX).len(), 120);
}

#[test]
fn what_finds_no_buffers_waits_for_them_and_nobody_spins() {
    let mut wire = Wire::new(ALL);
    let mut manager = EventManager::new().unwrap();
    manager.add_subscriber(Arc::new(Mutex::new(wire.driver.transport.events())));
    for mark in 0..3 {
        wire.host_sends(mark, &[mark; 100]);
    }
    let mut turn = || {
        let mut events = 0;
        while manager.run_with_timeout(0).unwrap() > 0 {
            events += 1;
            assert!(events < 20, "the device is never done");
        }
        events
    };
    assert!(turn() > 0);
    assert_eq!(turn(), 0, "the wire is readable, and nothing happens");
    assert!(wire.metric(|m| &m.no_rx_avail_buffer) > 0);
    // Too few for the longest frame.
    wire.offer(10, 1536);
    wire.driver.notify(RX);
    turn();
    assert_eq!(wire.driver.used(RX), []);
    let buffers = wire.offer(60, 1536);
    wire.driver.notify(RX);
    turn();
    assert_eq!(wire.driver.used(RX).len(), 3);
    let first = wire.driver.read(buffers[0].1, HEADER_LEN + 100);
    assert_eq!((first[0], first[10], first[111]), (0, 1, 0));
    assert_eq!(turn(), 0);
}

#[test]
fn a_driver_that_put_in_all_it_can_is_given_what_fits() {
    let mut wire = Wire::new(ALL);
    let size = u32::from(wire.driver.rings[RX].size);
    wire.offer(size, 64);
    wire.host_sends(0, &[9; 10_000]);
    wire.host_sends(0, &[8; 20_000]);
    wire.host_sends(0, &[7; 100]);
    wire.driver.notify(RX);
    wire.turn();
    // 256 buffers of 64 bytes are 16,384: 10,012 take 157 of them, 20,012 fit no more, 112 take 2.
    assert_eq!(wire.driver.used(RX).len(), 157);
    assert_eq!(
        (wire.metric(|m| &m.rx_fails), wire.metric(|m| &m.rx_packets_count)),
        (0, 1)
    );
    wire.offer(157, 64);
    wire.driver.notify(RX);
    wire.turn();
    assert_eq!(wire.driver.used(RX).len(), 2);
    assert_eq!(
        (wire.metric(|m| &m.rx_fails), wire.metric(|m| &m.rx_packets_count)),
        (1, 2)
    );
}

#[test]
fn without_mergeable_buffers_a_frame_has_one_chain_or_is_lost() {
    let mut wire = Wire::new(ALL & !F_MRG_RXBUF);
    let buffers = wire.offer(3, 1526);
    for (mark, len) in [(1, 1514), (2, 1515), (3, 60)] {
        wire.host_sends(mark, &vec![mark; len]);
    }
    wire.driver.notify(RX);
    wire.turn();
    assert_eq!(wire.driver.used(RX), [(buffers[0].0, 1526), (buffers[1].0, 72)]);
    assert_eq!(wire.driver.read(buffers[1].1 + 10, 3), [1, 0, 3]);
    assert_eq!(wire.metric(|m| &m.rx_fails), 1);
}

#[test]
fn limits_hold_frames_up_either_way_and_lose_none() {
    let ops = serde_json::json!({ "ops": { "size": 2, "refill_time": 40 } });
    let more = serde_json::json!({ "rx_rate_limiter": ops, "tx_rate_limiter": ops });
    let mut wire = Wire::with(more, ALL, |_| {});
    wire.offer(100, 1536);
    wire.driver.notify(RX);
    let begun = Instant::now();
    for mark in 0..5 {
        wire.host_sends(mark, &[mark; 100]);
        wire.driver.put(TX, &[from_driver(BUFFERS, 100)]);
    }
    wire.driver.notify(TX);
    let (mut received, mut sent) = (0, 0);
    while received < 5 || sent < 5 {
        wire.driver.turn_for(1, Duration::from_secs(60));
        received += wire.driver.used(RX).len();
        sent += wire.driver.used(TX).len();
    }
    // Two at once, then one each 20 ms.
    assert!(begun.elapsed() >= Duration::from_millis(60));
    assert_eq!((received, sent), (5, 5));
    assert_eq!((0..).map_while(|_| wire.host_hears()).count(), 5);
    assert!(wire.metric(|m| &m.rx_rate_limiter_throttled) >= 1);
    assert!(wire.metric(|m| &m.tx_rate_limiter_throttled) >= 1);
}

#[test]
fn limits_that_are_lifted_let_through_what_they_held_up() {
    let ops = serde_json::json!({ "ops": { "size": 1, "refill_time": 3_600_000 } });
    let more = serde_json::json!({ "rx_rate_limiter": ops, "tx_rate_limiter": ops });
    let mut wire = Wire::with(more, ALL, |_| {});
    let buffers = wire.offer(100, 1536);
    for mark in 0..4 {
        wire.host_sends(mark, &[mark; 2000]);
        wire.driver.put(TX, &[from_driver(BUFFERS, 100)]);
    }
    wire.driver.notify(RX);
    wire.driver.notify(TX);
    wire.turn();
    assert_eq!((wire.driver.used(RX).len(), wire.driver.used(TX).len()), (2, 1));
    let none: config::RateLimiter = serde_json::from_str(r#"{"ops": {"size": 0, "refill_time": 0}}"#).unwrap();
    wire.net.lock().unwrap().set_rate_limiters(Some(none), Some(none));
    while wire.metric(|m| &m.rx_packets_count) < 4 || wire.metric(|m| &m.tx_packets_count) < 4 {
        assert!(wire.driver.turn_for(1, Duration::from_secs(60)) > 0);
    }
    let used = wire.driver.used(RX);
    assert_eq!(
        used.iter().map(|used| used.0).collect::<Vec<_>>(),
        buffers[2..8].iter().map(|b| b.0).collect::<Vec<_>>()
    );
    for (place, mark) in [(2, 1), (4, 2), (6, 3)] {
        assert_eq!(wire.driver.read(buffers[place].1 + 12, 1), [mark]);
    }
}

#[test]
fn a_reset_forgets_what_was_held_up() {
    let ops = serde_json::json!({ "rx_rate_limiter": { "ops": { "size": 1, "refill_time": 3_600_000 } } });
    let mut wire = Wire::with(ops, ALL, |_| {});
    wire.offer(60, 1536);
    wire.host_sends(1, &[1; 100]);
    wire.host_sends(2, &[2; 100]);
    wire.driver.notify(RX);
    wire.turn();
    assert!(wire.net.lock().unwrap().held.is_some());
    wire.driver.set_up(ALL);
    assert!(wire.net.lock().unwrap().held.is_none());
    wire.turn();
    assert_eq!(wire.driver.used(RX), []);
}

#[test]
fn what_is_no_frame_is_counted_and_given_back() {
    let mut wire = Wire::new(ALL);
    let zero = vec![from_driver(BUFFERS, 0)];
    let table: [(&str, Vec<Buffer>); 5] = [
        ("nothing", zero),
        ("a header alone", vec![from_driver(BUFFERS, 12)]),
        ("less than Ethernet", vec![from_driver(BUFFERS, 25)]),
        ("more than a frame", vec![from_driver(BUFFERS, 65_563)]),
        ("for the device to write", vec![for_driver(BUFFERS, 100)]),
    ];
    for (place, (what, chain)) in table.iter().enumerate() {
        let head = wire.driver.put(TX, chain);
        wire.driver.notify(TX);
        wire.turn();
        assert_eq!(wire.driver.used(TX), [(head.into(), 0)], "{what}");
        assert_eq!(wire.metric(|m| &m.tx_malformed_frames), place as u64 + 1, "{what}");
        assert_eq!(wire.host_hears(), None, "{what}");
    }
    wire.sends(&frame(1, MAC, 60));
    wire.turn();
    assert!(wire.host_hears().is_some());
}

#[test]
fn a_driver_that_breaks_the_rules_has_to_reset_and_is_then_served() {
    let table = [
        (RX, vec![for_driver(BUFFERS, 11)]),
        (RX, vec![from_driver(BUFFERS, 1000)]),
        (RX, vec![for_driver(1 << 40, 2000)]),
        (RX, vec![for_driver(u64::MAX - 10, 2000)]),
        (TX, vec![from_driver(1 << 40, 2000)]),
        (TX, vec![for_driver(BUFFERS, 12), from_driver(BUFFERS, 12)]),
    ];
    for (queue, chain) in table {
        let mut wire = Wire::new(ALL);
        wire.host_sends(0, &[0; 100]);
        wire.driver.put(queue, &chain);
        wire.driver.notify(queue);
        wire.driver.turn(20);
        assert!(
            wire.driver.needs_reset() && wire.driver.interrupted(),
            "{queue}: {chain:?}"
        );
        wire.driver.set_up(ALL);
        wire.offer(60, 1536);
        wire.driver.notify(RX);
        wire.turn();
        assert_eq!(wire.driver.used(RX).len(), 1, "{queue}: {chain:?}");
        wire.sends(&frame(1, MAC, 60));
        wire.turn();
        assert!(wire.host_hears().is_some());
    }
}

#[test]
fn a_frame_in_anothers_name_is_sent_and_counted() {
    let mac = "06:00:ac:10:00:02";
    let mut wire = Wire::with(serde_json::json!({ "guest_mac": mac }), ALL, |_| {});
    for (from, spoofed) in [(MAC, 0), ([6, 0, 0xac, 0x10, 0, 3], 1), (MAC, 1)] {
        wire.sends(&frame(1, from, 60));
        wire.turn();
        assert_eq!(wire.host_hears().unwrap().1[6..12], from);
        assert_eq!(wire.metric(|m| &m.tx_spoofed_mac_count), spoofed);
    }
}

#[test]
fn the_configuration_space_and_the_features_are_what_was_configured() {
    let wire = Wire::with(
        serde_json::json!({ "guest_mac": "06:00:ac:10:00:02", "mtu": 1400 }),
        ALL,
        |_| {},
    );
    assert_eq!(
        wire.driver.config(0),
        [6, 0, 0xac, 0x10, 0, 2, 0, 0, 0, 0, 0x78, 5, 0, 0]
    );
    assert_eq!(wire.net.lock().unwrap().features() & (F_MAC | F_MTU), F_MAC | F_MTU);
    let wire = Wire::new(ALL);
    assert_eq!(wire.driver.config(0), [0u8; 12]);
    assert_eq!(wire.net.lock().unwrap().features() & (F_MAC | F_MTU), 0);
    let refused = Net::new(&config(serde_json::json!({ "mtu": 67 })), &Taps::default()).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "interface eth0: an MTU of 67 is not possible: it is 68 at least"
    );
}

#[test]
fn a_wire_that_is_cut_leaves_a_quiet_device() {
    let mut wire = Wire::new(ALL);
    let mut manager = EventManager::new().unwrap();
    manager.add_subscriber(Arc::new(Mutex::new(wire.driver.transport.events())));
    wire.offer(60, 1536);
    wire.driver.notify(RX);
    wire.host = None;
    for _ in 0..3 {
        wire.sends(&frame(1, MAC, 60));
        let mut events = 0;
        while manager.run_with_timeout(0).unwrap() > 0 {
            events += 1;
            assert!(events < 20, "the device is never done");
        }
        assert_eq!(wire.driver.used(TX).len(), 1);
    }
    assert!(wire.net.lock().unwrap().gone);
    assert_eq!((wire.metric(|m| &m.tx_fails), wire.driver.needs_reset()), (3, false));
    assert!(wire.metric(|m| &m.tap_read_fails) <= 1);
}

/// A service that takes what is for 0xda:da..., and answers each frame by itself, twice; once more when its time has come.
#[derive(Debug, Default)]
struct Echo {
    answers: Vec<Vec<u8>>,
    later: Option<(Instant, Vec<u8>)>,
}

impl Detour for Echo {
    fn takes(&self, start: &[u8]) -> bool {
        start.starts_with(&[0xda; 6])
    }

    fn receive(&mut self, frame: &[u8], now: Instant) {
        self.answers = vec![frame.to_vec(); 2];
        self.later = Some((now + Duration::from_millis(20), frame.to_vec()));
    }

    fn transmit(&mut self, now: Instant) -> Option<Vec<u8>> {
        let due = self.later.take_if(|(at, _)| *at <= now).map(|(_, frame)| frame);
        self.answers.pop().or(due)
    }

    fn next_poll(&mut self, now: Instant) -> Option<Duration> {
        self.later.as_ref().map(|(at, _)| at.saturating_duration_since(now))
    }
}

#[test]
fn what_is_for_the_vmm_takes_the_detour_and_its_answers_come_first() {
    let limit = serde_json::json!({ "tx_rate_limiter": { "ops": { "size": 1, "refill_time": 3_600_000 } } });
    let mut wire = Wire::with(limit, ALL, |net| net.set_detour(Box::<Echo>::default()).unwrap());
    // Not limited: it does not leave the VMM.
    for round in 0..3 {
        let long = frame(0xda, MAC, 5000 + round);
        wire.sends(&long);
        wire.turn();
        // Answers wait for the guest's buffers, as the wire's frames do.
        wire.host_sends(9, &[9; 100]);
        wire.turn();
        assert_eq!((wire.driver.used(RX), wire.host_hears()), (vec![], None));
        let buffers = wire.offer(80, 1536);
        wire.driver.notify(RX);
        wire.turn();
        let used = wire.driver.used(RX);
        assert_eq!(
            used.len(),
            4 + 4 + 1,
            "two answers of four buffers, and the wire's frame"
        );
        let mut received: Vec<u8> = Vec::new();
        for ((_, at), (_, len)) in buffers[..4].iter().zip(&used) {
            received.extend(wire.driver.read(*at, (*len).try_into().unwrap()));
        }
        assert_eq!(received[..HEADER_LEN], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0]);
        assert!(received[HEADER_LEN..] == long);
        // One of its own, by its timer.
        let mut late = 0;
        while late == 0 {
            assert!(wire.driver.turn_for(1, Duration::from_secs(60)) > 0);
            late = wire.driver.used(RX).len();
        }
        assert_eq!(late, 4);
        wire.driver.set_up(ALL);
        wire.turn();
    }
    wire.sends(&frame(1, MAC, 60));
    wire.turn();
    assert!(wire.host_hears().is_some(), "the rest goes by the wire");
    assert_eq!(wire.metric(|m| &m.tx_packets_count), 1);
}

/// A datagram socket fails once when nobody was there to hear: in place of a tap that fails and has a frame all the same.
#[test]
fn a_tap_that_failed_once_is_read_again_though_it_says_nothing_more() {
    let device = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    device.connect(port).unwrap();
    device.set_nonblocking(true).unwrap();
    let address = device.local_addr().unwrap();
    let net = Net::with_tap(&config(serde_json::json!({})), Tap::of(device.try_clone().unwrap())).unwrap();
    let metrics = Arc::clone(net.metrics());
    let mut driver = Driver::start(Arc::new(Mutex::new(net)), ALL);
    driver.put(RX, &[for_driver(BUFFERS, 70_000)]);
    driver.notify(RX);
    driver.turn(20);
    assert_eq!(
        (metrics.tap_read_fails.load(Ordering::Relaxed), driver.used(RX)),
        (0, vec![])
    );

    device.send(b"?").unwrap();
    let host = UdpSocket::bind(port).unwrap();
    host.send_to(&[1; HEADER_LEN + 60], address).unwrap();
    // The event is one for both.
    driver.turn(1);
    assert_eq!(
        (metrics.tap_read_fails.load(Ordering::Relaxed), driver.used(RX)),
        (1, vec![])
    );
    let used = loop {
        assert!(
            driver.turn_for(1, Duration::from_secs(60)) > 0,
            "the frame waits for the next"
        );
        let used = driver.used(RX);
        if !used.is_empty() {
            break used;
        }
    };
    assert_eq!(used[0].1, 72);
}

#[test]
fn a_tap_that_fails_again_and_again_is_asked_ever_more_seldom() {
    // An end of a pipe that is not for reading.
    let (_reader, device) = rustix::pipe::pipe().unwrap();
    let net = Net::with_tap(&config(serde_json::json!({})), Tap::of(device)).unwrap();
    let net = Arc::new(Mutex::new(net));
    let metrics = Arc::clone(net.lock().unwrap().metrics());
    let mut driver = Driver::start(net.clone(), ALL);
    driver.put(RX, &[for_driver(BUFFERS, 70_000)]);
    driver.notify(RX);
    driver.turn(20);
    for fails in 1..5 {
        while metrics.tap_read_fails.load(Ordering::Relaxed) < fails {
            assert!(driver.turn_for(1, Duration::from_secs(60)) > 0, "it is not asked again");
        }
        let doubled = u32::try_from(metrics.tap_read_fails.load(Ordering::Relaxed) - 1).unwrap();
        assert_eq!(net.lock().unwrap().retry_wait, RETRY_FIRST * 2u32.pow(doubled));
    }
    // Nothing but the timer asks: a driver that notifies does not.
    for _ in 0..10 {
        driver.notify(RX);
    }
    let before = metrics.tap_read_fails.load(Ordering::Relaxed);
    net.lock().unwrap().retry.stop();
    driver.turn(20);
    assert_eq!(metrics.tap_read_fails.load(Ordering::Relaxed), before);
}
