//! ACPI tables: how the guest's kernel learns of its CPUs, its serial port, its keyboard controller, and how to power off.
//!
//! ```text
//! RSDP ─► XSDT ─┬─► FADT ─┬─► FACS
//!               │         └─► DSDT: \_S5, COM1, PS/2 keyboard, virtio-mmio devices
//!               └─► MADT: local APICs, I/O APIC
//! ```
//!
//! Not hardware-reduced: the guest has a PIC and a PIT, and with the fixed hardware of chapter 4 powering off takes two
//! ports and no driver. Tables are of ACPI 6.5; section numbers below are that specification's.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, ONE, Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::devices::pm::{RESET_VALUE, SLEEP_TYPE_S5};
use crate::devices::virtio::mmio::Window;
use crate::layout;

const OEM: [u8; 6] = *b"CHRONO";
const OEM_TABLE: [u8; 8] = *b"CHRONOVM";
const REVISION: u32 = 1;
/// Tables are aligned to 64 bytes: what the FACS demands (5.2.10), and more than the others do.
const ALIGN: u64 = 64;
/// The I/O APIC's id: any that is no vCPU's; vCPU ids end at 31.
const IOAPIC_ID: u8 = 32;
/// MADT flag: the machine also has two 8259s (5.2.12).
const PCAT_COMPAT: u32 = 1;
/// IAPC_BOOT_ARCH (5.2.9.3): legacy devices, an i8042, no VGA, no CMOS clock. Without the second the kernel would not probe
/// for the keyboard controller; the last two spare it probing for what is not there.
const BOOT_ARCH: u16 = 1 | 1 << 1 | 1 << 2 | 1 << 5;

/// Why there are no tables.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the ACPI tables to guest memory: {0}; raise mem_size_mib to at least 1")]
pub struct AcpiError(String);

/// Writes the tables for `vcpus` vCPUs, whose APIC ids are their indices, and for the virtio devices behind `windows`. Returns
/// the RSDP's address.
///
/// # Errors
/// The guest has no memory where they go.
pub fn write(memory: &impl GuestMemoryBackend, vcpus: u8, windows: &[Window]) -> Result<u64, AcpiError> {
    // The RSDP goes first: a kernel that was not told its address finds it at the start of the BIOS area.
    let rsdp = layout::ACPI_TABLES;
    let mut place = Place {
        memory,
        next: rsdp + ALIGN,
    };
    let dsdt = place.table(dsdt(windows).as_slice())?;
    let facs = place.table(&bytes(&FACS::new()))?;
    let fadt = place.table(&bytes(&fadt(address_32(dsdt), address_32(facs)).finalize()))?;
    let madt = place.table(madt(vcpus).as_slice())?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place.table(&bytes(&xsdt))?;
    place.next = rsdp;
    place.table(&bytes(&Rsdp::new(OEM, xsdt)))
}

/// Puts one table after the other.
struct Place<'a, M> {
    memory: &'a M,
    next: u64,
}

impl<M: GuestMemoryBackend> Place<'_, M> {
    fn table(&mut self, table: &[u8]) -> Result<u64, AcpiError> {
        let at = self.next;
        self.next = (at + table.len() as u64).next_multiple_of(ALIGN);
        assert!(
            self.next <= layout::ACPI_TABLES_END,
            "32 CPUs take 256 bytes of the 128 KiB"
        );
        self.memory
            .write_slice(table, GuestAddress(at))
            .map_err(|e| AcpiError(e.to_string()))?;
        Ok(at)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn address_32(address: u64) -> u32 {
    u32::try_from(address).expect("the tables lie below 1 MiB")
}

fn fadt(dsdt: u32, facs: u32) -> FADTBuilder {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_32(dsdt)
        .firmware_ctrl_32(facs)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // Buttons and clock alarm are not in the fixed registers, where the kernel would otherwise look for them.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = layout::SCI_IRQ.into();
    fadt.pm1a_evt_blk = u32::from(layout::PM1A_EVENT).into();
    fadt.pm1_evt_len = layout::PM1A_EVENT_LEN;
    fadt.pm1a_cnt_blk = u32::from(layout::PM1A_CONTROL).into();
    fadt.pm1_cnt_len = layout::PM1A_CONTROL_LEN;
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(layout::ACPI_RESET),
    );
    fadt.reset_value = RESET_VALUE;
    fadt
}

