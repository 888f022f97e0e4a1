//! A flat program as a kernel: the smallest ELF64 a loader takes, one segment, entered by Linux's 64-bit boot protocol
//! (Documentation/arch/x86/boot.rst): long mode, flat segments, identity-mapped pages, CPL 0, interrupts off.

use super::Program;

/// Where the code is loaded and entered: 1 MiB, where loaders look for a kernel.
pub(super) const ADDRESS: u64 = 0x10_0000;
const HEADER: u16 = 64;
const PROGRAM_HEADER: u16 = 56;

/// `program` as an ELF64 executable.
///
/// In kernel mode every program runs: `out` and HLT need no leave there. On a software backend it is emulated, though.
#[must_use]
pub fn elf(program: &Program) -> Vec<u8> {
    let offset = u64::from(HEADER + PROGRAM_HEADER);
    let size = program.code.len() as u64;
    let mut file = vec![];
    file.extend(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0"); // e_ident: 64-bit, little-endian, version 1
    file.extend(2u16.to_le_bytes()); // e_type: ET_EXEC
    file.extend(62u16.to_le_bytes()); // e_machine: EM_X86_64
    file.extend(1u32.to_le_bytes()); // e_version
    file.extend(ADDRESS.to_le_bytes()); // e_entry
    file.extend(u64::from(HEADER).to_le_bytes()); // e_phoff
    file.extend(0u64.to_le_bytes()); // e_shoff
    file.extend(0u32.to_le_bytes()); // e_flags
    for half in [HEADER, PROGRAM_HEADER, 1, 64, 0, 0] {
        file.extend(half.to_le_bytes()); // e_ehsize, e_phentsize, e_phnum, e_shentsize, e_shnum, e_shstrndx
    }
    file.extend(1u32.to_le_bytes()); // p_type: PT_LOAD
    file.extend(5u32.to_le_bytes()); // p_flags: read, execute
    for word in [offset, ADDRESS, ADDRESS, size, size, 1] {
        file.extend(word.to_le_bytes()); // p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
    }
    file.extend(&program.code);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_is_where_the_header_says() {
        let program = Program::halt();
        let file = elf(&program);
        let word = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap());
        let (segment, [offset, size]) = (usize::from(HEADER), [8, 32].map(|field| word(64 + field)));
        assert_eq!(word(24), word(segment + 24), "entered at the segment's start");
        let code = usize::try_from(offset).unwrap()..usize::try_from(offset + size).unwrap();
        assert_eq!(file[code], program.code);
    }
}
