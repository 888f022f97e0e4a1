//! Guest memory: its layout around the x86 hole, and the host memory behind it.
//!
//! Each region starts at a 2 MiB boundary of the host's address space, as it does in the guest's: only then can the host back
//! it with huge pages and KVM map those in one step. An unaligned region cost 5,159 page-fault exits in a boot that takes
//! 15 with an aligned one.
//!
//! Nothing is touched here: a page of host memory is taken when the guest, or a loader, first writes to it.
#![allow(unsafe_code, reason = "mmap, madvise and munmap of guest memory")]

use std::ops::Range;
use std::ptr;

use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::{
    GuestAddress, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap, MmapRegion, VolatileSlice,
};

use crate::config::HugePages;
use crate::layout::{HOLE_END, HOLE_START};

/// A page on x86-64, of the guest's and of the host's.
pub const PAGE: usize = 4096;
/// A huge page on x86-64, and the alignment of every region.
const HUGE_PAGE: usize = 2 << 20;

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// No memory asked for.
    #[error("the guest has no memory: mem_size_mib is 0; give it at least 1")]
    Zero,
    /// More than the host has.
    #[error("{asked_mib} MiB of guest memory are more than this host's {host_mib} MiB: lower mem_size_mib")]
    MoreThanHost {
        /// What was asked for.
        asked_mib: usize,
        /// What there is.
        host_mib: u64,
    },
    /// hugetlbfs pages are whole.
    #[error("{asked_mib} MiB of guest memory are not a whole number of 2 MiB huge pages: make mem_size_mib even")]
    NotWholeHugePages {
        /// What was asked for.
        asked_mib: usize,
    },
    /// The hugetlbfs pool is too small.
    #[error(
        "cannot get {mib} MiB of guest memory in 2 MiB huge pages: {source}; reserve {pages} of them with \
         `sysctl vm.nr_hugepages={pages}`, or set huge_pages to None"
    )]
    HugePages {
        /// The region's size.
        mib: usize,
        /// That many pages.
        pages: usize,
        /// What the system said.
        source: std::io::Error,
    },
    /// mmap failed.
    #[error(
        "cannot map {mib} MiB of guest memory: {source}; lower mem_size_mib, or raise the address space limit (ulimit -v)"
    )]
    Map {
        /// The region's size.
        mib: usize,
        /// What the system said.
        source: std::io::Error,
    },
    /// vm-memory would not have it.
    #[error("cannot lay out guest memory: {0}")]
    Layout(#[from] GuestRegionCollectionError),
}

/// The guest's memory, seen by address, and the mappings behind it, which live exactly as long.
#[derive(Debug)]
pub struct GuestMemory {
    // Before `mappings`: dropped first, so that no region outlives its mapping.
    view: GuestMemoryMmap,
    mappings: Vec<Mapping>,
}

impl GuestMemory {
    /// Maps `mem_size_mib` of guest memory.
    ///
    /// # Errors
    /// See [`MemoryError`].
    pub fn new(mem_size_mib: usize, huge_pages: HugePages) -> Result<Self, MemoryError> {
        Self::within(mem_size_mib, huge_pages, host_memory_mib())
    }

    fn within(mem_size_mib: usize, huge_pages: HugePages, host_mib: u64) -> Result<Self, MemoryError> {
        if mem_size_mib == 0 {
            return Err(MemoryError::Zero);
        }
        if mem_size_mib as u64 > host_mib {
            return Err(MemoryError::MoreThanHost {
                asked_mib: mem_size_mib,
                host_mib,
            });
        }
        if huge_pages == HugePages::Hugetlbfs2M && !mem_size_mib.is_multiple_of(2) {
            return Err(MemoryError::NotWholeHugePages {
                asked_mib: mem_size_mib,
            });
        }
        let mut mappings = Vec::new();
        let mut regions = Vec::new();
        // No overflow: less than the host's memory, which is counted in bytes by 64 bits.
        for (start, len) in regions_of((mem_size_mib as u64) << 20) {
            let mapping = Mapping::new(len, huge_pages)?;
            regions.push(mapping.region(start)?);
            mappings.push(mapping);
        }
        Ok(Self {
            view: GuestMemoryMmap::from_regions(regions)?,
            mappings,
        })
    }

    /// The memory by guest address. Never cloned: a clone could outlive the mappings.
    #[must_use]
    pub fn view(&self) -> &GuestMemoryMmap {
        &self.view
    }

