//! How many interrupts of which kind a host CPU has had.

/// The figure of `kind` ("LOC": local timer, "CAL": function calls from other CPUs) for `cpu` in /proc/interrupts.
///
/// # Panics
/// When there is none.
#[must_use]
pub fn count(kind: &str, cpu: u32) -> u64 {
    let text = std::fs::read_to_string("/proc/interrupts").expect("procfs");
    let figures = text
        .lines()
        .find_map(|line| line.trim_start().strip_prefix(kind)?.strip_prefix(':'));
    let figure = figures.and_then(|figures| figures.split_whitespace().nth(cpu as usize)?.parse().ok());
    figure.unwrap_or_else(|| panic!("no figure of {kind} for CPU {cpu} in:\n{text}"))
}
