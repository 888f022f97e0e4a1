//! Python packages that tests run: `cargo xtask test` installs them, each into an environment of its own.

use std::path::PathBuf;

/// The interpreter of the environment `name`, which is the name of a file in tests/clients/, less its `.txt`.
///
/// What is run by it gets mounts and a network of its own, for which one has to be root.
///
/// # Errors
/// Why there is none, or why it is of no use.
pub fn of(name: &str) -> Result<PathBuf, String> {
    if let Some(why) = std::env::var_os("CHRONOVISOR_CLIENTS_LACK") {
        return Err(why.to_string_lossy().into_owned());
    }
    let Some(environments) = std::env::var_os("CHRONOVISOR_CLIENTS") else {
        return Err("there is no Python here, as in the emulated host, or `cargo xtask test` did not run this".into());
    };
    let python = PathBuf::from(environments).join(name).join("bin/python");
    if !python.exists() {
        return Err(format!("{} is missing", python.display()));
    }
    if !rustix::process::geteuid().is_root() {
        return Err("mounts and a network of its own are made for it, for which one has to be root".into());
    }
    Ok(python)
}
