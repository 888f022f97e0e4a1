//! Frames of a guest, whatever is in them: see [`crate::fuzz`].
//!
//! An input is the version of MMDS, by a byte, then one step after another: a segment of one of a few connections, whose sequence
//! numbers are right unless the step says otherwise, for else all would end at the door; a frame as it stands; or time that passes.
//! `$T` in a segment stands for the token that the guest got last, which no input could know.

use smoltcp::wire::{ETHERNET_HEADER_LEN, IPV4_HEADER_LEN, Ipv4Address, TcpSeqNumber};

use super::bounds::{drain, keeps_its_bounds};
use super::*;
use crate::fuzz::Input;
use crate::mmds::Mmds;
use crate::mmds::config::{DEFAULT_IPV4, MmdsConfig, Version};
use crate::mmds::data::DEFAULT_LIMIT_BYTES;

const MOST_STEPS: usize = 200;
const CONNECTIONS: usize = 40;
const FIRST_PORT: u16 = 1000;
const GUEST: [u8; 4] = [172, 16, 0, 9];

fn service(imds_compat: bool, version: Version, now: Instant) -> SharedMmds {
    let mut mmds = Mmds::new(DEFAULT_LIMIT_BYTES, now).expect("the kernel has random bytes");
    let document = serde_json::json!({
        "name": "chronovisor", "long": "x".repeat(20_000), "list": [1, null, {"a/b": true}], "latest": {"meta-data": {"id": "i-1"}},
    });
    mmds.data.put(document).expect("it is small enough");
    mmds.configure(&MmdsConfig {
        version,
        network_interfaces: vec!["eth0".into()],
        ipv4_address: DEFAULT_IPV4,
        imds_compat,
    });
    Arc::new(std::sync::Mutex::new(mmds))
}

pub(crate) fn run(mut input: Input) {
    let now = Instant::now();
    let mode = input.u8();
    let version = if mode & 1 == 0 { Version::V1 } else { Version::V2 };
    let mut play = Play {
        stack: Stack::with_seed(DEFAULT_IPV4, service(mode & 2 != 0, version, now), now, 4),
        now,
        peers: [Peer::default(); CONNECTIONS],
        token: Vec::new(),
    };
    for _ in 0..MOST_STEPS {
        if input.is_empty() {
            break;
        }
        play.step(&mut input);
        keeps_its_bounds(&mut play.stack, play.now);
    }
    // Whoever was heard of last is reset when it has been silent for long enough, and nothing is left.
    drain(&mut play.stack, play.now);
    play.now += IDLE + IDLE;
    drain(&mut play.stack, play.now);
    keeps_its_bounds(&mut play.stack, play.now);
}

/// What the guest knows of one of its connections.
#[derive(Clone, Copy, Default)]
struct Peer {
    next: u32,
    expected: u32,
}

struct Play {
    stack: Stack,
    now: Instant,
    peers: [Peer; CONNECTIONS],
    token: Vec<u8>,
}

impl Play {
    fn step(&mut self, input: &mut Input) {
        match input.u8() % 8 {
            0..=4 => {
                let segment = self.segment(input);
                let fetches = segment.1;
                self.receive(&ipv4(6, &segment.0));
                if fetches {
                    self.fetch();
                }
            }
            5 => self.frame(input),
            6 => {
                let leap_ms = input.pick(&[1, 0, 100, 1000, 11_000, 61_000]);
                self.now += Duration::from_millis(leap_ms);
                self.fetch();
            }
            _ => self.fetch(),
        }
    }

    fn receive(&mut self, frame: &[u8]) {
        self.stack.receive(frame, self.now);
    }

    fn segment(&mut self, input: &mut Input) -> (Vec<u8>, bool) {
        let (which, shape) = (usize::from(input.u8()), input.u8());
        let which = which % CONNECTIONS;
        let peer = self.peers[which];
        let flags = match shape & 7 {
            0 | 1 => 0x18,
            2 => 0x02,
            3 => 0x10,
            4 => 0x11,
            5 => 0x04,
            _ => input.u8(),
        };
        let (mut sequence, mut acknowledges, mut window) = (peer.next, peer.expected, 0xffff);
        if shape & 0x08 != 0 {
            sequence = sequence.wrapping_add(input.pick(&[1, 100, u32::MAX, 0xffff_fa00, 1 << 31, 0xffff]));
            acknowledges = acknowledges.wrapping_add(input.pick(&[0, 1, u32::MAX, 1 << 31, 1400]));
            window = input.u16();
        }
        let mut options = if shape & 0x10 == 0 { &[][..] } else { input.short() }.to_vec();
        options.truncate(40);
        options.resize(options.len().next_multiple_of(4), 0);
        let payload = match shape >> 5 & 3 {
            0 => Vec::new(),
            1 => self.with_token(input.short()),
            2 => vec![b'x'; usize::from(input.u16() % 9000)],
            _ => self.with_token(PHRASES[usize::from(input.u8()) % PHRASES.len()]),
        };
        let mut segment = vec![0; 20];
        let port = FIRST_PORT + u16::try_from(which).expect("they are few");
        segment[..2].copy_from_slice(&port.to_be_bytes());
        segment[2..4].copy_from_slice(&PORT.to_be_bytes());
        segment[4..8].copy_from_slice(&sequence.to_be_bytes());
        segment[8..12].copy_from_slice(&acknowledges.to_be_bytes());
        segment[12] = u8::try_from((20 + options.len()) / 4).expect("40 bytes at most") << 4;
        segment[13] = flags;
        segment[14..16].copy_from_slice(&window.to_be_bytes());
        segment.extend(options);
        segment.extend(payload);
        (segment, shape & 0x80 == 0)
    }

