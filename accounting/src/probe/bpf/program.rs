//! The two programs, and the figures they keep.
//!
//! Both begin alike. They are run for every hit on the whole host, so they first find out, as cheaply as they can,
//! whether it is one of our vCPU threads:
//!
//! ```text
//!   bpf_get_ns_current_pid_tgid: not of our PID namespace, or not our process ──► done
//!   threads[tid]: not tracked ──────────────────────────────────────────────────► done
//!   figures[index]
//!   now = bpf_ktime_get_ns
//! ```
//!
//! The clock is read at the same distance from the tracepoint in both, so that what precedes it cancels out of a slice;
//! and last, right before publication, because until then a reader takes a slice that has ended for one that goes on.
//! Then one opens a slice, unless one is open; the other closes it, if one is.
//!
//! Publication is the latch of [`crate::vtime`]: change *n* fills slot *n* mod 2 and then stores *n* as the sequence.
//! BPF has no fences (and store-release only since Linux 6.15), and needs none here: x86 makes one processor's plain
//! stores visible in program order (Intel SDM vol. 3, 10.2.2; AMD APM vol. 2, 7.2), and the kernel's compiler for BPF
//! reorders nothing. A thread's changes come from one processor at a time, the scheduler ordering one before the next.
//! A tracepoint calls its programs with preemption off, so `sched_switch` never comes in the middle of a change.

use std::mem::offset_of;
use std::sync::atomic::AtomicU64;

use super::insn::{Assembler, Function, Insn, Label, Reg, When};

/// What one publication says.
#[derive(Debug, Default)]
#[repr(C)]
pub(super) struct Slot {
    /// Closed slices, in nanoseconds.
    pub sum_ns: AtomicU64,
    /// When the open slice began, by `CLOCK_MONOTONIC`; 0 where none is open.
    pub began_ns: AtomicU64,
}

/// One vCPU's figures: all in one cache line, so that an exit dirties one line and a reader fetches one.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub(super) struct Figures {
    pub slots: [Slot; 2],
    pub sequence: AtomicU64,
}

/// The map value's size, as `bpf(2)` wants it.
pub(super) const FIGURES_SIZE: u32 = 64;
const _: () = assert!(size_of::<Figures>() == FIGURES_SIZE as usize);

const SEQUENCE: i16 = offset(offset_of!(Figures, sequence));
const SUM: i16 = offset(offset_of!(Slot, sum_ns));
const BEGAN: i16 = offset(offset_of!(Slot, began_ns));
/// Slots start at offset 0 and are 2^4 bytes each.
const SLOT_SHIFT: i32 = 4;
const _: () = assert!(offset_of!(Figures, slots) == 0 && size_of::<Slot>() == 1 << SLOT_SHIFT);

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "checked, and no TryFrom is const"
)]
const fn offset(bytes: usize) -> i16 {
    assert!(bytes < size_of::<Figures>());
    bytes as i16
}

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// On `kvm_entry`.
    Open,
    /// On `kvm_exit` and `sched_switch`.
    Close,
}

/// Whose threads these are, as the kernel sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// Device of the PID namespace's file, in the kernel's own encoding.
    pub dev: u64,
    /// Its inode.
    pub ino: u64,
    /// The process' id in that namespace.
    pub tgid: i32,
}

/// The maps' descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Maps {
    /// Thread id -> index.
    pub threads: u32,
    /// Index -> [`Figures`].
    pub figures: u32,
}

/// The program that does `act` to the current thread's slice.
pub(super) fn program(act: Act, identity: Identity, maps: Maps) -> Vec<Insn> {
    use Reg::{Fp, R0, R1, R2, R3, R4, R6, R7};
    let mut a = Assembler::default();
    let done = a.label();

    // struct bpf_pidns_info { u32 pid; u32 tgid; } at the top of the stack; `pid` is the thread's id.
    a.mov_imm64(R1, identity.dev);
    a.mov_imm64(R2, identity.ino);
    a.mov(R3, Fp);
    a.add_imm(R3, -8);
    a.mov_imm(R4, 8);
    a.call(Function::GetNsCurrentPidTgid);
    a.jump_imm(When::NotEqual, R0, 0, done);
    a.load_u32(R1, Fp, -4);
    a.jump_imm(When::NotEqual, R1, identity.tgid, done);

    a.mov_map(R1, maps.threads);
    a.mov(R2, Fp);
    a.add_imm(R2, -8);
    a.call(Function::MapLookupElem);
    a.jump_imm(When::Equal, R0, 0, done);
    // The value found is the next lookup's key.
    a.mov_map(R1, maps.figures);
    a.mov(R2, R0);
    a.call(Function::MapLookupElem);
    a.jump_imm(When::Equal, R0, 0, done);
    let figures = R6;
    a.mov(figures, R0);
    a.call(Function::KtimeGetNs);
    let now = R0;

    let (sequence, slot, sum, began) = (R7, R2, R3, R4);
    a.load_u64(sequence, figures, SEQUENCE);
    slot_of(&mut a, slot, figures, sequence);
    a.load_u64(sum, slot, SUM);
    a.load_u64(began, slot, BEGAN);
    match act {
        Act::Open => open(&mut a, now, began, done),
        Act::Close => close(&mut a, now, sum, began, done),
    }

    a.add_imm(sequence, 1);
    slot_of(&mut a, slot, figures, sequence);
    a.store_u64(slot, SUM, sum);
    a.store_u64(slot, BEGAN, began);
    a.store_u64(figures, SEQUENCE, sequence);

    a.place(done);
    a.mov_imm(R0, 0);
    a.exit();
    a.finish()
}

/// `slot = figures + (sequence & 1) * sizeof(Slot)`: in bounds, as the verifier can see. Destroys R1.
fn slot_of(a: &mut Assembler, slot: Reg, figures: Reg, sequence: Reg) {
    a.mov(Reg::R1, sequence);
    a.and_imm(Reg::R1, 1);
    a.shl_imm(Reg::R1, SLOT_SHIFT);
    a.mov(slot, figures);
    a.add(slot, Reg::R1);
}

fn open(a: &mut Assembler, now: Reg, began: Reg, done: Label) {
    a.jump_imm(When::NotEqual, began, 0, done);
    a.mov(began, now);
}

fn close(a: &mut Assembler, now: Reg, sum: Reg, began: Reg, done: Label) {
    a.jump_imm(When::Equal, began, 0, done);
    // A clock that steps back must not turn into 500 years.
    let closed = a.label();
    a.jump(When::Greater, began, now, closed);
    a.add(sum, now);
    a.sub(sum, began);
    a.place(closed);
    a.mov_imm(began, 0);
}
