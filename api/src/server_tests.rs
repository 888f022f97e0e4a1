use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;

use vmm::{Action, Reply, RunState};

use super::*;
use crate::backend::Answer;
use crate::backend::fake::Fake;
use crate::client::{Client, ClientError};
use crate::scratch::Scratch;
use crate::socket::{self, Reach};

/// Far above what any answer takes on the slowest machine: only so that a failure does not hang.
const PATIENCE: Duration = Duration::from_secs(60);

struct Served {
    scratch: Scratch,
    server: Server,
}

impl Served {
    fn with(limits: Limits) -> Self {
        let scratch = Scratch::new();
        let backend = Arc::new(Fake::new(RunState::Running));
        let listeners = Listeners {
            unix: Some(socket::bind(&scratch.path("s")).unwrap()),
            tcp: None,
            token: None,
        };
        let server = Server::spawn().unwrap();
        server.open(listeners, backend, limits, || {}).unwrap();
        Self { scratch, server }
    }

    fn new() -> Self {
        Self::with(Limits::default())
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.scratch.path("s")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn client(&self) -> Result<Client, ClientError> {
        Client::with_patience(&self.scratch.path("s"), PATIENCE)
    }

    fn answers(&self) -> bool {
        self.client().and_then(|mut client| client.get("/version")).is_ok()
    }
}

/// All that comes until the server closes the connection.
fn read_all(mut stream: impl Read) -> String {
    let mut answer = Vec::new();
    // A connection that is reset is closed too.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8(answer).unwrap()
}

#[test]
fn half_a_request_held_open_holds_nobody_up() {
    let served = Served::new();
    let halves: [&[u8]; 5] = [
        b"",
        b"G",
        b"GET / HTTP/1.1\r\nHost",
        b"PUT /actions HTTP/1.1\r\nContent-Length: 10\r\n\r\n{",
        b"\r\n",
    ];
    let held: Vec<_> = halves.iter().map(|half| (served.connect(), half)).collect();
    for (mut stream, half) in held.iter().map(|(stream, half)| (stream, half)) {
        stream.write_all(half).unwrap();
        assert!(served.answers());
    }
    drop(served.server);
    for (stream, _) in held {
        assert_eq!(read_all(stream), "");
    }
}

#[test]
fn the_path_is_free_before_requests_under_way_are_waited_for() {
    let served = Served::with(Limits {
        body_time: PATIENCE,
        linger: PATIENCE,
        ..Limits::default()
    });
    let mut under_way = served.connect();
    under_way
        .write_all(b"PUT /actions HTTP/1.1\r\nContent-Length: 10\r\n\r\n{")
        .unwrap();
    // Connections are served in the order they were made.
    assert!(served.answers());
    let Served { scratch, server } = served;
    let (path, begun) = (scratch.path("s"), std::time::Instant::now());
    let stop = std::thread::spawn(move || drop(server));
    while path.exists() {
        assert!(begun.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
    let _successor = socket::bind(&path).unwrap();
    assert!(!stop.is_finished());
    drop(under_way);
    stop.join().unwrap();
    assert!(path.exists(), "it is another's now");
}

#[test]
fn a_body_that_does_not_come_is_refused_in_time() {
    let served = Served::with(Limits {
        body_time: Duration::from_millis(20),
        ..Limits::default()
    });
    let mut stream = served.connect();
    stream
        .write_all(b"PUT /actions HTTP/1.1\r\nContent-Length: 10\r\nConnection: close\r\n\r\n{")
        .unwrap();
    let answer = read_all(stream);
    assert!(
        answer.starts_with("HTTP/1.1 400 ") && answer.contains("did not arrive"),
        "{answer}"
    );
}

#[test]
fn a_body_of_10_mib_is_refused_and_its_sender_gets_to_read_that() {
    let served = Served::new();
    let body = vec![b' '; 10 << 20];
    for chunked in [false, true] {
        let mut stream = served.connect();
        let head = "PUT /actions HTTP/1.1\r\nConnection: close\r\n";
        if chunked {
            write!(stream, "{head}Transfer-Encoding: chunked\r\n\r\n{:x}\r\n", body.len()).unwrap();
            stream.write_all(&body).unwrap();
            stream.write_all(b"\r\n0\r\n\r\n").unwrap();
        } else {
            write!(stream, "{head}Content-Length: {}\r\n\r\n", body.len()).unwrap();
            stream.write_all(&body).unwrap();
        }
        let answer = read_all(stream);
        assert!(
            answer.starts_with("HTTP/1.1 400 ") && answer.contains("51200"),
            "chunked {chunked}: {answer}"
        );
        assert!(served.answers());
    }
}

#[test]
fn an_endless_body_is_cut_off() {
    let served = Served::new();
    let mut stream = served.connect();
    write!(
        stream,
        "PUT /actions HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
        1_u64 << 40
    )
    .unwrap();
    let answer = read_all(stream);
    assert!(
        answer.starts_with("HTTP/1.1 400 ") && answer.contains("51200"),
        "{answer}"
    );
    assert!(served.answers());
}

#[test]
fn what_is_not_http_costs_its_own_connection_only() {
    let served = Served::new();
    let endless_head = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(1 << 20));
    for bytes in [
        b"\x16\x03\x01\x02\x00\x01\x00".as_slice(),
        b"hello\r\n\r\n",
        b"\0\0\0\0",
        endless_head.as_bytes(),
    ] {
        let mut stream = served.connect();
        // It may be closed before all is written.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let answer = read_all(stream);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
        assert!(served.answers());
    }
}

#[test]
fn who_comes_next_is_served_and_of_those_that_said_nothing_the_first_goes() {
    let served = Served::new();
    let mut client = served.client().unwrap();
    client.get("/version").unwrap();
    let mut silent: Vec<_> = (1..CONNECTIONS).map(|_| served.connect()).collect();
    let later = served.connect();
    assert!(served.answers(), "a newcomer has a place");
    // Of this process's, which are all: those are closed that the two of them took.
    assert_eq!(read_all(silent.remove(0)), "");
    assert_eq!(read_all(silent.remove(0)), "");
    for stream in silent.iter().chain([&later]) {
        stream.set_nonblocking(true).unwrap();
        let read = { stream }.read(&mut [0]).unwrap_err();
        assert_eq!(read.kind(), io::ErrorKind::WouldBlock, "open");
    }
    // Who has had answers is served on, however many come.
    for _ in 0..2 * CONNECTIONS {
        drop(served.connect());
        client.get("/vcpus").unwrap();
    }
}

#[test]
fn a_head_that_does_not_come_to_an_end_costs_its_connection() {
    let served = Served::with(Limits {
        head_time: Duration::from_millis(20),
        ..Limits::default()
    });
    let mut stream = served.connect();
    stream.write_all(b"GET /version HTTP/1.1\r\nHost: lo").unwrap();
    assert_eq!(read_all(stream), "");
    assert!(served.answers());
}

#[test]
fn what_is_beyond_a_limit_is_refused_with_its_status_and_read_no_further() {
    let served = Served::new();
    let put = "PUT /actions HTTP/1.1\r\n";
    let many: String = (0..101).map(|n| format!("X-{n}: x\r\n")).collect();
    let gib = 1_u64 << 30;
    let size = format!("Request payload with size {gib} is larger than the limit of 51200 allowed by server.");
    let table = [
        (
            format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(HEAD_BYTES)),
            "431",
            "",
        ),
        (format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(HEAD_BYTES)), "431", ""),
        (format!("GET / HTTP/1.1\r\n{many}\r\n"), "431", ""),
        // Nothing of it is sent, nor waited for.
        (format!("{put}Content-Length: {gib}\r\n\r\n"), "400", &size),
        (
            format!("{put}Content-Length: {gib}\r\nExpect: 100-continue\r\n\r\n"),
            "400",
            &size,
        ),
        (format!("{put}Content-Length: {}0\r\n\r\n", u64::MAX), "400", ""),
        (
            format!("{put}Content-Length: 1\r\nContent-Length: 2\r\n\r\n{{}}"),
            "400",
            "",
        ),
        (
            format!("{put}Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n"),
            "400",
            "",
        ),
    ];
    for (request, status, says) in table {
        let mut stream = served.connect();
        // Of a head that is too long the rest may meet a closed socket.
        let _ = stream.write_all(request.as_bytes());
        let answer = read_all(stream);
        let shown = &request[..request.len().min(100)];
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{shown}: {answer}");
        assert!(answer.contains(says), "{shown}: {answer}");
        assert!(served.answers());
    }
}

