//! A flood: thousands of connections from one process, held open as long as the other side lets them and made again when it does not.
//!
//! Of each four, two are slow (one says a head, one a body, a byte a second), one announces a body of 1 GiB and sends as much of it
//! as is taken, and one asks without end and reads no answer.
//!
//! It has to be a process of its own: by processes the API tells who floods it.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use vmm::unix_socket::connect;

use crate::bystander::Limits;

/// What a flood may do to who behaves: 20 ms for 99 of 100 readings, and a hundredth of the guest's time.
pub const FLOOD: Limits = Limits {
    p99_us: 20_000.0,
    waiting_share: 0.01,
    guest_share: 0.01,
};

/// The most that it may add to the process's resident memory, in KiB: each of 64 connections has a head, of 16 KiB, a body, of 50 KiB in a
/// buffer that has grown to 64, and an answer and what else there is to a connection, 16 KiB (docs/api-limits.md).
pub const CAP_KIB: u64 = 64 * (16 + 64 + 16);

/// Between two passes over all connections.
const PASS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// A process that floods, until this is dropped.
#[derive(Debug)]
pub struct Flood(Child);

impl Flood {
    /// `program`, to whose `main`, or to a test of whose, it is left to call [`flood_if_asked`], floods `socket`, and is so `nice`
    /// (setpriority(2)).
    ///
    /// # Panics
    /// When it cannot be started, or its connections be made.
    #[must_use]
    pub fn start(mut program: Command, socket: &Path, connections: usize, nice: i32) -> Self {
        program.env(ASKED, format!("{connections} {nice} {}", socket.display()));
        let child = program.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut flood = Self(child.unwrap_or_else(|e| panic!("{program:?}: {e}")));
        // One byte comes once each connection has been made once.
        let stdout = flood.0.stdout.take().expect("piped");
        let mut said = Vec::new();
        let mut stdout = io::BufReader::new(stdout);
        while io::BufRead::read_until(&mut stdout, b'\n', &mut said).is_ok_and(|bytes| bytes > 0) {
            if said.ends_with(b"flooding\n") {
                flood.0.stdout = Some(stdout.into_inner());
                return flood;
            }
        }
        panic!("{program:?} does not flood: {}", String::from_utf8_lossy(&said));
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        // It ends when its standard input does.
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

const ASKED: &str = "CHRONOVISOR_FLOOD";

/// Floods, if that is what this process was started for: true, then, once it is over.
///
/// # Panics
/// When it cannot.
#[must_use]
pub fn flood_if_asked() -> bool {
    let Ok(asked) = std::env::var(ASKED) else { return false };
    let mut words = asked.splitn(3, ' ');
    let mut word = || words.next().expect("as it is started");
    let connections: usize = word().parse().expect("as it is started");
    rustix::process::nice(word().parse().expect("as it is started")).expect("anybody may be nicer");
    let socket = word();
    crate::crowd::raise_open_files(connections as u64 + 100).expect("as many files as connections");
    let over = std::thread::spawn(|| io::stdin().read_to_end(&mut Vec::new()));
    let mut clients: Vec<Client> = (0..connections).map(Client::new).collect();
    let (mut begun, mut made, mut first) = (false, 0, 0);
    while !over.is_finished() {
        // From where there was no room left in the last pass: all have their turn.
        let (mut full, (behind, ahead)) = (None, clients.split_at_mut(first));
        for (n, client) in ahead.iter_mut().chain(behind).enumerate() {
            if client.stream.is_none() && full.is_none() {
                if client.connect(Path::new(socket)) {
                    made += 1;
                } else {
                    full = Some(n);
                }
            }
            client.go_on();
        }
        first = (first + full.unwrap_or(0)) % connections;
        if !begun && clients.iter().all(|client| client.ever) {
            begun = true;
            println!("flooding");
        }
        std::thread::sleep(PASS);
    }
    eprintln!(
        "{made} connections were made, {} are open",
        clients.iter().filter(|c| c.stream.is_some()).count()
    );
    true
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Does {
    SlowHead,
    SlowBody,
    Huge,
    Ask,
}

/// One connection.
struct Client {
    does: Does,
    stream: Option<UnixStream>,
    /// Whether it ever was connected.
    ever: bool,
    said: Instant,
}

impl Client {
    fn new(n: usize) -> Self {
        Self {
            does: [Does::SlowHead, Does::Huge, Does::SlowBody, Does::Ask][n % 4],
            stream: None,
            ever: false,
            said: Instant::now(),
        }
    }

    /// False where there is no room for now.
    fn connect(&mut self, socket: &Path) -> bool {
        let stream: OwnedFd = match connect(socket) {
            Ok(stream) => stream,
            Err(Errno::AGAIN) => return false,
            Err(error) => panic!("{}: {error}", socket.display()),
        };
        let mut stream = UnixStream::from(stream);
        let begin = match self.does {
            Does::SlowHead => "GET /vcpus/0/cputime HTTP/1.1\r\nHost: ",
            Does::SlowBody => "PUT /actions HTTP/1.1\r\nContent-Length: 50000\r\n\r\n",
            Does::Huge => "PUT /actions HTTP/1.1\r\nContent-Length: 1073741824\r\n\r\n",
            Does::Ask => "",
        };
        let _ = stream.write(begin.as_bytes());
        self.stream = Some(stream);
        (self.ever, self.said) = (true, Instant::now());
        true
    }

    fn go_on(&mut self) {
        let Some(stream) = &mut self.stream else { return };
        let said = match self.does {
            Does::SlowHead | Does::SlowBody if self.said.elapsed() < SECOND => stream.read(&mut [0; 512]),
            Does::SlowHead | Does::SlowBody => {
                self.said = Instant::now();
                stream.write(b"x")
            }
            Does::Huge => stream.write(&[b' '; 4096]),
            Does::Ask => stream.write(&b"GET /vcpus/0/cputime HTTP/1.1\r\n\r\n".repeat(8)),
        };
        let gone = match said {
            // Nothing more will come: closed.
            Ok(0) => true,
            Ok(_) => false,
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
        };
        if gone {
            self.stream = None;
        }
    }
}
