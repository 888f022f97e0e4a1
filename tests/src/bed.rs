//! Which bed this is, and where its files are.

use std::path::{Path, PathBuf};

/// Ends the calling test, in one line that `cargo xtask test` counts, unless its bed is here.
///
/// `require_bed!(kvm)` wants a `/dev/kvm` that opens; `require_bed!(nohz_full)` wants a host with a tickless CPU;
/// `require_bed!(milan)` wants one whose CPU is AMD's Milan.
#[macro_export]
macro_rules! require_bed {
    ($bed:ident) => {
        if let Err(why) = $crate::bed::$bed() {
            $crate::bed::skipped(&stringify!($bed).replace('_', "-"), &why);
            return;
        }
    };
}

/// Says that the calling test, which has to end now, was skipped, in the one line that `cargo xtask test` counts.
pub fn skipped(bed: &str, why: &str) {
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    println!("SKIPPED {bed}: {test}: {why}");
}

/// Whether `/dev/kvm` can be opened.
///
/// # Errors
/// Why not.
pub fn kvm() -> Result<(), String> {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("/dev/kvm: {error}")),
    }
}

/// Whether this host has a tickless CPU, and `/dev/kvm`.
///
/// # Errors
/// Why not.
pub fn nohz_full() -> Result<(), String> {
    kvm()?;
    match accounting::host::HostCpus::read() {
        Ok(host) if host.nohz_full.as_ref().is_some_and(|cpus| !cpus.is_empty()) => Ok(()),
        Ok(_) => Err("no CPU is nohz_full".into()),
        Err(error) => Err(error.to_string()),
    }
}

/// Whether this host's CPU is AMD's Milan, and it has a `/dev/kvm`.
///
/// # Errors
/// Why not.
pub fn milan() -> Result<(), String> {
    kvm()?;
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").map_err(|error| format!("/proc/cpuinfo: {error}"))?;
    let is = |name: &str, value: &str| {
        let mut fields = cpuinfo.lines().filter_map(|line| line.split_once(':'));
        fields.any(|(field, found)| field.trim() == name && found.trim() == value)
    };
    if is("vendor_id", "AuthenticAMD") && is("cpu family", "25") && is("model", "1") {
        return Ok(());
    }
    Err("this host's CPU is no Milan of AMD's".into())
}

/// Ends the calling test, in one line that `cargo xtask test --jail` counts, where microVMs are in a jail: this one cannot be in
/// there, for the reason given.
#[macro_export]
macro_rules! require_no_jail {
    ($why:literal) => {
        if $crate::bed::jailed() {
            $crate::bed::skipped("jail", $why);
            return;
        }
    };
}

/// Whether what the tests start as `chronovisor` is in a jail: `resources/jailed`.
#[must_use]
pub fn jailed() -> bool {
    std::env::var_os("CHRONOVISOR_JAILED").is_some()
}

/// A file of the bed by name: `chronovisor`, `vmlinux`, `bzImage`, `guest.cpio`.
///
/// # Panics
/// When the bed lacks it: `cargo xtask test` puts it there and names the folder in `CHRONOVISOR_BED`.
#[must_use]
pub fn file(name: &str) -> PathBuf {
    let folder = std::env::var_os("CHRONOVISOR_BED").map_or_else(|| PathBuf::from("/bed"), PathBuf::from);
    let path = match name {
        "chronovisor" if jailed() => folder.join("jailed"),
        name => folder.join(name),
    };
    assert!(
        path.exists(),
        "{} is missing: run the tests by `cargo xtask test`",
        path.display()
    );
    path
}

/// A folder of its own for one test, removed with all that is in it.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// A new, empty one.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn new() -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("chronovisor-test-{}-{n}", std::process::id()));
        std::fs::create_dir(&path).expect("a folder for the test");
        Self(path)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The path of `name` in it.
    #[must_use]
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes `bytes` to `name` in it.
    ///
    /// # Panics
    /// When that fails.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.join(name);
        std::fs::write(&path, bytes).expect("a file for the test");
        path
    }

    /// The names of what is in it, sorted.
    ///
    /// # Panics
    /// When it cannot be read.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).expect("the test's folder");
        let mut names: Vec<_> = entries
            .map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}

impl Default for Folder {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // A failing test's folder goes too; what it held is in the failure's message.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
