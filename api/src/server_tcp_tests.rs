//! Over TCP.

use super::*;

#[test]
fn the_loopback_is_served_as_the_socket_is() {
    let tcp = socket::bind_tcp("127.0.0.1:0".parse().unwrap(), Reach::Loopback).unwrap();
    let address = tcp.local_addr().unwrap();
    let backend = Arc::new(Fake::new(RunState::Running));
    let listeners = Listeners {
        unix: None,
        tcp: Some(tcp),
        token: None,
    };
    let server = Server::spawn().unwrap();
    server.open(listeners, backend, Limits::default(), || {}).unwrap();
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream
        .write_all(b"GET /version HTTP/1.1\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 200 ") && answer.contains("firecracker_version"),
        "{answer}"
    );
}

#[test]
fn a_name_that_is_another_hosts_is_refused_over_tcp_and_taken_over_the_unix_socket() {
    let request = b"GET /version HTTP/1.1\r\nHost: attacker.example\r\nConnection: close\r\n\r\n";
    let served = Served::new();
    let mut unix = served.connect();
    unix.write_all(request).unwrap();
    assert!(read_all(unix).starts_with("HTTP/1.1 200 "));

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let listeners = Listeners {
        unix: None,
        tcp: Some(listener),
        token: None,
    };
    let server = Server::spawn().unwrap();
    let backend = Arc::new(Fake::new(RunState::Running));
    server.open(listeners, backend, Limits::default(), || {}).unwrap();
    let mut tcp = std::net::TcpStream::connect(address).unwrap();
    tcp.set_read_timeout(Some(PATIENCE)).unwrap();
    tcp.write_all(request).unwrap();
    let answer = read_all(tcp);
    assert!(
        answer.starts_with("HTTP/1.1 400 ") && answer.contains("fault_message"),
        "{answer}"
    );
}

#[test]
fn over_tcp_who_brings_the_token_is_served_on_however_many_bring_none() {
    const TOKEN: &str = "c2VjcmV0IG9mIHRoZSB0ZXN0";
    let listener = socket::bind_tcp("127.0.0.1:0".parse().unwrap(), Reach::Loopback).unwrap();
    let address = listener.local_addr().unwrap();
    let listeners = Listeners {
        tcp: Some(listener),
        token: Some(Token::new(TOKEN.as_bytes()).unwrap()),
        ..Listeners::default()
    };
    let server = Server::spawn().unwrap();
    let backend = Arc::new(Fake::new(RunState::Running));
    server.open(listeners, backend, Limits::default(), || {}).unwrap();
    let connect = || {
        let stream = std::net::TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    // An answer is one JSON object, and written in one piece.
    let status = |mut stream: &std::net::TcpStream, authorization: &str| {
        let request = format!("GET /version HTTP/1.1\r\nHost: localhost\r\n{authorization}\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"}") {
            let mut bytes = [0; 4096];
            let read = stream.read(&mut bytes).unwrap();
            assert_ne!(read, 0, "it was closed: {}", String::from_utf8_lossy(&answer));
            answer.extend_from_slice(&bytes[..read]);
        }
        String::from_utf8(answer["HTTP/1.1 ".len()..][..3].to_vec()).unwrap()
    };
    let token = format!("Authorization: Bearer {TOKEN}\r\n");
    let client = connect();
    assert_eq!(status(&client, &token), "200");
    let strangers: Vec<_> = (0..2 * CONNECTIONS)
        .map(|_| {
            let stranger = connect();
            assert_eq!(status(&stranger, ""), "401");
            stranger
        })
        .collect();
    assert_eq!(status(&client, &token), "200");
    assert_eq!(read_all(&strangers[0]).len(), 0, "of those one went");
}
