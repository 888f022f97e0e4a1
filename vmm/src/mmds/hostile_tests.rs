//! Frames of a guest that means harm: none makes the stack panic, loop, or keep more than it promised.

use proptest::prelude::*;
use serde_json::json;
use smoltcp::wire::{ETHERNET_HEADER_LEN, IPV4_HEADER_LEN, Ipv4Address, TcpSeqNumber};

use super::bounds::{drain, keeps_its_bounds};
use super::stack_tests::{Bench, GET_NAME, named, ok};
use super::*;
use crate::mmds::config::{DEFAULT_IPV4, Version};

/// Steele and Vigna's SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).unwrap()
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.byte()).collect()
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// What the attacker knows of one of its connections: enough to be taken for the real one.
#[derive(Clone, Copy, Default)]
struct Peer {
    next: u32,
    expected: u32,
}

struct Attacker {
    random: Random,
    peers: [Peer; 48],
}

impl Attacker {
    const FIRST_PORT: u16 = 1000;

    /// A TCP segment, mostly right, wrong in any field now and then.
    fn segment(&mut self) -> Vec<u8> {
        let random = &mut self.random;
        // A few connections that get far, and many that take up room.
        let index = if random.one_in(4) {
            random.below(self.peers.len())
        } else {
            random.below(4)
        };
        let peer = self.peers[index];
        let astray = |random: &mut Random, right: u32| match random.below(8) {
            0 => u32::from_le_bytes(random.next().to_le_bytes()[..4].try_into().unwrap()),
            1 => right.wrapping_add(random.pick(&[1, 100, 65_535, u32::MAX, u32::MAX - 1400, 1 << 31])),
            _ => right,
        };
        let options = match random.below(8) {
            0 => {
                let length = 4 * random.below(11);
                random.bytes(length)
            }
            1 => vec![2, 4, random.pick(&[0, 2, 255]), random.pick(&[0, 1, 255])],
            2 => vec![3, 3, random.byte(), 0],
            3 => vec![5, 10, 0, 0, 0, 9, 0, 0, 0, 1, 1, 1],
            4 => vec![8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0],
            _ => vec![],
        };
        let payload = match random.below(8) {
            4 | 5 => b"GET /name HTTP/1.0\r\n\r\n".to_vec(),
            0 => GET_NAME.as_bytes().to_vec(),
            1 => b"GET / HTTP/1.1\r\nAccept: application/json\r\n\r\n".to_vec(),
            2 => GET_NAME.as_bytes()[..random.below(GET_NAME.len())].to_vec(),
            3 => {
                let length = random.pick(&[1, 100, 1460, 2500, 2501, 9000]);
                random.bytes(length)
            }
            _ => vec![],
        };
        // FIN, SYN, RST, PSH, ACK, URG, ...: what makes sense, or anything.
        let flags = match random.below(10) {
            0 => random.byte(),
            1 | 2 => 0x02,
            3 => 0x11,
            4 => random.pick(&[0x04, 0x14, 0x12]),
            _ => 0x10,
        };
        let mut segment = vec![0; 20];
        segment[..2].copy_from_slice(&(Self::FIRST_PORT + u16::try_from(index).unwrap()).to_be_bytes());
        segment[2..4].copy_from_slice(&PORT.to_be_bytes());
        segment[4..8].copy_from_slice(&astray(random, peer.next).to_be_bytes());
        segment[8..12].copy_from_slice(&astray(random, peer.expected).to_be_bytes());
        segment[12] = u8::try_from((20 + options.len()) / 4).unwrap() << 4;
        segment[13] = flags;
        let window: u16 = random.pick(&[0, 1, 2, 536, 4096, 65_535]);
        segment[14..16].copy_from_slice(&window.to_be_bytes());
        segment.extend(options);
        segment.extend(payload);
        segment
    }

