//! A crowd that listens to a microVM's stream: clients that read all they get, and clients that never read.

use std::collections::BTreeSet;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use accounting::Reading;
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::vm::PATIENCE;

/// One client, which reads when asked to.
#[derive(Debug)]
pub struct Listener {
    stream: BufReader<UnixStream>,
}

impl Listener {
    /// Asks for a reading every so often.
    ///
    /// # Errors
    /// What the socket says.
    pub fn open(socket: &Path, interval_ms: u64) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(
            stream,
            "GET /vcpus/stream?interval_ms={interval_ms} HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// The next reading; `None` once the stream has ended in good order.
    ///
    /// # Panics
    /// When it breaks off, or is not what a stream is.
    pub fn reading(&mut self) -> Option<Reading> {
        loop {
            let mut line = String::new();
            let length = self.stream.read_line(&mut line).expect("the stream goes on");
            assert_ne!(length, 0, "the stream broke off");
            // Lines of HTTP's chunks are between the events: the last one of all is of length 0.
            match line.strip_prefix("data: ") {
                Some(data) => return Some(serde_json::from_str(data).expect(data)),
                None if line == "0\r\n" => return None,
                None => {}
            }
        }
    }

    /// How many bytes wait in its socket to be read.
    ///
    /// # Panics
    /// When the system does not say.
    #[must_use]
    pub fn waiting_bytes(&self) -> u64 {
        rustix::io::ioctl_fionread(self.stream.get_ref()).expect("a socket")
    }
}

/// Clients that read all they get, on a thread of their own.
#[derive(Debug)]
pub struct Crowd {
    heard: Arc<Heard>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Heard {
    over: AtomicBool,
    bytes: AtomicU64,
    /// Those that got something since it was last asked.
    clients: Mutex<BTreeSet<usize>>,
}

impl Crowd {
    /// So many clients, all connected.
    ///
    /// # Errors
    /// What the system says.
    pub fn gather(socket: &Path, clients: usize, interval_ms: u64) -> io::Result<Self> {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let mut streams = Vec::with_capacity(clients);
        for index in 0..clients {
            let stream = Listener::open(socket, interval_ms)?.stream.into_inner();
            stream.set_nonblocking(true)?;
            let data = epoll::EventData::new_u64(index as u64);
            epoll::add(&poll, &stream, data, epoll::EventFlags::IN)?;
            streams.push(stream);
        }
        let heard = Arc::new(Heard::default());
        let thread = {
            let heard = heard.clone();
            std::thread::spawn(move || heard.listen(&poll, &mut streams))
        };
        Ok(Self {
            heard,
            thread: Some(thread),
        })
    }

    /// How many bytes they got so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.heard.bytes.load(Ordering::Relaxed)
    }

    /// Waits until each of so many clients has got something from now on.
    ///
    /// # Panics
    /// When that takes too long.
    pub fn wait_for_all(&self, clients: usize) {
        let heard = || self.heard.clients.lock().unwrap_or_else(PoisonError::into_inner);
        heard().clear();
        let begun = Instant::now();
        while heard().len() < clients {
            assert!(
                begun.elapsed() < PATIENCE,
                "{} of {clients} get something",
                heard().len()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.heard.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // What made it panic has been told.
            let _ = thread.join();
        }
    }
}

impl Heard {
    fn listen(&self, poll: &rustix::fd::OwnedFd, streams: &mut [UnixStream]) {
        let (mut events, mut buffer) = (Vec::with_capacity(256), vec![0; 1 << 16]);
        let tenth = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        while !self.over.load(Ordering::Relaxed) {
            if epoll::wait(poll, spare_capacity(&mut events), Some(&tenth)).is_err() {
                continue;
            }
            let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
            for event in events.drain(..) {
                let index = usize::try_from(event.data.u64()).expect("an index");
                // What is left over makes the next event.
                match streams[index].read(&mut buffer) {
                    Ok(0) => return,
                    Ok(bytes) => {
                        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
                        clients.insert(index);
                    }
                    Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
                }
            }
        }
    }
}

/// Lets this process, and those it starts, have as many files open as the system lets it.
///
/// # Errors
/// What the system says; or that this is less than `least`.
pub fn raise_open_files(least: u64) -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    if limit.maximum.is_some_and(|most| most < least) {
        return Err(io::Error::other(format!("{limit:?} of open files: {least} are needed")));
    }
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    Ok(setrlimit(Resource::Nofile, raised)?)
}
