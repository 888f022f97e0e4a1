use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::connection::BUFFER;
use super::mux::{MAX_CONNECTIONS, MAX_LINE, PARTING_PATIENCE, PATIENCE};
use super::packet::{HOST_CID, Op, Ports, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, STREAM};
use super::*;
use crate::devices::virtio::testing::{BUFFERS, Buffer, Driver, for_driver, from_driver};

const CID: u32 = 42;
/// Data in one of the driver's buffers for packets: Linux's are as long.
const RX_DATA: u32 = 4096;
/// Chains of two descriptors that fill the queue.
const RX_CHAINS: u16 = 128;
const RX_STRIDE: u64 = 0x2000;
const TX_AT: u64 = BUFFERS + RX_CHAINS as u64 * RX_STRIDE;

/// A folder that is gone when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("chronovisor-vsock-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn config(path: &Path) -> config::Vsock {
    config::Vsock {
        vsock_id: None,
        guest_cid: CID,
        uds_path: path.to_owned(),
    }
}

/// A packet, header and data.
type Packet = (Header, Vec<u8>);

/// A guest's driver with the host around it.
struct Guest {
    driver: Driver,
    vsock: Arc<Mutex<Vsock>>,
    inbox: VecDeque<Packet>,
    /// Told in every packet of the guest's.
    buf_alloc: u32,
    folder: Folder,
}

impl Guest {
    fn new() -> Self {
        let folder = Folder::new();
        let vsock = Arc::new(Mutex::new(Vsock::new(&config(&folder.path("v"))).unwrap()));
        // Time passes by Guest::pass alone: nobody is late for the machine being slow.
        vsock.lock().unwrap().clock = Some(Instant::now());
        let driver = Driver::start(vsock.clone(), u64::MAX);
        let mut guest = Self {
            driver,
            vsock,
            inbox: VecDeque::new(),
            buf_alloc: 1 << 20,
            folder,
        };
        guest.offer(RX_CHAINS);
        guest
    }

    /// Resets the device and sets it up anew.
    fn set_up(&mut self) {
        self.driver.set_up(u64::MAX);
        self.inbox.clear();
        self.offer(RX_CHAINS);
    }

    /// Offers buffers for packets. The device uses chains in their order, so descriptors come round in it too.
    fn offer(&mut self, chains: u16) {
        for _ in 0..chains {
            let at = BUFFERS + u64::from(self.next_slot()) * RX_STRIDE;
            let chain = [for_driver(at, 44), for_driver(at + 0x1000, RX_DATA)];
            self.driver.put(RX, &chain);
        }
        self.driver.notify(RX);
        self.driver.turn(100);
    }

    fn next_slot(&self) -> u16 {
        self.driver.rings[RX].next_descriptor() / 2
    }

