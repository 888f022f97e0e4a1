//! What must be got out of the way before boots can be compared inside an emulator.
#![allow(unsafe_code, reason = "mmap and personality")]

use std::ptr;

use anyhow::{Context, Result};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

const PAGE: usize = 4096;
/// Of the memory that is available, this much is left to whoever needs some meanwhile.
const LEFT: usize = 256 << 20;

/// Touches most of the host's free memory once. An emulated host's memory is its emulator's, which gets it from the real
/// host page by page as it is first touched: whoever boots on pages that nobody had before would pay for that, and by chance.
pub fn touch_free_memory() -> Result<()> {
    let meminfo = std::fs::read_to_string("/proc/meminfo")?;
    let available = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB"));
    let kib: usize = available.context("no MemAvailable in /proc/meminfo")?.parse()?;
    let len = (kib << 10).saturating_sub(LEFT) / PAGE * PAGE;
    if len == 0 {
        return Ok(());
    }
    // SAFETY: an anonymous mapping at an address of the kernel's choice touches no existing memory.
    let start = unsafe {
        mmap_anonymous(
            ptr::null_mut(),
            len,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
        )
    }?;
    for at in (0..len).step_by(PAGE) {
        // SAFETY: inside the mapping just made, which nothing else refers to.
        unsafe { start.cast::<u8>().add(at).write_volatile(1) };
    }
    // SAFETY: the mapping made above, used no more.
    unsafe { munmap(start, len) }?;
    Ok(())
}

/// Has the programs that this process starts loaded at the same addresses each time. An emulator that keeps the code it
/// has translated by virtual address (QEMU before 8.0) would otherwise translate all of it again for each process: a cost
/// in proportion to the size of a program, where a processor has none.
pub fn without_aslr() -> Result<()> {
    // SAFETY: changes nothing but how programs are loaded from here on.
    let old = unsafe { libc::personality(libc::ADDR_NO_RANDOMIZE as libc::c_ulong) };
    if old < 0 {
        return Err(std::io::Error::last_os_error()).context("switch off address space randomisation");
    }
    Ok(())
}
