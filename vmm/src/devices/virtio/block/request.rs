//! A request (5.2.6): a head that the device reads, data in either direction, a status byte that it writes.

use vm_memory::GuestAddress;

use super::{S_IOERR, S_UNSUPP, SECTOR, SEG_MAX};
use crate::devices::virtio::queue::{Buffers, Chain, QueueError};

/// Bytes in one request, at most. A chain may name the same memory again and again; what a driver of this world asks for in
/// [`SEG_MAX`] pieces is less.
const LARGEST: u64 = 64 << 20;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;

/// What a driver asks for.
#[derive(Debug)]
pub(super) enum Kind<'m> {
    /// Read from this byte of the file.
    Read(u64, Buffers<'m>),
    /// Write from this byte of the file on.
    Write(u64, Buffers<'m>),
    /// Make safe what was written.
    Flush,
    /// The disk's serial number.
    Id(Buffers<'m>),
}

/// The kinds that reach the file, without what belongs to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read,
    Write,
    Flush,
}

impl Kind<'_> {
    /// Bytes of data, in either direction.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Read(_, data) | Self::Write(_, data) => data.len() as u64,
            Self::Flush | Self::Id(_) => 0,
        }
    }

    /// Bytes of data that the guest gets, when all goes well.
    pub fn written_to_guest(&self) -> u64 {
        match self {
            Self::Read(_, data) | Self::Id(data) => data.len() as u64,
            Self::Write(..) | Self::Flush => 0,
        }
    }

    pub fn operation(&self) -> Operation {
        match self {
            Self::Read(..) | Self::Id(_) => Operation::Read,
            Self::Write(..) => Operation::Write,
            Self::Flush => Operation::Flush,
        }
    }
}

/// A request with a place for its answer.
#[derive(Debug)]
pub(super) struct Request<'m> {
    /// Where its status goes.
    pub status: GuestAddress,
    /// What to do, or the status to answer with instead.
    pub checked: Result<Kind<'m>, u8>,
}

impl<'m> Request<'m> {
    /// # Errors
    /// It has no head, or no place for a status: there is no way to answer it.
    pub fn parse(mut chain: Chain<'m>, sectors: u64, read_only: bool) -> Result<Self, QueueError> {
        let mut head = [0; 16];
        if chain.readable.read(&mut head) < head.len() {
            return Err(chain.error("has no request head of 16 bytes"));
        }
        let status = chain.last_writable.ok_or_else(|| chain.error("has no status byte"))?;
        let [kind, sector] = [&head[..4], &head[8..]].map(|bytes| {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            u64::from_le_bytes(word)
        });
        let for_guest = chain.writable.take_front(chain.writable.len() - 1);
        let from_guest = chain.readable;
        let checked = match u32::try_from(kind) {
            Ok(T_IN) => place(sector, &for_guest, sectors).map(|at| Kind::Read(at, for_guest)),
            Ok(T_OUT) if read_only => Err(S_IOERR),
            Ok(T_OUT) => place(sector, &from_guest, sectors).map(|at| Kind::Write(at, from_guest)),
            Ok(T_FLUSH) => Ok(Kind::Flush),
            Ok(T_GET_ID) if for_guest.len() >= 20 => Ok(Kind::Id(for_guest)),
            Ok(T_GET_ID) => Err(S_IOERR),
            _ => Err(S_UNSUPP),
        };
        Ok(Self { status, checked })
    }
}

/// The byte of the file where `data` belongs, if all of it lies on the disk, in whole sectors.
fn place(sector: u64, data: &Buffers<'_>, sectors: u64) -> Result<u64, u8> {
    let bytes = data.len() as u64;
    let whole =
        bytes > 0 && bytes <= LARGEST && bytes.is_multiple_of(SECTOR) && data.slices().len() <= SEG_MAX as usize;
    match sector.checked_add(bytes / SECTOR) {
        Some(end) if whole && end <= sectors => Ok(sector * SECTOR),
        _ => Err(S_IOERR),
    }
}