    /// End of the memory below the hole.
    #[must_use]
    pub fn low_end(&self) -> u64 {
        self.mappings[0].len as u64
    }

    /// For KVM: each region's guest address, length and host address.
    pub fn slots(&self) -> impl Iterator<Item = (u64, u64, u64)> {
        let starts = [0, HOLE_END];
        self.mappings
            .iter()
            .zip(starts)
            .map(|(mapping, start)| (start, mapping.len as u64, mapping.start as u64))
    }

    /// Gives the whole pages of `pieces` back to the host: they read as zeros afterwards, and take no memory until they are
    /// touched again. What of them is no memory of this guest is left alone. How many bytes that were, each counted once.
    ///
    /// # Errors
    /// The host refused, as it does with parts of hugetlbfs pages; others of `pieces` may have been given back.
    pub fn discard(&self, pieces: &[VolatileSlice<'_>]) -> std::io::Result<u64> {
        let mut discarded = 0;
        for run in runs(pieces) {
            for mapping in &self.mappings {
                discarded += mapping.discard(&run)? as u64;
            }
        }
        Ok(discarded)
    }

    /// What the guest may use, by the ranges (start, length) that memory maps are made of.
    #[must_use]
    pub fn usable(&self) -> Vec<(u64, u64)> {
        use crate::layout::{HIGH_MEMORY_START, LOW_MEMORY_END};
        let mut ranges = vec![(0, LOW_MEMORY_END.min(self.low_end()))];
        if self.low_end() > HIGH_MEMORY_START {
            ranges.push((HIGH_MEMORY_START, self.low_end() - HIGH_MEMORY_START));
        }
        ranges.extend(self.slots().skip(1).map(|(start, len, _)| (start, len)));
        ranges
    }
}

/// The regions (start, length) that `size` bytes make around the hole.
fn regions_of(size: u64) -> Vec<(u64, usize)> {
    let bytes = |len: u64| usize::try_from(len).expect("usize has 64 bits on x86-64");
    if size <= HOLE_START {
        vec![(0, bytes(size))]
    } else {
        vec![(0, bytes(HOLE_START)), (HOLE_END, bytes(size - HOLE_START))]
    }
}

/// The whole pages of `pieces`, by host addresses: sorted, and what touches or overlaps made one.
fn runs(pieces: &[VolatileSlice<'_>]) -> Vec<Range<usize>> {
    let whole_pages = |piece: &VolatileSlice<'_>| {
        let start = piece.ptr_guard().as_ptr().addr();
        // Both are addresses of a mapping, far below the end of the address space.
        start.next_multiple_of(PAGE)..(start + piece.len()) / PAGE * PAGE
    };
    let mut pages: Vec<_> = pieces
        .iter()
        .map(whole_pages)
        .filter(|pages| !pages.is_empty())
        .collect();
    pages.sort_unstable_by_key(|pages| pages.start);
    let mut runs: Vec<Range<usize>> = Vec::new();
    for pages in pages {
        match runs.last_mut() {
            Some(last) if pages.start <= last.end => last.end = last.end.max(pages.end),
            _ => runs.push(pages),
        }
    }
    runs
}

/// Physical memory of this host, in MiB. Swap does not count: a guest that lives in swap is of no use to anybody.
fn host_memory_mib() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram * u64::from(info.mem_unit)) >> 20
}

/// An anonymous mapping aligned to [`HUGE_PAGE`]; unmapped when dropped.
#[derive(Debug)]
struct Mapping {
    start: *mut u8,
    len: usize,
}

// SAFETY: `start` names memory of the process, not of a thread; a Mapping only unmaps it, once.
unsafe impl Send for Mapping {}
// SAFETY: `&Mapping` gives no access to the memory but through `region`, whose users go through vm-memory's volatile accesses.
unsafe impl Sync for Mapping {}

const PROT: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);
/// `NORESERVE`: under strict overcommit a guest would be charged all its memory at once.
const FLAGS: MapFlags = MapFlags::PRIVATE.union(MapFlags::NORESERVE);

