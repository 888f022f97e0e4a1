//! The first vCPU's registers, and the tables in guest memory they point to.
//!
//! The others have none to set: they wait for the guest's INIT and SIPI, which KVM's local APIC delivers.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::{BootError, Entry, Protocol};
use crate::layout::{BOOT_STACK, GDT, PAGE_DIRECTORIES, PDPT, PML4, PVH_START_INFO, ZERO_PAGE};

// Intel SDM volume 3A, 2.5 (control registers), 2.2.1 (EFER).
const CR0_PE: u64 = 1;
/// Reads as one on every processor since the 486.
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS: bit 1 is always one; interrupts are off, as both protocols ask.
const RFLAGS: u64 = 2;

// Page-table entries: SDM volume 3A, 4.5.4.
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const HUGE: u64 = 1 << 7;

/// Descriptors as they stand in the table: SDM volume 3A, 3.4.5. Flat, accessed, present; code can be read.
const CODE_64: u64 = 0x00af_9b00_0000_ffff;
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
/// A busy 32-bit TSS at address 0: entering the guest demands one, nothing uses it.
const TSS: u64 = 0x0000_8b00_0000_0067;
/// Both protocols want code at selector 0x10 and data at 0x18: `__BOOT_CS` and `__BOOT_DS` (Linux, boot.rst), and PVH leaves the choice to us.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

/// Writes the tables that `entry`'s protocol needs into guest memory.
///
/// # Errors
/// [`BootError::Write`]: the guest has no memory there.
pub fn write_tables(memory: &impl GuestMemoryBackend, entry: Entry) -> Result<(), BootError> {
    let write = |value: u64, address: u64| {
        memory
            .write_obj(value, GuestAddress(address))
            .map_err(|e| BootError::Write {
                what: "boot tables",
                reason: e.to_string(),
            })
    };
    for (index, descriptor) in (0..).zip(gdt(entry.protocol)) {
        write(descriptor, GDT + index * 8)?;
    }
    if entry.protocol == Protocol::Linux64 {
        write(PDPT | PRESENT | WRITABLE, PML4)?;
        for index in 0..4 {
            write((PAGE_DIRECTORIES + index * 4096) | PRESENT | WRITABLE, PDPT + index * 8)?;
        }
        for index in 0..4 * 512 {
            write((index << 21) | PRESENT | WRITABLE | HUGE, PAGE_DIRECTORIES + index * 8)?;
        }
    }
    Ok(())
}

/// Sets the registers of `vcpu`, the first one.
///
/// # Errors
/// What KVM said.
pub fn set(vcpu: &VcpuFd, entry: Entry) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    set_sregs(&mut sregs, entry.protocol);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&regs(entry))
}

fn gdt(protocol: Protocol) -> [u64; 5] {
    let code = match protocol {
        Protocol::Linux64 => CODE_64,
        Protocol::Pvh => CODE_32,
    };
    [0, 0, code, DATA, TSS]
}

fn set_sregs(sregs: &mut kvm_sregs, protocol: Protocol) {
    let table = gdt(protocol);
    let segment = |selector: u16| segment(selector, table[usize::from(selector / 8)]);
    let data = segment(DATA_SELECTOR);
    sregs.cs = segment(CODE_SELECTOR);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TSS_SELECTOR);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = u16::try_from(size_of_val(&table) - 1).expect("five descriptors");
    // No interrupt and no fault can be handled yet: a fault is a triple fault, which is reported as what it is.
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    match protocol {
        Protocol::Linux64 => {
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.cr3 = PML4;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        }
        Protocol::Pvh => {
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr3 = 0;
            sregs.cr4 = 0;
            sregs.efer = 0;
        }
    }
}

fn regs(entry: Entry) -> kvm_regs {
    let regs = kvm_regs {
        rip: entry.address,
        rflags: RFLAGS,
        ..Default::default()
    };
    match entry.protocol {
        Protocol::Linux64 => kvm_regs {
            rsi: ZERO_PAGE,
            rsp: BOOT_STACK,
            rbp: BOOT_STACK,
            ..regs
        },
        Protocol::Pvh => kvm_regs {
            rbx: PVH_START_INFO,
            ..regs
        },
    }
}

