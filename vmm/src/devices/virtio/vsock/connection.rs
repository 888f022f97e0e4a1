//! One connection, as it stands between the guest's socket and the host's: what has been said, what is due, who may
//! still send. It does no I/O; `mux.rs` tells it what happened, and asks it what to do.
//!
//! ```text
//!  by the host:   Requested ── RESPONSE ──► Established      by the guest:   Established, a RESPONSE is due
//!                                               │
//!  Established:  guest's SHUTDOWN, by direction ┤   sending: the host's end sees it, behind all that came before
//!                                               │   receiving: the host's end cannot write any more
//!                host's end of file ────────────┤   SHUTDOWN, sending: the guest may go on
//!                host's end closed ─────────────┤   SHUTDOWN, both: the guest resets, or is reset after a while
//!                                               ▼
//!                over: by the guest's SHUTDOWN of both (answered by a RST), a RST, or a broken rule (a RST)
//! ```
//!
//! Flow control is by credit (5.10.6.3). Towards the guest no more is sent than it says that it has room for, and it is
//! asked once when there is none. From the guest at most [`BUFFER`] bytes are held that the host's end does not take; a
//! guest that sends more has its connection reset. It is told of room as soon as half of that has become free.

use std::collections::VecDeque;

use super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Bytes held for a host's end that does not take them, at most: `buf_alloc` (5.10.6.3), as large as Firecracker's.
pub const BUFFER: u32 = 64 << 10;

/// Bytes of data in one packet to the guest, at most: Linux's `VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`.
const MAX_DATA: u32 = 64 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Requested,
    Established,
}

/// What follows from a packet of the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing more than was noted.
    Noted,
    /// The guest took the connection: the host's end is to be told.
    Accepted,
    /// So much data, for which there is room.
    Data(u32),
    /// The guest is through with it. It gets a RST; what it sent before is still the host's.
    Closed,
    /// The guest reset it.
    Gone,
    /// The guest broke a rule: it gets a RST, and the host's end is dropped.
    Broken,
}

/// What is to be done for the guest next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Say this, with these flags.
    Say(Op, u32),
    /// Read from the host's end, so many bytes at most, and send them.
    Read(u32),
}

/// A connection.
#[derive(Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a fact of its own: of either end, or due to it"
)]
pub struct Connection {
    state: State,

    // Towards the guest.
    guest_buf_alloc: u32,
    guest_fwd_cnt: u32,
    sent: u32,
    /// Credit was asked for, and none has come since.
    asked: bool,
    request_due: bool,
    response_due: bool,
    credit_due: bool,
    told_shutdown: u32,

    // From the guest.
    guest_shutdown: u32,
    /// What the host's end has not taken yet.
    held: VecDeque<u8>,
    forwarded: u32,
    /// `forwarded`, as the guest knows it.
    told_forwarded: u32,

    // The host's end.
    readable: bool,
    writable: bool,
    ended: bool,
    hung_up: bool,
    told_receive: bool,
    told_send: bool,
}

impl Connection {
    fn new(state: State) -> Self {
        Self {
            state,
            guest_buf_alloc: 0,
            guest_fwd_cnt: 0,
            sent: 0,
            asked: false,
            request_due: state == State::Requested,
            response_due: state == State::Established,
            credit_due: false,
            told_shutdown: 0,
            guest_shutdown: 0,
            held: VecDeque::new(),
            forwarded: 0,
            told_forwarded: 0,
            // Until an attempt shows otherwise.
            readable: true,
            writable: true,
            ended: false,
            hung_up: false,
            told_receive: false,
            told_send: false,
        }
    }

    /// The host asks for it.
    #[must_use]
    pub fn by_host() -> Self {
        Self::new(State::Requested)
    }

    /// The guest asked for it by `request`, and the host has taken it.
    #[must_use]
    pub fn by_guest(request: &Header) -> Self {
        let mut connection = Self::new(State::Established);
        connection.hear_credit(request);
        connection
    }

