//! The `bpf(2)` system call: the six commands that [`super`] needs, and nothing of a library's.
//!
//! Each command's argument is one member of `union bpf_attr` (`include/uapi/linux/bpf.h`); the kernel takes a shorter
//! one than it knows for one that ends in zeroes. Every descriptor it returns is closed by exec.
#![expect(unsafe_code, reason = "no safe wrapper for bpf(2) exists")]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::insn::Insn;

// enum bpf_cmd.
const MAP_CREATE: libc::c_long = 0;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const MAP_DELETE_ELEM: libc::c_long = 3;
const PROG_LOAD: libc::c_long = 5;
const RAW_TRACEPOINT_OPEN: libc::c_long = 17;

/// `enum bpf_map_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum MapType {
    Hash = 1,
    Array = 2,
}

/// `BPF_F_MMAPABLE`: an array that can be mapped. Since Linux 5.5.
pub(super) const MMAPABLE: u32 = 1 << 10;
/// `BPF_ANY`: an update that creates or replaces.
pub(super) const ANY: u64 = 0;
/// `BPF_NOEXIST`: an update that only creates.
pub(super) const NO_EXIST: u64 = 1;
/// `BPF_PROG_TYPE_RAW_TRACEPOINT`.
const PROG_TYPE_RAW_TRACEPOINT: u32 = 17;
/// Not GPL-compatible in the kernel's eyes; none of the functions called asks for that.
const LICENSE: &CStr = c"Apache-2.0";
/// Names are for `bpftool` and the like: 15 bytes and a zero.
const NAME_LEN: usize = 16;

#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    name: [u8; NAME_LEN],
}

#[repr(C)]
struct Element {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_count: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    name: [u8; NAME_LEN],
}

#[repr(C)]
struct RawTracepointOpen {
    name: u64,
    prog_fd: u32,
    pad: u32,
}

/// # Safety
/// `T` is the union's member for `command`, has no padding, and every address in it is of memory that the command may
/// read, or write, as far as it says.
unsafe fn bpf<T>(command: libc::c_long, attr: &T) -> io::Result<libc::c_long> {
    // SAFETY: the attribute's size is its own; what it points to is the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn owned(descriptor: libc::c_long) -> OwnedFd {
    let descriptor = i32::try_from(descriptor).expect("a descriptor is an int");
    // SAFETY: bpf(2) has just made it, for us alone.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// The descriptor as the attributes want it.
pub(super) fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

fn address<T>(of: *const T) -> u64 {
    of.expose_provenance() as u64
}

fn name(text: &str) -> [u8; NAME_LEN] {
    let mut name = [0; NAME_LEN];
    // The last byte stays 0.
    for (to, &from) in name[..NAME_LEN - 1].iter_mut().zip(text.as_bytes()) {
        *to = from;
    }
    name
}

/// Makes a map of `entries` values of `value_size` bytes under keys of 32 bits.
pub(super) fn create_map(
    called: &str,
    map_type: MapType,
    value_size: u32,
    entries: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    let attr = MapCreate {
        map_type: map_type as u32,
        key_size: 4,
        value_size,
        max_entries: entries,
        flags,
        inner_map_fd: 0,
        numa_node: 0,
        name: name(called),
    };
    // SAFETY: the command's attribute, which holds no address.
    unsafe { bpf(MAP_CREATE, &attr) }.map(owned)
}

/// Sets `map[key]`.
///
/// # Safety
/// `map` was made by [`create_map`] with the size of `V`, all bytes of which are initialised.
pub(super) unsafe fn update<V>(map: BorrowedFd<'_>, key: u32, value: &V, flags: u64) -> io::Result<()> {
    let attr = Element {
        map_fd: number(map),
        pad: 0,
        key: address(&raw const key),
        value: address(value),
        flags,
    };
    // SAFETY: the command's attribute; the key is of the 4 bytes that all maps here have, the value of the map's size
    // by the caller's promise, and both are alive.
    unsafe { bpf(MAP_UPDATE_ELEM, &attr) }.map(drop)
}

/// Removes `map[key]`; `map` was made by [`create_map`].
pub(super) fn delete(map: BorrowedFd<'_>, key: u32) -> io::Result<()> {
    let attr = Element {
        map_fd: number(map),
        pad: 0,
        key: address(&raw const key),
        value: 0,
        flags: 0,
    };
    // SAFETY: the command's attribute; the key is alive, and of the 4 bytes that all maps here have.
    unsafe { bpf(MAP_DELETE_ELEM, &attr) }.map(drop)
}

/// Why a program was not loaded.
#[derive(Debug)]
pub(super) struct LoadError {
    pub source: io::Error,
    /// What the verifier said; empty where it was not asked.
    pub log: String,
}

/// Verifies and compiles a raw-tracepoint program. Where the kernel refuses it, it is asked again for its reasons.
pub(super) fn load(called: &str, insns: &[Insn]) -> Result<OwnedFd, LoadError> {
    /// A refusal's log is a few lines for each instruction verified.
    const LOG_SIZE: usize = 64 << 10;
    let refused = match load_logged(called, insns, &mut []) {
        Ok(program) => return Ok(program),
        Err(error) => error,
    };
    if refused.raw_os_error() == Some(libc::EPERM) {
        // It did not get as far as the verifier.
        let log = String::new();
        return Err(LoadError { source: refused, log });
    }
    let mut log = vec![0; LOG_SIZE];
    load_logged(called, insns, &mut log).map_err(|source| {
        let text = log.split(|&byte| byte == 0).next().unwrap_or_default();
        let log = String::from_utf8_lossy(text).into_owned();
        LoadError { source, log }
    })
}

fn load_logged(called: &str, insns: &[Insn], log: &mut [u8]) -> io::Result<OwnedFd> {
    let attr = ProgLoad {
        prog_type: PROG_TYPE_RAW_TRACEPOINT,
        insn_count: u32::try_from(insns.len()).expect("programs here are short"),
        insns: address(insns.as_ptr()),
        license: address(LICENSE.as_ptr()),
        log_level: u32::from(!log.is_empty()),
        log_size: u32::try_from(log.len()).expect("logs here are short"),
        // Without a log the address must be null.
        log_buf: if log.is_empty() { 0 } else { address(log.as_mut_ptr()) },
        kern_version: 0,
        prog_flags: 0,
        name: name(called),
    };
    // SAFETY: the command's attribute; instructions, licence and log are alive, and as large as it says.
    unsafe { bpf(PROG_LOAD, &attr) }.map(owned)
}

/// Runs `program` at the raw tracepoint `tracepoint` for as long as the descriptor returned is open.
pub(super) fn open_raw_tracepoint(tracepoint: &CStr, program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let attr = RawTracepointOpen {
        name: address(tracepoint.as_ptr()),
        prog_fd: number(program),
        pad: 0,
    };
    // SAFETY: the command's attribute; the name is a C string, and alive.
    unsafe { bpf(RAW_TRACEPOINT_OPEN, &attr) }.map(owned)
}
