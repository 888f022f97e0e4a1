//! Debian's packages: those to install, and those only to unpack.
//!
//! A package that is only unpacked is downloaded once, compared with the size and the SHA-256 that apt has from its signed
//! lists, and takes its final name only then: an interrupted download is never taken for a whole one.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::progress::Progress;

/// What must be installed for most of what there is to do: the command looked for, and the package that has it.
const INSTALLED: &[(&str, &str)] = &[("qemu-system-x86_64", "qemu-system-x86")];

/// Installs what is lacking.
///
/// # Errors
/// Not root: the line that root should type. Otherwise what apt-get said.
pub fn install_missing() -> Result<()> {
    install(INSTALLED)
}

/// Installs what is lacking of `commands`, each with the package that has it.
///
/// # Errors
/// As [`install_missing`].
pub fn install(commands: &[(&str, &str)]) -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let lacks = |command: &str| !std::env::split_paths(&path).any(|dir| dir.join(command).is_file());
    let missing: Vec<&str> = commands
        .iter()
        .filter(|(command, _)| lacks(command))
        .map(|&(_, package)| package)
        .collect();
    install_packages(&missing)
}

/// Installs `missing`, by the names of packages.
///
/// # Errors
/// As [`install_missing`].
pub fn install_packages(missing: &[&str]) -> Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    let packages = missing.join(" ");
    if !rustix::process::geteuid().is_root() {
        bail!(
            "lacking {packages}; as root, type:\n\
             apt-get update && apt-get install --yes --no-install-recommends {packages}"
        );
    }
    let _progress = Progress::new(format!("installing {packages}"));
    let install = || {
        apt(
            "apt-get",
            ["install", "--yes", "--no-install-recommends"].iter().chain(missing),
        )
    };
    if install().is_err() {
        update()?;
        install()?;
    }
    Ok(())
}

/// The Debian package with the kernel that `linux-image-cloud-amd64` depends on, in `downloads`.
pub fn kernel_package(downloads: &Path) -> Result<PathBuf> {
    download(downloads, "linux-image-cloud-amd64", || {
        let control = apt("apt-cache", ["show", "--no-all-versions", "linux-image-cloud-amd64"])?;
        let control = String::from_utf8_lossy(&control.stdout).into_owned();
        let depends = control
            .lines()
            .find_map(|line| line.strip_prefix("Depends: "))
            .unwrap_or_default();
        let real = depends.split([',', ' ']).find(|word| word.starts_with("linux-image-"));
        real.map(str::to_owned)
            .context("linux-image-cloud-amd64 depends on no kernel: is this Debian, or a mix?")
    })
}

/// The Debian package busybox-static, in `downloads`.
pub fn busybox_package(downloads: &Path) -> Result<PathBuf> {
    download(downloads, "busybox-static", || Ok("busybox-static".to_owned()))
}

/// The Debian package e2fsck-static, in `downloads`.
pub fn e2fsck_package(downloads: &Path) -> Result<PathBuf> {
    download(downloads, "e2fsck-static", || Ok("e2fsck-static".to_owned()))
}

/// The Debian package prometheus, in `downloads`.
pub fn prometheus_package(downloads: &Path) -> Result<PathBuf> {
    download(downloads, "prometheus", || Ok("prometheus".to_owned()))
}

/// Unpacks `package` into `to`, which is there afterwards only if all of it is.
pub fn unpack(package: &Path, to: &Path) -> Result<()> {
    let partial = to.with_extension("partial");
    remove_dir(&partial)?;
    run(Command::new("dpkg-deb").arg("--extract").arg(package).arg(&partial))?;
    remove_dir(to)?;
    fs::rename(&partial, to).with_context(|| format!("cannot rename {} to {}", partial.display(), to.display()))
}

/// Downloads the package that `resolve` names, as `NAME.deb`, unless it is there.
fn download(downloads: &Path, name: &str, resolve: impl Fn() -> Result<String>) -> Result<PathBuf> {
    let whole = downloads.join(format!("{name}.deb"));
    if whole.exists() {
        return Ok(whole);
    }
    let _progress = Progress::new(format!("downloading {name}"));
    // A machine that never ran `apt-get update` knows no package; one that ran it long ago knows one that is gone.
    let fetched = resolve()
        .and_then(|package| fetch(downloads, &package))
        .or_else(|first| {
            if !rustix::process::geteuid().is_root() {
                return Err(first.context("as root, type: apt-get update\nand try again"));
            }
            update()?;
            resolve().and_then(|package| fetch(downloads, &package))
        })?;
    fs::rename(&fetched, &whole)?;
    remove_dir(&downloads.join("partial"))?;
    Ok(whole)
}

/// Downloads `package` into `downloads/partial` and verifies it.
fn fetch(downloads: &Path, package: &str) -> Result<PathBuf> {
    let partial = downloads.join("partial");
    remove_dir(&partial)?;
    fs::create_dir_all(&partial).with_context(|| format!("cannot make {}", partial.display()))?;

    // One line: 'URI' file-name size SHA256:sum
    let line = apt("apt-get", ["download", "--print-uris", package])?;
    let line = String::from_utf8_lossy(&line.stdout).into_owned();
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [_, _, size, sum] = fields[..] else {
        bail!("apt-get does not say what {package} is: {line:?}");
    };
    let sum = sum
        .strip_prefix("SHA256:")
        .with_context(|| format!("apt-get gives no SHA-256 for {package}: {sum}"))?;

    run(apt_command("apt-get").args(["download", package]).current_dir(&partial))?;
    let file = fs::read_dir(&partial)?
        .next()
        .with_context(|| format!("apt-get downloaded nothing for {package}"))??;
    let file = file.path();
    let found = fs::metadata(&file)?.len();
    ensure!(
        found.to_string() == size,
        "{package}: {found} bytes downloaded, {size} expected; try again"
    );
    let output = run(Command::new("sha256sum").arg("--").arg(&file))?;
    // A name with a backslash or a newline gets a leading backslash; those of packages have neither.
    ensure!(
        output.stdout.starts_with(sum.as_bytes()),
        "{package}: the SHA-256 of the download is not {sum}; try again"
    );
    Ok(file)
}

fn update() -> Result<Output> {
    apt("apt-get", ["update"])
}

fn apt<S: AsRef<OsStr>>(command: &str, args: impl IntoIterator<Item = S>) -> Result<Output> {
    run(apt_command(command).args(args))
}

fn apt_command(command: &str) -> Command {
    let mut command = Command::new(command);
    command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
    command
}

/// Runs `command` to its end, its words kept for the error.
fn run(command: &mut Command) -> Result<Output> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {name}: is this Debian?"))?;
    if !output.status.success() {
        let args: Vec<_> = command.get_args().map(OsStr::to_string_lossy).collect();
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        bail!("{name} {}: {}: {said}", args.join(" "), output.status);
    }
    Ok(output)
}

fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
