//! The kernel image: which format it is, whether it is whole, where it goes, where it is entered.
//!
//! An ELF vmlinux is entered by PVH where it carries the note for it (`XEN_ELFNOTE_PHYS32_ENTRY`), since that is the entry a
//! kernel offers on purpose, and else by the 64-bit boot protocol at its ELF entry point; a bzImage by the 64-bit protocol,
//! 0x200 above its start (Linux, Documentation/arch/x86/boot.rst, "64-bit boot protocol").

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{ByteValued, GuestAddress};

use super::BootError;
use super::elf::{self, Fault};
use crate::layout::{CMDLINE_MAX, HIGH_MEMORY_START, HOLE_START};
use crate::memory::GuestMemory;

/// How the first vCPU enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Linux's 64-bit boot protocol: long mode, zero page in RSI.
    Linux64,
    /// Xen's PVH: 32-bit protected mode, `hvm_start_info` in EBX.
    Pvh,
}

/// Where the first vCPU enters the kernel, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Guest physical address.
    pub address: u64,
    /// In which state.
    pub protocol: Protocol,
    /// Whether the image says that it is the kernel of an operating system: it has Linux's setup header or PVH's note. A flat
    /// program in an ELF file has neither.
    pub operating_system: bool,
}

/// A kernel in guest memory.
#[derive(Debug)]
pub(super) struct Kernel {
    pub entry: Entry,
    /// End of the memory it occupies before it can protect anything itself.
    pub end: u64,
    /// A bzImage's own header, to be completed and passed back to it.
    pub header: Option<setup_header>,
}

impl Kernel {
    /// How long a command line it reads, its NUL not counted.
    pub(super) fn cmdline_max(&self) -> usize {
        let limit = CMDLINE_MAX - 1;
        match &self.header {
            Some(header) => usize::try_from(header.cmdline_size).map_or(limit, |own| own.min(limit)),
            None => limit,
        }
    }

    /// The end of the addresses at which it finds an initrd.
    pub(super) fn initrd_end(&self) -> u64 {
        match &self.header {
            Some(header) => u64::from(header.initrd_addr_max) + 1,
            None => HOLE_START,
        }
    }
}

/// Boot protocol 2.12: the first with `xloadflags`, which says whether there is a 64-bit entry. Linux 3.8.
const PROTOCOL_2_12: u16 = 0x020c;
/// "HdrS", little-endian.
const HEADER_MAGIC: u32 = 0x5372_6448;
const HEADER_AT: u64 = 0x1f1;
/// `xloadflags`: there is a 64-bit entry point at +0x200.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;

/// Loads the kernel at `path`.
pub(super) fn load(path: &Path, memory: &GuestMemory) -> Result<Kernel, BootError> {
    let (mut file, len) = super::open("kernel", path)?;
    let mut magic = [0; 4];
    let read = file.read_at(&mut magic, 0).map_err(|source| unreadable(path, source))?;
    if &magic[..read] == b"\x7fELF" {
        load_elf(path, &mut file, len, memory)
    } else if let Some(header) = bzimage_header(&file) {
        load_bzimage(path, &mut file, len, header, memory)
    } else {
        Err(BootError::NotAKernel {
            path: path.into(),
            found: describe(&magic[..read]),
        })
    }
}

fn load_elf(path: &Path, file: &mut File, len: u64, memory: &GuestMemory) -> Result<Kernel, BootError> {
    let extent = elf::check(file, len, memory.low_end()).map_err(|fault| match fault {
        Fault::NotForUs(found) => BootError::NotAKernel {
            path: path.into(),
            found,
        },
        Fault::Truncated { part, needed } => BootError::Truncated {
            path: path.into(),
            part,
            needed,
            len,
        },
        Fault::Damaged(reason) => BootError::Damaged {
            path: path.into(),
            reason,
        },
        Fault::TooLarge { end } => too_large(path, end, memory),
    })?;
    let loaded = Elf::load(memory.view(), None, file, None).map_err(|e| BootError::Damaged {
        path: path.into(),
        reason: e.to_string(),
    })?;
    let entry = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(address) => Entry {
            address: address.0,
            protocol: Protocol::Pvh,
            operating_system: true,
        },
        _ => Entry {
            address: loaded.kernel_load.0,
            protocol: Protocol::Linux64,
            operating_system: false,
        },
    };
    if !extent.holds(entry.address) {
        let reason = format!("its entry point {:#x} is outside of what it loads", entry.address);
        return Err(BootError::Damaged {
            path: path.into(),
            reason,
        });
    }
    Ok(Kernel {
        entry,
        end: extent.end,
        header: None,
    })
}

