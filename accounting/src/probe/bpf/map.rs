//! The two maps: which thread is which vCPU, and the vCPUs' figures, which are also mapped into this process.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{Ordering, fence};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::program::{FIGURES_SIZE, Figures, Maps};
use super::sys::{self, MapType};
use super::{BpfError, GuestTime};

/// How many vCPUs can be tracked at once. Twice what a microVM may have: an index given up is not taken again soon.
pub(super) const ENTRIES: u32 = 64;

/// The whole figures map: one page.
const VIEW_SIZE: usize = ENTRIES as usize * size_of::<Figures>();
const _: () = assert!(VIEW_SIZE == 4096, "what is mapped is whole pages");

/// A map of `V` under 32-bit keys. `V` is plain integers.
#[derive(Debug)]
struct Map<V>(OwnedFd, PhantomData<V>);

impl<V> Map<V> {
    fn create(called: &str, map_type: MapType, flags: u32) -> Result<Self, BpfError> {
        let value_size = u32::try_from(size_of::<V>()).expect("values here are small");
        let fd = sys::create_map(called, map_type, value_size, ENTRIES, flags)
            .map_err(|e| BpfError::of(format!("make the BPF map {called}"), e))?;
        Ok(Self(fd, PhantomData))
    }

    #[expect(unsafe_code, reason = "a map's value has the size the map was made with")]
    fn set(&self, key: u32, value: &V, flags: u64) -> io::Result<()> {
        // SAFETY: `create` made the map with the size of `V`, which is plain integers.
        unsafe { sys::update(self.0.as_fd(), key, value, flags) }
    }
}

/// Thread id -> index of its figures.
#[derive(Debug)]
pub(super) struct Threads(Map<u32>);

impl Threads {
    pub(super) fn create() -> Result<Self, BpfError> {
        Map::create("cv_threads", MapType::Hash, 0).map(Self)
    }

    /// From here on the programs keep `tid`'s figures at `index`. `EEXIST` where they keep them already.
    pub(super) fn add(&self, tid: u32, index: u32) -> io::Result<()> {
        self.0.set(tid, &index, sys::NO_EXIST)
    }

    /// From here on they do not.
    pub(super) fn remove(&self, tid: u32) -> io::Result<()> {
        sys::delete(self.0.0.as_fd(), tid)
    }
}

/// Index -> figures.
#[derive(Debug)]
pub(super) struct FiguresMap {
    /// As the system call sees a [`Figures`].
    map: Map<[u64; FIGURES_SIZE as usize / 8]>,
    view: View,
}

impl FiguresMap {
    pub(super) fn create() -> Result<Self, BpfError> {
        let map = Map::create("cv_figures", MapType::Array, sys::MMAPABLE)?;
        let view = View::of(&map.0).map_err(BpfError::Mmap)?;
        Ok(Self { map, view })
    }

    /// Zeroes the figures at `index`; nobody may be tracked there.
    pub(super) fn clear(&self, index: u32) -> io::Result<()> {
        self.map.set(index, &[0; FIGURES_SIZE as usize / 8], sys::ANY)
    }

    /// The last complete publication at `index`.
    pub(super) fn read(&self, index: u32) -> Option<GuestTime> {
        self.view.figures()[index as usize].read()
    }
}

/// What the programs need of both.
pub(super) fn descriptors(threads: &Threads, figures: &FiguresMap) -> Maps {
    Maps {
        threads: sys::number(threads.0.0.as_fd()),
        figures: sys::number(figures.map.0.as_fd()),
    }
}

/// The figures, mapped read-only.
#[derive(Debug)]
struct View(NonNull<Figures>);

// SAFETY: what it points to is only ever read, atomically, and stays mapped until it is dropped, on whatever thread.
#[expect(unsafe_code, reason = "a mapping belongs to the process, not to a thread")]
unsafe impl Send for View {}
// SAFETY: as above.
#[expect(unsafe_code, reason = "a mapping belongs to the process, not to a thread")]
unsafe impl Sync for View {}

