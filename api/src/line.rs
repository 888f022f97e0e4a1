//! A connection as the handler of an endless answer sees it: it counts as a stream from then on, and little is buffered for it.
//!
//! Why: a stream takes a connection for as long as its client likes, so it must not take the place of a request; and the
//! system would hold some 200 KiB in a socket's buffer (`net.core.wmem_default`) for each client that does not read.

use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;

/// The connection that a request came by.
#[derive(Debug)]
pub(crate) struct Line {
    /// Its place among those that may make requests.
    place: Mutex<Option<OwnedSemaphorePermit>>,
    /// How many bytes the system shall buffer for it, once; 0 where that is as it should be.
    send_buffer: AtomicUsize,
}

impl Line {
    pub fn new(place: OwnedSemaphorePermit) -> Arc<Self> {
        Arc::new(Self {
            place: Mutex::new(Some(place)),
            send_buffer: AtomicUsize::new(0),
        })
    }

    /// From now on it is a stream, of messages of some `bytes`: its place is another connection's, and the system buffers
    /// a message or two for it.
    pub fn becomes_stream(&self, bytes: usize) {
        drop(self.place.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.send_buffer.store(bytes, Ordering::Relaxed);
    }

    /// `io` with its line's wishes fulfilled.
    pub fn socket<IO>(self: Arc<Self>, io: IO) -> Socket<IO> {
        Socket { io, line: self }
    }
}

/// A connection's socket.
#[derive(Debug)]
pub(crate) struct Socket<IO> {
    io: IO,
    line: Arc<Line>,
}

impl<IO: AsFd + Unpin> Socket<IO> {
    /// The socket, about to be written to.
    fn writable(self: Pin<&mut Self>) -> Pin<&mut IO> {
        let this = self.get_mut();
        if this.line.send_buffer.load(Ordering::Relaxed) != 0 {
            // The system doubles it, for its own bookkeeping (socket(7), SO_SNDBUF).
            let bytes = this.line.send_buffer.swap(0, Ordering::Relaxed);
            if let Err(error) = rustix::net::sockopt::set_socket_send_buffer_size(this.io.as_fd(), bytes) {
                tracing::debug!("a stream's socket buffers as much as any: {error}");
            }
        }
        Pin::new(&mut this.io)
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Socket<IO> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_read(context, buf)
    }
}

impl<IO: AsyncWrite + AsFd + Unpin> AsyncWrite for Socket<IO> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.writable().poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.writable().poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(context)
    }
}