    fn frame(&mut self) -> Vec<u8> {
        let ours = DEFAULT_IPV4.octets();
        let kind = self.random.below(20);
        if kind == 0 {
            let length = self.random.below(100);
            return self.random.bytes(length);
        }
        let source = self.random.pick(&[
            [172, 16, 0, 9],
            [172, 16, 0, 9],
            [172, 16, 0, 9],
            [0; 4],
            [255; 4],
            ours,
            [224, 0, 0, 1],
        ]);
        let mut frame = [0xff; ETHERNET_HEADER_LEN].to_vec();
        frame[6..12].copy_from_slice(&self.random.bytes(6));
        if kind == 1 {
            let arp = [
                &[0, 1, 8, 0, 6, 4, 0, self.random.byte() % 4],
                &self.random.bytes(6)[..],
                &source,
                &[0; 6],
                &ours,
            ];
            frame[12..].copy_from_slice(&[8, 6]);
            frame.extend(arp.concat());
        } else {
            let protocol = match kind {
                2 => 1,
                3 => self.random.byte(),
                _ => 6,
            };
            let payload = match protocol {
                6 => self.segment(),
                1 => [&[8, 0, 0, 0], &self.random.bytes(64)[..]].concat(),
                _ => self.random.bytes(64),
            };
            let length = u16::try_from(IPV4_HEADER_LEN + payload.len()).unwrap();
            let mut header = [0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            header[2..4].copy_from_slice(&length.to_be_bytes());
            header[12..16].copy_from_slice(&source);
            header[16..].copy_from_slice(&ours);
            let mut header = Ipv4Packet::new_unchecked(header);
            header.fill_checksum();
            frame[12..].copy_from_slice(&[8, 0]);
            frame.extend(header.into_inner());
            frame.extend(payload);
            if protocol == 1 {
                smoltcp::wire::Icmpv4Packet::new_unchecked(&mut frame[34..]).fill_checksum();
            }
        }
        // A byte of the headers now and then, or the end cut off; the IPv4 checksum put right, or the change would not get far.
        if self.random.one_in(10) {
            let at = self.random.below(frame.len().min(60));
            frame[at] = self.random.byte();
            if frame.len() >= ETHERNET_HEADER_LEN + IPV4_HEADER_LEN && (frame[14] & 0x0f) >= 5 {
                let header_len = usize::from(frame[14] & 0x0f) * 4;
                if frame.len() >= ETHERNET_HEADER_LEN + header_len {
                    Ipv4Packet::new_unchecked(&mut frame[ETHERNET_HEADER_LEN..]).fill_checksum();
                }
            }
        }
        if self.random.one_in(20) {
            let length = self.random.below(frame.len());
            frame.truncate(length);
        }
        frame
    }

    /// Follows the stack's sequence numbers, so that what comes next is taken seriously.
    fn learn(&mut self, frame: &[u8]) {
        let Ok(ipv4) = Ipv4Packet::new_checked(&frame[ETHERNET_HEADER_LEN..]) else {
            return;
        };
        if ipv4.next_header() != IpProtocol::Tcp {
            return;
        }
        let segment = TcpPacket::new_checked(ipv4.payload()).unwrap();
        let source: Ipv4Address = ipv4.src_addr();
        assert!(segment.verify_checksum(&source.into(), &ipv4.dst_addr().into()));
        let Some(index) = segment.dst_port().checked_sub(Self::FIRST_PORT) else {
            return;
        };
        let Some(peer) = self.peers.get_mut(usize::from(index)) else {
            return;
        };
        let raw = |number: TcpSeqNumber| u32::from_ne_bytes(number.0.to_ne_bytes());
        let expected = raw(segment.seq_number() + segment.segment_len());
        // Acknowledging nothing, sometimes, keeps responses on the stack's hands.
        if !self.random.one_in(3) {
            peer.expected = expected;
        }
        if segment.ack() {
            peer.next = raw(segment.ack_number());
        }
    }
}

#[test]
fn ten_thousand_hostile_frames_leave_the_stack_serving() {
    let document = json!({ "name": "chronovisor", "long": "x".repeat(30_000) });
    let mut states = std::collections::HashSet::new();
    let mut bench = Bench::new(Version::V1, document);
    let mut attacker = Attacker {
        random: Random(4),
        peers: [Peer::default(); 48],
    };
    for case in 0..10_000 {
        let frame = attacker.frame();
        bench.stack.receive(&frame, bench.now);
        keeps_its_bounds(&mut bench.stack, bench.now);
        // A guest may well fetch nothing for a while.
        if !attacker.random.one_in(4) {
            for frame in drain(&mut bench.stack, bench.now) {
                attacker.learn(&frame);
            }
        }
        for connection in &bench.stack.connections {
            states.insert(format!(
                "{}",
                bench.stack.sockets.get::<Socket>(connection.handle).state()
            ));
        }
        let leap_ms = match attacker.random.below(200) {
            0 => 61_000,
            1..5 => 11_000,
            5..20 => 1_000,
            20..100 => 1,
            _ => 0,
        };
        bench.now += Duration::from_millis(leap_ms);
        if case % 500 == 499 {
            // Who waits for the attacker's connections to be old enough to give way is served.
            bench.wait(EVICTABLE);
            drain(&mut bench.stack, bench.now);
            let honest = bench.open();
            assert_eq!(
                bench.ask(honest, GET_NAME),
                ok("chronovisor"),
                "after {case} hostile frames"
            );
        }
    }
    // It was an attack on more than the door: the connections went through their whole life.
    for state in [
        "LISTEN",
        "SYN-RECEIVED",
        "ESTABLISHED",
        "CLOSE-WAIT",
        "LAST-ACK",
        "FIN-WAIT-1",
        "TIME-WAIT",
    ] {
        assert!(states.contains(state), "no connection was in {state}: {states:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn any_frames_at_all_leave_the_stack_within_its_bounds(
        frames in proptest::collection::vec(
            (proptest::collection::vec(any::<u8>(), 0..120), 0_u8..4, 0_u64..20_000), 0..40),
    ) {
        let mut bench = Bench::new(Version::V1, named());
        for (mut frame, kind, leap_ms) in frames {
            // Of most random frames the first look would see that they are not ours.
            let (ethertype, at) = if kind == 0 { ([8, 6], 38) } else { ([8, 0], 30) };
            if kind < 3 && frame.len() >= at + 4 {
                frame[12..14].copy_from_slice(&ethertype);
                frame[at..at + 4].copy_from_slice(&DEFAULT_IPV4.octets());
            }
            if kind == 2 && frame.len() > 54 {
                frame[14] = 0x45;
                let length = u16::try_from(frame.len() - 14).unwrap();
                frame[16..18].copy_from_slice(&length.to_be_bytes());
                frame[23] = 6;
                Ipv4Packet::new_unchecked(&mut frame[14..]).fill_checksum();
            }
            bench.stack.receive(&frame, bench.now);
            bench.now += Duration::from_millis(leap_ms);
            keeps_its_bounds(&mut bench.stack, bench.now);
            drain(&mut bench.stack, bench.now);
        }
        bench.wait(IDLE);
        let honest = bench.open();
        prop_assert_eq!(bench.ask(honest, GET_NAME), ok("chronovisor"));
    }
}
