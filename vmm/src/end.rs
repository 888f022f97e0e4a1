//! How a microVM ended: each way its own word, and where KVM could not go on, one line for the user.

use vcpu::VcpuEnd;

use crate::devices::MachineEvent;
use crate::host;

/// How a microVM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest powered off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset (i8042 or the ACPI reset register).
    Reboot,
    /// A vCPU triple-faulted.
    TripleFault,
    /// KVM could not go on: one line for the user, what happened on which vCPU, and what to do.
    KvmError(String),
    /// Stopped by [`crate::Action::Stop`].
    Stopped,
}

// KVM_SYSTEM_EVENT_* of linux/kvm.h.
const SYSTEM_EVENT_SHUTDOWN: u32 = 1;
const SYSTEM_EVENT_RESET: u32 = 2;
/// KVM_INTERNAL_ERROR_EMULATION.
const EMULATION: u32 = 1;

/// The end that `event` means; none for a vCPU that was told to stop.
pub(crate) fn of(event: MachineEvent) -> Option<End> {
    match event {
        MachineEvent::PowerOff => Some(End::PowerOff),
        MachineEvent::Reset => Some(End::Reboot),
        MachineEvent::Vcpu { index, end } => of_vcpu(index, end, &host::backend_modules()),
    }
}

/// `modules`: the KVM backends of this host.
fn of_vcpu(index: u32, end: VcpuEnd, modules: &[String]) -> Option<End> {
    Some(match end {
        VcpuEnd::Stopped => return None,
        VcpuEnd::TripleFault => End::TripleFault,
        VcpuEnd::SystemEvent(SYSTEM_EVENT_SHUTDOWN) => End::PowerOff,
        VcpuEnd::SystemEvent(SYSTEM_EVENT_RESET) => End::Reboot,
        VcpuEnd::SystemEvent(kind) => End::KvmError(format!(
            "KVM reports system event {kind} on vCPU {index}: the guest crashed; look at its last console output"
        )),
        VcpuEnd::InternalError {
            suberror,
            rip,
            insn,
            insn_len,
        } => {
            let insn = &insn[..usize::from(insn_len).min(insn.len())];
            End::KvmError(internal_error(index, suberror, rip, insn, modules))
        }
        VcpuEnd::FailEntry { reason } => End::KvmError(format!(
            "the processor refused to enter the guest on vCPU {index} (hardware reason {reason:#x}): the guest's state is \
             invalid; look at the host's kernel log (`dmesg`)"
        )),
        VcpuEnd::Run(errno) => End::KvmError(format!(
            "KVM_RUN failed on vCPU {index}: {}; look at the host's kernel log (`dmesg`)",
            std::io::Error::from_raw_os_error(errno)
        )),
        VcpuEnd::Halted => End::KvmError(format!(
            "vCPU {index} halted outside of KVM's interrupt controller, so that nothing can wake it; \
             report this host's kernel version"
        )),
        VcpuEnd::Unhandled(exit) => End::KvmError(format!(
            "KVM stopped vCPU {index} with exit {exit}, which no device of ours asks for; report it with this host's kernel version"
        )),
        VcpuEnd::Panicked => End::KvmError(format!(
            "the thread of vCPU {index} panicked: an error of ours; report the message above"
        )),
    })
}

fn internal_error(index: u32, suberror: u32, rip: u64, insn: &[u8], modules: &[String]) -> String {
    if suberror != EMULATION {
        return format!(
            "KVM failed on vCPU {index} at {rip:#x} (internal error, suberror {suberror}); look at the host's kernel log (`dmesg`)"
        );
    }
    let insn = match insn {
        [] => String::new(),
        bytes => format!(
            " ({})",
            bytes
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<Vec<_>>()
                .join(" ")
        ),
    };
    let what = format!("KVM could not emulate the instruction at {rip:#x}{insn} on vCPU {index}");
    if host::has_hardware(modules) {
        format!(
            "{what}: the guest executed what no kernel executes, or code outside of its memory; check the kernel image"
        )
    } else {
        format!(
            "{what}: this host's KVM ({}) is a software backend that cannot run stock kernels; use a host with VMX or SVM, or \
             the emulated one that `cargo xtask demo` builds",
            host::name(modules)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(end: VcpuEnd, modules: &[&str]) -> String {
        let modules: Vec<_> = modules.iter().map(ToString::to_string).collect();
        match of_vcpu(1, end, &modules) {
            Some(End::KvmError(line)) => line,
            other => panic!("{other:?}"),
        }
    }

    fn emulation_failure() -> VcpuEnd {
        let mut insn = [0; 15];
        insn[..3].copy_from_slice(&[0x0f, 0x01, 0xca]);
        VcpuEnd::InternalError {
            suberror: 1,
            rip: 0x100_0000,
            insn,
            insn_len: 3,
        }
    }

    #[test]
    fn a_backend_that_cannot_run_stock_kernels_is_named_with_what_to_do() {
        assert_eq!(
            error(emulation_failure(), &["kvm_pvm"]),
            "KVM could not emulate the instruction at 0x1000000 (0f 01 ca) on vCPU 1: this host's KVM (kvm_pvm) is a software \
             backend that cannot run stock kernels; use a host with VMX or SVM, or the emulated one that `cargo xtask demo` builds"
        );
    }

    #[test]
    fn the_same_failure_on_hardware_points_at_the_guest() {
        let line = error(emulation_failure(), &["kvm_amd"]);
        assert!(
            line.ends_with("check the kernel image") && !line.contains("software backend"),
            "{line}"
        );
    }

    #[test]
    fn every_other_end_has_its_own_word_and_one_line() {
        let of = |end| of_vcpu(0, end, &[]);
        assert_eq!(of(VcpuEnd::Stopped), None);
        assert_eq!(of(VcpuEnd::TripleFault), Some(End::TripleFault));
        assert_eq!(of(VcpuEnd::SystemEvent(1)), Some(End::PowerOff));
        assert_eq!(of(VcpuEnd::SystemEvent(2)), Some(End::Reboot));
        let insn = [0; 15];
        let lines = [
            VcpuEnd::SystemEvent(3),
            VcpuEnd::InternalError {
                suberror: 3,
                rip: 0,
                insn,
                insn_len: 200,
            },
            VcpuEnd::FailEntry { reason: 7 },
            VcpuEnd::Run(libc::EFAULT),
            VcpuEnd::Halted,
            VcpuEnd::Unhandled(99),
            VcpuEnd::Panicked,
        ]
        .map(|end| error(end, &[]));
        for (index, line) in lines.iter().enumerate() {
            assert!(!line.contains('\n') && line.contains("vCPU 1"), "{line}");
            assert!(!lines[..index].contains(line), "{line}");
        }
        assert_eq!(super::of(MachineEvent::Reset), Some(End::Reboot));
        assert_eq!(super::of(MachineEvent::PowerOff), Some(End::PowerOff));
    }
}