#[test]
fn of_requests_that_come_all_at_once_no_more_is_read_than_a_head_is_long() {
    let served = Served::new();
    let stream = served.connect();
    let request = b"GET /vcpus/0/cputime HTTP/1.1\r\n\r\n";
    // No answer is read: from some point on, neither side takes any more.
    stream.set_nonblocking(true).unwrap();
    let mut sent = 0;
    while let Ok(bytes) = (&stream).write(&request.repeat(64)) {
        sent += bytes;
        served.answers();
    }
    // What the sockets hold, of answers and of requests: 208 KiB each, unless the system was told otherwise
    // (socket(7)), and what the system keeps of each piece; and no number of requests.
    assert!(sent < 4 << 20, "{sent} bytes of requests were taken");
    assert!(served.answers());
}

#[test]
fn a_client_that_reads_no_answer_holds_nobody_up() {
    let served = Served::new();
    let stream = served.connect();
    stream.set_nonblocking(true).unwrap();
    // Until neither side takes any more.
    while (&stream).write_all(&b"GET /vcpus HTTP/1.1\r\n\r\n".repeat(64)).is_ok() {}
    assert!(served.answers());
}

impl Served {
    /// A client of the stream, which has got a reading.
    fn listen(&self, interval_ms: u32) -> BufReader<UnixStream> {
        let mut stream = BufReader::new(self.connect());
        let request = format!("GET /vcpus/stream?interval_ms={interval_ms} HTTP/1.1\r\n\r\n");
        stream.get_mut().write_all(request.as_bytes()).unwrap();
        next_reading(&mut stream);
        stream
    }
}

