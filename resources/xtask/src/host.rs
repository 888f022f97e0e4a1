//! `cargo xtask host`: the emulated host by hand, with a shell on this terminal, or by script.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::layout::Layout;
use crate::{bed, build, debian, setup};

/// The arguments.
#[derive(clap::Args)]
pub struct Host {
    /// Shell script to run there
    script: Option<PathBuf>,
    /// Shell commands to run there
    #[arg(short = 'c', value_name = "COMMANDS", conflicts_with = "script")]
    commands: Option<String>,
    /// The host's processor
    #[arg(long, default_value = "any")]
    cpu: bed::Cpu,
    /// File to put into /bed, under its own name; may be given more than once
    #[arg(long, value_name = "FILE")]
    with: Vec<PathBuf>,
}

impl Host {
    /// Boots the host. The exit status is the script's; 0 after a shell.
    pub fn run(self, layout: &Layout) -> Result<u8> {
        let script = match (&self.script, self.commands) {
            (Some(path), _) => {
                Some(fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?)
            }
            (None, commands) => commands,
        };
        debian::install_missing()?;
        let kit = setup::setup(layout)?;
        let built = build::everything(layout)?;
        let tests = built.tests.iter().filter_map(|test| {
            let suite = test.suite.as_deref()?;
            Some((format!("tests/{suite}"), test.executable.clone()))
        });
        let mut programs: Vec<_> = tests.collect();
        for path in self.with {
            let name = path
                .file_name()
                .with_context(|| format!("{} has no name", path.display()))?;
            programs.push((format!("bed/{}", name.to_string_lossy()), path));
        }
        // Where it was made, it is there.
        let disk = Some(layout.kept().join("rootfs.ext4")).filter(|image| image.exists());
        let Some(script) = script else {
            bed::shell(layout, &kit, &built.chronovisor, &programs, self.cpu, disk.as_deref())?;
            return Ok(0);
        };
        let job = bed::Job {
            script,
            chronovisor: &built.chronovisor,
            programs,
            cpu: self.cpu,
            // Whoever runs a script is there to stop it.
            disk,
            limit: Duration::MAX,
        };
        let outcome = bed::run(layout, &kit, &job, |line| println!("{line}"))?;
        // A shell's status is a byte.
        Ok(u8::try_from(outcome.status).unwrap_or(u8::MAX))
    }
}
