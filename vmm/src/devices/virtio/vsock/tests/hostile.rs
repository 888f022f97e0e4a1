//! Drivers that break the rules.

use super::*;
use crate::devices::virtio::Shared;
use crate::devices::virtio::hostile::{self, Dice, Shape};
use crate::unix_socket;

/// Clients of the host's, who come, speak and go, and programs that listen, around devices in one folder.
struct Host {
    folder: Folder,
    vsock: Option<Arc<Mutex<Vsock>>>,
    listener: UnixListener,
    clients: Vec<UnixStream>,
    /// By all devices but the last: connections, and bytes to and from the guest.
    counted: [u64; 3],
}

impl Host {
    fn new() -> Self {
        let folder = Folder::new();
        let listener = UnixListener::bind(folder.path("v_7")).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self {
            folder,
            vsock: None,
            listener,
            clients: Vec::new(),
            counted: [0; 3],
        }
    }

    /// Adds what the device has counted.
    fn count(&mut self) {
        if let Some(vsock) = &self.vsock {
            let vsock = vsock.lock().unwrap();
            let metrics = vsock.metrics();
            let counters = [&metrics.conns_added, &metrics.rx_bytes_count, &metrics.tx_bytes_count];
            for (sum, counter) in self.counted.iter_mut().zip(counters) {
                *sum += counter.load(Ordering::Relaxed);
            }
        }
    }
}

impl hostile::World for &mut Host {
    fn make(&mut self) -> Shared {
        self.count();
        // The one before it lives on until its driver is dropped.
        let _ = std::fs::remove_file(self.folder.path("v"));
        let vsock = Arc::new(Mutex::new(Vsock::new(&config(&self.folder.path("v"))).unwrap()));
        self.vsock = Some(vsock.clone());
        vsock
    }

    fn meanwhile(&mut self, dice: &mut Dice) {
        let vsock = self.vsock.as_ref().unwrap().lock().unwrap();
        assert!(vsock.mux.sockets() <= MAX_CONNECTIONS && vsock.mux.line() <= MAX_LINE);
        drop(vsock);
        for _ in 0..2 {
            host_side(&self.folder, &self.listener, &mut self.clients, dice);
        }
    }

    /// A packet that the guest might send, now and then one of a connection that there is.
    fn says(&mut self, dice: &mut Dice) -> Option<Vec<u8>> {
        let known = self.vsock.as_ref()?.lock().unwrap().mux.some_ports();
        let header = hostile_header(known, 4 * u32::try_from(dice.below(9)).unwrap(), dice);
        let data = (0..32).map(|_| 0xa5);
        Some(header.to_bytes().into_iter().chain(data).collect())
    }

    /// A header and a little.
    fn buffers(&self, queue: usize) -> Option<Shape> {
        (queue <= TX).then_some(Shape {
            writable: queue == RX,
            least: 64,
        })
    }
}

#[test]
fn a_hostile_drivers_rings_harm_nobody_while_the_host_connects_and_sends() {
    let mut host = Host::new();
    hostile::survives(&mut host);
    println!("connections, bytes to and from the guest: {:?}", host.counted);
    // Rings through which nobody ever came would show nothing.
    assert!(host.counted.iter().all(|&counter| counter > 1000), "{:?}", host.counted);
}

#[test]
fn a_hostile_drivers_registers_harm_nobody_while_the_host_connects_and_sends() {
    hostile::survives_registers(&mut Host::new());
}

#[test]
fn chains_that_are_no_packets_ask_for_a_reset_after_which_the_device_serves() {
    type Break = fn(&mut Guest);
    let table: [(&str, Break); 5] = [
        ("an empty packet", |guest| guest.put_tx(&[for_driver(TX_AT, 100)])),
        ("a header too short", |guest| guest.put_tx(&[from_driver(TX_AT, 43)])),
        ("a packet outside of memory", |guest| {
            guest.put_tx(&[from_driver(1 << 40, 44)])
        }),
        ("a chain in a circle", |guest| {
            guest.driver.descriptor(TX, 9, from_driver(TX_AT, 44), 1, 9);
            guest.driver.offer(TX, 9);
            guest.driver.notify(TX);
            guest.driver.turn(1000);
        }),
        ("no room for a packet", |guest| {
            guest.set_up_without_room();
            guest.driver.put(RX, &[for_driver(BUFFERS, 44)]);
            guest.send(PORTS, Op::CreditUpdate);
        }),
    ];
    let mut guest = Guest::new();
    for (what, do_it) in table {
        let (mut client, _) = guest.connected_by_host(52);
        do_it(&mut guest);
        assert!(guest.driver.needs_reset(), "{what}");
        assert!(is_closed(&mut client), "{what}");
        guest.set_up();
    }
    guest.connected_by_host(52);
}

impl Guest {
    /// As [`Guest::set_up`], without buffers for packets.
    fn set_up_without_room(&mut self) {
        self.driver.set_up(u64::MAX);
        self.driver.turn(100);
    }
}

