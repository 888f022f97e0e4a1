//! Connections as they should be.

use super::*;

#[test]
fn the_guest_finds_its_context_id() {
    let guest = Guest::new();
    assert_eq!(u64::from_le_bytes(guest.driver.config(0)), u64::from(CID));
    assert_eq!(guest.driver.config::<8>(4), [0; 8], "nothing else");
}

#[test]
fn a_host_connects_and_data_goes_both_ways() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected_by_host(52);
    client.write_all(b"ping").unwrap();
    assert_eq!(guest.expect(Op::Data).1, b"ping");
    guest.send_data(ports, b"pong!");
    let mut answer = [0; 5];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"pong!");
    assert!(guest.driver.interrupted());
    assert_eq!(guest.counted(|metrics| &metrics.rx_bytes_count), 4);
    assert_eq!(guest.counted(|metrics| &metrics.tx_bytes_count), 5);
    assert_eq!(guest.counted(|metrics| &metrics.conns_added), 1);
    // Two to the same port are two.
    let (_other, other_ports) = guest.connected_by_host(52);
    assert_ne!(ports, other_ports);
}

#[test]
fn what_a_client_says_is_a_connect_line_or_the_end_of_it() {
    let mut guest = Guest::new();
    for good in [
        "CONNECT 52\n",
        "connect 52\n",
        "Connect  52\r\n",
        "CONNECT 0000000000000000000052\n",
    ] {
        let mut client = guest.client(good);
        let (request, _) = guest.expect(Op::Request);
        assert_eq!(request.dst_port, 52, "{good:?}");
        guest.send(request_ports(&request), Op::Reset);
        assert!(is_closed(&mut client), "nobody listens there: {good:?}");
    }
    let bad = [
        "\n",
        "CONNECT\n",
        "CONNECT \n",
        "CONNECT x\n",
        "CONNECT -1\n",
        "CONNECT 4294967296\n",
        "HELLO 52\n",
        "52\n",
        "CONNECT\u{e9} 52\n",
        "CONNECT 000000000000000000000000052\n",
        "GET / HTTP/1.1 or something like it\n",
    ];
    for bad in bad {
        let mut client = guest.client(bad);
        assert_eq!(guest.turn(), [], "{bad:?}");
        assert!(is_closed(&mut client), "{bad:?}");
    }
    assert_eq!(guest.sockets(), 0);
}

fn request_ports(request: &Header) -> Ports {
    Ports {
        host: request.src_port,
        guest: request.dst_port,
    }
}

#[test]
fn a_client_may_say_its_line_in_pieces_and_go_on_at_once() {
    let mut guest = Guest::new();
    let mut client = guest.client("CONN");
    assert_eq!(guest.turn(), []);
    client.write_all(b"ECT 5").unwrap();
    assert_eq!(guest.turn(), []);
    client.write_all(b"2\nand more\nof it").unwrap();
    let (request, _) = guest.expect(Op::Request);
    assert_eq!(guest.turn(), [], "until it is accepted");
    guest.send(request_ports(&request), Op::Response);
    assert_eq!(guest.expect(Op::Data).1, b"and more\nof it");
    assert!(line(&mut client).starts_with("OK "));
}

#[test]
fn a_guest_connects_to_who_listens_and_is_refused_where_nobody_does() {
    let mut guest = Guest::new();
    let listener = guest.listener(7);
    let mut stream = guest.connected_by_guest(&listener, PORTS);
    guest.send_data(PORTS, b"to the host");
    let mut data = [0; 11];
    stream.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"to the host");
    stream.write_all(b"to the guest").unwrap();
    assert_eq!(guest.expect(Op::Data).1, b"to the guest");
    drop(listener);
    std::fs::write(guest.folder.path("v_9"), "no socket").unwrap();
    for host in [7, 8, 9] {
        let ports = Ports { host, guest: 99 };
        guest.send(ports, Op::Request);
        let (reset, _) = guest.expect(Op::Reset);
        assert_eq!((reset.src_port, reset.dst_port), (host, 99));
    }
    assert_eq!(guest.sockets(), 1);
}