/// The descriptor at `selector`, as KVM wants it: taken apart, the limit in bytes.
fn segment(selector: u16, descriptor: u64) -> kvm_segment {
    let bits =
        |shift: u32, count: u32| u32::try_from((descriptor >> shift) & ((1 << count) - 1)).expect("at most 32 bits");
    let bit = |shift| u8::from(bits(shift, 1) == 1);
    let limit = bits(0, 16) | bits(48, 4) << 16;
    kvm_segment {
        base: u64::from(bits(16, 24) | bits(56, 8) << 24),
        limit: if bit(55) == 1 { limit << 12 | 0xfff } else { limit },
        selector,
        type_: u8::try_from(bits(40, 4)).expect("4 bits"),
        s: bit(44),
        dpl: u8::try_from(bits(45, 2)).expect("2 bits"),
        present: bit(47),
        avl: bit(52),
        l: bit(53),
        db: bit(54),
        g: bit(55),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::HugePages;
    use crate::memory::GuestMemory;

    #[test]
    fn descriptors_come_apart_as_the_manual_has_them() {
        let code = segment(CODE_SELECTOR, CODE_64);
        assert_eq!((code.base, code.limit, code.selector), (0, 0xffff_ffff, 0x10));
        assert_eq!((code.type_, code.s, code.dpl, code.present), (0xb, 1, 0, 1));
        assert_eq!((code.l, code.db, code.g), (1, 0, 1));
        let code = segment(CODE_SELECTOR, CODE_32);
        assert_eq!((code.l, code.db, code.g), (0, 1, 1));
        let data = segment(DATA_SELECTOR, DATA);
        assert_eq!((data.type_, data.s, data.db, data.l), (3, 1, 1, 0));
        let tss = segment(TSS_SELECTOR, TSS);
        assert_eq!((tss.type_, tss.s, tss.present, tss.limit, tss.g), (0xb, 0, 1, 0x67, 0));
    }

    #[test]
    fn a_64_bit_boot_maps_the_first_4_gib_to_themselves() {
        let memory = GuestMemory::new(2, HugePages::None).unwrap();
        let entry = Entry {
            address: 0x100_0000,
            protocol: Protocol::Linux64,
            operating_system: false,
        };
        write_tables(memory.view(), entry).unwrap();
        let read = |address: u64| memory.view().read_obj::<u64>(GuestAddress(address)).unwrap();
        for address in [0, 0x12_3456, 0x4000_0000, 0xffff_ffff_u64] {
            let pdpt = read(PML4 + ((address >> 39) & 511) * 8) & !0xfff;
            let pd = read(pdpt + ((address >> 30) & 511) * 8) & !0xfff;
            let page = read(pd + ((address >> 21) & 511) * 8);
            assert_eq!(page & 0xfff, PRESENT | WRITABLE | HUGE);
            assert_eq!((page & !0xfff) + (address & 0x1f_ffff), address);
        }
        let mut sregs = kvm_sregs::default();
        set_sregs(&mut sregs, Protocol::Linux64);
        assert_eq!(read(sregs.gdt.base + u64::from(sregs.cs.selector)), CODE_64);
    }

    #[test]
    fn a_pvh_boot_starts_in_protected_mode_without_paging() {
        let mut sregs = kvm_sregs {
            cr4: 7,
            efer: 7,
            ..Default::default()
        };
        set_sregs(&mut sregs, Protocol::Pvh);
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (CR0_PE | CR0_ET, 0, 0));
        assert_eq!((sregs.cs.db, sregs.cs.l), (1, 0));
        let regs = regs(Entry {
            address: 0x100_0000,
            protocol: Protocol::Pvh,
            operating_system: false,
        });
        assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x100_0000, PVH_START_INFO, 2));
    }
}
