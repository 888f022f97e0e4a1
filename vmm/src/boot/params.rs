//! What the kernel is told on entry: the zero page of the 64-bit boot protocol, or PVH's `hvm_start_info`. Both say the same:
//! memory map, command line, initrd, RSDP.

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::GuestAddress;

use super::BootError;
use super::initrd::Initrd;
use super::kernel::{Kernel, Protocol};
use crate::layout::{ACPI_TABLES_END, CMDLINE, LOW_MEMORY_END, PVH_MEMMAP, PVH_MODULES, PVH_START_INFO, ZERO_PAGE};
use crate::memory::GuestMemory;

/// e820 types, which PVH's memory map shares (ACPI 6.5, table 15.5).
const RAM: u32 = 1;
const RESERVED: u32 = 2;
/// `type_of_loader`: none of the registered ones.
const LOADER_UNDEFINED: u8 = 0xff;
/// `XEN_HVM_START_MAGIC_VALUE`: "xEn3" with the highest bit of the E set.
const PVH_MAGIC: u32 = 0x336e_c578;

/// Writes them. `cmdline_len` is without its NUL.
pub(super) fn write(
    memory: &GuestMemory,
    kernel: &Kernel,
    cmdline_len: usize,
    initrd: Option<Initrd>,
    rsdp: u64,
) -> Result<(), BootError> {
    let cannot = |e: linux_loader::configurator::Error| BootError::Write {
        what: "boot parameters",
        reason: e.to_string(),
    };
    match kernel.entry.protocol {
        Protocol::Linux64 => {
            let page = zero_page(memory, kernel, cmdline_len, initrd, rsdp);
            LinuxBootConfigurator::write_bootparams(&BootParams::new(&page, GuestAddress(ZERO_PAGE)), memory.view())
        }
        Protocol::Pvh => {
            let (info, memmap, modules) = start_info(memory, initrd, rsdp);
            let mut params = BootParams::new(&info, GuestAddress(PVH_START_INFO));
            params.set_sections(&memmap, GuestAddress(PVH_MEMMAP));
            if !modules.is_empty() {
                params.set_modules(&modules, GuestAddress(PVH_MODULES));
            }
            PvhBootConfigurator::write_bootparams(&params, memory.view())
        }
    }
    .map_err(cannot)
}

/// (start, length, type) of everything the kernel should know of.
fn memory_map(memory: &GuestMemory) -> Vec<(u64, u64, u32)> {
    let mut map: Vec<_> = memory
        .usable()
        .into_iter()
        .map(|(start, len)| (start, len, RAM))
        .collect();
    // The BIOS area: the ACPI tables are in it, as memory, and must stay.
    map.insert(1, (LOW_MEMORY_END, ACPI_TABLES_END - LOW_MEMORY_END, RESERVED));
    map
}

fn zero_page(
    memory: &GuestMemory,
    kernel: &Kernel,
    cmdline_len: usize,
    initrd: Option<Initrd>,
    rsdp: u64,
) -> boot_params {
    let low_u32 = |address: u64| u32::try_from(address).expect("placed below 4 GiB");
    let mut page = boot_params {
        hdr: kernel.header.unwrap_or_default(),
        acpi_rsdp_addr: rsdp,
        ..Default::default()
    };
    if kernel.header.is_none() {
        // What a vmlinux would find if it had a setup header: without the two magic numbers it reads nothing of the rest.
        page.hdr.boot_flag = 0xaa55;
        page.hdr.header = 0x5372_6448;
        page.hdr.kernel_alignment = 2 << 20;
    }
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.cmd_line_ptr = low_u32(CMDLINE);
    page.hdr.cmdline_size = u32::try_from(cmdline_len).expect("at most CMDLINE_MAX");
    // Whatever the file's own header says of one.
    page.hdr.ramdisk_image = initrd.map_or(0, |initrd| low_u32(initrd.start));
    page.hdr.ramdisk_size = initrd.map_or(0, |initrd| low_u32(initrd.len));
    let map = memory_map(memory);
    for (slot, &(addr, size, r#type)) in page.e820_table.iter_mut().zip(&map) {
        *slot = boot_e820_entry { addr, size, r#type };
    }
    page.e820_entries = u8::try_from(map.len()).expect("four ranges at most");
    page
}

fn start_info(
    memory: &GuestMemory,
    initrd: Option<Initrd>,
    rsdp: u64,
) -> (hvm_start_info, Vec<hvm_memmap_table_entry>, Vec<hvm_modlist_entry>) {
    let memmap: Vec<_> = memory_map(memory)
        .into_iter()
        .map(|(addr, size, type_)| hvm_memmap_table_entry {
            addr,
            size,
            type_,
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> = initrd
        .iter()
        .map(|at| hvm_modlist_entry {
            paddr: at.start,
            size: at.len,
            ..Default::default()
        })
        .collect();
    let info = hvm_start_info {
        magic: PVH_MAGIC,
        // 1: with a memory map.
        version: 1,
        nr_modules: u32::try_from(modules.len()).expect("one at most"),
        modlist_paddr: if modules.is_empty() { 0 } else { PVH_MODULES },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: PVH_MEMMAP,
        memmap_entries: u32::try_from(memmap.len()).expect("four ranges at most"),
        ..Default::default()
    };
    (info, memmap, modules)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::Entry;
    use crate::config::HugePages;

    const MIB: u64 = 1 << 20;

    fn kernel() -> Kernel {
        Kernel {
            entry: Entry {
                address: 0x100_0000,
                protocol: Protocol::Linux64,
                operating_system: false,
            },
            end: 0x200_0000,
            header: None,
        }
    }

    #[test]
    fn the_memory_map_covers_all_memory_and_reserves_the_bios_area() {
        let memory = GuestMemory::new(3074, HugePages::None).unwrap();
        let page = zero_page(&memory, &kernel(), 5, None, 0xe0000);
        let entries: Vec<_> = page.e820_table[..usize::from(page.e820_entries)]
            .iter()
            .map(|entry| ({ entry.addr }, { entry.size }, { entry.r#type }))
            .collect();
        let expected = [
            (0, 0x9fc00, 1),
            (0x9fc00, 0x60400, 2),
            (0x10_0000, 3071 * MIB, 1),
            (4096 * MIB, 2 * MIB, 1),
        ];
        assert_eq!(entries, expected);
        let (info, memmap, _) = start_info(&memory, None, 0xe0000);
        let entries: Vec<_> = memmap
            .iter()
            .map(|entry| (entry.addr, entry.size, entry.type_))
            .collect();
        assert_eq!(entries, expected);
        assert_eq!((info.memmap_entries, info.nr_modules, info.modlist_paddr), (4, 0, 0));
    }

    #[test]
    fn both_protocols_tell_of_the_initrd_and_the_rsdp() {
        let memory = GuestMemory::new(8, HugePages::None).unwrap();
        let initrd = Some(Initrd {
            start: 6 * MIB,
            len: 4321,
        });
        let page = zero_page(&memory, &kernel(), 5, initrd, 0xe0000);
        assert_eq!(({ page.hdr.ramdisk_image }, { page.hdr.ramdisk_size }), (6 << 20, 4321));
        assert_eq!(
            ({ page.acpi_rsdp_addr }, { page.hdr.cmd_line_ptr }),
            (0xe0000, 0x2_0000)
        );
        let (info, _, modules) = start_info(&memory, initrd, 0xe0000);
        assert_eq!((modules[0].paddr, modules[0].size), (6 * MIB, 4321));
        assert_eq!((info.rsdp_paddr, info.cmdline_paddr), (0xe0000, 0x2_0000));
    }
}