/// Four MiB each way, at once, through a guest's buffer of 3000 bytes and a host's that is read in little pieces.
#[test]
fn mebibytes_go_both_ways_through_little_credit_unchanged() {
    const TOTAL: usize = 4 << 20;
    let mut guest = Guest::new();
    guest.buf_alloc = 3000;
    let listener = guest.listener(7);
    let mut writing = guest.connected_by_guest(&listener, PORTS);
    let mut reading = writing.try_clone().unwrap();
    let writer = std::thread::spawn(move || writing.write_all(&pattern(0, TOTAL)).unwrap());
    let reader = std::thread::spawn(move || {
        let (mut at, mut piece) = (0, [0; 777]);
        while at < TOTAL {
            let len = reading.read(&mut piece).unwrap();
            assert!(piece[..len] == pattern(at, len), "at {at}");
            at += len;
        }
    });
    let (mut got, mut sent, mut fwd_cnt) = (0, 0, 0);
    let mut room = BUFFER as usize;
    while got < TOTAL || sent < TOTAL {
        let len = room.min(5000).min(TOTAL - sent);
        if len > 0 {
            let header = Header {
                len: u32::try_from(len).unwrap(),
                fwd_cnt,
                ..guest.header(PORTS, Op::Data)
            };
            guest.send_raw(header, &pattern(sent, len));
            sent += len;
            room -= len;
        }
        guest.collect();
        if len == 0 && guest.inbox.is_empty() {
            let events = guest.driver.turn_for(1, Duration::from_secs(60));
            assert!(events > 0, "stuck at {got} and {sent}");
            guest.collect();
        }
        while let Some((header, data)) = guest.inbox.pop_front() {
            let counted = usize::try_from(header.fwd_cnt).unwrap();
            room = BUFFER as usize - (sent - counted);
            let op = Op::from_number(header.op).unwrap();
            if op == Op::Data {
                assert!(data == pattern(got, data.len()), "at {got}");
                got += data.len();
                assert!(got - fwd_cnt as usize <= 3000, "more than the guest has room for");
            }
            if op == Op::Data || op == Op::CreditRequest {
                fwd_cnt = u32::try_from(got).unwrap();
                let header = Header {
                    fwd_cnt,
                    ..guest.header(PORTS, Op::CreditUpdate)
                };
                guest.send_raw(header, &[]);
            }
        }
    }
    writer.join().unwrap();
    // What is held is written as the reader takes it.
    while !reader.is_finished() {
        guest.driver.turn_for(1, Duration::from_millis(10));
        guest.collect();
    }
    reader.join().unwrap();
}

#[test]
fn each_side_may_end_its_half_and_go_on_hearing() {
    let mut guest = Guest::new();
    let listener = guest.listener(7);
    let mut stream = guest.connected_by_guest(&listener, PORTS);
    stream.write_all(b"question").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.expect(Op::Data).1, b"question");
    assert_eq!(guest.expect(Op::Shutdown).0.flags, SHUTDOWN_SEND);
    guest.send_data(PORTS, b"answer");
    guest.send_shutdown(PORTS, SHUTDOWN_SEND);
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    // Both halves have ended: nobody is left to hear the guest.
    assert_eq!(guest.expect(Op::Shutdown).0.flags, SHUTDOWN_BOTH);

    let ports = Ports { host: 7, guest: 5 };
    let mut stream = guest.connected_by_guest(&listener, ports);
    guest.send_data(ports, b"question");
    guest.send_shutdown(ports, SHUTDOWN_SEND);
    let mut question = String::new();
    stream.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    stream.write_all(b"answer").unwrap();
    let (_, data) = loop {
        let packet = guest
            .turn()
            .into_iter()
            .find(|(header, _)| header.op == Op::Data.number());
        if let Some(packet) = packet {
            break packet;
        }
    };
    assert_eq!(data, b"answer");
}

#[test]
fn a_guest_that_will_not_receive_has_its_writer_told() {
    let mut guest = Guest::new();
    let listener = guest.listener(7);
    let mut stream = guest.connected_by_guest(&listener, PORTS);
    guest.send_shutdown(PORTS, SHUTDOWN_RECEIVE);
    assert_eq!(stream.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    guest.send_data(PORTS, b"still");
    let mut data = [0; 5];
    stream.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"still");
}

#[test]
fn a_host_that_closes_ends_the_connection_by_the_guests_reset_or_its_own() {
    let mut guest = Guest::new();
    let listener = guest.listener(7);
    for answers in [true, false] {
        let stream = guest.connected_by_guest(&listener, PORTS);
        drop(stream);
        let mut flags = 0;
        while flags != SHUTDOWN_BOTH {
            flags = guest.expect(Op::Shutdown).0.flags;
        }
        if answers {
            guest.send(PORTS, Op::Reset);
            assert_eq!(guest.turn(), []);
        } else {
            guest.run_out_of_patience();
            guest.expect(Op::Reset);
        }
        assert_eq!(guest.sockets(), 0);
    }
    assert_eq!(guest.counted(|metrics| &metrics.conns_removed), 2);
    assert_eq!(guest.counted(|metrics| &metrics.conns_killed), 1);
}

