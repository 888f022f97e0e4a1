//! Packets, whatever they say and in whatever order: see [`crate::fuzz`]. The rings they come by are as they should be: those that are
//! not are [`crate::fuzz::virtio`]'s.
//!
//! An input is one step after another: of the guest's, of a client's of the host's, of a program's that listens there, or of time's.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::connection::BUFFER;
use super::mux::{MAX_CONNECTIONS, MAX_LINE, PARTING_PATIENCE, PATIENCE};
use super::packet::{HOST_CID, Op, Ports, STREAM};
use super::*;
use crate::config::HugePages;
use crate::devices::virtio::Shared;
use crate::devices::virtio::testing::{Driver, for_driver, from_driver};
use crate::fuzz::Input;
use crate::memory::GuestMemory;

const CID: u32 = 42;
/// Where the host listens.
const PORT: u32 = 7;
/// Chains of two descriptors that fill the queue, and where their buffers are: a header, and data behind it.
const RX_CHAINS: u16 = 128;
const RX_AT: u64 = 0x4_0000;
const RX_STRIDE: u64 = 0x1000;
const RX_DATA: u32 = 0xc00;
const TX_AT: u64 = RX_AT + RX_CHAINS as u64 * RX_STRIDE;
const TX_MAX: usize = 0x2_0000;
const MOST_STEPS: usize = 200;
const MOST_CLIENTS: usize = 16;

/// A folder with somebody who listens in it, for as long as this thread is.
struct Folder {
    path: PathBuf,
    listener: UnixListener,
}

