//! vtime: the stamps at the `KVM_RUN` boundary.
use std::cell::Cell;
use std::marker::PhantomData;

/// Why `KVM_RUN` returned: KVM's exit reasons, those without a use here folded into `Other`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ExitReason {
    /// Port input or output.
    Io,
    /// Memory-mapped input or output.
    Mmio,
    /// HLT, where no in-kernel interrupt controller handles it.
    Hlt,
    /// A signal or a kick (`EINTR`).
    Interrupted,
    /// Triple fault.
    Shutdown,
    /// `KVM_EXIT_SYSTEM_EVENT`.
    SystemEvent,
    /// KVM could not go on (`KVM_EXIT_INTERNAL_ERROR`).
    InternalError,
    /// The processor refused the guest's state (`KVM_EXIT_FAIL_ENTRY`).
    FailEntry,
    /// Anything else.
    Other,
}

/// The writing side: one per vCPU, on its thread. Each method is one transition: one read of the clock.
#[derive(Debug)]
pub struct VtimeWriter {
    not_sync: PhantomData<Cell<()>>,
}

impl VtimeWriter {
    /// VMM -> guest, right before `KVM_RUN`. `handled` is the exit just handled, if one was.
    #[inline]
    pub fn guest_enter(&mut self, handled: Option<ExitReason>) {
        let _ = handled;
        todo!()
    }

    /// Guest -> VMM, right after `KVM_RUN` returns, before the exit is looked at.
    #[inline]
    pub fn guest_exit(&mut self) {
        todo!()
    }

    /// VMM -> paused. `handled` is the exit just handled, if one was.
    pub fn pause(&mut self, handled: Option<ExitReason>) {
        let _ = handled;
        todo!()
    }

    /// Paused -> VMM.
    pub fn resume(&mut self) {
        todo!()
    }
}