/// A connection by the guest, which has sent as much as there is room for, in the host's socket and then in ours, and closed it;
/// with how much that is.
fn parting(guest: &mut Guest, listener: &UnixListener) -> (UnixStream, usize) {
    let stream = guest.connected_by_guest(listener, PORTS);
    let (mut sent, mut forwarded) = (0, 0);
    while sent - forwarded + 4096 <= BUFFER as usize {
        guest.send_data(PORTS, &pattern(sent, 4096));
        sent += 4096;
        guest.send(PORTS, Op::CreditRequest);
        let updates = guest.turn();
        forwarded = updates.last().expect("an update").0.fwd_cnt as usize;
    }
    assert!(forwarded < sent);
    guest.send_shutdown(PORTS, SHUTDOWN_BOTH);
    guest.expect(Op::Reset);
    (stream, sent)
}

#[test]
fn what_a_guest_sent_before_it_closed_arrives_however_late_it_is_read() {
    let mut guest = Guest::new();
    let listener = guest.listener(7);
    let (mut stream, sent) = parting(&mut guest, &listener);
    // The ports are free for another connection meanwhile, which takes nothing from the first.
    let other = guest.connected_by_guest(&listener, PORTS);
    assert_eq!(guest.sockets(), 2);
    // As slowly as may be, with no more than a few of the pieces that it was written in at a time.
    let (mut data, mut piece) = (Vec::new(), [0; 4 * 4096]);
    while guest.sockets() > 1 {
        let len = stream.read(&mut piece).unwrap();
        data.extend(&piece[..len]);
        guest.pass(PARTING_PATIENCE * 9 / 10);
        guest.driver.turn(100);
    }
    stream.read_to_end(&mut data).unwrap();
    assert!(data == pattern(0, sent));
    drop(other);
}

#[test]
fn a_host_that_takes_nothing_more_has_its_place_for_a_minute_and_no_longer() {
    let mut guest = Guest::new();
    let listener = guest.listener(7);
    let (mut stream, sent) = parting(&mut guest, &listener);
    guest.pass(PARTING_PATIENCE * 9 / 10);
    assert_eq!(guest.sockets(), 1);
    guest.pass(PARTING_PATIENCE / 10);
    assert_eq!((guest.sockets(), guest.turn()), (0, vec![]));
    // What is in the host's socket is the host's.
    let mut data = Vec::new();
    stream.read_to_end(&mut data).unwrap();
    assert!(data.len() < sent && data == pattern(0, data.len()));
}

#[test]
fn a_reset_ends_a_connection_at_once() {
    let mut guest = Guest::new();
    let (mut client, ports) = guest.connected_by_host(52);
    guest.send(ports, Op::Reset);
    assert!(is_closed(&mut client));
    assert_eq!((guest.sockets(), guest.turn()), (0, vec![]));
    // Of a connection that is none a packet is answered by one, but for a reset.
    guest.send(ports, Op::CreditUpdate);
    guest.expect(Op::Reset);
    guest.send(ports, Op::Reset);
    assert_eq!(guest.turn(), []);
}

#[test]
fn who_says_nothing_is_not_waited_for() {
    let mut guest = Guest::new();
    let mut silent = guest.client("");
    let mut half = guest.client("CONNECT 5");
    let mut unanswered = guest.client("CONNECT 52\n");
    let (request, _) = guest.expect(Op::Request);
    assert_eq!(guest.turn(), []);
    assert_eq!(guest.sockets(), 3);
    guest.run_out_of_patience();
    let (reset, _) = guest.expect(Op::Reset);
    assert_eq!(request_ports(&reset), request_ports(&request));
    assert_eq!(guest.sockets(), 0);
    assert!([&mut silent, &mut half, &mut unanswered].into_iter().all(is_closed));
    assert_eq!(guest.counted(|metrics| &metrics.conns_killed), 3);
    // Too late.
    guest.send(request_ports(&request), Op::Response);
    guest.expect(Op::Reset);
    guest.connected_by_host(52);
}

#[test]
fn the_device_is_woken_when_somebody_is_late_and_by_nothing_else() {
    let mut guest = Guest::new();
    let listener = guest.listener(7);
    // A parting has set the timer: who is late sooner is not to wait for that.
    let _parting = parting(&mut guest, &listener);
    guest.vsock.lock().unwrap().clock = None;
    let mut silent = guest.client("");
    while guest.counted(|metrics| &metrics.conns_killed) == 0 {
        assert!(guest.driver.turn_for(1, PARTING_PATIENCE / 2) > 0);
    }
    assert!(is_closed(&mut silent));
    assert_eq!(guest.sockets(), 1);
}

