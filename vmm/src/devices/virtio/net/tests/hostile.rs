//! A driver that breaks the rules, on a wire whose other end goes on sending and taking away.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use super::super::spec::{HEADER_LEN, MAX_FRAME_LEN};
use super::super::*;
use super::config;
use crate::devices::virtio::Shared;
use crate::devices::virtio::hostile::{self, Dice, Shape};

/// The other ends of wires: what comes by them is taken away, and frames of any length are sent.
#[derive(Default)]
struct Hosts {
    last: Option<(OwnedFd, Arc<NetMetrics>)>,
    /// By all devices but the last: frames to and from the guest.
    counted: [u64; 2],
}

impl Hosts {
    /// Adds what the last device has counted, and lets go of it.
    fn count(&mut self) {
        if let Some((_, metrics)) = self.last.take() {
            let counters = [&metrics.rx_packets_count, &metrics.tx_packets_count];
            for (sum, counter) in self.counted.iter_mut().zip(counters) {
                *sum += counter.load(Ordering::Relaxed);
            }
        }
    }
}

impl hostile::World for &mut Hosts {
    fn make(&mut self) -> Shared {
        self.count();
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (host, device) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let net = Net::with_tap(&config(serde_json::json!({})), Tap::of(device)).unwrap();
        self.last = Some((host, Arc::clone(net.metrics())));
        Arc::new(Mutex::new(net))
    }

    fn meanwhile(&mut self, dice: &mut Dice) {
        let Some((host, _)) = &self.last else { return };
        let mut frame = vec![0; MAX_FRAME_LEN];
        // A wire that nobody reads takes nothing more after a few.
        while recv(host, &mut frame, RecvFlags::empty()).is_ok() {}
        for _ in 0..dice.below(4) {
            let len = dice.pick(&[HEADER_LEN, HEADER_LEN + 14, 72, 1526, 1527, 9000, MAX_FRAME_LEN]);
            // Fails where a guest has left too many.
            let _ = send(host, &frame[..len], SendFlags::empty());
        }
    }

    /// A few that the longest frame fits into; and a header with a frame behind it.
    fn buffers(&self, queue: usize) -> Option<Shape> {
        Some(Shape {
            writable: queue == RX,
            least: if queue == RX { 1 << 15 } else { 64 },
        })
    }
}

#[test]
fn a_hostile_driver_harms_nobody_while_frames_come_and_go() {
    let mut hosts = Hosts::default();
    hostile::survives(&mut hosts);
    hosts.count();
    println!("frames to and from the guest: {:?}", hosts.counted);
    // As many as there are cases: rings through which hardly anything ever came would show nothing.
    assert!(
        hosts.counted.iter().all(|&frames| frames > 10_000),
        "{:?}",
        hosts.counted
    );
    hostile::survives_registers(&mut Hosts::default());
}