impl View {
    #[expect(unsafe_code, reason = "mapping memory")]
    fn of(map: &OwnedFd) -> io::Result<Self> {
        // SAFETY: a new mapping, where the kernel likes; it replaces none.
        let at = unsafe {
            mmap(
                std::ptr::null_mut(),
                VIEW_SIZE,
                ProtFlags::READ,
                MapFlags::SHARED,
                map,
                0,
            )
        }?;
        Ok(Self(NonNull::new(at.cast()).expect("mmap maps no page at 0 unasked")))
    }

    #[expect(unsafe_code, reason = "reading mapped memory")]
    fn figures(&self) -> &[Figures; ENTRIES as usize] {
        // SAFETY: mapped, page-aligned and of this size until `self` is dropped. The kernel changes it meanwhile, but
        // all of it is atomics; they are only loaded, Relaxed, which read-only memory allows (std::sync::atomic,
        // "Atomic accesses to read-only memory"). Any bits are a u64.
        unsafe { self.0.cast().as_ref() }
    }
}

impl Drop for View {
    #[expect(unsafe_code, reason = "unmapping memory")]
    fn drop(&mut self) {
        // SAFETY: mapped by `of` with this size, and no reference outlives `self`. It cannot fail on a whole mapping.
        let _ = unsafe { munmap(self.0.as_ptr().cast(), VIEW_SIZE) };
    }
}

impl Figures {
    /// A try fails only if the vCPU opens or closes a slice within its some 10 ns; a slice takes a microsecond.
    const TRIES: usize = 64;

    /// Mirrors what [`super::program`] stores, and [`crate::vtime::VtimeReader::snapshot`].
    fn read(&self) -> Option<GuestTime> {
        (0..Self::TRIES).find_map(|_| self.try_read())
    }

    #[inline]
    fn try_read(&self) -> Option<GuestTime> {
        // Not an acquire load: read-only memory allows Relaxed ones alone. The fence makes it one.
        let sequence = self.sequence.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let slot = &self.slots[usize::from(sequence & 1 == 1)];
        let sum_ns = slot.sum_ns.load(Ordering::Relaxed);
        let began_ns = slot.began_ns.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        (self.sequence.load(Ordering::Relaxed) == sequence).then_some(GuestTime {
            sequence,
            sum_ns,
            began_ns: (began_ns != 0).then_some(began_ns),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    /// What the program's last stores do.
    fn publish(figures: &Figures, sequence: u64, sum_ns: u64, began_ns: u64) {
        let slot = &figures.slots[usize::from(sequence & 1 == 1)];
        fence(Ordering::Release);
        slot.sum_ns.store(sum_ns, Ordering::Relaxed);
        slot.began_ns.store(began_ns, Ordering::Relaxed);
        figures.sequence.store(sequence, Ordering::Release);
    }

    #[test]
    fn what_is_read_is_what_was_published_last() {
        let figures = Figures::default();
        assert_eq!(figures.read(), Some(GuestTime::default()));
        publish(&figures, 1, 0, 1_000);
        let open = GuestTime {
            sequence: 1,
            sum_ns: 0,
            began_ns: Some(1_000),
        };
        assert_eq!(figures.read(), Some(open));
        publish(&figures, 2, 500, 0);
        let closed = GuestTime {
            sequence: 2,
            sum_ns: 500,
            began_ns: None,
        };
        assert_eq!(figures.read(), Some(closed));
    }

    #[test]
    fn no_reader_sees_half_a_publication() {
        let (figures, done) = (Figures::default(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut last = 0;
                while !done.load(Ordering::Relaxed) {
                    let Some(read) = figures.read() else { continue };
                    // The writer below derives both from the sequence.
                    assert_eq!(read.sum_ns, read.sequence * 3);
                    assert_eq!(read.began_ns.unwrap_or(0), (read.sequence & 1) * read.sequence);
                    assert!(read.sequence >= last);
                    last = read.sequence;
                }
            });
            for n in 1..1_000_000 {
                publish(&figures, n, n * 3, (n & 1) * n);
            }
            done.store(true, Ordering::Relaxed);
            reader.join().expect("a reader saw half a publication");
        });
    }
}