#[test]
fn a_packet_that_says_more_than_its_chain_has_ends_its_connection() {
    for len in [6, BUFFER, BUFFER + 1, u32::MAX] {
        let mut guest = Guest::new();
        let (mut client, ports) = guest.connected_by_host(52);
        let header = Header {
            len,
            ..guest.header(ports, Op::Data)
        };
        guest.send_raw(header, b"short");
        guest.expect(Op::Reset);
        assert!(is_closed(&mut client), "{len}");
    }
}

#[test]
fn a_guest_speaks_for_itself_and_to_the_host_only() {
    let mut guest = Guest::new();
    let listener = guest.listener(7);
    listener.set_nonblocking(true).unwrap();
    for (src_cid, dst_cid) in [
        (3, 2),
        (2, 2),
        (CID.into(), CID.into()),
        (CID.into(), 3),
        (u64::MAX, 2),
        (1 << 32 | 42, 2),
    ] {
        let header = Header {
            src_cid,
            dst_cid,
            ..guest.header(PORTS, Op::Request)
        };
        guest.send_raw(header, &[]);
        assert_eq!(guest.turn(), [], "{src_cid} {dst_cid}");
    }
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    // Other types of socket are refused, in their own type.
    for kind in [0, 2, 3, u16::MAX] {
        let header = Header {
            kind,
            ..guest.header(PORTS, Op::Request)
        };
        guest.send_raw(header, &[]);
        assert_eq!(guest.expect(Op::Reset).0.kind, kind);
    }
}

#[test]
fn a_guest_that_connects_to_its_own_socket_is_a_client_like_any_other() {
    let mut guest = Guest::new();
    std::os::unix::fs::symlink("v", guest.folder.path("v_7")).unwrap();
    guest.send(PORTS, Op::Request);
    guest.expect(Op::Response);
    guest.send_data(PORTS, b"CONNECT 99\n");
    let (request, _) = guest.expect(Op::Request);
    let ports = Ports {
        host: request.src_port,
        guest: 99,
    };
    assert_eq!(request.dst_port, 99);
    guest.send(ports, Op::Response);
    assert_eq!(
        guest.expect(Op::Data).1,
        format!("OK {}\n", request.src_port).as_bytes()
    );
    guest.send_data(ports, b"to myself");
    assert_eq!(guest.expect(Op::Data).1, b"to myself");
}

#[test]
fn storms_are_answered_once_or_not_at_all() {
    let mut guest = Guest::new();
    let (_client, ports) = guest.connected_by_host(52);
    guest.set_up_without_room();
    let listener = guest.listener(7);
    guest.send(PORTS, Op::Request);
    let _stream = listener.accept().unwrap();
    for number in 0..5000 {
        guest.send(PORTS, Op::CreditRequest);
        guest.send(
            Ports { guest: number, ..ports },
            [Op::Response, Op::CreditRequest, Op::Data][usize::try_from(number % 3).unwrap()],
        );
    }
    assert_eq!(guest.sockets(), 1);
    guest.offer(RX_CHAINS);
    let mut ops: Vec<_> = Vec::new();
    loop {
        let packets = guest.turn();
        if packets.is_empty() {
            break;
        }
        ops.extend(packets.iter().map(|(header, _)| header.op));
    }
    let count = |op: Op| ops.iter().filter(|&&found| found == op.number()).count();
    assert_eq!(count(Op::Reset), 256);
    // Which tells of credit too.
    assert_eq!((count(Op::Response), ops.len()), (1, 257));
    guest.connected_by_host(52);
}

