use super::*;

/// A packet of the guest's that says it has room for 1000 bytes and has taken `fwd_cnt`.
fn packet(op: Op, flags: u32, len: u32, fwd_cnt: u32) -> Header {
    Header {
        op: op.number(),
        flags,
        len,
        buf_alloc: 1000,
        fwd_cnt,
        ..Header::default()
    }
}

fn control(op: Op) -> Header {
    packet(op, 0, 0, 0)
}

/// By the guest, with its RESPONSE said.
fn established() -> Connection {
    let mut connection = Connection::by_guest(&control(Op::Request));
    assert_eq!(connection.next(), Some(Next::Say(Op::Response, 0)));
    connection.said(Op::Response, 0);
    connection
}

/// By the host, with its REQUEST said.
fn requested() -> Connection {
    let mut connection = Connection::by_host();
    assert_eq!(connection.next(), Some(Next::Say(Op::Request, 0)));
    connection.said(Op::Request, 0);
    connection
}

/// As [`established`], with a host's end that has nothing to read.
fn quiet() -> Connection {
    let mut connection = established();
    connection.drained();
    assert_eq!(connection.next(), None);
    connection
}

fn said_next(connection: &mut Connection) -> Option<(Op, u32)> {
    match connection.next() {
        Some(Next::Say(op, flags)) => {
            connection.said(op, flags);
            connection.fill(&mut Header::default());
            Some((op, flags))
        }
        Some(Next::Read(_)) => panic!("nothing is to be read"),
        None => None,
    }
}

#[test]
fn each_packet_has_its_verdict_in_each_state() {
    use Op::{CreditRequest, CreditUpdate, Data, Request, Reset, Response, Shutdown};
    use Verdict::{Accepted, Broken, Closed, Gone, Noted};
    let table = [
        // Packet, in a connection requested, established, and one whose guest will not send.
        (control(Request), Broken, Broken, Broken),
        (control(Response), Accepted, Broken, Broken),
        (control(Reset), Gone, Gone, Gone),
        (packet(Shutdown, 0, 0, 0), Broken, Noted, Noted),
        (packet(Shutdown, SHUTDOWN_RECEIVE, 0, 0), Broken, Noted, Closed),
        (packet(Shutdown, SHUTDOWN_SEND, 0, 0), Broken, Noted, Noted),
        (packet(Shutdown, SHUTDOWN_BOTH, 0, 0), Broken, Closed, Closed),
        (packet(Shutdown, !SHUTDOWN_BOTH, 0, 0), Broken, Noted, Noted),
        (packet(Data, 0, 1, 0), Broken, Verdict::Data(1), Broken),
        (packet(Data, 0, BUFFER, 0), Broken, Verdict::Data(BUFFER), Broken),
        (packet(Data, 0, BUFFER + 1, 0), Broken, Broken, Broken),
        (packet(Data, 0, u32::MAX, 0), Broken, Broken, Broken),
        (control(CreditUpdate), Noted, Noted, Noted),
        (control(CreditRequest), Noted, Noted, Noted),
        (Header::default(), Broken, Broken, Broken),
        (
            Header {
                op: 8,
                ..Header::default()
            },
            Broken,
            Broken,
            Broken,
        ),
        (
            Header {
                op: u16::MAX,
                ..Header::default()
            },
            Broken,
            Broken,
            Broken,
        ),
    ];
    for (header, when_requested, when_established, when_half_closed) in table {
        assert_eq!(requested().hear(&header), when_requested, "requested: {header:?}");
        assert_eq!(established().hear(&header), when_established, "established: {header:?}");
        let mut half = established();
        half.hear(&packet(Shutdown, SHUTDOWN_SEND, 0, 0));
        assert_eq!(half.hear(&header), when_half_closed, "half-closed: {header:?}");
    }
}

#[test]
fn a_host_waits_with_its_data_until_the_guest_has_accepted() {
    let mut connection = requested();
    connection.readable();
    assert_eq!(connection.next(), None);
    assert_eq!(connection.hear(&control(Op::Response)), Verdict::Accepted);
    assert_eq!(connection.next(), Some(Next::Read(1000)));
}

#[test]
fn the_guest_is_sent_what_it_has_room_for_and_no_more() {
    let table = [
        // buf_alloc, fwd_cnt, sent; how much may be sent then.
        (1000, 0, 0, 1000),
        (1000, 0, 999, 1),
        (1000, 0, 1000, 0),
        (1000, 500, 1000, 500),
        // It shrank its buffer below what is under way.
        (100, 0, 500, 0),
        // Counters run over.
        (1000, u32::MAX - 9, 90, 900),
        // It took more than it was sent.
        (1000, 2000, 1000, 0),
        (u32::MAX, 0, 0, MAX_DATA),
        (0, 0, 0, 0),
    ];
    for (buf_alloc, fwd_cnt, sent, room) in table {
        let mut connection = established();
        connection.sent(sent);
        let header = Header {
            buf_alloc,
            ..packet(Op::CreditUpdate, 0, 0, fwd_cnt)
        };
        connection.hear(&header);
        let expected = match room {
            0 => Next::Say(Op::CreditRequest, 0),
            room => Next::Read(room),
        };
        assert_eq!(connection.next(), Some(expected), "{buf_alloc} {fwd_cnt} {sent}");
    }
}

