//! What the tests have from the Python registry: Firecracker's clients, which they drive, and schemathesis, which asks what the
//! document of the API says. Installed as they are, each into an environment of its own, for two of them are packages of the
//! same name.
//!
//! The versions, and the sum of each file, are in tests/clients/*.txt. The network is touched only when one of those files
//! is new.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::layout::Layout;
use crate::progress::Progress;
use crate::{debian, setup};

/// Each of them; its requirements are in tests/clients/NAME.txt.
const CLIENTS: [&str; 4] = [
    "firecracker-python",
    "hysn-firecracker-python",
    "microheart",
    "schemathesis",
];

/// What the clients and their drivers run, and the packages that have it.
const COMMANDS: [(&str, &str); 5] = [
    ("python3", "python3"),
    ("ip", "iproute2"),
    ("iptables", "iptables"),
    ("nft", "nftables"),
    ("sysctl", "procps"),
];
/// What they import: the module, and the package that has it. nftables is where firecracker-python looks for it, which is not where
/// another Python than Debian's would.
const MODULES: [(&str, &str); 3] = [
    ("ensurepip", "python3-venv"),
    ("venv", "python3-venv"),
    ("nftables", "python3-nftables"),
];

/// Installs what is not there yet, and gives the folder with an environment for each client, named as the client.
///
/// # Errors
/// What is lacking, and cannot be had.
pub fn install(layout: &Layout) -> Result<PathBuf> {
    debian::install(&COMMANDS)?;
    let mut packages: Vec<&str> = MODULES
        .iter()
        .filter(|(module, _)| !imports(module))
        .map(|&(_, package)| package)
        .collect();
    packages.dedup();
    debian::install_packages(&packages)?;

    let environments = layout.kept().join("clients");
    fs::create_dir_all(&environments).with_context(|| format!("cannot make {}", environments.display()))?;
    let _lock = setup::lock(&layout.kept())?;
    for client in CLIENTS {
        let requirements = layout.root.join(format!("tests/clients/{client}.txt"));
        environment(&environments.join(client), &requirements).with_context(|| format!("cannot install {client}"))?;
    }
    Ok(environments)
}

fn imports(module: &str) -> bool {
    let look = format!("import sys; sys.path.append('/usr/lib/python3/dist-packages'); import {module}");
    let output = Command::new("python3").args(["-c", &look]).output();
    output.is_ok_and(|output| output.status.success())
}

/// Makes `dir` an environment with `requirements`, unless it is.
fn environment(dir: &Path, requirements: &Path) -> Result<()> {
    let wanted = fs::read(requirements).with_context(|| format!("cannot read {}", requirements.display()))?;
    // Written last: an environment without it is half made.
    let made_of = dir.join("requirements.txt");
    if fs::read(&made_of).is_ok_and(|made_of| made_of == wanted) {
        return Ok(());
    }
    let _progress = Progress::new(format!("installing {}", requirements.display()));
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(dir))?;
    let mut pip = Command::new(dir.join("bin/python"));
    pip.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--require-hashes",
    ]);
    run(pip.args(["--only-binary=:all:", "--requirement"]).arg(requirements))?;
    Ok(fs::write(&made_of, wanted)?)
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{command:?}: {}: {}",
        output.status,
        said.trim()
    );
    Ok(())
}