/// Whoever is to be answered stands in line until the guest takes an answer, which it need not ever do.
#[test]
fn connections_that_come_and_go_unheard_leave_nothing_behind() {
    let mut guest = Guest::new();
    let listener = guest.listener(7);
    guest.set_up_without_room();
    for _ in 0..5 * MAX_CONNECTIONS {
        guest.send(PORTS, Op::Request);
        let _stream = listener.accept().unwrap();
        guest.send(PORTS, Op::Reset);
    }
    assert_eq!(guest.sockets(), 0);
    let line = guest.vsock.lock().unwrap().mux.line();
    assert!(line <= MAX_LINE, "{line} places are taken by nobody");
    guest.offer(RX_CHAINS);
    guest.connected_by_guest(&listener, PORTS);
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_is_reset() {
    let mut guest = Guest::new();
    let listener = guest.listener(7);
    let _never_reads = guest.connected_by_guest(&listener, PORTS);
    let mut sent = 0;
    let packets = loop {
        guest.send_data(PORTS, &[0; 60_000]);
        sent += 60_000;
        let packets = guest.turn();
        if packets.iter().any(|(header, _)| header.op == Op::Reset.number()) {
            break packets;
        }
        assert!(sent < 64 << 20, "who holds all this?");
    };
    assert_eq!(packets.last().unwrap().0.op, Op::Reset.number());
    assert_eq!(guest.sockets(), 0);
}

/// Whatever a guest says in whatever order, with clients of the host's that come, go, speak and read or not.
#[test]
fn ten_thousand_seeded_cases_neither_stop_the_device_nor_outgrow_it() {
    let mut guest = Guest::new();
    let listener = guest.listener(7);
    listener.set_nonblocking(true).unwrap();
    let mut clients: Vec<UnixStream> = Vec::new();
    for seed in 1..=10_000 {
        let mut dice = Dice(seed);
        for _ in 0..dice.below(8) {
            hostile_packet(&mut guest, &mut dice);
            host_side(&guest.folder, &listener, &mut clients, &mut dice);
        }
        if guest.driver.needs_reset() {
            guest.set_up();
        }
        guest.turn();
        assert!(guest.sockets() <= MAX_CONNECTIONS, "seed {seed}");
        if seed.is_multiple_of(500) {
            guest.set_up();
            clients.clear();
            // What had come and was not taken in yet is so now, and goes.
            guest.turn();
            guest.run_out_of_patience();
            guest.turn();
            let (mut client, ports) = guest.connected_by_host(52);
            guest.send_data(ports, b"well");
            let mut data = [0; 4];
            client.read_exact(&mut data).unwrap();
            assert_eq!(&data, b"well", "seed {seed}");
            guest.set_up();
        }
    }
}

fn hostile_packet(guest: &mut Guest, dice: &mut Dice) {
    let known = guest.vsock.lock().unwrap().mux.some_ports();
    let data = vec![0xa5; usize::try_from(dice.pick(&[0, 1, 100, 5000, 65536, 65537])).unwrap()];
    let header = hostile_header(known, u32::try_from(data.len()).unwrap(), dice);
    if dice.below(50) == 0 {
        let len = dice.pick(&EXTREMES);
        let at = dice.pick(&[TX_AT, 0, u64::MAX, 1 << 24, (1 << 24) - 1]);
        let buffer = Buffer {
            at,
            len,
            writable: dice.below(2) == 0,
        };
        let queue = dice.pick(&[RX, TX, 2]);
        guest.driver.put(queue, &[buffer]);
        guest.driver.notify(queue);
        guest.driver.turn(1000);
        guest.driver.used(queue);
        // Its buffers are no more where they were.
        guest.set_up();
    } else {
        guest.send_raw(header, &data);
    }
}

/// A packet's, more often than not one that `known` may get next, with `honest` bytes behind it.
fn hostile_header(known: Option<Ports>, honest: u32, dice: &mut Dice) -> Header {
    let mut ports = Ports {
        host: dice.pick(&[7, 7, 8, 1 << 30, u32::MAX]),
        guest: dice.pick(&[0, 1, 2, 3, u32::MAX]),
    };
    if let (Some(known), 0..3) = (known, dice.below(4)) {
        ports = known;
    }
    Header {
        src_cid: dice.pick(&[CID.into(), CID.into(), CID.into(), CID.into(), 2, u64::MAX]),
        dst_cid: dice.pick(&[2, 2, 2, 2, CID.into(), u64::MAX]),
        kind: dice.pick(&[1, 1, 1, 1, 1, 2, 0xffff]),
        op: dice.pick(&[1, 1, 2, 2, 3, 4, 5, 5, 5, 6, 7, 0, 8, 0xffff]),
        flags: dice.pick(&[0, 1, 2, 3, u32::MAX]),
        len: if dice.below(3) > 0 {
            honest
        } else {
            dice.pick(&EXTREMES)
        },
        buf_alloc: dice.pick(&EXTREMES),
        fwd_cnt: dice.pick(&EXTREMES),
        src_port: ports.guest,
        dst_port: ports.host,
    }
}

const EXTREMES: [u32; 9] = [0, 1, 44, 100, BUFFER - 1, BUFFER, BUFFER + 1, 1 << 31, u32::MAX];

fn host_side(folder: &Folder, listener: &UnixListener, clients: &mut Vec<UnixStream>, dice: &mut Dice) {
    if let Ok((stream, _)) = listener.accept() {
        stream.set_nonblocking(true).unwrap();
        clients.push(stream);
    }
    if dice.below(4) == 0 {
        // Fails where the queue is full: nobody is taken in while the device has no driver.
        if let Ok(client) = unix_socket::connect(&folder.path("v")) {
            let mut client = UnixStream::from(client);
            let says = dice.pick(&["", "CONNECT 52\n", "CONNECT 52\nmore", "CONN", "nonsense\n"]);
            client.write_all(says.as_bytes()).unwrap();
            clients.push(client);
        }
    }
    if clients.is_empty() {
        return;
    }
    // Most of them are of connections long gone.
    let newest = dice.pick(&[1, 2, 4, clients.len()]).min(clients.len());
    let index = clients.len() - 1 - usize::try_from(dice.below(newest as u64)).unwrap();
    let client = &mut clients[index];
    match dice.below(6) {
        0 => drop(clients.swap_remove(index)),
        1 => drop(client.shutdown(dice.pick(&[
            std::net::Shutdown::Read,
            std::net::Shutdown::Write,
            std::net::Shutdown::Both,
        ]))),
        2 | 3 => drop(client.write(&[0x5a; 3000])),
        _ => drop(client.read(&mut [0; 100_000])),
    }
    if clients.len() > 200 {
        clients.clear();
    }
}
