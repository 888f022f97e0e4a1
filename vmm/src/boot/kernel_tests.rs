use super::*;
use crate::config::HugePages;
use crate::testing::{TempFile, elf, elf_with_pvh_note};
use vm_memory::Bytes;

const MIB: u64 = 1 << 20;
/// Offsets in the image that `elf` makes: the program header follows the ELF header.
const PHDR: usize = 64;
/// Where a bzImage's setup header starts.
const HEADER: usize = 0x1f1;

fn memory(mib: usize) -> GuestMemory {
    GuestMemory::new(mib, HugePages::None).unwrap()
}

fn load_bytes(image: &[u8]) -> Result<Kernel, BootError> {
    load(TempFile::new(image).path(), &memory(8))
}

fn put(mut image: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    image[at..at + bytes.len()].copy_from_slice(bytes);
    image
}

/// A bzImage of boot protocol 2.15: one sector of setup code, `len` bytes of kernel.
fn bzimage(len: u32) -> Vec<u8> {
    let mut image = vec![0x11; 2 * 512 + len as usize];
    let mut header = setup_header {
        setup_sects: 1,
        boot_flag: 0xaa55,
        jump: 0x6aeb,
        header: HEADER_MAGIC,
        version: 0x020f,
        loadflags: 1,
        xloadflags: XLF_KERNEL_64,
        syssize: len / 16,
        initrd_addr_max: 0x7fff_ffff,
        cmdline_size: 2047,
        pref_address: 2 * MIB,
        init_size: 3 << 20,
        ..Default::default()
    };
    image[HEADER..HEADER + header.as_slice().len()].copy_from_slice(header.as_mut_slice());
    image
}

fn with_header(change: impl Fn(&mut setup_header)) -> Vec<u8> {
    let mut image = bzimage(4096);
    let mut header = setup_header::default();
    let at = HEADER..HEADER + header.as_slice().len();
    header.as_mut_slice().copy_from_slice(&image[at.clone()]);
    change(&mut header);
    image[at].copy_from_slice(header.as_slice());
    image
}

#[test]
fn a_vmlinux_without_a_note_is_entered_by_the_64_bit_protocol() {
    let memory = memory(8);
    let file = TempFile::new(&elf(2 * MIB, b"code"));
    let kernel = load(file.path(), &memory).unwrap();
    assert_eq!(
        kernel.entry,
        Entry {
            address: 2 * MIB,
            protocol: Protocol::Linux64,
            operating_system: false
        }
    );
    assert_eq!(
        (kernel.end, kernel.initrd_end(), kernel.cmdline_max()),
        (2 * MIB + 4, HOLE_START, 2047)
    );
    let mut code = [0; 5];
    memory.view().read_slice(&mut code, GuestAddress(2 * MIB)).unwrap();
    assert_eq!(&code, b"code\0");
}

#[test]
fn a_vmlinux_with_the_note_is_entered_by_pvh() {
    let kernel = load_bytes(&elf_with_pvh_note(2 * MIB, (2 << 20) + 16)).unwrap();
    assert_eq!(
        kernel.entry,
        Entry {
            address: 2 * MIB + 16,
            protocol: Protocol::Pvh,
            operating_system: true
        }
    );
}

#[test]
fn a_bzimage_is_entered_0x200_above_its_preferred_address() {
    let kernel = load_bytes(&bzimage(4096)).unwrap();
    assert_eq!(
        kernel.entry,
        Entry {
            address: 2 * MIB + 0x200,
            protocol: Protocol::Linux64,
            operating_system: true
        }
    );
    assert_eq!(
        (kernel.end, kernel.initrd_end(), kernel.cmdline_max()),
        (5 * MIB, 1 << 31, 2047)
    );
}

#[test]
fn a_bzimages_code_is_not_taken_for_its_header() {
    // Protocol 2.12 ends its header at 0x268, where `init_size` and what follows of later ones begin.
    let image = with_header(|header| {
        header.jump = 0x66eb;
        header.kernel_info_offset = 0xdead_beef;
    });
    let header = load_bytes(&image).unwrap().header.unwrap();
    assert_eq!({ header.kernel_info_offset }, 0);
    assert_eq!({ header.init_size }, 3 << 20);
}

#[test]
fn a_file_that_is_no_kernel_is_refused_with_what_was_expected() {
    for (image, found) in [
        (&b"#!/bin/sh\n"[..], "something else"),
        (b"\x1f\x8b\x08\0", "compressed by gzip"),
        (b"\xfd7zXZ\0", "compressed by xz"),
        (b"\x28\xb5\x2f\xfd", "compressed by zstd"),
        (b"!<arch>\ndebian-binary", "a Debian package"),
        (b"MZ", "an EFI program without"),
        (b"x", "something else"),
        (&put(elf(2 * MIB, b"x"), 18, &183u16.to_le_bytes()), "another machine"),
        (&put(elf(2 * MIB, b"x"), 4, &[1]), "another machine"),
        (&put(elf(2 * MIB, b"x"), 16, &1u16.to_le_bytes()), "not executable"),
        (
            &put(elf(2 * MIB, b"x"), PHDR + 24, &0x7000u64.to_le_bytes()),
            "a program that loads at 0x7000",
        ),
    ] {
        let refusal = load_bytes(image).unwrap_err().to_string();
        assert!(
            refusal.contains("is not a kernel: expected an x86-64 ELF vmlinux or a bzImage"),
            "{refusal}"
        );
        assert!(refusal.contains(found), "{refusal}");
    }
}

