//! What linux-loader does not check of an ELF kernel: the machine, that the file holds all of what its headers name, and
//! that each segment lands in guest memory clear of our boot data.
//!
//! linux-loader takes the file's word for offsets and lengths, adds them unchecked, and reports a truncated file and a small
//! guest by the same error. This reads the headers first; afterwards linux-loader only sees files that are whole.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::layout::HIGH_MEMORY_START;

/// An ELF-64 header's size, and a program header's (System V ABI, chapter 4 and 5, ELF-64 object file format 1.5).
const EHDR: usize = 64;
const PHDR: usize = 56;
const ELFCLASS64: u8 = 2;
const ELFDATA2LSB: u8 = 1;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// What the headers of a sound file say.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// End of the guest memory it fills, bss included.
    pub end: u64,
    /// Guest memory of each loaded segment: start and end.
    segments: Vec<(u64, u64)>,
}

impl Extent {
    /// Whether `address` is inside a loaded segment.
    pub(super) fn holds(&self, address: u64) -> bool {
        self.segments
            .iter()
            .any(|&(start, end)| (start..end).contains(&address))
    }
}

/// What is wrong with a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fault {
    NotForUs(String),
    Truncated { part: &'static str, needed: u64 },
    Damaged(String),
    TooLarge { end: u64 },
}

/// Checks the ELF file of `len` bytes against itself and against a guest whose low memory ends at `low_end`.
pub(super) fn check(file: &File, len: u64, low_end: u64) -> Result<Extent, Fault> {
    let header: [u8; EHDR] = read(file, 0, len, "ELF header")?;
    if header[4] != ELFCLASS64 || header[5] != ELFDATA2LSB || u16_at(&header, 18) != EM_X86_64 {
        return Err(Fault::NotForUs("an ELF file of another machine".into()));
    }
    if ![ET_EXEC, ET_DYN].contains(&u16_at(&header, 16)) {
        return Err(Fault::NotForUs("an ELF file that is not executable".into()));
    }
    let (table, count) = (u64_at(&header, 32), u16_at(&header, 56));
    if usize::from(u16_at(&header, 54)) != PHDR || count == 0 {
        return Err(Fault::Damaged("it has no program headers".into()));
    }

    let mut segments = Vec::new();
    for index in 0..u64::from(count) {
        let at = table
            .checked_add(index * PHDR as u64)
            .ok_or_else(|| overflow("program header", index))?;
        let phdr: [u8; PHDR] = read(file, at, len, "program header table")?;
        let kind = u32_at(&phdr, 0);
        if kind != PT_LOAD && kind != PT_NOTE {
            continue;
        }
        let (offset, filesz, memsz) = (u64_at(&phdr, 8), u64_at(&phdr, 32), u64_at(&phdr, 40));
        let needed = offset.checked_add(filesz).ok_or_else(|| overflow("segment", index))?;
        if needed > len {
            let part = if kind == PT_LOAD {
                "code and data"
            } else {
                "note segment"
            };
            return Err(Fault::Truncated { part, needed });
        }
        if kind == PT_LOAD && memsz > 0 {
            let start = u64_at(&phdr, 24);
            let end = start.checked_add(memsz).ok_or_else(|| overflow("segment", index))?;
            if filesz > memsz {
                return Err(Fault::Damaged(format!(
                    "segment {index} has more bytes in the file than in memory"
                )));
            }
            if start < HIGH_MEMORY_START {
                // Not damage: an ordinary position-independent program is made so.
                return Err(Fault::NotForUs(format!(
                    "a program that loads at {start:#x}, below 1 MiB"
                )));
            }
            if end > low_end {
                return Err(Fault::TooLarge { end });
            }
            segments.push((start, end));
        }
    }
    match segments.iter().map(|&(_, end)| end).max() {
        Some(end) => Ok(Extent { end, segments }),
        None => Err(Fault::Damaged("it has nothing to load".into())),
    }
}

fn overflow(what: &str, index: u64) -> Fault {
    Fault::Damaged(format!("{what} {index} ends beyond 64 bits"))
}

fn read<const N: usize>(file: &File, at: u64, len: u64, part: &'static str) -> Result<[u8; N], Fault> {
    let needed = at.checked_add(N as u64).filter(|&needed| needed <= i64::MAX as u64);
    let needed = needed.ok_or_else(|| Fault::Damaged(format!("its {part} is said to be at {at:#x}")))?;
    let mut bytes = [0; N];
    match file.read_exact_at(&mut bytes, at) {
        Ok(()) if needed <= len => Ok(bytes),
        _ => Err(Fault::Truncated { part, needed }),
    }
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("a range of N bytes")
}
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes_at(bytes, at))
}
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(bytes, at))
}
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(bytes, at))
}
