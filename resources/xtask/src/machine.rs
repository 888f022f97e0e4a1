//! The machine that figures are of.

use std::fs;
use std::process::Command;

/// What a figure depends on, beside the program.
pub struct Machine {
    /// When it was looked at.
    pub date: String,
    /// How many, of which kind, and whether they are real.
    pub cpus: String,
    /// The kernel's version.
    pub kernel: String,
}

impl Machine {
    /// Looks at this one.
    pub fn look() -> Self {
        let first_line = |text: String| text.lines().next().unwrap_or_default().trim().to_owned();
        let model = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let mut lines = model.lines().filter_map(|line| line.split_once(':'));
            lines.find_map(|(key, value)| (key.trim() == name).then(|| value.trim().to_owned()))
        };
        // The kernel sets the bit aside for hypervisors to say that they are there.
        let is_guest = field("flags").is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor"));
        let count = std::thread::available_parallelism().map_or(1, usize::from);
        let kind = if is_guest { "a virtual machine" } else { "hardware" };
        let date = Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]).output();
        Self {
            date: date.map_or_else(
                |_| "at an unknown time".to_owned(),
                |output| first_line(String::from_utf8_lossy(&output.stdout).into_owned()),
            ),
            cpus: format!("{count} CPUs ({}), {kind}", field("model name").unwrap_or_default()),
            kernel: version(rustix::system::uname().release().to_string_lossy().as_ref()).to_owned(),
        }
    }
}

/// A kernel's version by its release, as `uname -r` has it: without what its builder put behind.
pub fn version(release: &str) -> &str {
    release.split('-').next().unwrap_or_default()
}