/// acpi_tables' own MADT has no way to set [`PCAT_COMPAT`].
fn madt(vcpus: u8) -> Sdt {
    let mut madt = Sdt::new(*b"APIC", 44, 6, OEM, OEM_TABLE, REVISION);
    madt.write_u32(36, layout::LAPIC);
    madt.write_u32(40, PCAT_COMPAT);
    for id in 0..vcpus {
        ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut madt);
    }
    // Interrupt 0 is pin 0: KVM routes the PIT there, so the usual override of pin 2 would be wrong.
    IoApic::new(IOAPIC_ID, layout::IOAPIC, 0).to_aml_bytes(&mut madt);
    madt
}

fn dsdt(windows: &[Window]) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, REVISION);
    // \_S5: what to write to SLP_TYP of PM1a and PM1b; two more that are reserved (7.4.2).
    Name::new(
        Path::new("\\_S5_"),
        &Package::new(vec![&SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO]),
    )
    .to_aml_bytes(&mut dsdt);
    let port = |base, len| IO::new(base, base, 1, len);
    let interrupt = |number| Interrupt::new(true, true, false, false, number);
    Scope::new(
        Path::new("\\_SB_"),
        vec![
            &Device::new(
                Path::new("COM1"),
                vec![
                    &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                    &Name::new(Path::new("_UID"), &ZERO),
                    &Name::new(
                        Path::new("_CRS"),
                        &ResourceTemplate::new(vec![&port(layout::COM1_PORT, 8), &interrupt(layout::COM1_IRQ)]),
                    ),
                ],
            ),
            &Device::new(
                Path::new("PS2K"),
                vec![
                    &Name::new(Path::new("_HID"), &EISAName::new("PNP0303")),
                    &Name::new(
                        Path::new("_CRS"),
                        &ResourceTemplate::new(vec![
                            &port(layout::I8042_DATA, 1),
                            &port(layout::I8042_COMMAND, 1),
                            &interrupt(layout::KEYBOARD_IRQ),
                        ]),
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(&mut dsdt);
    for (uid, window) in (0u8..).zip(windows) {
        virtio(uid, window, &mut dsdt);
    }
    dsdt
}

/// LNRO0005 is the name that Linux's virtio_mmio driver knows (drivers/virtio/virtio_mmio.c).
fn virtio(uid: u8, window: &Window, dsdt: &mut Sdt) {
    let path = format!("VR{uid:02}");
    let base = u32::try_from(window.base).expect("windows lie below 4 GiB");
    let len = u32::try_from(Window::LEN).expect("a window is a page");
    Scope::new(
        Path::new("\\_SB_"),
        vec![&Device::new(
            Path::new(&path),
            vec![
                &Name::new(Path::new("_HID"), &"LNRO0005"),
                &Name::new(Path::new("_UID"), &uid),
                &Name::new(Path::new("_CCA"), &ONE),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, base, len),
                        // Edge, high, nobody else's: as KVM raises them.
                        &Interrupt::new(true, true, false, false, window.irq),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(dsdt);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::HugePages;
    use crate::memory::GuestMemory;

    fn memory_with_tables(vcpus: u8) -> (GuestMemory, u64) {
        let memory = GuestMemory::new(1, HugePages::None).unwrap();
        let rsdp = write(memory.view(), vcpus, &[]).unwrap();
        (memory, rsdp)
    }

    fn read(memory: &GuestMemory, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.view().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn table(memory: &GuestMemory, at: u64) -> Vec<u8> {
        let len = u32::from_le_bytes(read(memory, at + 4, 4).try_into().unwrap());
        read(memory, at, len as usize)
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    /// Every table of the tree, by signature.
    fn tables(memory: &GuestMemory, rsdp: u64) -> std::collections::BTreeMap<String, Vec<u8>> {
        let rsdp = read(memory, rsdp, 36);
        assert_eq!((&rsdp[..8], sum(&rsdp[..20]), sum(&rsdp)), (&b"RSD PTR "[..], 0, 0));
        let xsdt = table(memory, u64::from_le_bytes(rsdp[24..32].try_into().unwrap()));
        let mut found: Vec<_> = xsdt[36..]
            .chunks(8)
            .map(|entry| table(memory, u64::from_le_bytes(entry.try_into().unwrap())))
            .collect();
        let fadt = found.iter().find(|table| table.starts_with(b"FACP")).unwrap();
        found.push(table(
            memory,
            u64::from(u32::from_le_bytes(fadt[40..44].try_into().unwrap())),
        ));
        found.push(xsdt);
        found
            .into_iter()
            .map(|table| (String::from_utf8(table[..4].to_vec()).unwrap(), table))
            .collect()
    }

    #[test]
    fn every_table_is_reachable_from_the_rsdp_and_sums_to_zero() {
        let (memory, rsdp) = memory_with_tables(1);
        assert_eq!(rsdp, 0xe_0000);
        let tables = tables(&memory, rsdp);
        assert_eq!(tables.keys().collect::<Vec<_>>(), ["APIC", "DSDT", "FACP", "XSDT"]);
        for (name, table) in tables {
            assert_eq!(sum(&table), 0, "{name}");
        }
    }

    #[test]
    fn the_madt_names_each_vcpu_and_one_io_apic() {
        for vcpus in [1, 2, 32] {
            let (memory, rsdp) = memory_with_tables(vcpus);
            let madt = &tables(&memory, rsdp)["APIC"];
            assert_eq!(
                madt[36..44],
                [0, 0, 0xe0, 0xfe, 1, 0, 0, 0],
                "local APIC address, two 8259s"
            );
            let mut entries = &madt[44..];
            for id in 0..vcpus {
                assert_eq!(entries[..8], [0, 8, id, id, 1, 0, 0, 0]);
                entries = &entries[8..];
            }
            assert_eq!(entries, [1, 12, 32, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
        }
    }

    #[test]
    fn the_fadt_names_the_ports_of_the_power_management_device() {
        let (memory, rsdp) = memory_with_tables(1);
        let fadt = &tables(&memory, rsdp)["FACP"];
        let u16_at = |at: usize| u16::from_le_bytes(fadt[at..at + 2].try_into().unwrap());
        let u32_at = |at: usize| u32::from_le_bytes(fadt[at..at + 4].try_into().unwrap());
        assert_eq!((u32_at(56), fadt[88], u32_at(64), fadt[89]), (0x600, 4, 0x604, 2));
        assert_eq!(u16_at(109), BOOT_ARCH);
        assert_eq!(u32_at(112) & (1 << 20), 0, "not hardware-reduced");
        assert_eq!((u32_at(112) >> 10) & 1, 1, "the reset register counts");
        assert_eq!((fadt[116], u32_at(120), fadt[128]), (1, 0x608, RESET_VALUE));
        let facs = table(&memory, u64::from(u32_at(36)));
        assert_eq!((&facs[..4], facs.len(), u32_at(36) % 64), (&b"FACS"[..], 64, 0));
    }

    #[test]
    fn the_dsdt_names_each_virtio_device_with_its_window_and_interrupt() {
        let memory = GuestMemory::new(1, HugePages::None).unwrap();
        let windows = [0, 1, 14].map(|place| Window::nth(place).unwrap());
        let rsdp = write(memory.view(), 1, &windows).unwrap();
        let dsdt = &tables(&memory, rsdp)["DSDT"];
        let count = |pattern: &[u8]| dsdt.windows(pattern.len()).filter(|at| *at == pattern).count();
        assert_eq!(count(b"LNRO0005\0"), 3);
        for (name, window) in [b"VR00", b"VR01", b"VR02"].iter().zip(windows) {
            assert_eq!(count(*name), 1);
            // Memory32Fixed, writable; Extended Interrupt, a consumer's, edge, high, exclusive, one (6.4.3.4, 6.4.3.6).
            let mut resources = vec![0x86, 9, 0, 1];
            resources.extend(u32::try_from(window.base).unwrap().to_le_bytes());
            resources.extend(0x1000u32.to_le_bytes());
            resources.extend([0x89, 6, 0, 0b0011, 1]);
            resources.extend(window.irq.to_le_bytes());
            assert_eq!(count(&resources), 1, "{window:?}");
        }
    }

    #[test]
    fn the_dsdt_has_the_sleep_type_that_powers_off() {
        let (memory, rsdp) = memory_with_tables(1);
        let dsdt = &tables(&memory, rsdp)["DSDT"];
        // NameOp, \_S5_, PackageOp, length 8, 4 elements: BytePrefix 5, 0, 0, 0 (20.2.5.4).
        let expected = b"\x08\\_S5_\x12\x07\x04\x0a\x05\x00\x00\x00";
        assert!(dsdt.windows(expected.len()).any(|at| at == expected), "{dsdt:x?}");
    }
}
