//! What a thread of another process has read and written by its own system calls: whether it is the one that does the I/O.

/// Bytes that thread `tid` of process `process` has moved by read and write calls of any kind so far (`rchar` and `wchar` of proc(5));
/// what other threads, or io_uring's workers, did for it is not among them.
///
/// # Panics
/// There is no such thread, or the kernel has no `CONFIG_TASK_IO_ACCOUNTING`.
#[must_use]
pub fn bytes_moved_by(process: u32, tid: i32) -> u64 {
    let path = format!("/proc/{process}/task/{tid}/io");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let of = |name: &str| -> u64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|line| line.trim().parse().ok());
        number.unwrap_or_else(|| panic!("no {name} in {text}"))
    };
    of("rchar:") + of("wchar:")
}