/// The setup header, if `file` starts like a bzImage: magic and boot flag in place.
fn bzimage_header(file: &File) -> Option<setup_header> {
    let mut header = setup_header::default();
    let have = file.read_at(header.as_mut_slice(), HEADER_AT).ok()?;
    // A file that ends within the header is no bzImage; the header proper is shorter than the struct in old kernels.
    (have == header.as_slice().len() && header.header == HEADER_MAGIC && header.boot_flag == 0xaa55).then_some(header)
}

fn load_bzimage(
    path: &Path,
    file: &mut File,
    len: u64,
    mut header: setup_header,
    memory: &GuestMemory,
) -> Result<Kernel, BootError> {
    let unsupported = |reason| BootError::Unsupported {
        path: path.into(),
        reason,
    };
    if header.version < PROTOCOL_2_12 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(unsupported(
            "it has no 64-bit entry point; use an x86-64 kernel of Linux 3.8 or later",
        ));
    }
    // linux-loader reads whatever there is; a file cut off anywhere would start and then die decompressing.
    let setup_sects = if header.setup_sects == 0 {
        4
    } else {
        u64::from(header.setup_sects)
    };
    let needed = (setup_sects + 1) * 512 + u64::from(header.syssize) * 16;
    if len < needed {
        return Err(BootError::Truncated {
            path: path.into(),
            part: "compressed kernel",
            needed,
            len,
        });
    }
    // Where it runs without moving itself. It unpacks itself in place, into `init_size` bytes.
    let start = header.pref_address;
    let end = start
        .checked_add(u64::from(header.init_size).max(len))
        .filter(|_| start >= HIGH_MEMORY_START);
    let Some(end) = end else {
        let reason = format!("its preferred address is {start:#x}");
        return Err(BootError::Damaged {
            path: path.into(),
            reason,
        });
    };
    if end > memory.low_end() {
        return Err(too_large(path, end, memory));
    }
    BzImage::load(memory.view(), Some(GuestAddress(start)), file, None).map_err(|e| BootError::Damaged {
        path: path.into(),
        reason: e.to_string(),
    })?;

    // The struct may be longer than this kernel's header, whose end the second byte of the jump over it tells; what follows is code.
    let [_, jump] = header.jump.to_le_bytes();
    let own = usize::from(jump) + 0x202 - 0x1f1;
    header.as_mut_slice().iter_mut().skip(own).for_each(|byte| *byte = 0);
    Ok(Kernel {
        entry: Entry {
            address: start + ENTRY_64,
            protocol: Protocol::Linux64,
            operating_system: true,
        },
        end,
        header: Some(header),
    })
}

fn too_large(path: &Path, end: u64, memory: &GuestMemory) -> BootError {
    BootError::KernelTooLarge {
        path: path.into(),
        needed_mib: end.div_ceil(1 << 20),
        low_mib: memory.low_end() >> 20,
    }
}

fn unreadable(path: &Path, source: std::io::Error) -> BootError {
    BootError::Open {
        what: "kernel",
        path: path.into(),
        source,
    }
}

/// What people pass by mistake, by its first bytes.
fn describe(magic: &[u8]) -> String {
    let compressed = |by| format!("a file compressed by {by}: unpack it");
    match magic {
        [0x1f, 0x8b, ..] => compressed("gzip"),
        [0xfd, b'7', b'z', b'X'] => compressed("xz"),
        [0x28, 0xb5, 0x2f, 0xfd] => compressed("zstd"),
        [0x04, 0x22, 0x4d, 0x18] | [0x02, 0x21, 0x4c, 0x18] => compressed("lz4"),
        [b'!', b'<', b'a', b'r'] => "a Debian package or an archive: unpack it and take its boot/vmlinuz-*".into(),
        [b'M', b'Z', ..] => "an EFI program without Linux's boot header".into(),
        _ => "something else".into(),
    }
}

#[cfg(test)]
#[path = "kernel_tests.rs"]
mod tests;