    /// Whether the guest has yet to accept it.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        self.state == State::Requested
    }

    /// The guest sent `header`. [`Verdict::Data`] has to be followed by as many bytes being told of to
    /// [`Connection::took`] or [`Connection::hold`].
    pub fn hear(&mut self, header: &Header) -> Verdict {
        let Some(op) = Op::from_number(header.op) else {
            return Verdict::Broken;
        };
        self.hear_credit(header);
        match (self.state, op) {
            (_, Op::Reset) => Verdict::Gone,
            (State::Requested, Op::Response) => {
                self.state = State::Established;
                Verdict::Accepted
            }
            (State::Established, Op::Shutdown) => {
                self.guest_shutdown |= header.flags & SHUTDOWN_BOTH;
                if self.guest_shutdown == SHUTDOWN_BOTH {
                    Verdict::Closed
                } else {
                    Verdict::Noted
                }
            }
            (State::Established, Op::Data) if self.guest_shutdown & SHUTDOWN_SEND == 0 && header.len <= self.room() => {
                Verdict::Data(header.len)
            }
            (_, Op::CreditUpdate) => Verdict::Noted,
            (_, Op::CreditRequest) => {
                self.credit_due = true;
                Verdict::Noted
            }
            _ => Verdict::Broken,
        }
    }

    /// Every packet of the guest's tells of its room.
    fn hear_credit(&mut self, header: &Header) {
        self.guest_buf_alloc = header.buf_alloc;
        self.guest_fwd_cnt = header.fwd_cnt;
        if self.credit() > 0 {
            self.asked = false;
        }
    }

    /// Bytes that the guest has room for. None where what it says makes no sense.
    fn credit(&self) -> u32 {
        self.guest_buf_alloc
            .saturating_sub(self.sent.wrapping_sub(self.guest_fwd_cnt))
    }

    /// Bytes that there is room for here.
    fn room(&self) -> u32 {
        // What is held has come through here.
        BUFFER - u32::try_from(self.held.len()).unwrap_or(BUFFER)
    }

    /// What is due to the guest: [`Connection::said`], [`Connection::sent`], [`Connection::drained`] or
    /// [`Connection::end_of_file`] is to follow. [`None`] until something happens.
    #[must_use]
    pub fn next(&self) -> Option<Next> {
        if self.request_due {
            return Some(Next::Say(Op::Request, 0));
        }
        if self.state == State::Requested {
            return None;
        }
        if self.response_due {
            return Some(Next::Say(Op::Response, 0));
        }
        let refused = self.guest_shutdown & SHUTDOWN_RECEIVE != 0;
        let mut shutdown = self.told_shutdown;
        if self.hung_up {
            shutdown |= SHUTDOWN_RECEIVE;
        }
        if self.ended || (self.hung_up && refused) {
            shutdown |= SHUTDOWN_SEND;
        }
        if shutdown != self.told_shutdown {
            return Some(Next::Say(Op::Shutdown, shutdown));
        }
        if self.readable && !self.ended && !refused {
            match self.credit() {
                0 if self.asked => {}
                0 => return Some(Next::Say(Op::CreditRequest, 0)),
                credit => return Some(Next::Read(credit.min(MAX_DATA))),
            }
        }
        let untold = self.forwarded.wrapping_sub(self.told_forwarded);
        if self.credit_due || (untold >= BUFFER / 2 && self.guest_shutdown & SHUTDOWN_SEND == 0) {
            return Some(Next::Say(Op::CreditUpdate, 0));
        }
        None
    }

    /// Completes the header of a packet that is sent now.
    pub fn fill(&mut self, header: &mut Header) {
        header.buf_alloc = BUFFER;
        header.fwd_cnt = self.forwarded;
        self.told_forwarded = self.forwarded;
        self.credit_due = false;
    }

    /// That was said, with these flags.
    pub fn said(&mut self, op: Op, flags: u32) {
        match op {
            Op::Request => self.request_due = false,
            Op::Response => self.response_due = false,
            Op::Shutdown => self.told_shutdown = flags,
            Op::CreditRequest => self.asked = true,
            Op::CreditUpdate | Op::Data | Op::Reset => {}
        }
    }

    /// Whether the guest has been told that it is over, and has only to say so too.
    #[must_use]
    pub fn awaits_reset(&self) -> bool {
        self.told_shutdown == SHUTDOWN_BOTH
    }

    /// So many bytes of the host's were sent to the guest.
    pub fn sent(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// The host's end has something to read, or an end of file.
    pub fn readable(&mut self) {
        self.readable = true;
    }

    /// The host's end has nothing to read.
    pub fn drained(&mut self) {
        self.readable = false;
    }

    /// The host's end will send no more.
    pub fn end_of_file(&mut self) {
        self.ended = true;
    }

    /// The host's end is gone: what was held for it goes too. What it sent may still be read.
    pub fn hung_up(&mut self) {
        self.hung_up = true;
        self.readable = true;
        self.took_held(self.held.len());
    }

    /// Whether what the guest sends has nobody to take it.
    #[must_use]
    pub fn is_hung_up(&self) -> bool {
        self.hung_up
    }

    /// The host's end has room.
    pub fn writable(&mut self) {
        self.writable = true;
    }

    /// The host's end has no room.
    pub fn full(&mut self) {
        self.writable = false;
    }

    /// Whether what the guest sends may be written to the host's end straight away: it has room, and nothing is held
    /// before it.
    #[must_use]
    pub fn may_write(&self) -> bool {
        self.writable && self.held.is_empty()
    }

    /// So many bytes of the guest's were taken by the host's end as they came, or are nobody's.
    pub fn took(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes);
    }

    /// These were not.
    pub fn hold(&mut self, bytes: &[u8]) {
        self.held.extend(bytes);
    }

    /// What is held and may be written to the host's end now; empty where there is nothing to do.
    #[must_use]
    pub fn to_write(&self) -> &[u8] {
        let (front, _) = self.held.as_slices();
        if self.writable { front } else { &[] }
    }

    /// The host's end took so many of the bytes held.
    pub fn took_held(&mut self, bytes: usize) {
        let bytes = self.held.drain(..bytes).len();
        // Less than BUFFER.
        self.took(u32::try_from(bytes).unwrap_or(BUFFER));
        if self.held.is_empty() {
            // Most connections never hold anything: no memory stays with those that did.
            self.held = VecDeque::new();
        }
    }

    /// Bytes held for the host's end.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_flushed(&self) -> bool {
        self.held.is_empty()
    }

    /// True once: when the guest will send no more and all that it sent is taken, so that the host's end is to see an
    /// end of file.
    pub fn shuts_sending(&mut self) -> bool {
        let now = self.guest_shutdown & SHUTDOWN_SEND != 0 && self.held.is_empty();
        now && !std::mem::replace(&mut self.told_send, true)
    }

    /// True once: when the guest will receive no more, so that the host's end is not to write any more.
    pub fn shuts_receiving(&mut self) -> bool {
        self.guest_shutdown & SHUTDOWN_RECEIVE != 0 && !std::mem::replace(&mut self.told_receive, true)
    }
}

#[cfg(test)]
mod tests;
