//! A virtqueue, as a device uses it: virtio-queue's split ring, with everything the driver wrote checked here, once.

use std::io;
use std::ops::Range;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryMmap, Permissions, VolatileSlice};

/// How the driver broke the rules.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The ring itself.
    #[error("ring: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// A chain that does not end: it runs in a circle, out of its table, over 4 GiB, into a broken indirect table, or on for
    /// more descriptors than the queue may have.
    #[error("the chain at descriptor {head} does not end within its table, its queue's size and 4 GiB")]
    Endless {
        /// Its first descriptor.
        head: u16,
    },
    /// A buffer that is not guest memory.
    #[error("the chain at descriptor {head} has {len} bytes at {address:#x}, which is not guest memory")]
    NotMemory {
        /// The chain's first descriptor.
        head: u16,
        /// Where.
        address: u64,
        /// How much.
        len: u32,
    },
    /// A buffer to read behind one to write (2.7.4.2).
    #[error("the chain at descriptor {head} has a readable buffer behind a writable one")]
    Order {
        /// Its first descriptor.
        head: u16,
    },
    /// A chain that is not one of this device's: something it needs is missing, or in the wrong place.
    #[error("the chain at descriptor {head} {what}")]
    Shape {
        /// Its first descriptor.
        head: u16,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// One queue, ready or not.
#[derive(Debug)]
pub struct Queue(virtio_queue::Queue, Given);

/// How many chains were given back since the driver's wish for an interrupt was last looked at.
type Given = u16;

/// Available ring, flags: the driver wants no interrupts (2.7.6).
const NO_INTERRUPT: u16 = 1;

impl Queue {
    /// `queue` as its driver set it up; [`None`] where that is not a queue in `memory`.
    #[must_use]
    pub fn new(queue: virtio_queue::Queue, memory: &GuestMemoryMmap) -> Option<Self> {
        (!queue.ready() || queue.is_valid(memory)).then_some(Self(queue, 0))
    }

    /// The next chain, with its buffers; [`None`] where the driver has put in no more. [`Queue::unpop`] puts it back.
    ///
    /// # Errors
    /// See [`QueueError`].
    pub fn pop<'m>(&mut self, memory: &'m GuestMemoryMmap) -> Result<Option<Chain<'m>>, QueueError> {
        if !self.0.ready() {
            return Ok(None);
        }
        let max_size = self.0.max_size();
        match self.0.iter(memory)?.next() {
            Some(chain) => Chain::new(chain, memory, max_size).map(Some),
            None => Ok(None),
        }
    }

    /// Puts back the chain popped last: the next pop gives it again.
    pub fn unpop(&mut self) {
        self.0.set_next_avail(self.0.next_avail().wrapping_sub(1));
    }

    /// Gives the chain at `head` back to the driver, with `len` bytes written into it.
    ///
    /// # Errors
    /// The used ring cannot be written.
    pub fn give_back(&mut self, memory: &GuestMemoryMmap, head: u16, len: u32) -> Result<(), QueueError> {
        self.give_back_together(memory, &[(head, len)])
    }

    /// Gives several chains back, heads and lengths, of which the driver sees all or none: an answer that does not fit in one of
    /// them must not be found in half (5.1.6.4).
    ///
    /// # Errors
    /// As [`Queue::give_back`].
    pub fn give_back_together(&mut self, memory: &GuestMemoryMmap, chains: &[(u16, u32)]) -> Result<(), QueueError> {
        let used_ring = GuestAddress(self.0.used_ring());
        let mut next = self.0.next_used();
        let failed = |error| QueueError::Ring(virtio_queue::Error::GuestMemory(error));
        for &(head, len) in chains {
            // Behind flags and index, 2 bytes each; then 8 bytes an entry (2.7.8). Queue::new saw that all of it is memory.
            let entry = used_ring.0 + 4 + 8 * u64::from(next % self.0.size());
            let bytes = u64::from(head) | u64::from(len) << 32;
            memory.write_obj(bytes.to_le(), GuestAddress(entry)).map_err(failed)?;
            next = next.wrapping_add(1);
            self.1 = self.1.saturating_add(1);
        }
        self.0.set_next_used(next);
        // Release: who sees the index sees the entries, and what the device wrote into their buffers.
        memory
            .store(next.to_le(), GuestAddress(used_ring.0 + 2), Ordering::Release)
            .map_err(failed)
    }

    /// Whether the driver wants an interrupt for what was given back since this was last asked.
    ///
    /// # Errors
    /// The ring cannot be read.
    pub fn wants_signal(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        let given = std::mem::take(&mut self.1);
        if given == 0 {
            return Ok(false);
        }
        // The driver writes its wish and then looks at the index; the index was written, now its wish is looked at.
        fence(Ordering::SeqCst);
        let ring = self.0.avail_ring();
        let wish = |at| {
            let word = memory.load::<u16>(GuestAddress(at), Ordering::Relaxed);
            word.map(u16::from_le).map_err(virtio_queue::Error::GuestMemory)
        };
        if !self.0.event_idx_enabled() {
            return Ok(wish(ring)? & NO_INTERRUPT == 0);
        }
        // Behind flags, index and entries, 2 bytes each: the used index at which it wants to hear (2.7.7.2).
        let event = wish(ring + 4 + 2 * u64::from(self.0.size()))?;
        Ok(self.0.next_used().wrapping_sub(event).wrapping_sub(1) < given)
    }

    /// Asks the driver to notify of the next chain it puts in. True if there is one already, for which no notification may come.
    ///
    /// # Errors
    /// The ring cannot be written.
    pub fn listen(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        Ok(self.0.ready() && self.0.enable_notification(memory)?)
    }

    /// How many chains the queue can hold, as its driver chose.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.0.size()
    }
}