#[test]
fn a_guest_without_room_is_asked_once_until_it_has_some() {
    let mut connection = established();
    connection.sent(1000);
    assert_eq!(said_next(&mut connection), Some((Op::CreditRequest, 0)));
    assert_eq!(connection.next(), None);
    connection.readable();
    connection.hear(&control(Op::CreditUpdate));
    assert_eq!(connection.next(), None, "it said that there is none");
    connection.hear(&packet(Op::CreditUpdate, 0, 0, 10));
    assert_eq!(connection.next(), Some(Next::Read(10)));
    connection.sent(10);
    assert_eq!(said_next(&mut connection), Some((Op::CreditRequest, 0)));
}

#[test]
fn no_more_is_held_than_the_guest_was_told_and_it_hears_when_half_is_free() {
    let mut connection = quiet();
    connection.full();
    let data = [7; BUFFER as usize];
    assert_eq!(connection.hear(&packet(Op::Data, 0, BUFFER, 0)), Verdict::Data(BUFFER));
    assert!(!connection.may_write());
    connection.hold(&data);
    assert!(connection.to_write().is_empty());
    connection.writable();
    assert_eq!(connection.to_write(), data);
    assert!(!connection.may_write(), "what comes later goes behind");
    connection.took_held(BUFFER as usize / 2 - 1);
    assert_eq!(connection.next(), None);
    connection.took_held(1);
    assert_eq!(connection.next(), Some(Next::Say(Op::CreditUpdate, 0)));
    let mut header = Header::default();
    connection.fill(&mut header);
    assert_eq!((header.buf_alloc, header.fwd_cnt), (BUFFER, BUFFER / 2));
    assert_eq!(connection.next(), None);
    assert_eq!(
        connection.hear(&packet(Op::Data, 0, BUFFER / 2, 0)),
        Verdict::Data(BUFFER / 2)
    );
    assert_eq!(
        connection.hear(&packet(Op::Data, 0, BUFFER / 2 + 1, 0)),
        Verdict::Broken
    );
}

#[test]
fn a_guest_that_asks_for_credit_is_answered_once() {
    let mut connection = quiet();
    for _ in 0..3 {
        connection.hear(&control(Op::CreditRequest));
    }
    assert_eq!(said_next(&mut connection), Some((Op::CreditUpdate, 0)));
    assert_eq!(connection.next(), None);
}

#[test]
fn a_guest_that_will_not_send_ends_the_file_once_all_before_is_taken() {
    let mut connection = quiet();
    connection.full();
    connection.hear(&packet(Op::Data, 0, 3, 0));
    connection.hold(b"abc");
    connection.hear(&packet(Op::Shutdown, SHUTDOWN_SEND, 0, 0));
    assert!(!connection.shuts_sending());
    connection.took_held(3);
    assert!(connection.shuts_sending());
    assert!(!connection.shuts_sending(), "once is enough");
    assert!(!connection.shuts_receiving());
    connection.readable();
    assert_eq!(connection.next(), Some(Next::Read(1000)), "the other direction goes on");
}

#[test]
fn a_guest_that_will_not_receive_is_sent_nothing() {
    let mut connection = established();
    connection.hear(&packet(Op::Shutdown, SHUTDOWN_RECEIVE, 0, 0));
    assert!(connection.shuts_receiving());
    assert!(!connection.shuts_receiving() && !connection.shuts_sending());
    assert_eq!(connection.next(), None);
    assert_eq!(connection.hear(&packet(Op::Data, 0, 5, 0)), Verdict::Data(5));
    connection.hung_up();
    assert_eq!(said_next(&mut connection), Some((Op::Shutdown, SHUTDOWN_BOTH)));
    assert!(connection.awaits_reset());
}

#[test]
fn a_host_that_will_not_send_leaves_the_guest_sending() {
    let mut connection = established();
    connection.end_of_file();
    assert_eq!(said_next(&mut connection), Some((Op::Shutdown, SHUTDOWN_SEND)));
    assert_eq!(connection.next(), None);
    assert!(!connection.awaits_reset());
    assert_eq!(connection.hear(&packet(Op::Data, 0, 5, 0)), Verdict::Data(5));
    connection.hung_up();
    assert_eq!(said_next(&mut connection), Some((Op::Shutdown, SHUTDOWN_BOTH)));
    assert!(connection.awaits_reset());
}

#[test]
fn what_a_host_sent_before_it_closed_still_arrives() {
    let mut connection = quiet();
    connection.full();
    connection.hear(&packet(Op::Data, 0, 3, 0));
    connection.hold(b"abc");
    connection.hung_up();
    assert!(connection.is_flushed(), "nobody takes it");
    assert_eq!(said_next(&mut connection), Some((Op::Shutdown, SHUTDOWN_RECEIVE)));
    assert_eq!(connection.next(), Some(Next::Read(1000)));
    connection.sent(1000);
    assert_eq!(said_next(&mut connection), Some((Op::CreditRequest, 0)));
    connection.hear(&packet(Op::CreditUpdate, 0, 0, 1000));
    assert_eq!(connection.next(), Some(Next::Read(1000)));
    connection.end_of_file();
    assert_eq!(said_next(&mut connection), Some((Op::Shutdown, SHUTDOWN_BOTH)));
    assert_eq!(connection.next(), None);
}
