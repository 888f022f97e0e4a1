//! The API's thread: one current-thread runtime that accepts, serves and ends connections.
//!
//! Promises: kept off the vCPUs' CPUs; a client that sends half a request, or never reads its answer, delays nobody
//! else, and is sent away in time (`line`); accepting waits for nobody, and who comes next has a place at once
//! (`places`); streams do not take the places of requests; what all connections together may hold is bounded
//! ([`CONNECTIONS`] of [`HEAD_BYTES`], a body and an answer each); dropping the [`Server`] takes no longer than
//! [`Limits::linger`], whatever clients do.

use std::convert::Infallible;
use std::io;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use accounting::host::{CpuSet, HostCpus, run_on};
use axum::Router;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::TokioIo;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use seccomp::Role;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot;
use vmm::unix_socket::Listening;

use crate::backend::Backend;
use crate::line::Line;
use crate::places::{Peer, Place, Places};
use crate::routes::{self, Limits, OverTcp, Shared};
use crate::token::Token;

/// Connections served at once, streams not counted: several times what Firecracker has (10). Each more of them is one
/// more that may ask without end, and that others have to wait for at every turn.
const CONNECTIONS: usize = 64;

/// Connections accepted before those that are there have their turn: a request waits for no more than these, some
/// hundred microseconds.
const ACCEPTED_AT_ONCE: usize = 16;

/// The longest head, in bytes; and what is read ahead of what is needed.
const HEAD_BYTES: usize = 16 << 10;

/// What to listen on; both non-blocking.
#[derive(Debug, Default)]
pub struct Listeners {
    /// `--api-sock`.
    pub unix: Option<Listening>,
    /// `--api-listen`.
    pub tcp: Option<TcpListener>,
    /// `--api-token-file`: what who asks over TCP has to bring.
    pub token: Option<Token>,
}

/// The server. It serves once it is opened, or [held](Server::hold) and let go; dropping it stops it: nothing more is
/// accepted, requests under way may finish.
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
    go: oneshot::Receiver<()>,
}

/// A server that has all it takes to serve, and does not: clients that connect wait. Dropped, it never will.
#[derive(Debug)]
pub struct Held {
    go: oneshot::Sender<()>,
}

impl Held {
    /// Serves.
    pub fn serve(self) {
        // A thread that panicked has been reported by the panic hook.
        let _ = self.go.send(());
    }
}

