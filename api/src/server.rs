//! The API's thread: one current-thread runtime that accepts, serves and ends connections.
//!
//! Promises: kept off the vCPUs' CPUs; a client that holds a connection open, sends half a request or never reads its answer
//! delays nobody else and is dropped in time; dropping the
//! [`Server`] takes no longer than [`LINGER`], whatever clients do.

use std::io;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use accounting::host::{CpuSet, HostCpus, run_on};
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::backend::Backend;
use crate::routes::{self, Limits, Shared};

/// Connections served at once; one more is told so and closed.
const CONNECTIONS: usize = 128;

/// How long a connection may take over a request's head, and how long it may stay idle between two requests.
const HEAD_TIME: Duration = Duration::from_secs(60);

/// How long requests under way may take to finish once the server stops.
const LINGER: Duration = Duration::from_millis(500);

/// What to listen on; both non-blocking.
#[derive(Debug, Default)]
pub struct Listeners {
    /// `--api-sock`.
    pub unix: Option<UnixListener>,
    /// `--api-listen`.
    pub tcp: Option<TcpListener>,
}

/// The running server. Dropping it stops it: nothing more is accepted, requests under way may finish.
#[derive(Debug)]
pub struct Server {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `backend` on `listeners`, on a thread named `api`. `started` is called on that thread once the guest has been
    /// started over the API.
    ///
    /// # Errors
    /// The thread, or its runtime, could not be made.
    pub fn spawn(
        listeners: Listeners,
        backend: Arc<dyn Backend>,
        limits: Limits,
        started: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()?;
        let (unix, tcp) = {
            let _in_runtime = runtime.enter();
            let unix = listeners.unix.map(tokio::net::UnixListener::from_std).transpose()?;
            (unix, listeners.tcp.map(tokio::net::TcpListener::from_std).transpose()?)
        };
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new().name("api".to_owned()).spawn(move || {
            keep_off_vcpus(&*backend);
            let started = {
                let backend = backend.clone();
                move || {
                    keep_off_vcpus(&*backend);
                    started();
                }
            };
            let router = routes::router(
                Shared {
                    backend,
                    started: Arc::new(started),
                },
                limits,
            );
            runtime.block_on(accept(unix, tcp, router, stopped));
            runtime.shutdown_background();
        })?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// Moves the calling thread to the housekeeping CPUs: a server on a vCPU's CPU would take that vCPU's time.
fn keep_off_vcpus(backend: &dyn Backend) {
    let readings = (0..backend.vcpus()).filter_map(|index| backend.read(index));
    let pinned: CpuSet = readings.filter(|r| r.host_cpu.pinned).map(|r| r.host_cpu.cpu).collect();
    let moved = HostCpus::read().and_then(|host| run_on(&host.housekeeping(&pinned)));
    if let Err(error) = moved {
        tracing::warn!("the API's thread may share a CPU with a vCPU: its affinity could not be set: {error}");
    }
}

async fn accept(
    unix: Option<tokio::net::UnixListener>,
    tcp: Option<tokio::net::TcpListener>,
    router: Router,
    mut stop: oneshot::Receiver<()>,
) {
    let graceful = GracefulShutdown::new();
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let serve = |watcher: Watcher, permit| Connection {
        router: router.clone(),
        watcher,
        permit,
    };
    loop {
        let accepted = tokio::select! {
            accepted = next_unix(unix.as_ref()) => accepted.map(|io| {
                let permit = room.clone().try_acquire_owned().ok();
                tokio::spawn(serve(graceful.watcher(), permit).run(io));
            }),
            accepted = next_tcp(tcp.as_ref()) => accepted.map(|io| {
                let permit = room.clone().try_acquire_owned().ok();
                tokio::spawn(serve(graceful.watcher(), permit).run(io));
            }),
            _ = &mut stop => break,
        };
        if let Err(error) = accepted {
            // Out of descriptors, as a rule: give connections the time to end.
            tracing::warn!("a connection could not be accepted: {error}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    drop((unix, tcp));
    if tokio::time::timeout(LINGER, graceful.shutdown()).await.is_err() {
        tracing::debug!("connections with a request under way were closed");
    }
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
    permit: Option<OwnedSemaphorePermit>,
}

impl Connection {
    async fn run(self, mut io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let Some(_permit) = self.permit else {
            let body = r#"{"fault_message":"Too many open connections."}"#;
            let head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n";
            let response = format!("{head}Content-Length: {}\r\n\r\n{body}", body.len());
            // Fits in any socket buffer; a client that is gone needs no answer.
            let _ = io.write_all(response.as_bytes()).await;
            return;
        };
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME);
        let connection = builder.serve_connection(TokioIo::new(io), TowerToHyperService::new(self.router));
        if let Err(error) = self.watcher.watch(connection).await {
            tracing::debug!("a connection ended early: {error}");
        }
    }
}
