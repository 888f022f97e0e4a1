//! The API's thread: one current-thread runtime that accepts, serves and ends connections.
//!
//! Promises: kept off the vCPUs' CPUs; a client that sends half a request, or never reads its answer, delays nobody else; streams
//! do not take the places of requests; dropping the [`Server`] takes no longer than [`Limits::linger`], whatever clients do.

use std::io;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use accounting::host::{CpuSet, HostCpus, run_on};
use axum::Router;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::backend::Backend;
use crate::line::Line;
use crate::routes::{self, Limits, Shared};

/// Connections served at once, streams not counted; one more is told so and closed.
const CONNECTIONS: usize = 128;

/// How long one more waits for a place. When many clients come at once to listen to a stream, each has a place until its
/// request has been read.
const PLACE_TIME: Duration = Duration::from_millis(50);

/// How long a connection may take over a request's head, and how long it may stay idle between two requests.
const HEAD_TIME: Duration = Duration::from_secs(60);

/// What to listen on; both non-blocking.
#[derive(Debug, Default)]
pub struct Listeners {
    /// `--api-sock`.
    pub unix: Option<UnixListener>,
    /// `--api-listen`.
    pub tcp: Option<TcpListener>,
}

/// The server. It serves once it is opened; dropping it stops it: nothing more is accepted, requests under way may finish.
#[derive(Debug)]
pub struct Server {
    open: Option<mpsc::Sender<Opened>>,
    /// Whether it serves.
    serves: mpsc::Receiver<io::Result<()>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What is served.
struct Surface {
    router: Router,
    shared: Shared,
    limits: Limits,
}

/// What serving waits for.
struct Opened {
    listeners: Listeners,
    service: Surface,
    backend: Arc<dyn Backend>,
    cpus: Arc<OnceLock<HostCpus>>,
}

impl Server {
    /// Starts a thread named `api` that makes ready to serve. To be called before the calling thread confines itself to some
    /// CPUs, for this one takes its CPUs for the process's.
    ///
    /// Whoever spawned this program waits for its API: its thread makes ready while the caller does what must be done before.
    ///
    /// # Errors
    /// The thread could not be made.
    pub fn spawn() -> io::Result<Self> {
        let (open, opened) = mpsc::channel();
        let (serving, serves) = mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new().name("api".to_owned()).spawn(move || {
            let prepared = HostCpus::read().and_then(|host| {
                let mut runtime = tokio::runtime::Builder::new_current_thread();
                Ok((host, runtime.enable_io().enable_time().build()?))
            });
            // Dropped before it was opened.
            let Ok(Opened {
                listeners,
                service,
                backend,
                cpus,
            }) = opened.recv()
            else {
                return;
            };
            let listening = prepared.and_then(|(host, runtime)| {
                let host = cpus.get_or_init(|| host);
                keep_off_vcpus(host, &*backend);
                let _in_runtime = runtime.enter();
                let unix = listeners.unix.map(tokio::net::UnixListener::from_std).transpose()?;
                let tcp = listeners.tcp.map(tokio::net::TcpListener::from_std).transpose()?;
                Ok((runtime, unix, tcp))
            });
            let (runtime, unix, tcp) = match listening {
                Ok(listening) => listening,
                Err(error) => return drop(serving.send(Err(error))),
            };
            // The opener waits for it.
            let _ = serving.send(Ok(()));
            runtime.block_on(accept(unix, tcp, service, stopped));
            runtime.shutdown_background();
        })?;
        Ok(Self {
            open: Some(open),
            serves,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Serves `backend` on `listeners`; to be called once. `started` is called on the server's thread once the guest has been
    /// started over the API.
    ///
    /// # Errors
    /// The host's CPUs could not be read, or no runtime be made that takes the sockets.
    pub fn open(
        &self,
        listeners: Listeners,
        backend: Arc<dyn Backend>,
        limits: Limits,
        started: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<()> {
        let cpus = Arc::new(OnceLock::new());
        let keep_off = {
            let (backend, cpus) = (Arc::clone(&backend), Arc::clone(&cpus));
            move || {
                if let Some(cpus) = cpus.get() {
                    keep_off_vcpus(cpus, &*backend);
                }
            }
        };
        let shared = Shared::new(Arc::clone(&backend), {
            let keep_off = keep_off.clone();
            move || {
                keep_off();
                started();
            }
        });
        let shared = shared.when_moved(keep_off);
        let service = Surface {
            router: routes::router(shared.clone(), limits),
            shared,
            limits,
        };
        let gone = || io::Error::other("its thread ended at once");
        let opened = Opened {
            listeners,
            service,
            backend,
            cpus,
        };
        self.open
            .as_ref()
            .and_then(|open| open.send(opened).ok())
            .ok_or_else(gone)?;
        self.serves.recv().map_err(|_| gone())?
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Unopened, the thread still waits for this.
        drop(self.open.take());
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// Moves the calling thread to the housekeeping CPUs: a server on a vCPU's CPU would take that vCPU's time.
fn keep_off_vcpus(host: &HostCpus, backend: &dyn Backend) {
    let readings = (0..backend.vcpus()).filter_map(|index| backend.read(index));
    let pinned: CpuSet = readings.filter(|r| r.host_cpu.pinned).map(|r| r.host_cpu.cpu).collect();
    if let Err(error) = run_on(&host.housekeeping(&pinned)) {
        tracing::warn!("the API's thread may share a CPU with a vCPU: {error}");
    }
}

async fn accept(
    unix: Option<tokio::net::UnixListener>,
    tcp: Option<tokio::net::TcpListener>,
    service: Surface,
    mut stop: oneshot::Receiver<()>,
) {
    let graceful = GracefulShutdown::new();
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let serve = |place, over_tcp| Connection {
        router: service.router.clone(),
        watcher: graceful.watcher(),
        place,
        over_tcp,
    };
    loop {
        let accepted = tokio::select! {
            accepted = next_unix(unix.as_ref()) => accepted.map(Accepted::Unix),
            accepted = next_tcp(tcp.as_ref()) => accepted.map(Accepted::Tcp),
            _ = &mut stop => break,
        };
        match accepted {
            Ok(Accepted::Unix(io)) => drop(tokio::spawn(serve(place(&room).await, false).run(io))),
            Ok(Accepted::Tcp(io)) => drop(tokio::spawn(serve(place(&room).await, true).run(io))),
            Err(error) => {
                // Out of descriptors, as a rule: give connections the time to end.
                tracing::warn!("a connection could not be accepted: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    drop((unix, tcp));
    service.shared.end_streams();
    if tokio::time::timeout(service.limits.linger, graceful.shutdown())
        .await
        .is_err()
    {
        tracing::debug!("connections with a request under way were closed");
    }
}

enum Accepted {
    Unix(tokio::net::UnixStream),
    Tcp(tokio::net::TcpStream),
}

/// A place for a connection; `None` where there is none, and none becomes free in time.
async fn place(room: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    tokio::time::timeout(PLACE_TIME, room.clone().acquire_owned())
        .await
        .ok()?
        .ok()
}

async fn next_unix(listener: Option<&tokio::net::UnixListener>) -> io::Result<tokio::net::UnixStream> {
    match listener {
        Some(listener) => Ok(listener.accept().await?.0),
        None => std::future::pending().await,
    }
}

async fn next_tcp(listener: Option<&tokio::net::TcpListener>) -> io::Result<tokio::net::TcpStream> {
    match listener {
        Some(listener) => {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            Ok(stream)
        }
        None => std::future::pending().await,
    }
}

struct Connection {
    router: Router,
    watcher: Watcher,
    place: Option<OwnedSemaphorePermit>,
    over_tcp: bool,
}

impl Connection {
    async fn run(self, mut io: impl AsyncRead + AsyncWrite + AsFd + Unpin + Send + 'static) {
        let Some(place) = self.place else {
            let body = r#"{"fault_message":"Too many open connections."}"#;
            let head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n";
            let response = format!("{head}Content-Length: {}\r\n\r\n{body}", body.len());
            // Fits in any socket buffer; a client that is gone needs no answer.
            let _ = io.write_all(response.as_bytes()).await;
            return;
        };
        let line = Line::new(place);
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME);
        let serve = {
            let (router, line) = (TowerToHyperService::new(self.router), line.clone());
            service_fn(move |mut request: Request<Incoming>| {
                if self.over_tcp {
                    request.extensions_mut().insert(routes::OverTcp);
                }
                if routes::plain(request.uri()).path() == routes::STREAM {
                    request.extensions_mut().insert(line.clone());
                }
                router.call(request)
            })
        };
        let connection = builder.serve_connection(TokioIo::new(line.socket(io)), serve);
        if let Err(error) = self.watcher.watch(connection).await {
            tracing::debug!("a connection ended early: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::os::unix::net::UnixStream;

    use vmm::RunState;

    use super::*;
    use crate::backend::fake::Fake;
    use crate::client::{Client, ClientError};
    use crate::scratch::Scratch;
    use crate::socket;

    /// Far above what any answer takes on the slowest machine: only so that a failure does not hang.
    const PATIENCE: Duration = Duration::from_secs(60);

    struct Served {
        scratch: Scratch,
        server: Server,
        _file: Arc<vmm::unix_socket::SocketFile>,
    }

    impl Served {
        fn with(limits: Limits) -> Self {
            let scratch = Scratch::new();
            let (unix, file) = socket::bind(&scratch.path("s")).unwrap();
            let backend = Arc::new(Fake::new(RunState::Running));
            let listeners = Listeners {
                unix: Some(unix),
                tcp: None,
            };
            let server = Server::spawn().unwrap();
            server.open(listeners, backend, limits, || {}).unwrap();
            Self {
                scratch,
                server,
                _file: file,
            }
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
    fn one_connection_too_many_is_told_so_and_others_are_served_on() {
        let served = Served::new();
        let mut first = served.client().unwrap();
        first.get("/version").unwrap();
        let idle: Vec<_> = (1..CONNECTIONS).map(|_| served.connect()).collect();
        // Connections are accepted in the order they were made.
        let answer = read_all(served.connect());
        assert!(
            answer.starts_with("HTTP/1.1 503 ") && answer.contains("Too many open connections"),
            "{answer}"
        );
        assert!(first.get("/vcpus").is_ok());
        drop(idle);
        // Room is made as the server sees them close: ask until it has.
        while !served.answers() {
            std::thread::yield_now();
        }
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
    fn the_loopback_is_served_as_the_socket_is() {
        let tcp = socket::bind_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = tcp.local_addr().unwrap();
        let backend = Arc::new(Fake::new(RunState::Running));
        let listeners = Listeners {
            unix: None,
            tcp: Some(tcp),
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
}
