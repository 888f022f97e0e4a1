//! Flat guests: a few dozen bytes of 64-bit code that measure themselves, so that the truth is known.
//!
//! There is no kernel, no interrupt and no stack in them. They start in user mode (CPL 3: DPL-3 segments, user pages,
//! IOPL 3, so that `out` needs no leave), which every KVM backend runs natively, software ones included; only
//! [`Program::halt`] has to start in kernel mode, since HLT does. What they tell, they tell by `out` to a port of
//! [`port`].
//!
//! [`Machine`] is such a guest's microVM, bare: no devices, an in-kernel interrupt controller, one page of code.
//! [`Guest`] is one vCPU of it on a `vcpu::Vcpu`, and the readings its own account gives at each thing the guest tells.
//! [`elf`] makes a kernel of a program, for `chronovisor run --kernel`.

mod disk;
mod dodge;
mod elf;
mod guest;
mod machine;
mod probe;
mod program;

pub use disk::{RECORD, record};
pub use dodge::Dodged;
pub use elf::elf;
pub use guest::{Event, Figure, Guest, Mark, Report};
pub use machine::Machine;
pub use program::{Between, Program, port};
