//! Where things are: the workspace, and what `cargo xtask` keeps in its target directory.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// The workspace's directories.
pub struct Layout {
    /// The workspace's root.
    pub root: PathBuf,
    /// Cargo's target directory.
    pub target: PathBuf,
}

impl Layout {
    /// Asks cargo, which knows of CARGO_TARGET_DIR and of configuration files.
    pub fn find() -> Result<Self> {
        let output = cargo()
            .args(["metadata", "--no-deps", "--format-version=1", "--manifest-path"])
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run cargo")?;
        ensure!(output.status.success(), "cargo metadata failed");
        let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let path = |key: &str| {
            metadata[key]
                .as_str()
                .map(PathBuf::from)
                .with_context(|| format!("cargo metadata does not give its {key}"))
        };
        Ok(Self {
            root: path("workspace_root")?,
            target: path("target_directory")?,
        })
    }

    /// What tests start in place of `chronovisor` where it is to be in a jail.
    pub fn jailed(&self) -> PathBuf {
        self.root.join("resources/jailed")
    }

    /// What is made here and kept: downloads, the kernel, the guest's initramfs. Safe to remove at any time.
    pub fn kept(&self) -> PathBuf {
        self.target.join("chronovisor")
    }

    /// The folder, named to tests by `CHRONOVISOR_BED`, with the program and the guest: `chronovisor`, `vmlinux`, `bzImage`,
    /// `guest.cpio`.
    pub fn bed(&self) -> PathBuf {
        self.kept().join("bed")
    }
}

/// The cargo that started us.
pub fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}
