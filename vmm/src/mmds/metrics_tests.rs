//! What the stack counts, against a guest whose doings are known.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::stack_tests::{Bench, GET_NAME, named, ok};
use crate::mmds::config::{DEFAULT_IPV4, Version};

fn is(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[test]
fn a_conversation_is_counted_by_its_frames_its_tokens_and_its_connection() {
    let mut bench = Bench::new(Version::V2, named());
    let connection = bench.open();
    assert_eq!(bench.ask(connection, GET_NAME).0, "401 Unauthorized");
    let wrong = "GET /name HTTP/1.1\r\nX-metadata-token: none\r\n\r\n";
    assert_eq!(bench.ask(connection, wrong).0, "401 Unauthorized");
    let put = "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 30\r\n\r\n";
    let (_, token) = bench.ask(connection, put);
    let get = format!("GET /name HTTP/1.1\r\nX-metadata-token: {token}\r\n\r\n");
    assert_eq!(bench.ask(connection, &get), ok("chronovisor"));

    let metrics = bench.stack.metrics.clone();
    assert_eq!((is(&metrics.rx_no_token), is(&metrics.rx_invalid_token)), (1, 1));
    assert_eq!(
        (is(&metrics.connections_created), is(&metrics.connections_destroyed)),
        (1, 0)
    );
    // All but the question for our MAC address is TCP.
    assert_eq!(is(&metrics.rx_accepted), is(&metrics.rx_count) + 1);
    // Our MAC address, the handshake's answer, four responses, and maybe acknowledgements of their own.
    assert!(is(&metrics.tx_frames) >= 6);
    assert_eq!(is(&metrics.tx_frames), is(&metrics.tx_count));
    // Ethernet, IPv4 and TCP or ARP have 42 bytes at least.
    assert!(is(&metrics.tx_bytes) > 42 * is(&metrics.tx_frames) + token.len() as u64 + "chronovisor".len() as u64);

    // Silent for too long: reset.
    bench.wait(Duration::from_secs(120));
    bench.wait(Duration::from_secs(1));
    assert_eq!(
        (is(&metrics.connections_created), is(&metrics.connections_destroyed)),
        (1, 1)
    );
}

#[test]
fn what_is_dropped_and_what_is_no_tcp_is_counted_as_that() {
    let mut bench = Bench::new(Version::V1, named());
    let frame = |packet: &[u8]| [&[0x02; 12][..], &[8, 0], packet].concat();
    // A packet of 20 bytes, all header: of UDP (17) or TCP (6), whose segment would need 20 more.
    let packet = |protocol: u8| {
        let ours = DEFAULT_IPV4.octets();
        [
            &[0x45, 0, 0, 20, 0, 0, 0, 0, 64, protocol, 0, 0, 172, 16, 0, 2][..],
            &ours,
        ]
        .concat()
    };
    let mut nonsense = packet(17);
    // Longer than its frame.
    nonsense[3] = 21;
    for packet in [packet(17), packet(6), nonsense] {
        bench.stack.receive(&frame(&packet), bench.now);
    }
    let metrics = &bench.stack.metrics;
    assert_eq!(is(&metrics.rx_accepted), 3);
    assert_eq!(is(&metrics.rx_accepted_unusual), 1);
    assert_eq!(is(&metrics.rx_accepted_err), 2);
    assert_eq!((is(&metrics.rx_count), is(&metrics.connections_created)), (0, 0));
}
