//! Where everything lies in the guest's physical address space, and why there.
//!
//! ```text
//! 0            640 KiB      1 MiB                      3 GiB         4 GiB
//! ├─ boot data ─┬─ reserved ─┬─ kernel ... initrd ─────┬─ the hole ───┬─ the rest of memory ─
//! │ usable by   │ ACPI       │ memory                  │ virtio-mmio, │
//! │ the kernel  │ tables     │                         │ IOAPIC, LAPIC│
//! ```

/// End of the memory below the hole, and the hole's start. 3 GiB is where every PC puts it: room for devices, and below it
/// as much memory as 32-bit addresses in the boot protocols can name.
pub const HOLE_START: u64 = 3 << 30;
/// End of the hole: where memory goes on. Everything with a fixed address on a PC lies below 4 GiB.
pub const HOLE_END: u64 = 4 << 30;

/// Our descriptor table for the first instructions; the kernel loads its own soon. Above the real-mode interrupt vectors
/// and BIOS data (0 to 0x4ff), which Linux's real-mode trampoline may read.
pub const GDT: u64 = 0x500;
/// `hvm_start_info` of a PVH boot.
pub const PVH_START_INFO: u64 = 0x6000;
/// The module list of a PVH boot: one entry, the initrd.
pub const PVH_MODULES: u64 = 0x6800;
/// The memory map of a PVH boot.
pub const PVH_MEMMAP: u64 = 0x6c00;
/// The zero page (`struct boot_params`) of the 64-bit boot protocol: one page.
pub const ZERO_PAGE: u64 = 0x7000;
/// Stack for the first instructions of a 64-bit boot: grows down over the page between the zero page and the page tables.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables of a 64-bit boot: the top level, then one page of the second, then [`PAGE_DIRECTORIES`].
pub const PML4: u64 = 0x9000;
/// The second level of the page tables.
pub const PDPT: u64 = 0xa000;
/// Four page directories: 2 MiB pages for the first 4 GiB, so that wherever a kernel lies below the hole it is mapped.
pub const PAGE_DIRECTORIES: u64 = 0xb000;
/// The kernel's command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Longest command line with its terminating NUL: `COMMAND_LINE_SIZE` in Linux's arch/x86/include/asm/setup.h.
pub const CMDLINE_MAX: usize = 2048;

/// End of conventional memory: the kilobyte below 640 KiB is the extended BIOS data area on a PC, where old kernels look for tables.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// The ACPI tables: start of the BIOS area, where a kernel that was told no RSDP address searches (ACPI 6.5, 5.2.5.1).
pub const ACPI_TABLES: u64 = 0xe_0000;
/// End of the BIOS area.
pub const ACPI_TABLES_END: u64 = 0x10_0000;
/// Kernels are loaded from here up.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;

/// The windows of virtio-mmio devices, one after the other, from here up. Where Firecracker had them before it had PCI: their
/// command lines name it.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Their interrupts, in order. Those below 16 first: a kernel that was told to do without ACPI knows no others, for it has only
/// the two 8259s. Left out are the timer (0), the keyboard (1), the second 8259 (2), COM2 and COM1 (3, 4), the clock (8), ACPI
/// (9), the mouse (12) and the coprocessor (13), which kernels take for what they are on a PC.
pub const VIRTIO_IRQS: [u32; 15] = [5, 6, 7, 10, 11, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

/// I/O APIC: where KVM's in-kernel one answers.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC: its address after reset.
pub const LAPIC: u32 = 0xfee0_0000;
/// One page that KVM may use for an identity map, on Intel hosts without unrestricted guest mode; below the TSS.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM may use for a task state segment, on the same hosts. The address is the one QEMU uses.
pub const TSS: usize = 0xfffb_d000;

/// Port of COM1, and its number of registers.
pub const COM1_PORT: u16 = 0x3f8;
/// Registers of COM1.
pub const COM1_LEN: u16 = 8;
/// Interrupt of COM1.
pub const COM1_IRQ: u32 = 4;
/// Interrupt of the i8042's keyboard side.
pub const KEYBOARD_IRQ: u32 = 1;
/// i8042 data port.
pub const I8042_DATA: u16 = 0x60;
/// i8042 status and command port.
pub const I8042_COMMAND: u16 = 0x64;
/// ACPI PM1a event block: status and enable, two bytes each. Fixed nowhere; QEMU's q35 has it here too.
pub const PM1A_EVENT: u16 = 0x600;
/// Length of the PM1a event block.
pub const PM1A_EVENT_LEN: u8 = 4;
/// ACPI PM1a control block.
pub const PM1A_CONTROL: u16 = 0x604;
/// Length of the PM1a control block.
pub const PM1A_CONTROL_LEN: u8 = 2;
/// ACPI reset register: one byte.
pub const ACPI_RESET: u16 = 0x608;
/// First port of the power-management device, which owns all of the above.
pub const PM_PORT: u16 = PM1A_EVENT;
/// Its number of ports.
pub const PM_LEN: u16 = ACPI_RESET - PM1A_EVENT + 1;
/// The interrupt ACPI events would come on (SCI). Nothing raises it yet.
pub const SCI_IRQ: u16 = 9;