fn next_reading(stream: &mut BufReader<UnixStream>) -> String {
    let mut line = String::new();
    while !line.starts_with("data: {") {
        line.clear();
        assert_ne!(stream.read_line(&mut line).unwrap(), 0, "the stream has ended");
    }
    line["data: ".len()..].trim_end().to_owned()
}

#[test]
fn a_stream_says_what_a_request_is_answered_until_the_server_stops() {
    let served = Served::new();
    let mut stream = served.listen(10);
    let mut client = Client::connect(&served.scratch.path("s")).unwrap();
    for index in [1, 0, 1, 0] {
        let answer = client.get(&format!("/vcpus/{index}/cputime")).unwrap();
        assert_eq!(next_reading(&mut stream).as_bytes(), answer);
    }
    drop(served.server);
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.ends_with("\r\n0\r\n\r\n"), "not ended in order: {rest}");
}

#[test]
fn streams_take_no_places_of_requests_however_many_come_at_once() {
    let served = Served::new();
    let request = b"GET /vcpus/stream?interval_ms=60000 HTTP/1.1\r\n\r\n";
    let connect = || {
        let mut stream = served.connect();
        stream.write_all(request).unwrap();
        BufReader::new(stream)
    };
    let mut streams: Vec<_> = (0..2 * CONNECTIONS).map(|_| connect()).collect();
    for stream in &mut streams {
        next_reading(stream);
    }
    assert!(served.answers());
}

#[test]
fn the_end_does_not_wait_for_clients_that_read_nothing() {
    let served = Served::with(Limits {
        // A server that waited would be noticed.
        linger: Duration::from_secs(3600),
        ..Limits::default()
    });
    let mut deaf: Vec<_> = (0..8).map(|_| served.listen(10)).collect();
    // A hundred readings, some 80 KB, are more than a stream's socket holds.
    let mut hearing = served.listen(10);
    for _ in 0..100 {
        next_reading(&mut hearing);
    }
    let (ended, end) = std::sync::mpsc::channel();
    let server = served.server;
    std::thread::spawn(move || {
        drop(server);
        ended.send(()).unwrap();
    });
    end.recv_timeout(Duration::from_secs(60))
        .expect("the server waits for them");
    for stream in &mut deaf {
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert!(
            !rest.ends_with(b"\r\n0\r\n\r\n"),
            "what was cut off is not said to be whole"
        );
        assert!(rest.len() < 64 << 10, "{} bytes were held for it", rest.len());
    }
}

#[test]
fn one_that_is_held_serves_nobody_until_it_is_let_go() {
    let scratch = Scratch::new();
    let hold = || {
        let server = Server::spawn().unwrap();
        let listeners = Listeners {
            unix: Some(socket::bind(&scratch.path("s")).unwrap()),
            tcp: None,
            token: None,
        };
        let backend = Arc::new(Fake::new(RunState::Running));
        let held = server.hold(listeners, backend, Limits::default(), || {}).unwrap();
        let mut stream = UnixStream::connect(scratch.path("s")).unwrap();
        stream
            .write_all(b"GET /version HTTP/1.1\r\nConnection: close\r\n\r\n")
            .unwrap();
        (server, held, stream)
    };
    let (server, held, stream) = hold();
    drop(held);
    assert_eq!(read_all(stream), "", "it never serves");
    drop(server);
    let (server, _held, stream) = hold();
    drop(server);
    assert_eq!(read_all(stream), "", "it is stopped");
    let (_server, held, stream) = hold();
    held.serve();
    assert!(read_all(stream).starts_with("HTTP/1.1 200 "));
}

