//! `cargo xtask screenshots`: pictures of what people look at, for docs/screenshots.
//!
//! tests/src/bin/screenshots takes them, of a flat guest on this machine's /dev/kvm.

use std::fs::OpenOptions;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::layout::Layout;
use crate::process::follow;
use crate::{build, chromium, debian};

/// Takes them all, in the place of those that are there.
pub fn screenshots(layout: &Layout) -> Result<()> {
    let chromium = chromium::install()?;
    debian::install(&[("tmux", "tmux"), ("pngquant", "pngquant")])?;
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    kvm.context("a guest is to be looked at, but /dev/kvm cannot be opened")?;
    let program = build::screenshots(layout)?;
    let mut command = Command::new(&program);
    command
        .arg(layout.root.join("docs/screenshots"))
        .env("CHRONOVISOR_BED", layout.bed())
        .env("CHRONOVISOR_CHROMIUM", chromium);
    ensure!(
        follow(&mut command, |line| println!("{line}"))?,
        "{} failed",
        program.display()
    );
    Ok(())
}
