//! Under the stack: Ethernet frames in and out, ARP, and which guest MAC has which address.
//!
//! smoltcp is run on IP packets, and the frames around them are made here, for two reasons. A guest may send us packets by way of its
//! gateway's MAC (its default route), and smoltcp's Ethernet would drop those. And a guest that reached us has shown its MAC: asking
//! for it by ARP, as smoltcp would, costs a round trip and fails behind a strict guest. Frames and ARP are smoltcp's wire formats.

use std::collections::VecDeque;

use smoltcp::phy::{self, Checksum, DeviceCapabilities, Medium};
use smoltcp::time::Instant;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, Ipv4Address,
    Ipv4Packet,
};

/// The service's own MAC, as in Firecracker.
pub(super) const MAC: EthernetAddress = EthernetAddress([0x06, 0x01, 0x23, 0x45, 0x67, 0x01]);

const ETHERNET_HEADER_BYTES: usize = EthernetFrame::<&[u8]>::header_len();

/// Largest IP packet sent; a guest's TCP may ask for smaller ones.
const MTU_BYTES: usize = 1500;

/// Frames that wait for the guest's buffers. A guest that gives none loses what comes next, and TCP asks again.
pub(super) const QUEUE_FRAMES: usize = 32;

/// Guest addresses remembered at once: one, mostly; several where a guest bridges for others. The eldest is forgotten.
const NEIGHBORS: usize = 16;

/// Frames on their way to the guest.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    frames: VecDeque<Vec<u8>>,
    /// Least recently heard first.
    neighbors: VecDeque<(Ipv4Address, EthernetAddress)>,
}

impl Outgoing {
    pub fn pop(&mut self) -> Option<Vec<u8>> {
        self.frames.pop_front()
    }

    pub fn len(&self) -> usize {
        self.frames.len()
    }

    pub fn is_full(&self) -> bool {
        self.frames.len() >= QUEUE_FRAMES
    }

    /// Remembers where packets to `address` go.
    pub fn learn(&mut self, address: Ipv4Address, mac: EthernetAddress) {
        self.neighbors.retain(|&(known, _)| known != address);
        if self.neighbors.len() == NEIGHBORS {
            self.neighbors.pop_front();
        }
        self.neighbors.push_back((address, mac));
    }

    /// Answers the ARP packet `request` if it asks for `ours`.
    pub fn answer_arp(&mut self, request: &[u8], ours: Ipv4Address) {
        let parsed = ArpPacket::new_checked(request).and_then(|packet| ArpRepr::parse(&packet));
        let Ok(ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        }) = parsed
        else {
            return;
        };
        if target_protocol_addr != ours || self.is_full() {
            return;
        }
        let reply = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: MAC,
            source_protocol_addr: ours,
            target_hardware_addr: source_hardware_addr,
            target_protocol_addr: source_protocol_addr,
        };
        self.push(
            source_hardware_addr,
            EthernetProtocol::Arp,
            reply.buffer_len(),
            |payload| {
                reply.emit(&mut ArpPacket::new_unchecked(payload));
            },
        );
    }

    fn push<R>(
        &mut self,
        to: EthernetAddress,
        ethertype: EthernetProtocol,
        payload_bytes: usize,
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> R {
        let header = EthernetRepr {
            src_addr: MAC,
            dst_addr: to,
            ethertype,
        };
        let mut frame = vec![0; ETHERNET_HEADER_BYTES + payload_bytes];
        header.emit(&mut EthernetFrame::new_unchecked(&mut frame[..]));
        let result = fill(&mut frame[ETHERNET_HEADER_BYTES..]);
        self.frames.push_back(frame);
        result
    }

    /// Puts the MAC of the guest's that has the packet's destination on the newest frame. One that is not known any more, for many
    /// others were heard since, takes that heard last.
    fn address_newest(&mut self) {
        let Some(frame) = self.frames.back_mut() else { return };
        let Ok(packet) = Ipv4Packet::new_checked(&frame[ETHERNET_HEADER_BYTES..]) else {
            return;
        };
        let destination = packet.dst_addr();
        let known = self.neighbors.iter().find(|(address, _)| *address == destination);
        if let Some(&(_, mac)) = known.or(self.neighbors.back()) {
            EthernetFrame::new_unchecked(&mut frame[..]).set_dst_addr(mac);
        }
    }
}

/// What smoltcp sees as its network device, for one call: at most one packet in, and the queue out.
pub(super) struct Port<'a> {
    pub incoming: Option<&'a [u8]>,
    pub outgoing: &'a mut Outgoing,
}

pub(super) struct Incoming<'a>(&'a [u8]);

pub(super) struct Slot<'a>(&'a mut Outgoing);

impl phy::Device for Port<'_> {
    type RxToken<'a>
        = Incoming<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Slot<'a>
    where
        Self: 'a;

    fn receive(&mut self, _: Instant) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        let packet = self.incoming.take()?;
        Some((Incoming(packet), Slot(self.outgoing)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Self::TxToken<'_>> {
        (!self.outgoing.is_full()).then_some(Slot(self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU_BYTES;
        // A guest whose device offers VIRTIO_NET_F_CSUM leaves the TCP checksum to whoever has the segment next: here nobody.
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

impl phy::RxToken for Incoming<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(self.0)
    }
}

impl phy::TxToken for Slot<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, packet_bytes: usize, fill: F) -> R {
        let result = self
            .0
            .push(EthernetAddress::BROADCAST, EthernetProtocol::Ipv4, packet_bytes, fill);
        self.0.address_newest();
        result
    }
}
