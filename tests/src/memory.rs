//! What of a process is resident, now and at most. Its guest's memory is included, which does not change.

/// Now, in KiB.
///
/// # Panics
/// When the process is gone.
#[must_use]
pub fn resident_kib(pid: u32) -> u64 {
    field(&format!("/proc/{pid}/smaps_rollup"), "Rss:")
}

/// The most since [`start_peak`], in KiB (proc(5): `VmHWM`).
///
/// # Panics
/// When the process is gone.
#[must_use]
pub fn peak_kib(pid: u32) -> u64 {
    field(&format!("/proc/{pid}/status"), "VmHWM:")
}

/// From now on the peak is counted anew (proc(5): `clear_refs`, 5).
///
/// # Panics
/// When the process is gone, or another user's.
pub fn start_peak(pid: u32) {
    let path = format!("/proc/{pid}/clear_refs");
    std::fs::write(&path, "5").unwrap_or_else(|e| panic!("{path}: {e}"));
}

fn field(path: &str, name: &str) -> u64 {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    let kib = value.and_then(|value| value.trim().strip_suffix(" kB")?.parse().ok());
    kib.unwrap_or_else(|| panic!("no {name} in {path}: {text}"))
}
