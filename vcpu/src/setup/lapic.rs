//! The local APIC's two pins, wired as the MP specification's virtual wire mode has them (Intel MultiProcessor
//! Specification 1.4, 3.6.2.2): LINT0 takes the 8259's interrupts, LINT1 is NMI.

use kvm_bindings::kvm_lapic_state;
use kvm_ioctls::VcpuFd;

use super::SetupError;

/// Offsets of the local vector table's entries (Intel SDM vol. 3, table 11-1).
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
/// Delivery modes, bits 10:8 of an entry (figure 11-8).
const NMI: u32 = 0b100;
const EXT_INT: u32 = 0b111;

/// Wires the pins of vCPU `index`'s local APIC. Masks stay as KVM resets them: LINT0 open on the boot processor only.
///
/// # Errors
/// [`SetupError::Kvm`].
pub fn set(fd: &VcpuFd, index: u32) -> Result<(), SetupError> {
    let refused = |what| move |source| SetupError::Kvm { index, what, source };
    let mut lapic = fd.get_lapic().map_err(refused("read the local APIC"))?;
    set_delivery_mode(&mut lapic, LVT_LINT0, EXT_INT);
    set_delivery_mode(&mut lapic, LVT_LINT1, NMI);
    fd.set_lapic(&lapic).map_err(refused("set the local APIC"))
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, entry: usize, mode: u32) {
    let bytes = &mut lapic.regs[entry..entry + 4];
    let old = u32::from_le_bytes(std::array::from_fn(|i| bytes[i].to_le_bytes()[0]));
    let new = old & !(0b111 << 8) | mode << 8;
    for (byte, value) in bytes.iter_mut().zip(new.to_le_bytes()) {
        *byte = i8::from_le_bytes([value]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_delivery_mode_of_the_one_entry_changes() {
        let mut lapic = kvm_lapic_state { regs: [-1; 1024] };
        set_delivery_mode(&mut lapic, LVT_LINT1, NMI);
        let mut expected = [-1; 1024];
        expected[LVT_LINT1 + 1] = i8::from_le_bytes([0xfc]);
        assert_eq!(lapic.regs, expected);
    }
}