    fn with_token(&self, text: &[u8]) -> Vec<u8> {
        match text.windows(2).position(|two| two == b"$T") {
            Some(at) => [&text[..at], &self.token, &text[at + 2..]].concat(),
            None => text.to_vec(),
        }
    }

    /// A frame as it stands, or an IPv4 packet, or a question for a MAC address, with what makes it one put right.
    fn frame(&mut self, input: &mut Input) {
        let kind = input.u8() % 4;
        let bytes = input.short();
        let frame = match kind {
            0 => bytes.to_vec(),
            1 => ipv4(1, bytes),
            2 => ipv4(bytes.first().copied().unwrap_or_default(), bytes),
            _ => {
                let mut frame = vec![0xff; ETHERNET_HEADER_LEN];
                frame[12..].copy_from_slice(&[8, 6]);
                frame.extend([0, 1, 8, 0, 6, 4, 0, 1, 2, 2, 2, 2, 2, 2]);
                frame.extend(GUEST.iter().chain(&[0; 6]).chain(&DEFAULT_IPV4.octets()));
                let at = ETHERNET_HEADER_LEN + usize::from(bytes.first().copied().unwrap_or_default()) % 28;
                for (byte, change) in frame[at..].iter_mut().zip(bytes.iter().skip(1)) {
                    *byte ^= change;
                }
                frame
            }
        };
        self.receive(&frame);
    }

    /// Takes what is for the guest, and learns of it: sequence numbers, and tokens.
    fn fetch(&mut self) {
        for frame in drain(&mut self.stack, self.now) {
            let Ok(ipv4) = Ipv4Packet::new_checked(&frame[ETHERNET_HEADER_LEN..]) else {
                continue;
            };
            if ipv4.next_header() != IpProtocol::Tcp {
                continue;
            }
            let segment = TcpPacket::new_checked(ipv4.payload()).expect("the stack's are sound");
            let source: Ipv4Address = ipv4.src_addr();
            assert!(segment.verify_checksum(&source.into(), &ipv4.dst_addr().into()));
            let which = segment.dst_port().checked_sub(FIRST_PORT).map(usize::from);
            let Some(peer) = which.and_then(|which| self.peers.get_mut(which)) else {
                continue;
            };
            let raw = |number: TcpSeqNumber| u32::from_ne_bytes(number.0.to_ne_bytes());
            peer.expected = raw(segment.seq_number() + segment.segment_len());
            if segment.ack() {
                peer.next = raw(segment.ack_number());
            }
            let said = segment.payload();
            if let Some(at) = said.windows(4).position(|four| four == b"\r\n\r\n")
                && said.starts_with(b"HTTP/1.1 200")
            {
                self.token = said[at + 4..].to_vec();
            }
        }
    }
}

/// What an honest guest says, from which to go astray.
const PHRASES: [&[u8]; 8] = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET /name HTTP/1.1\r\nAccept: application/json\r\n\r\n",
    b"PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n",
    b"GET /latest/meta-data/ HTTP/1.1\r\nX-metadata-token: $T\r\n\r\n",
    b"GET /long HTTP/1.0\r\nConnection: close\r\n\r\n",
    b"GET /list/2/a~1b HTTP/1.1\r\nAccept: */*\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody",
    b"GET /na",
];

/// A frame with an IPv4 packet for the service in it.
fn ipv4(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0xff; ETHERNET_HEADER_LEN];
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    frame[12..].copy_from_slice(&[8, 0]);
    let length = u16::try_from(IPV4_HEADER_LEN + payload.len()).expect("payloads are short");
    let mut header = [0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    header[2..4].copy_from_slice(&length.to_be_bytes());
    header[12..16].copy_from_slice(&GUEST);
    header[16..].copy_from_slice(&DEFAULT_IPV4.octets());
    let mut header = Ipv4Packet::new_unchecked(header);
    header.fill_checksum();
    frame.extend(header.into_inner());
    frame.extend(payload);
    frame
}
