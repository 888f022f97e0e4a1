//! From a boot source to a guest that needs only `KVM_RUN`: kernel, initrd, command line and memory map in guest memory,
//! and the first vCPU's registers.
//!
//! ```text
//! load ─┬─ kernel.rs   ELF vmlinux or bzImage → where to enter, and by which protocol
//!       ├─ initrd.rs   as high as the kernel can reach
//!       ├─ cmdline     checked, NUL-terminated
//!       └─ params.rs   zero page (64-bit protocol) or hvm_start_info (PVH)
//! regs.rs              the registers each protocol asks for
//! ```
//!
//! Files are not trusted: every length and address in them is checked against the file and against guest memory before it
//! is used. An error names the file and what to do. Nothing but guest memory is changed.

mod elf;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzz;
mod initrd;
mod kernel;
mod params;
pub mod regs;

use std::fs::File;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress};

use crate::config::BootSource;
use crate::layout;
use crate::memory::GuestMemory;

pub use kernel::{Entry, Protocol};

/// The command line of a boot source without `boot_args`: Firecracker's, so that clients that rely on it get the same guest. It
/// is for microVM kernels without modules and console; `run` passes its own.
pub const DEFAULT_BOOT_ARGS: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd";

/// Why a boot source cannot be booted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// The file could not be opened or read.
    #[error("cannot open {what} {}: {source}; check the path and its permissions", path.display())]
    Open {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A directory, a device, a pipe.
    #[error("{what} {} is not a regular file: name the image itself", path.display())]
    NotAFile {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// Nothing in it.
    #[error("{what} {} is empty: fetch or build it again", path.display())]
    Empty {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// No format we know.
    #[error(
        "{} is not a kernel: expected an x86-64 ELF vmlinux or a bzImage (such as /boot/vmlinuz-*), found {found}",
        path.display()
    )]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What it looks like.
        found: String,
    },
    /// Shorter than its own headers say.
    #[error(
        "kernel {} is truncated: its {part} needs {needed} bytes of file, which has {len}; fetch or build it again",
        path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What is cut off.
        part: &'static str,
        /// How long the file would have to be.
        needed: u64,
        /// How long it is.
        len: u64,
    },
    /// A header that contradicts itself.
    #[error("kernel {} is damaged: {reason}; fetch or build it again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A kernel we cannot enter.
    #[error("kernel {} cannot be booted: {reason}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it lacks, and what to do.
        reason: &'static str,
    },
    /// Not enough guest memory for the kernel.
    #[error(
        "kernel {} does not fit: it needs memory up to {needed_mib} MiB and the guest has {low_mib} MiB below 3 GiB; \
         raise mem_size_mib to at least {needed_mib}",
        path.display()
    )]
    KernelTooLarge {
        /// The file.
        path: PathBuf,
        /// End of the memory it needs.
        needed_mib: u64,
        /// End of the memory there is.
        low_mib: u64,
    },
    /// Not enough guest memory for the initrd.
    #[error(
        "initrd {} does not fit: it has {len} bytes and the kernel leaves {room} bytes of the memory it can reach; raise \
         mem_size_mib to at least {needed_mib}, or use a smaller initrd",
        path.display()
    )]
    InitrdTooLarge {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: u64,
        /// How much there is for it.
        room: u64,
        /// Memory that would do.
        needed_mib: u64,
    },
    /// The command line is too long.
    #[error("the kernel command line has {len} bytes, {max} are allowed: shorten boot_args")]
    CmdlineTooLong {
        /// Its length.
        len: usize,
        /// What fits.
        max: usize,
    },
    /// The command line has a byte that the kernel would end it at.
    #[error("the kernel command line has a NUL byte at position {at}: remove it from boot_args")]
    CmdlineNul {
        /// Where.
        at: usize,
    },
    /// Guest memory refused a write: the guest has less memory than the boot data need.
    #[error("cannot write the {what} to guest memory: {reason}; raise mem_size_mib")]
    Write {
        /// What did not fit.
        what: &'static str,
        /// What vm-memory or linux-loader said.
        reason: String,
    },
}

/// What can be said of `source` without a guest: its files are there, and its command line is not too long for any kernel.
///
/// # Errors
/// See [`BootError`].
pub fn check(source: &BootSource) -> Result<(), BootError> {
    open("kernel", &source.kernel_image_path)?;
    if let Some(initrd) = &source.initrd_path {
        open("initrd", initrd)?;
    }
    check_boot_args(source)
}

/// The part of [`check`] that no file takes part in.
pub(crate) fn check_boot_args(source: &BootSource) -> Result<(), BootError> {
    check_cmdline(cmdline(source), layout::CMDLINE_MAX - 1)
}

fn cmdline(source: &BootSource) -> &str {
    source.boot_args.as_deref().unwrap_or(DEFAULT_BOOT_ARGS)
}

