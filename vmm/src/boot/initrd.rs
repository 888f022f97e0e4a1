//! The initial RAM disk: as high as the kernel can reach, so that the kernel has room below to unpack itself and to build
//! its first tables.

use std::path::Path;

use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::memory::GuestMemory;

/// The kernel frees the initrd by pages.
const PAGE: u64 = 4096;

/// Where the initrd lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Initrd {
    pub start: u64,
    pub len: u64,
}

/// Loads the initrd at `path` between `kernel_end` and the lower of `limit` and the end of low memory.
pub(super) fn load(path: &Path, memory: &GuestMemory, kernel_end: u64, limit: u64) -> Result<Initrd, BootError> {
    let (mut file, len) = super::open("initrd", path)?;
    let top = limit.min(memory.low_end()) / PAGE * PAGE;
    let floor = kernel_end.next_multiple_of(PAGE);
    let start = top
        .checked_sub(len)
        .map(|start| start / PAGE * PAGE)
        .filter(|&start| start >= floor);
    let Some(start) = start else {
        let needed_mib = floor
            .saturating_add(len)
            .div_ceil(PAGE)
            .saturating_mul(PAGE)
            .div_ceil(1 << 20);
        return Err(BootError::InitrdTooLarge {
            path: path.into(),
            len,
            room: top.saturating_sub(floor),
            needed_mib,
        });
    };
    let bytes = usize::try_from(len).expect("usize has 64 bits on x86-64");
    memory
        .view()
        .read_exact_volatile_from(GuestAddress(start), &mut file, bytes)
        .map_err(|e| BootError::Open {
            what: "initrd",
            path: path.into(),
            source: std::io::Error::other(e),
        })?;
    Ok(Initrd { start, len })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::HugePages;
    use crate::testing::TempFile;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_initrd_ends_in_the_last_page_it_may_have() {
        let memory = GuestMemory::new(4, HugePages::None).unwrap();
        let file = TempFile::new(&[7; 5000]);
        let initrd = load(file.path(), &memory, 2 * MIB, u64::MAX).unwrap();
        assert_eq!(
            initrd,
            Initrd {
                start: 4 * MIB - 8192,
                len: 5000
            }
        );
        assert_eq!(
            memory.view().read_obj::<u8>(GuestAddress(initrd.start + 4999)).unwrap(),
            7
        );
        assert_eq!(
            memory.view().read_obj::<u8>(GuestAddress(initrd.start + 5000)).unwrap(),
            0
        );
        let below = load(file.path(), &memory, 2 * MIB, 3 * MIB).unwrap();
        assert_eq!(below.start, 3 * MIB - 8192);
    }

    #[test]
    fn an_initrd_that_does_not_fit_above_the_kernel_is_refused_with_its_numbers() {
        let memory = GuestMemory::new(4, HugePages::None).unwrap();
        let file = TempFile::new(&[7; 8192]);
        assert!(load(file.path(), &memory, 4 * MIB - 8192, u64::MAX).is_ok());
        let refusal = load(file.path(), &memory, 4 * MIB - 8191, u64::MAX)
            .unwrap_err()
            .to_string();
        assert!(
            refusal.contains("has 8192 bytes and the kernel leaves 4096 bytes"),
            "{refusal}"
        );
        assert!(refusal.contains("raise mem_size_mib to at least 5"), "{refusal}");
        let big = TempFile::sparse(5 * MIB);
        let refusal = load(big.path(), &memory, 2 * MIB, u64::MAX).unwrap_err().to_string();
        assert!(refusal.contains("raise mem_size_mib to at least 7"), "{refusal}");
    }
}