/// A chain of buffers: first those that the device reads, then those that it writes.
#[derive(Debug)]
pub struct Chain<'m> {
    /// Its first descriptor: its name, when it is given back.
    pub head: u16,
    /// What the driver wrote.
    pub readable: Buffers<'m>,
    /// Where the driver wants its answer.
    pub writable: Buffers<'m>,
    /// The guest address of the last byte of that, where several requests keep their status.
    pub last_writable: Option<GuestAddress>,
}

impl<'m> Chain<'m> {
    fn new(
        mut chain: virtio_queue::DescriptorChain<&'m GuestMemoryMmap>,
        memory: &'m GuestMemoryMmap,
        most: u16,
    ) -> Result<Self, QueueError> {
        let head = chain.head_index();
        let (mut readable, mut writable) = (Buffers::default(), Buffers::default());
        // virtio-queue ends a chain silently where it breaks the rules: then the last descriptor names a next one.
        let mut ends = false;
        let mut last_writable = None;
        // A chain is no longer than its queue (2.7.5.3.1), and Linux heeds the queue's largest size only. An indirect table
        // could hold 65,535.
        for descriptor in chain.by_ref().take(most.into()) {
            ends = !descriptor.has_next();
            let not_memory = || QueueError::NotMemory {
                head,
                address: descriptor.addr().0,
                len: descriptor.len(),
            };
            let (buffers, access) = if descriptor.is_write_only() {
                if let Some(last) = descriptor.len().checked_sub(1) {
                    last_writable = descriptor.addr().0.checked_add(last.into()).map(GuestAddress);
                }
                (&mut writable, Permissions::Write)
            } else if writable.slices.is_empty() {
                (&mut readable, Permissions::Read)
            } else {
                return Err(QueueError::Order { head });
            };
            buffers
                .add(memory, descriptor.addr(), descriptor.len(), access)
                .ok_or_else(not_memory)?;
        }
        if !ends {
            return Err(QueueError::Endless { head });
        }
        Ok(Self {
            head,
            readable,
            writable,
            last_writable,
        })
    }

    /// An error of this chain.
    #[must_use]
    pub fn error(&self, what: &'static str) -> QueueError {
        QueueError::Shape { head: self.head, what }
    }
}

/// Pieces of guest memory that follow each other: read, or written, from their start.
#[derive(Clone, Debug, Default)]
pub struct Buffers<'m> {
    slices: Vec<VolatileSlice<'m>>,
    len: usize,
}

impl<'m> Buffers<'m> {
    /// [`None`] where it is not memory.
    fn add(&mut self, memory: &'m GuestMemoryMmap, at: GuestAddress, len: u32, access: Permissions) -> Option<()> {
        let len = usize::try_from(len).ok()?;
        // Also checks that nothing wraps around.
        at.0.checked_add(len as u64)?;
        for slice in memory.get_slices(at, len, access).ok()? {
            self.slices.push(slice.ok()?);
        }
        self.len += len;
        Some(())
    }

    /// Bytes left.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces.
    #[must_use]
    pub fn slices(&self) -> &[VolatileSlice<'m>] {
        &self.slices
    }

    /// Takes the first `len` bytes away; all where there are fewer.
    #[must_use]
    pub fn take_front(&mut self, len: usize) -> Self {
        let at = len.min(self.len);
        let back = self.cut(at..self.len);
        std::mem::replace(self, back).cut(0..at)
    }

    /// The bytes of `range`, which must be inside.
    fn cut(&self, range: Range<usize>) -> Self {
        let mut slices = Vec::with_capacity(self.slices.len());
        let mut start = 0;
        for slice in &self.slices {
            let end = start + slice.len();
            let (from, to) = (range.start.max(start), range.end.min(end));
            if from < to {
                slices.push(
                    slice
                        .subslice(from - start, to - from)
                        .expect("from and to lie inside of this slice"),
                );
            }
            start = end;
        }
        Self {
            slices,
            len: range.len(),
        }
    }

    /// Copies the first bytes to `to` and takes them away; how many there were. The rest of `to` is left as it is.
    pub fn read(&mut self, to: &mut [u8]) -> usize {
        let front = self.take_front(to.len());
        let mut done = 0;
        for slice in &front.slices {
            done += slice.copy_to(&mut to[done..]);
        }
        done
    }

    /// Copies `from` over the first bytes and takes those away; how many there was room for.
    pub fn write(&mut self, from: &[u8]) -> usize {
        let front = self.take_front(from.len());
        let mut done = 0;
        for slice in &front.slices {
            slice.copy_from(&from[done..done + slice.len()]);
            done += slice.len();
        }
        done
    }

    /// For `readv` and its kin. Valid as long as the guest's memory is: the compiler does not know of it.
    #[must_use]
    pub fn iovecs(&self) -> Vec<libc::iovec> {
        let iovec = |slice: &VolatileSlice<'m>| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        };
        self.slices.iter().map(iovec).collect()
    }
}

/// `Write` over what the driver offered, for encoders.
impl io::Write for Buffers<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        Ok(Buffers::write(self, from))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
