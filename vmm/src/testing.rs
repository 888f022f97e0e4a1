//! What several modules' tests need.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A file that is gone when dropped.
#[derive(Debug)]
pub struct TempFile(PathBuf);

impl TempFile {
    pub fn new(contents: &[u8]) -> Self {
        let (this, mut file) = Self::create();
        file.write_all(contents).unwrap();
        this
    }

    /// `len` bytes of zeros that take no room.
    pub fn sparse(len: u64) -> Self {
        let (this, file) = Self::create();
        file.set_len(len).unwrap();
        this
    }

    fn create() -> (Self, File) {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "chronovisor-test-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        let file = File::create_new(&path).unwrap();
        (Self(path), file)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// An ELF-64 kernel: `code` at `address`, entered there.
pub fn elf(address: u64, code: &[u8]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend(2u16.to_le_bytes()); // ET_EXEC
    file.extend(62u16.to_le_bytes()); // EM_X86_64
    file.extend(1u32.to_le_bytes());
    file.extend(address.to_le_bytes());
    file.extend(64u64.to_le_bytes()); // program headers
    file.extend(0u64.to_le_bytes());
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes()); // PT_LOAD
    file.extend(5u32.to_le_bytes());
    for quad in [64 + 56, address, address, code.len() as u64, code.len() as u64, 4096] {
        file.extend(quad.to_le_bytes());
    }
    file.extend(code);
    file
}

/// An ELF-64 kernel of no-operations at `address`, with the note of an operating system that is entered by PVH at `entry`.
pub fn elf_with_pvh_note(address: u64, entry: u32) -> Vec<u8> {
    const PHDR: usize = 64;
    const PHDR_LEN: usize = 56;
    let mut image = elf(address, &[0x90; 4096]);
    // A second program header behind the first: everything after them moves.
    let code = image.split_off(PHDR + PHDR_LEN);
    let offset = (PHDR + 2 * PHDR_LEN) as u64;
    image[56..58].copy_from_slice(&2u16.to_le_bytes());
    image[PHDR + 8..PHDR + 16].copy_from_slice(&offset.to_le_bytes());
    let note = [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry];
    let note: Vec<u8> = note.iter().flat_map(|word| word.to_le_bytes()).collect();
    image.extend([4u32, 4].iter().flat_map(|word| word.to_le_bytes())); // PT_NOTE
    for quad in [
        offset + code.len() as u64,
        0,
        0,
        note.len() as u64,
        note.len() as u64,
        4,
    ] {
        image.extend(quad.to_le_bytes());
    }
    image.extend(code);
    image.extend(note);
    image
}