/// Loads `source` into `memory`, `added` on its command line; `rsdp` is where the ACPI tables start. Says where the first vCPU
/// has to enter.
///
/// # Errors
/// See [`BootError`].
pub fn load(source: &BootSource, added: &str, memory: &GuestMemory, rsdp: u64) -> Result<Entry, BootError> {
    let kernel = kernel::load(&source.kernel_image_path, memory)?;
    let cmdline = with(cmdline(source), added);
    load_cmdline(&cmdline, kernel.cmdline_max(), memory)?;
    let initrd = match &source.initrd_path {
        Some(path) => Some(initrd::load(path, memory, kernel.end, kernel.initrd_end())?),
        None => None,
    };
    params::write(memory, &kernel, cmdline.len(), initrd, rsdp)?;
    Ok(kernel.entry)
}

/// `added` before what is meant for init, which starts behind " -- ".
fn with(cmdline: &str, added: &str) -> String {
    let (kernel, init) = cmdline.find(" -- ").map_or((cmdline, ""), |at| cmdline.split_at(at));
    if added.is_empty() || kernel.is_empty() {
        format!("{kernel}{added}{init}")
    } else {
        format!("{kernel} {added}{init}")
    }
}

/// `max`: how many bytes the kernel will read, its NUL not counted.
fn check_cmdline(cmdline: &str, max: usize) -> Result<(), BootError> {
    if let Some(at) = cmdline.bytes().position(|byte| byte == 0) {
        return Err(BootError::CmdlineNul { at });
    }
    if cmdline.len() > max {
        return Err(BootError::CmdlineTooLong {
            len: cmdline.len(),
            max,
        });
    }
    Ok(())
}

fn load_cmdline(cmdline: &str, max: usize, memory: &GuestMemory) -> Result<(), BootError> {
    check_cmdline(cmdline, max)?;
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    memory
        .view()
        .write_slice(&bytes, GuestAddress(layout::CMDLINE))
        .map_err(|e| BootError::Write {
            what: "command line",
            reason: e.to_string(),
        })
}

/// Opens a boot file: a regular one, with something in it. Its length comes with it.
fn open(what: &'static str, path: &Path) -> Result<(File, u64), BootError> {
    let cannot = |source| BootError::Open {
        what,
        path: path.into(),
        source,
    };
    // Asked before opening: opening a named pipe would wait for its other end.
    let metadata = std::fs::metadata(path).map_err(cannot)?;
    if !metadata.is_file() {
        return Err(BootError::NotAFile {
            what,
            path: path.into(),
        });
    }
    if metadata.len() == 0 {
        return Err(BootError::Empty {
            what,
            path: path.into(),
        });
    }
    Ok((File::open(path).map_err(cannot)?, metadata.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::HugePages;

    fn memory() -> GuestMemory {
        GuestMemory::new(4, HugePages::None).unwrap()
    }

    #[test]
    fn the_command_line_arrives_with_its_nul() {
        let memory = memory();
        memory
            .view()
            .write_slice(&[0xff; 16], GuestAddress(layout::CMDLINE))
            .unwrap();
        load_cmdline("quiet", layout::CMDLINE_MAX - 1, &memory).unwrap();
        let mut bytes = [0; 7];
        memory
            .view()
            .read_slice(&mut bytes, GuestAddress(layout::CMDLINE))
            .unwrap();
        assert_eq!(&bytes, b"quiet\0\xff");
    }

    #[test]
    fn what_devices_add_to_the_command_line_comes_before_what_is_for_init() {
        assert_eq!(with("quiet", "root=/dev/vda rw"), "quiet root=/dev/vda rw");
        assert_eq!(with("quiet -- single", "ro"), "quiet ro -- single");
        assert_eq!((with("", "ro").as_str(), with("quiet", "").as_str()), ("ro", "quiet"));
    }

    #[test]
    fn the_command_line_may_be_as_long_as_the_kernel_reads_and_no_longer() {
        let memory = memory();
        let max = layout::CMDLINE_MAX - 1;
        assert_eq!(max, 2047);
        load_cmdline(&"x".repeat(max), max, &memory).unwrap();
        let refusal = load_cmdline(&"x".repeat(max + 1), max, &memory).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "the kernel command line has 2048 bytes, 2047 are allowed: shorten boot_args"
        );
        let refusal = load_cmdline("a\0b", max, &memory).unwrap_err();
        assert_eq!(
            refusal.to_string(),
            "the kernel command line has a NUL byte at position 1: remove it from boot_args"
        );
    }

    #[test]
    fn what_is_not_a_file_with_something_in_it_is_refused_before_it_is_opened() {
        let refusal = |path: &str| open("kernel", Path::new(path)).unwrap_err().to_string();
        assert!(refusal("/no/such/kernel").starts_with("cannot open kernel /no/such/kernel: No such file"));
        assert_eq!(refusal("/"), "kernel / is not a regular file: name the image itself");
        assert!(refusal("/dev/null").contains("not a regular file"));
        let empty = crate::testing::TempFile::new(b"");
        assert!(refusal(empty.path().to_str().unwrap()).ends_with("is empty: fetch or build it again"));
    }
}
