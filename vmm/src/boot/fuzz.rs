//! Kernel images and initrds that nobody ever built: see [`crate::fuzz`].
//!
//! An input is: the guest's memory, by a byte; the command line, preceded by its length; what devices add to it, likewise; the
//! initrd's length, in four bytes, none for zero; and the kernel.

use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};

use super::{BootError, load};
use crate::config::{BootSource, HugePages};
use crate::fuzz::{Input, file};
use crate::layout::{CMDLINE, CMDLINE_MAX, HIGH_MEMORY_START, ZERO_PAGE};
use crate::memory::GuestMemory;

/// Linux prefers to be at 16 MiB. There is a hole in what has more than 3 GiB; memory costs when it is touched.
const MEMORIES_MIB: [usize; 8] = [64, 1, 2, 3, 8, 24, 3072, 3080];
/// Whose contents nobody looks at: long enough to be too long for some memories.
const MAX_INITRD: u32 = 2 << 20;
/// Of the zero page: the initrd's address and length (Linux, Documentation/arch/x86/zero-page.rst).
const RAMDISK_IMAGE: u64 = ZERO_PAGE + 0x218;
const RAMDISK_SIZE: u64 = ZERO_PAGE + 0x21c;
const RSDP: u64 = 0xe_0000;

pub(crate) fn run(mut input: Input) {
    let Ok(memory) = GuestMemory::new(input.pick(&MEMORIES_MIB), HugePages::None) else {
        // The host has less.
        return;
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let boot_args = text(input.short());
    let added = text(input.short());
    let initrd_len = u64::from(input.u32() % MAX_INITRD);
    let (kernel, kernel_image_path) = file(0);
    kernel.write_all_at(input.rest(), 0).expect("a file in memory takes it");
    let initrd = (initrd_len > 0).then(|| file(initrd_len));
    let source = BootSource {
        kernel_image_path,
        boot_args: Some(boot_args),
        initrd_path: initrd.as_ref().map(|(_, path)| path.clone()),
    };
    match load(&source, &added, &memory, RSDP) {
        Ok(entry) => {
            assert!(
                (HIGH_MEMORY_START..memory.low_end()).contains(&entry.address),
                "{entry:?}"
            );
            let mut cmdline = [0; CMDLINE_MAX];
            let view = memory.view();
            view.read_slice(&mut cmdline, GuestAddress(CMDLINE))
                .expect("it was written");
            assert!(cmdline.contains(&0), "a command line without an end");
            let word = |at| u64::from(view.read_obj::<u32>(GuestAddress(at)).expect("it was written"));
            let (start, len) = (word(RAMDISK_IMAGE), word(RAMDISK_SIZE));
            // PVH is told elsewhere, and of none both are zero.
            assert!(
                len == 0 || start >= HIGH_MEMORY_START && start + len <= memory.low_end(),
                "{start:#x} {len:#x}"
            );
        }
        // On one line, whatever is in the file.
        Err(error) => {
            assert!(!matches!(error, BootError::Open { what: "kernel", .. }), "{error}");
            assert!(!error.to_string().contains('\n'), "{error}");
        }
    }
}