#[test]
fn a_truncated_kernel_is_refused_wherever_it_was_cut() {
    let elf = elf(2 * MIB, &[0x90; 5000]);
    for len in [5, 63, 64, 100, 119, 120, elf.len() - 1] {
        let refusal = load_bytes(&elf[..len]).unwrap_err();
        assert!(
            matches!(refusal, BootError::Truncated { .. }),
            "ELF cut at {len}: {refusal}"
        );
    }
    let pvh = elf_with_pvh_note(2 * MIB, 2 << 20);
    let refusal = load_bytes(&pvh[..pvh.len() - 1]).unwrap_err();
    assert!(
        matches!(
            refusal,
            BootError::Truncated {
                part: "note segment",
                ..
            }
        ),
        "{refusal}"
    );
    let bzimage = bzimage(4096);
    for len in [bzimage.len() - 1, 2000, 1024, 700] {
        let refusal = load_bytes(&bzimage[..len]).unwrap_err();
        assert!(
            matches!(refusal, BootError::Truncated { .. }),
            "bzImage cut at {len}: {refusal}"
        );
    }
    let refusal = load_bytes(&bzimage[..bzimage.len() - 1]).unwrap_err().to_string();
    assert!(
        refusal.contains("needs 5120 bytes of file, which has 5119; fetch or build it again"),
        "{refusal}"
    );
}

#[test]
fn lengths_and_addresses_that_cannot_be_are_refused() {
    let image = || elf(2 * MIB, &[0x90; 16]);
    let max = u64::MAX.to_le_bytes();
    for (what, image) in [
        ("program headers far away", put(image(), 32, &max)),
        ("no program headers", put(image(), 56, &[0, 0])),
        ("program headers of another size", put(image(), 54, &[32, 0])),
        ("offset beyond 64 bits", put(image(), PHDR + 8, &max)),
        ("address beyond 64 bits", put(image(), PHDR + 24, &max)),
        (
            "more in the file than in memory",
            put(image(), PHDR + 40, &15u64.to_le_bytes()),
        ),
        ("nothing to load", put(image(), PHDR, &[6])),
        ("entry outside", put(image(), 24, &(2 * MIB + 16).to_le_bytes())),
        ("PVH entry outside", elf_with_pvh_note(2 * MIB, 1)),
        (
            "bzImage below 1 MiB",
            with_header(|header| header.pref_address = 0x7000),
        ),
        (
            "bzImage beyond 64 bits",
            with_header(|header| header.pref_address = u64::MAX),
        ),
    ] {
        let refusal = load_bytes(&image).unwrap_err();
        assert!(matches!(refusal, BootError::Damaged { .. }), "{what}: {refusal}");
    }
    for (what, image) in [
        ("file size", put(image(), PHDR + 32, &(1u64 << 40).to_le_bytes())),
        ("headers behind the end", put(image(), 32, &4096u64.to_le_bytes())),
        ("bzImage", with_header(|header| header.syssize = u32::MAX)),
    ] {
        let refusal = load_bytes(&image).unwrap_err();
        assert!(matches!(refusal, BootError::Truncated { .. }), "{what}: {refusal}");
    }
}

#[test]
fn a_kernel_larger_than_memory_is_refused_with_what_it_needs() {
    for image in [
        put(elf(2 * MIB, b"x"), PHDR + 40, &(6 * MIB + 1).to_le_bytes()),
        with_header(|header| header.init_size = (6 << 20) + 1),
    ] {
        let refusal = load_bytes(&image).unwrap_err().to_string();
        assert!(
            refusal.contains("needs memory up to 9 MiB and the guest has 8 MiB below 3 GiB"),
            "{refusal}"
        );
        assert!(refusal.contains("raise mem_size_mib to at least 9"), "{refusal}");
    }
    let bss = put(elf(2 * MIB, b"x"), PHDR + 40, &(6 * MIB).to_le_bytes());
    assert_eq!(
        load_bytes(&bss).unwrap().end,
        8 * MIB,
        "exactly all of it is not too much"
    );
}

#[test]
fn a_kernel_without_a_64_bit_entry_is_refused() {
    for image in [
        with_header(|header| header.version = 0x020b),
        with_header(|header| header.xloadflags = 0),
    ] {
        let refusal = load_bytes(&image).unwrap_err().to_string();
        assert!(
            refusal.contains("no 64-bit entry point; use an x86-64 kernel"),
            "{refusal}"
        );
    }
}