#[test]
fn a_reset_of_the_device_ends_all_and_the_next_driver_finds_those_who_waited() {
    let mut guest = Guest::new();
    let (mut client, _) = guest.connected_by_host(52);
    let listener = guest.listener(7);
    let mut stream = guest.connected_by_guest(&listener, PORTS);
    guest.driver.set(crate::devices::virtio::testing::STATUS, 0);
    assert!(is_closed(&mut client) && is_closed(&mut stream));
    let mut early = guest.client("CONNECT 53\n");
    assert_eq!(guest.driver.turn(10), 0, "nobody is taken in without a driver");
    guest.set_up();
    let (request, _) = guest.expect(Op::Request);
    guest.send(request_ports(&request), Op::Response);
    assert!(line(&mut early).starts_with("OK "));
}

#[test]
fn a_thousand_connections_have_each_their_data_and_one_too_many_is_refused() {
    // Two descriptors each, and those of other tests.
    let (current, maximum) = {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        (limit.current, limit.maximum)
    };
    if current.is_some_and(|current| current < 4096) {
        let limit = rustix::process::Rlimit {
            current: maximum.map(|maximum| maximum.min(4096)).or(Some(4096)),
            maximum,
        };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
    }
    let mut guest = Guest::new();
    let listener = guest.listener(7);
    let ports = |guest| Ports { host: 7, guest };
    let mut streams = Vec::new();
    for number in 0..1000 {
        streams.push(guest.connected_by_guest(&listener, ports(number)));
    }
    let mut clients: Vec<_> = (1000..MAX_CONNECTIONS).map(|_| guest.connected_by_host(52)).collect();
    assert_eq!(guest.sockets(), MAX_CONNECTIONS);
    guest.send(ports(5000), Op::Request);
    guest.expect(Op::Reset);
    let mut refused = guest.client("CONNECT 52\n");
    assert_eq!(guest.turn(), []);
    assert!(is_closed(&mut refused));

    for (number, stream) in (0u32..).zip(&mut streams) {
        stream.write_all(&number.to_le_bytes()).unwrap();
    }
    let mut seen = Vec::new();
    while seen.len() < streams.len() {
        let (header, data) = guest.expect(Op::Data);
        assert_eq!(data, header.dst_port.to_le_bytes());
        seen.push(header.dst_port);
        guest.send_data(ports(header.dst_port), &data);
    }
    assert_eq!(
        {
            seen.sort_unstable();
            seen.dedup();
            seen.len()
        },
        streams.len()
    );
    for (number, stream) in (0u32..).zip(&mut streams) {
        let mut data = [0; 4];
        stream.read_exact(&mut data).unwrap();
        assert_eq!(data, number.to_le_bytes());
    }
    // One goes, one comes.
    let (client, ports) = clients.pop().unwrap();
    drop(client);
    guest.send(ports, Op::Reset);
    guest.turn();
    guest.connected_by_host(52);
}

/// Clients that have not said what they want, and those that the guest has not answered.
#[test]
fn nobody_is_late_for_the_guest_having_been_held() {
    let mut guest = Guest::new();
    let _silent = guest.client("");
    let mut client = guest.client("CONNECT 52\n");
    let (request, _) = guest.expect(Op::Request);
    let ports = Ports {
        host: request.src_port,
        guest: 52,
    };
    guest.pass(PATIENCE / 2);
    guest.vsock.lock().unwrap().set_held(true);
    // Who comes meanwhile has all of his time too, from when it goes on.
    let _late = guest.client("");
    guest.turn();
    guest.pass(4 * PATIENCE);
    guest.turn();
    assert_eq!(guest.sockets(), 3, "while it is held");
    guest.vsock.lock().unwrap().set_held(false);
    guest.pass(Duration::ZERO);
    guest.turn();
    assert_eq!(guest.sockets(), 3, "as it goes on");
    guest.send(ports, Op::Response);
    assert_eq!(line(&mut client), format!("OK {}\n", ports.host));
    // What was left of it before runs on.
    guest.pass(PATIENCE / 2);
    guest.turn();
    assert_eq!(guest.sockets(), 2);
    guest.pass(PATIENCE / 2);
    guest.turn();
    assert_eq!(guest.sockets(), 1, "the one that was answered");
}
