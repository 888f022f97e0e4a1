//! Chromium, from Debian's package: the tests look at the page `GET /ui` with it, and `cargo xtask screenshots` takes pictures.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::debian;

/// Installs it unless it is there, and says where it is.
///
/// # Errors
/// As [`debian::install`].
pub fn install() -> Result<PathBuf> {
    debian::install(&[("chromium", "chromium")])?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut found = std::env::split_paths(&path).map(|dir| dir.join("chromium"));
    found
        .find(|chromium| chromium.is_file())
        .context("Debian's package chromium is installed, but there is no chromium on the PATH")
}