impl Server {
    /// Starts a thread named `api` that makes ready to serve. To be called before the calling thread confines itself to
    /// some CPUs, for this one takes its CPUs for the process's.
    ///
    /// Whoever spawned this program waits for its API: its thread makes ready while the caller does what must be done
    /// before.
    ///
    /// # Errors
    /// The thread could not be made.
    pub fn spawn() -> io::Result<Self> {
        let (open, opened) = mpsc::channel();
        let (serving, serves) = mpsc::channel();
        let (stop, mut stopped) = oneshot::channel();
        let thread = vmm::thread("api").spawn(move || {
            let prepared = HostCpus::read().and_then(|host| {
                let mut runtime = tokio::runtime::Builder::new_current_thread();
                let runtime = runtime
                    .enable_io()
                    .enable_time()
                    .thread_stack_size(vmm::STACK)
                    .on_thread_start(|| seccomp::inherited(Some(Role::Api)))
                    .build()
                    .map_err(|e| io::Error::new(e.kind(), format!("its event loop cannot be made: {e}")))?;
                // Here, where nobody waits for it yet.
                seccomp::enter(Role::Api)?;
                Ok((host, runtime))
            });
            // Dropped before it was opened.
            let Ok(Opened {
                listeners,
                service,
                backend,
                cpus,
                go,
            }) = opened.recv()
            else {
                return;
            };
            let listening = prepared.and_then(|(host, runtime)| {
                cpus.get_or_init(|| host);
                let _in_runtime = runtime.enter();
                let in_unix = |unix: Listening| unix.try_map(tokio::net::UnixListener::from_std);
                let unwaited = |e: io::Error| io::Error::new(e.kind(), format!("its socket cannot be waited for: {e}"));
                let unix = listeners.unix.map(in_unix).transpose().map_err(unwaited)?;
                let tcp = listeners.tcp.map(tokio::net::TcpListener::from_std).transpose();
                let tcp = tcp.map_err(unwaited)?;
                Ok((runtime, unix, tcp, listeners.token))
            });
            let (runtime, unix, tcp, token) = match listening {
                Ok(listening) => listening,
                Err(error) => return drop(serving.send(Err(error))),
            };
            // The opener waits for it.
            let _ = serving.send(Ok(()));
            runtime.block_on(async {
                tokio::select! {
                    biased;
                    // Dropped by whoever held it, it never serves.
                    gone = go => if gone.is_err() { return },
                    _ = &mut stopped => return,
                }
                if let Some(host) = cpus.get() {
                    keep_off_vcpus(host, &*backend);
                }
                accept(unix, tcp, token, service, stopped).await;
            });
            runtime.shutdown_background();
        })?;
        Ok(Self {
            open: Some(open),
            serves,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Serves `backend` on `listeners`; to be called once, or [`Server::hold`] is. `started` is called on the server's
    /// thread once the guest has been started over the API.
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
        let (held, go) = oneshot::channel();
        // Beforehand, so that the thread goes on without another word.
        Held { go: held }.serve();
        self.take(listeners, backend, limits, started, go)
    }

    /// As [`Server::open`], but for serving, which is up to what is returned: for whoever has to know that nothing can
    /// fail any more, and has something to do first.
    ///
    /// # Errors
    /// As [`Server::open`].
    pub fn hold(
        &self,
        listeners: Listeners,
        backend: Arc<dyn Backend>,
        limits: Limits,
        started: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<Held> {
        let (held, go) = oneshot::channel();
        self.take(listeners, backend, limits, started, go)?;
        Ok(Held { go: held })
    }

    fn take(
        &self,
        listeners: Listeners,
        backend: Arc<dyn Backend>,
        limits: Limits,
        started: impl Fn() + Send + Sync + 'static,
        go: oneshot::Receiver<()>,
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
            go,
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
    unix: Option<Listening<tokio::net::UnixListener>>,
    tcp: Option<tokio::net::TcpListener>,
    token: Option<Token>,
    service: Surface,
    mut stop: oneshot::Receiver<()>,
) {
    let graceful = GracefulShutdown::new();
    let places = Places::new(CONNECTIONS);
    let serve = |peer, over_tcp| {
        let line = Line::new(peer, service.limits);
        Connection {
            router: service.router.clone(),
            watcher: graceful.watcher(),
            place: places.enter(&line),
            line,
            over_tcp,
        }
    };
    let over_tcp = OverTcp {
        token: token.map(Arc::new),
    };
    let mut at_once = 0;
    loop {
        let accepted = tokio::select! {
            accepted = next_unix(unix.as_ref().map(Listening::listener)) => accepted.map(Accepted::Unix),
            accepted = next_tcp(tcp.as_ref()) => accepted.map(Accepted::Tcp),
            _ = &mut stop => break,
        };
        match accepted {
            Ok(Accepted::Unix(io)) => drop(tokio::spawn(serve(peer(&io), None).run(io))),
            Ok(Accepted::Tcp(io)) => drop(tokio::spawn(serve(Peer::Tcp, Some(over_tcp.clone())).run(io))),
            Err(error) => {
                // Out of descriptors, as a rule: give connections the time to end.
                tracing::warn!("a connection could not be accepted: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        at_once += 1;
        if at_once == ACCEPTED_AT_ONCE {
            at_once = 0;
            tokio::task::yield_now().await;
        }
    }
    // Before anybody is waited for, so that another microVM may take the path.
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

/// Who has connected.
fn peer(stream: &tokio::net::UnixStream) -> Peer {
    let process = stream.peer_cred().ok().and_then(|peer| peer.pid());
    // 0 is one of another PID namespace.
    process.filter(|&pid| pid > 0).map_or(Peer::Unknown, Peer::Process)
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
    place: Place,
    line: Arc<Line>,
    /// Where it is.
    over_tcp: Option<OverTcp>,
}

impl Connection {
    async fn run(self, io: impl AsyncRead + AsyncWrite + AsFd + Unpin + Send + 'static) {
        let (line, place) = (self.line, Arc::new(self.place));
        let mut builder = http1::Builder::new();
        // A head that is larger is answered 431, by hyper.
        builder.max_buf_size(HEAD_BYTES).header_read_timeout(None);
        let serve = {
            let (router, line) = (TowerToHyperService::new(self.router), line.clone());
            service_fn(move |mut request: Request<Incoming>| {
                if let Some(over_tcp) = &self.over_tcp {
                    request.extensions_mut().insert(over_tcp.clone());
                }
                if routes::plain(request.uri()).path() == routes::STREAM {
                    request.extensions_mut().insert(line.clone());
                }
                let (answer, line, place) = (router.call(request), line.clone(), place.clone());
                async move {
                    line.asked().await;
                    let Ok(answer) = answer.await;
                    line.answers(answer.status());
                    if line.is_stream() {
                        place.leave();
                    }
                    Ok::<_, Infallible>(answer)
                }
            })
        };
        let connection = builder.serve_connection(TokioIo::new(line.clone().socket(io)), serve);
        let mut connection = std::pin::pin!(self.watcher.watch(connection));
        let connection = std::future::poll_fn(|context| {
            line.begin_turn();
            connection.as_mut().poll(context)
        });
        // In this order: whether it is overdue depends on what it has just done.
        tokio::select! {
            biased;
            () = line.sent_away() => tracing::debug!("a connection gave up its place for another"),
            ended = connection => if let Err(error) = ended {
                tracing::debug!("a connection ended early: {error}");
            },
            stage = line.overdue() => tracing::debug!("a connection was closed: it was too long in stage {stage:?}"),
        }
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