impl Folder {
    fn new() -> Self {
        let thread = format!("{:?}", std::thread::current().id());
        let number = thread.trim_matches(|c: char| !c.is_ascii_digit());
        let path = std::env::temp_dir().join(format!("chronovisor-fuzz-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).expect("a folder for sockets");
        let listener = UnixListener::bind(path.join(format!("v_{PORT}"))).expect("a socket");
        listener.set_nonblocking(true).expect("a socket");
        Self { path, listener }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

thread_local! {
    static FOLDER: Folder = Folder::new();
}

fn at(path: &Path) -> Vsock {
    let config = config::Vsock {
        vsock_id: None,
        guest_cid: CID,
        uds_path: path.join("v"),
    };
    let mut vsock = Vsock::new(&config).expect("nobody else listens there");
    vsock.clock = Some(Instant::now());
    vsock
}

/// A device that nobody connects to.
pub(crate) fn device() -> Shared {
    FOLDER.with(|folder| Arc::new(Mutex::new(at(&folder.path))))
}

pub(crate) fn run(mut input: Input) {
    FOLDER.with(|folder| {
        let vsock = Arc::new(Mutex::new(at(&folder.path)));
        let memory = Arc::new(GuestMemory::new(1, HugePages::None).expect("the host has a MiB"));
        let mut play = Play {
            driver: Driver::with_memory(vsock.clone(), memory),
            vsock,
            folder,
            clients: Vec::new(),
            heard: Vec::new(),
            offered: 0,
        };
        play.set_up();
        play.offer(8);
        for _ in 0..MOST_STEPS {
            if input.is_empty() {
                break;
            }
            play.step(&mut input);
            play.collect();
            let vsock = play.lock();
            assert!(vsock.mux.sockets() <= MAX_CONNECTIONS && vsock.mux.line() <= MAX_LINE);
        }
        play.clients.clear();
        while folder.listener.accept().is_ok() {}
    });
}

struct Play<'f> {
    driver: Driver,
    vsock: Arc<Mutex<Vsock>>,
    folder: &'f Folder,
    clients: Vec<UnixStream>,
    /// Connections that the guest was told of, the last ones.
    heard: Vec<Ports>,
    /// Chains for packets that the device has.
    offered: u16,
}

impl Play<'_> {
    fn lock(&self) -> MutexGuard<'_, Vsock> {
        self.vsock.lock().expect("no holder of this lock panics")
    }

    fn set_up(&mut self) {
        self.driver.set_up(u64::MAX);
        self.offered = 0;
        self.driver.turn(1000);
    }

    fn offer(&mut self, chains: u16) {
        for _ in 0..chains.min(RX_CHAINS - self.offered) {
            let slot = u64::from(self.driver.rings[RX].next_descriptor() / 2);
            let at = RX_AT + slot * RX_STRIDE;
            self.driver
                .put(RX, &[for_driver(at, HEADER_SIZE), for_driver(at + 0x400, RX_DATA)]);
            self.offered += 1;
        }
        self.driver.notify(RX);
    }

    /// Has the device do what it has to, and takes what it says.
    fn collect(&mut self) {
        self.driver.turn(1000);
        for (head, len) in self.driver.used(RX) {
            self.offered -= 1;
            let at = RX_AT + u64::from(head / 2) * RX_STRIDE;
            let bytes = self.driver.read(at, HEADER_LEN);
            let header = Header::from_bytes(bytes.as_slice().try_into().expect("as long as a header"));
            assert_eq!(len, header.len + HEADER_SIZE);
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID.into()));
            assert!(Op::from_number(header.op).is_some(), "{header:?}");
            self.heard.insert(
                0,
                Ports {
                    host: header.src_port,
                    guest: header.dst_port,
                },
            );
            self.heard.truncate(4);
        }
        self.driver.used(TX);
        // Packets say what they like; but the rings are sound.
        assert!(!self.driver.needs_reset());
    }

    fn step(&mut self, input: &mut Input) {
        match input.u8() % 16 {
            0..=6 => self.packet(input),
            7 => self.connect(input),
            8 | 9 => self.client(input),
            10 => {
                if let Ok((stream, _)) = self.folder.listener.accept() {
                    self.admit(stream);
                }
            }
            11 | 12 => self.offer(u16::from(input.u8())),
            13 => self.pass(input.pick(&[Duration::from_millis(1), PATIENCE, PARTING_PATIENCE])),
            14 => {
                let held = input.u8() & 1 != 0;
                self.lock().set_held(held);
            }
            _ => self.set_up(),
        }
    }

    fn ports(&self, input: &mut Input) -> Ports {
        let which = input.u8();
        let known = match which >> 4 {
            0..=4 => self.heard.get(usize::from(which & 3)).copied(),
            5..=8 => self.lock().mux.some_ports(),
            _ => None,
        };
        known.unwrap_or_else(|| Ports {
            host: [PORT, PORT, 8, 1 << 30, u32::MAX][usize::from(which & 7) % 5],
            guest: [1, 2, 3, 0, u32::MAX][usize::from(which >> 3 & 7) % 5],
        })
    }

    fn packet(&mut self, input: &mut Input) {
        const EXTREMES: [u32; 8] = [BUFFER, 0, 1, 100, BUFFER - 1, BUFFER + 1, 1 << 31, u32::MAX];
        let ports = self.ports(input);
        let shape = input.u8();
        let data = match shape >> 5 {
            0..=2 => Vec::new(),
            3 => input.short().to_vec(),
            4 => vec![0xa5; 1000],
            5 => vec![0xa5; usize::from(input.u16())],
            _ => vec![0xa5; TX_MAX / 2],
        };
        let honest = u32::try_from(data.len()).expect("they are few");
        let mut header = Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: ports.guest,
            dst_port: ports.host,
            len: honest,
            kind: STREAM,
            op: [5, 1, 2, 3, 4, 5, 6, 7][usize::from(shape & 7)],
            buf_alloc: EXTREMES[0],
            ..Header::default()
        };
        if shape & 0x08 != 0 {
            header.flags = input.u8().into();
            header.buf_alloc = input.pick(&EXTREMES);
            header.fwd_cnt = input.pick(&EXTREMES);
        }
        if shape & 0x10 != 0 {
            match input.u8() % 8 {
                0 => header.src_cid = input.u64(),
                1 => header.dst_cid = input.u64(),
                2 => header.kind = input.u16(),
                3 => header.op = input.u16(),
                4 => header.len = input.u32(),
                5 => header.flags = input.u32(),
                6 => header.buf_alloc = input.u32(),
                _ => header.fwd_cnt = input.u32(),
            }
        }
        self.driver.write(TX_AT, &header.to_bytes());
        self.driver.write(TX_AT + u64::from(HEADER_SIZE), &data);
        self.driver.put(TX, &[from_driver(TX_AT, HEADER_SIZE + honest)]);
        self.driver.notify(TX);
    }

    fn admit(&mut self, stream: UnixStream) {
        stream.set_nonblocking(true).expect("a socket");
        self.clients.push(stream);
        if self.clients.len() > MOST_CLIENTS {
            self.clients.remove(0);
        }
    }

    fn connect(&mut self, input: &mut Input) {
        let says: &[u8] = match input.u8() % 4 {
            0 | 1 => b"CONNECT 52\n",
            2 => b"CONNECT 52\nmore",
            _ => input.short(),
        };
        // Fails where the queue is full: nobody is taken in while the device has no driver.
        let path = self.folder.path.join("v");
        if let Ok(client) = crate::unix_socket::connect(&path) {
            let mut client = UnixStream::from(client);
            let _ = client.write(says);
            self.admit(client);
        }
    }

    fn client(&mut self, input: &mut Input) {
        let (which, what) = (usize::from(input.u8()), input.u8());
        if self.clients.is_empty() {
            return;
        }
        let which = self.clients.len() - 1 - which % self.clients.len();
        let client = &mut self.clients[which];
        // Any of these fails where the other end is gone, or slow.
        match what % 8 {
            0 => drop(self.clients.remove(which)),
            1 => drop(client.shutdown(Shutdown::Read)),
            2 => drop(client.shutdown(Shutdown::Write)),
            3 => drop(client.write(input.short())),
            4 | 5 => drop(client.write(&[0x5a; 3000])),
            6 => drop(client.write(&[0x5a; 0x4_0000])),
            _ => drop(client.read(&mut [0; 0x1_0000])),
        }
    }

    fn pass(&mut self, time: Duration) {
        let mut vsock = self.lock();
        vsock.clock = Some(vsock.now() + time);
        let now = vsock.time();
        vsock.mux.expired(now);
        drop(vsock);
        self.driver.notify(RX);
    }
}