impl Mapping {
    fn new(len: usize, huge_pages: HugePages) -> Result<Self, MemoryError> {
        let mib = len >> 20;
        if huge_pages == HugePages::Hugetlbfs2M {
            // The kernel aligns these itself. No NORESERVE: pages missing from the pool must show here, not as SIGBUS later.
            let flags = MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB;
            // SAFETY: an anonymous mapping at an address of the kernel's choice touches no existing memory.
            return match unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len, PROT, flags) } {
                Ok(start) => Ok(Self {
                    start: start.cast(),
                    len,
                }),
                Err(e) => Err(MemoryError::HugePages {
                    mib,
                    pages: mib / 2,
                    source: e.into(),
                }),
            };
        }

        let refused = |e: rustix::io::Errno| MemoryError::Map { mib, source: e.into() };
        // Linux aligns large anonymous mappings by itself from 6.7 on only. Take a huge page more, give back what sticks out.
        // SAFETY: as above.
        let taken: *mut u8 = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len + HUGE_PAGE, PROT, FLAGS) }
            .map_err(refused)?
            .cast();
        let head = taken.align_offset(HUGE_PAGE);
        let tail = HUGE_PAGE - head;
        // In bounds: `head` < HUGE_PAGE, and the mapping has `len` + HUGE_PAGE bytes.
        let start = taken.wrapping_add(head);
        let mapping = Self { start, len };
        for (edge, len) in [(taken, head), (start.wrapping_add(len), tail)] {
            if len > 0 {
                // SAFETY: part of the mapping just made, which nothing refers to, and outside of [start, start + len).
                unsafe { rustix::mm::munmap(edge.cast(), len) }.map_err(refused)?;
            }
        }
        // For HugePages::None as well. Where the host allows huge pages on request (the usual setting) this is most of the
        // time from exec to the first KVM_RUN; where it does not, the advice has no effect. It fails only on kernels built
        // without huge pages, which is as good as no effect.
        // SAFETY: our own mapping; the advice does not change its contents.
        let _ = unsafe { rustix::mm::madvise(start.cast(), len, Advice::LinuxHugepage) };
        Ok(mapping)
    }

    /// Drops what is in the part of `run` that is this mapping's; how many bytes that has.
    fn discard(&self, run: &Range<usize>) -> std::io::Result<usize> {
        let own = self.start.addr();
        let (start, end) = (run.start.max(own), run.end.min(own + self.len));
        if start >= end {
            return Ok(0);
        }
        let at = self.start.with_addr(start).cast();
        // SAFETY: [start, end) is part of this mapping. Its contents change, to zeros: guest memory, which whoever reads it
        // takes to change at any time.
        unsafe { rustix::mm::madvise(at, end - start, Advice::LinuxDontNeed) }?;
        Ok(end - start)
    }

    /// The region at guest address `start` that this mapping stands behind.
    fn region(&self, start: u64) -> Result<GuestRegionMmap, MemoryError> {
        let refused = |_| MemoryError::Map {
            mib: self.len >> 20,
            source: std::io::ErrorKind::InvalidInput.into(),
        };
        let (prot, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: start and len are those of a live mapping, and GuestMemory drops its regions before its mappings.
        let region = unsafe { MmapRegion::build_raw(self.start, self.len, prot, flags) }.map_err(refused)?;
        GuestRegionMmap::new(region, GuestAddress(start))
            .ok_or(MemoryError::Layout(GuestRegionCollectionError::MemoryRegionOverlap))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and unmapped nowhere else.
        let unmapped = unsafe { rustix::mm::munmap(self.start.cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    const HOST: u64 = 1 << 20;

    fn memory(mib: usize) -> GuestMemory {
        GuestMemory::within(mib, HugePages::None, HOST).unwrap()
    }

    #[test]
    fn memory_leaves_the_hole_free() {
        let ranges = |mib: usize| {
            memory(mib)
                .slots()
                .map(|(start, len, _)| (start, len))
                .collect::<Vec<_>>()
        };
        assert_eq!(ranges(1), [(0, 1 << 20)]);
        assert_eq!(ranges(3072), [(0, 3 << 30)]);
        assert_eq!(ranges(3073), [(0, 3 << 30), (4 << 30, 1 << 20)]);
        let memory = memory(4096);
        assert!(memory.view().address_in_range(GuestAddress((3 << 30) - 1)));
        assert!(!memory.view().address_in_range(GuestAddress(3 << 30)));
        assert!(!memory.view().address_in_range(GuestAddress((4 << 30) - 1)));
        assert!(memory.view().address_in_range(GuestAddress((5 << 30) - 1)));
        assert!(!memory.view().address_in_range(GuestAddress(5 << 30)));
    }

    #[test]
    fn every_region_is_aligned_to_huge_pages() {
        for mib in [1, 3, 128, 3073] {
            for (_, _, host) in memory(mib).slots() {
                assert_eq!(host % HUGE_PAGE as u64, 0, "{mib} MiB");
            }
        }
    }

    #[test]
    fn memory_reads_as_written_up_to_its_last_byte() {
        let memory = memory(3073);
        for address in [0, (3 << 30) - 1, 4 << 30, (4u64 << 30) + (1 << 20) - 1] {
            memory.view().write_obj(0xa5u8, GuestAddress(address)).unwrap();
            assert_eq!(memory.view().read_obj::<u8>(GuestAddress(address)).unwrap(), 0xa5);
        }
    }

    #[test]
    fn whole_pages_are_given_back_once_and_nothing_beside_them() {
        let page = PAGE as u64;
        // (guest address, bytes) of the pieces, and the pages that are zeros afterwards.
        type Row<'a> = (&'a [(u64, usize)], &'a [u64]);
        let table: [Row; 8] = [
            (&[], &[]),
            (&[(page, PAGE)], &[1]),
            (&[(page, PAGE - 1)], &[]),
            (&[(page + 1, 2 * PAGE - 1)], &[2]),
            (&[(page - 1, PAGE + 2)], &[1]),
            (&[(3 * page, PAGE), (page, PAGE), (2 * page, PAGE)], &[1, 2, 3]),
            (
                &[(page, 2 * PAGE), (page, PAGE), (2 * page, PAGE), (5 * page, PAGE)],
                &[1, 2, 5],
            ),
            (
                &[(page, 4 * PAGE), (2 * page, PAGE), (5 * page, PAGE)],
                &[1, 2, 3, 4, 5],
            ),
        ];
        let memory = memory(1);
        let view = memory.view();
        for (pieces, zeros) in table {
            view.write_slice(&[0xa5; 8 * PAGE], GuestAddress(0)).unwrap();
            let slice = |&(at, len)| view.get_slice(GuestAddress(at), len).unwrap();
            let slices: Vec<_> = pieces.iter().map(slice).collect();
            assert_eq!(
                memory.discard(&slices).unwrap(),
                zeros.len() as u64 * page,
                "{pieces:?}"
            );
            for number in 0..8 {
                let mut bytes = [0; PAGE];
                view.read_slice(&mut bytes, GuestAddress(number * page)).unwrap();
                let expected = if zeros.contains(&number) { 0 } else { 0xa5 };
                assert!(bytes.iter().all(|&byte| byte == expected), "{pieces:?}: page {number}");
            }
        }
    }

    #[test]
    fn what_is_not_this_guests_is_not_given_back() {
        let (ours, other) = (memory(1), memory(1));
        other.view().write_obj(0xa5u8, GuestAddress(0)).unwrap();
        let theirs = other.view().get_slice(GuestAddress(0), 1 << 20).unwrap();
        assert_eq!(ours.discard(&[theirs]).unwrap(), 0);
        assert_eq!(other.view().read_obj::<u8>(GuestAddress(0)).unwrap(), 0xa5);
        assert_eq!(other.discard(&[theirs]).unwrap(), 1 << 20);
    }

    #[test]
    fn the_usable_ranges_are_memory_and_spare_the_bios_area() {
        let memory = memory(3073);
        assert_eq!(
            memory.usable(),
            [(0, 0x9fc00), (0x10_0000, (3 << 30) - 0x10_0000), (4 << 30, 1 << 20)]
        );
    }

    #[test]
    fn impossible_sizes_are_refused_in_words() {
        let refusal = |mib, pages, host| GuestMemory::within(mib, pages, host).unwrap_err().to_string();
        assert!(refusal(0, HugePages::None, HOST).contains("mem_size_mib is 0"));
        assert_eq!(
            refusal(2049, HugePages::None, 2048),
            "2049 MiB of guest memory are more than this host's 2048 MiB: lower mem_size_mib"
        );
        assert!(refusal(usize::MAX, HugePages::None, 2048).contains("more than this host's"));
        assert!(refusal(3, HugePages::Hugetlbfs2M, HOST).contains("make mem_size_mib even"));
    }

    #[test]
    fn too_few_huge_pages_are_refused_with_how_to_get_more() {
        // 512 GiB: more than any pool of a machine that runs tests.
        let refusal = GuestMemory::within(512 << 10, HugePages::Hugetlbfs2M, HOST).unwrap_err();
        let refusal = refusal.to_string();
        assert!(refusal.contains("`sysctl vm.nr_hugepages=1536`"), "{refusal}");
    }

    #[test]
    fn the_host_has_memory() {
        assert!(host_memory_mib() > 64);
    }
}
