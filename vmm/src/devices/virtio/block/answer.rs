//! How a request ended, and how its driver is told: the status byte, the chain given back, the signal.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::request::Operation;
use super::uring::Uring;
use super::{BlockMetrics, S_IOERR, S_OK};
use crate::devices::virtio::queue::QueueError;
use crate::devices::virtio::{Active, Complaints, count};

pub(super) fn signal(active: &mut Active) -> Result<(), QueueError> {
    if active.queues[0].wants_signal(active.memory.view())? {
        active.interrupt.signal_used();
    }
    Ok(())
}

/// Answers what the engine has done.
pub(super) fn answer(
    uring: &mut Uring,
    active: &mut Active,
    metrics: &BlockMetrics,
    drive: &str,
    complaints: &Complaints,
) -> Result<(), QueueError> {
    while let Some(completed) = uring.next_completed() {
        let done = Done::of(completed.result, drive, complaints);
        done.count(metrics, completed.operation, completed.bytes);
        if done.status != S_OK {
            count(&metrics.invalid_reqs_count, 1);
        }
        done.tell(active, completed.head, completed.status)?;
    }
    signal(active)
}

/// How a request ended.
pub(super) struct Done {
    pub(super) status: u8,
    /// Bytes written into the guest's buffers, the status byte not counted.
    written: u64,
}

impl Done {
    pub(super) fn failed(status: u8) -> Self {
        Self { status, written: 0 }
    }

    pub(super) fn written(written: u64) -> Self {
        Self { status: S_OK, written }
    }

    pub(super) fn of(result: std::io::Result<u64>, drive: &str, complaints: &Complaints) -> Self {
        result.map_or_else(
            |error| {
                if complaints.due() {
                    tracing::warn!("drive {drive}: a request failed: {error}; the guest is told");
                }
                Self::failed(S_IOERR)
            },
            Self::written,
        )
    }

    pub(super) fn count(&self, metrics: &BlockMetrics, operation: Operation, bytes: u64) {
        use Operation::{Flush, Read, Write};
        if self.status != S_OK {
            return;
        }
        let (requests, of_bytes) = match operation {
            Read => (&metrics.read_count, Some(&metrics.read_bytes)),
            Write => (&metrics.write_count, Some(&metrics.write_bytes)),
            Flush => (&metrics.flush_count, None),
        };
        count(requests, 1);
        if let Some(of_bytes) = of_bytes {
            count(of_bytes, bytes);
        }
    }

    /// Writes the status byte and gives the chain back.
    pub(super) fn tell(&self, active: &mut Active, head: u16, status: GuestAddress) -> Result<(), QueueError> {
        let memory: &GuestMemoryMmap = active.memory.view();
        let shape = |_| QueueError::Shape {
            head,
            what: "has no status byte in guest memory",
        };
        memory.write_obj(self.status, status).map_err(shape)?;
        let len = u32::try_from(self.written + 1).unwrap_or(u32::MAX);
        active.queues[0].give_back(memory, head, len)
    }
}