    fn collect(&mut self) {
        let used = self.driver.used(RX);
        let chains = u16::try_from(used.len()).unwrap();
        for (head, len) in used {
            let at = BUFFERS + u64::from(head / 2) * RX_STRIDE;
            let header = Header::from_bytes(&self.driver.read(at, 44).try_into().unwrap());
            assert_eq!(len, header.len + 44);
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID.into()));
            let data = self.driver.read(at + 0x1000, header.len as usize);
            self.inbox.push_back((header, data));
        }
        if chains > 0 {
            self.offer(chains);
        }
    }

    /// Has the device do what it has to; all that the guest got meanwhile.
    fn turn(&mut self) -> Vec<Packet> {
        // Twice: what the host did may reach the device's epoll descriptor through the first.
        for _ in 0..2 {
            self.driver.turn(1000);
            self.collect();
        }
        assert!(!self.driver.needs_reset());
        self.inbox.drain(..).collect()
    }

    /// The next packet, which is an `op`.
    fn expect(&mut self, op: Op) -> Packet {
        // What the guest sent last may have been answered already.
        self.collect();
        while self.inbox.is_empty() {
            assert!(
                self.driver.turn_for(1, Duration::from_secs(60)) > 0,
                "no {op:?} in a minute"
            );
            self.collect();
        }
        let packet = self.inbox.pop_front().unwrap();
        assert_eq!(packet.0.op, op.number(), "{op:?} expected: {:?}", packet.0);
        packet
    }

    fn header(&self, ports: Ports, op: Op) -> Header {
        Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: ports.guest,
            dst_port: ports.host,
            kind: STREAM,
            op: op.number(),
            buf_alloc: self.buf_alloc,
            ..Header::default()
        }
    }

    /// Sends a packet, whatever it says, with `data` behind it.
    fn send_raw(&mut self, header: Header, data: &[u8]) {
        self.driver.write(TX_AT, &header.to_bytes());
        self.driver.write(TX_AT + 44, data);
        let len = u32::try_from(data.len()).unwrap();
        // In two pieces, cut somewhere in the header, for a device that thought it knew.
        self.put_tx(&[from_driver(TX_AT, 17), from_driver(TX_AT + 17, 27 + len)]);
    }

    fn put_tx(&mut self, chain: &[Buffer]) {
        self.driver.put(TX, chain);
        self.driver.notify(TX);
        self.driver.turn(1000);
        self.driver.used(TX);
    }

    fn send(&mut self, ports: Ports, op: Op) {
        let header = self.header(ports, op);
        self.send_raw(header, &[]);
    }

    fn send_shutdown(&mut self, ports: Ports, flags: u32) {
        let header = Header {
            flags,
            ..self.header(ports, Op::Shutdown)
        };
        self.send_raw(header, &[]);
    }

    fn send_data(&mut self, ports: Ports, data: &[u8]) {
        let header = Header {
            len: u32::try_from(data.len()).unwrap(),
            ..self.header(ports, Op::Data)
        };
        self.send_raw(header, data);
    }

    /// A client of the host's.
    fn client(&self, says: &str) -> UnixStream {
        let mut client = UnixStream::connect(self.folder.path("v")).unwrap();
        client.write_all(says.as_bytes()).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        client
    }

    /// A connection by the host to the guest's port.
    fn connected_by_host(&mut self, port: u32) -> (UnixStream, Ports) {
        let mut client = self.client(&format!("CONNECT {port}\n"));
        let (request, _) = self.expect(Op::Request);
        assert_eq!((request.dst_port, request.kind), (port, STREAM));
        assert_eq!(request.buf_alloc, BUFFER);
        let ports = Ports {
            host: request.src_port,
            guest: port,
        };
        self.send(ports, Op::Response);
        assert_eq!(line(&mut client), format!("OK {}\n", ports.host));
        (client, ports)
    }

    fn listener(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.folder.path(&format!("v_{port}"))).unwrap()
    }

    /// A connection by the guest to the host's port, where `listener` is.
    fn connected_by_guest(&mut self, listener: &UnixListener, ports: Ports) -> UnixStream {
        self.send(ports, Op::Request);
        let (response, _) = self.expect(Op::Response);
        assert_eq!((response.src_port, response.dst_port), (ports.host, ports.guest));
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    fn sockets(&self) -> usize {
        self.vsock.lock().unwrap().mux.sockets()
    }

    fn pass(&mut self, time: Duration) {
        let mut vsock = self.vsock.lock().unwrap();
        vsock.clock = Some(vsock.now() + time);
        let now = vsock.time();
        vsock.mux.expired(now);
        drop(vsock);
        self.driver.notify(RX);
    }

    fn run_out_of_patience(&mut self) {
        self.pass(PATIENCE);
    }

    fn counted(&self, counter: impl Fn(&VsockMetrics) -> &std::sync::atomic::AtomicU64) -> u64 {
        counter(self.vsock.lock().unwrap().metrics()).load(Ordering::Relaxed)
    }
}

fn line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

fn is_closed(stream: &mut UnixStream) -> bool {
    let read = stream.read(&mut [0]);
    matches!(read, Ok(0)) || read.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}

/// Bytes that tell where they belong.
fn pattern(from: usize, len: usize) -> Vec<u8> {
    (from..from + len)
        .map(|at| (at ^ at >> 8 ^ at >> 16).to_le_bytes()[0])
        .collect()
}

const PORTS: Ports = Ports { host: 7, guest: 1234 };

mod connections;
mod hostile;
mod sockets;
