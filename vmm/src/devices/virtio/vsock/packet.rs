//! What device and driver exchange: a header of 44 bytes, then data (5.10.6). Each packet is one chain.
//!
//! There is a crate for this, but it reads chains of virtio-queue's, unchecked ones; ours come out of
//! [`Queue`](crate::devices::virtio::queue::Queue) checked, and then a header is ten numbers in a row.

/// Length of a header.
pub const HEADER_LEN: usize = 44;
/// The host's context id (5.10.4).
pub const HOST_CID: u64 = 2;
/// The only type of socket that is offered (5.10.6).
pub const STREAM: u16 = 1;

/// In a [`Op::Shutdown`]: its sender will receive no more data.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// In a [`Op::Shutdown`]: its sender will send no more data.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both: the connection is over.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for (5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Asks for a connection.
    Request,
    /// Accepts it.
    Response,
    /// Refuses or ends it.
    Reset,
    /// Ends it in one direction or in both, by its flags.
    Shutdown,
    /// Data (`RW`).
    Data,
    /// Tells how much room there is.
    CreditUpdate,
    /// Asks for that.
    CreditRequest,
}

impl Op {
    const ALL: [Self; 7] = [
        Self::Request,
        Self::Response,
        Self::Reset,
        Self::Shutdown,
        Self::Data,
        Self::CreditUpdate,
        Self::CreditRequest,
    ];

    /// [`None`] for what is none.
    #[must_use]
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|op| op.number() == number)
    }

    /// As in a header.
    #[must_use]
    pub fn number(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }
}

/// A connection's name: ports of both its ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// On the host.
    pub host: u32,
    /// In the guest.
    pub guest: u32,
}

/// A header, field for field.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of data behind the header.
    pub len: u32,
    /// Type of socket.
    pub kind: u16,
    /// [`Op`], by its number.
    pub op: u16,
    /// Of the operation.
    pub flags: u32,
    /// Bytes that the sender's end of the connection buffers at most.
    pub buf_alloc: u32,
    /// Bytes that it has taken out of its buffer since the connection began, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// Writes it.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        for (to, from) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }

    /// A packet that came from the guest: which connection it is of.
    #[must_use]
    pub fn ports_from_guest(&self) -> Ports {
        Ports {
            host: self.dst_port,
            guest: self.src_port,
        }
    }

    /// A packet of the host's, for the guest `cid`.
    #[must_use]
    pub fn to_guest(cid: u64, ports: Ports, op: Op) -> Self {
        Self {
            src_cid: HOST_CID,
            dst_cid: cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind: STREAM,
            op: op.number(),
            ..Self::default()
        }
    }
}

fn take<const N: usize>(from: &mut &[u8]) -> [u8; N] {
    let (first, rest) = from.split_first_chunk().expect("the fields make up a header");
    *from = rest;
    *first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_reads_back_as_it_was_written_with_its_fields_where_they_belong() {
        let mut bytes = [0; HEADER_LEN];
        for (byte, value) in bytes.iter_mut().zip(1..) {
            *byte = value;
        }
        let header = Header::from_bytes(&bytes);
        assert_eq!(header.to_bytes(), bytes);
        assert_eq!(header.dst_cid, 0x100f_0e0d_0c0b_0a09);
        assert_eq!(
            (header.src_port, header.dst_port, header.len),
            (0x1413_1211, 0x1817_1615, 0x1c1b_1a19)
        );
        assert_eq!((header.kind, header.op, header.flags), (0x1e1d, 0x201f, 0x2423_2221));
        assert_eq!((header.buf_alloc, header.fwd_cnt), (0x2827_2625, 0x2c2b_2a29));
    }

    #[test]
    fn operations_have_their_numbers_and_there_are_no_others() {
        let known: Vec<_> = (0..=u16::MAX).filter_map(Op::from_number).map(Op::number).collect();
        assert_eq!(known, [1, 2, 3, 4, 5, 6, 7]);
    }
}