#[test]
fn what_cannot_be_served_is_refused_by_one_that_is_held() {
    // A file, which nothing can wait for (EPERM, epoll_ctl(2)).
    let scratch = Scratch::new();
    let mut file = std::fs::OpenOptions::new();
    file.create(true).append(true).custom_flags(libc::O_NONBLOCK);
    let file = file.open(scratch.path("file")).unwrap();
    let listeners = Listeners {
        unix: None,
        tcp: Some(std::os::fd::OwnedFd::from(file).into()),
        token: None,
    };
    let backend = Arc::new(Fake::new(RunState::NotStarted));
    let held = Server::spawn()
        .unwrap()
        .hold(listeners, backend, Limits::default(), || {});
    let refused = held.unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
    assert!(
        refused.to_string().starts_with("its socket cannot be waited for: "),
        "{refused}"
    );
}

/// A microVM whose answers to changes are held back.
struct Slow {
    fake: Fake,
    asked: mpsc::Sender<(Action, Answer)>,
}

impl Backend for Slow {
    fn send(&self, action: Action, answer: Answer) {
        self.asked.send((action, answer)).unwrap();
    }
    fn vcpus(&self) -> usize {
        self.fake.vcpus()
    }
    fn read(&self, index: usize) -> Option<accounting::Reading> {
        self.fake.read(index)
    }
    fn explain(&self, index: usize) -> Option<accounting::Explained> {
        self.fake.explain(index)
    }
    fn histograms(&self, index: usize) -> Option<accounting::reading::Histograms> {
        self.fake.histograms(index)
    }
    fn disturbances(&self, index: usize) -> Vec<accounting::disturbance::Disturbance> {
        self.fake.disturbances(index)
    }
}

#[test]
fn what_follows_from_a_change_follows_though_its_client_has_hung_up() {
    let scratch = Scratch::new();
    let (asked, asks) = mpsc::channel();
    let (starting, started) = mpsc::channel();
    let fake = Fake::new(RunState::Running);
    let listeners = Listeners {
        unix: Some(socket::bind(&scratch.path("s")).unwrap()),
        tcp: None,
        token: None,
    };
    let server = Server::spawn().unwrap();
    let backend = Arc::new(Slow { fake, asked });
    let follows = move || starting.send(()).unwrap();
    server.open(listeners, backend, Limits::default(), follows).unwrap();
    let body = r#"{"action_type": "InstanceStart"}"#;
    let mut client = UnixStream::connect(scratch.path("s")).unwrap();
    write!(
        client,
        "PUT /actions HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let (action, answer) = asks.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(action, Action::Start));
    drop(client);
    // The server hears of it before it hears of these.
    for _ in 0..3 {
        let mut other = Client::with_patience(&scratch.path("s"), PATIENCE).unwrap();
        other.get("/vcpus").unwrap();
    }
    assert!(started.try_recv().is_err(), "not before it is answered");
    answer(Ok(Reply::Done));
    started.recv_timeout(PATIENCE).unwrap();
}

#[test]
fn who_asks_and_hangs_up_makes_no_line_without_end_and_readings_need_no_turn() {
    const QUEUE: usize = 32;
    let scratch = Scratch::new();
    let (asked, asks) = mpsc::channel();
    let fake = Fake::new(RunState::Running);
    let listeners = Listeners {
        unix: Some(socket::bind(&scratch.path("s")).unwrap()),
        tcp: None,
        token: None,
    };
    let server = Server::spawn().unwrap();
    let backend = Arc::new(Slow { fake, asked });
    server.open(listeners, backend, Limits::default(), || {}).unwrap();
    let body = r#"{"state": "Paused"}"#;
    let length = body.len();
    let change = || {
        let mut client = UnixStream::connect(scratch.path("s")).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let head = format!("PATCH /vm HTTP/1.1\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
        client.write_all((head + body).as_bytes()).unwrap();
        client
    };
    // Each hangs up once it is in the line.
    let mut line = Vec::new();
    for _ in 0..QUEUE {
        let client = change();
        line.push(asks.recv_timeout(PATIENCE).unwrap());
        drop(client);
    }
    let refused = read_all(change());
    assert!(
        refused.starts_with("HTTP/1.1 503 ") && refused.contains("32 requests wait for the microVM"),
        "{refused}"
    );
    assert!(asks.try_recv().is_err(), "it was not put into the line");
    let mut client = Client::with_patience(&scratch.path("s"), PATIENCE).unwrap();
    client.get("/vcpus").unwrap();
    let (_, answer) = line.pop().unwrap();
    answer(Ok(Reply::Done));
    let client = change();
    let (_, answer) = asks.recv_timeout(PATIENCE).unwrap();
    answer(Ok(Reply::Done));
    assert!(read_all(client).starts_with("HTTP/1.1 204 "));
}

#[path = "server_tcp_tests.rs"]
mod tcp;
