//! `cargo xtask rootfs`: a Debian root file system as a guest's disk, with systemd, a serial login and sshd.
//!
//! mmdebstrap installs Debian 12 into a folder, `resources/rootfs/customize` makes that a guest, and `mkfs.ext4 -d` makes an
//! image of it: nothing is mounted but what mmdebstrap mounts in its own mount namespace. The image is kept, and made again
//! when what goes into it changes; it takes its name only when it is whole.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::layout::Layout;
use crate::process::bound_to_us;
use crate::progress::Progress;
use crate::setup::Kit;
use crate::{debian, setup};

/// What makes it, and the packages that have that.
const MAKERS: [(&str, &str); 2] = [("mmdebstrap", "mmdebstrap"), ("mkfs.ext4", "e2fsprogs")];
/// What a guest of that kind has, beside what every Debian has.
const PACKAGES: &str = "systemd,systemd-sysv,udev,openssh-server,iproute2,iputils-ping,kmod,procps";
const SUITE: &str = "bookworm";
/// Of those, what no program reads.
const LEFT_OUT: [&str; 3] = ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"];
/// Half of it is free.
const SIZE: &str = "640M";
/// The same in each build: two images of the same packages have the same contents.
const UUID: &str = "6368726f-6e6f-7669-736f-720000000001";
const HASH_SEED: &str = "6368726f-6e6f-7669-736f-720000000002";
const EPOCH: &str = "1700000000";

/// The image, made if it is not there yet.
///
/// # Errors
/// Not root: mmdebstrap has to make files of other users. Otherwise what failed, with what it said.
pub fn make(layout: &Layout, kit: &Kit) -> Result<PathBuf> {
    let _lock = setup::lock(&layout.kept())?;
    let image = layout.kept().join("rootfs.ext4");
    let recipe = recipe(layout, kit)?;
    let made_by = layout.kept().join("rootfs.recipe");
    if image.exists() && fs::read_to_string(&made_by).is_ok_and(|made_by| made_by == recipe) {
        return Ok(image);
    }
    ensure!(
        rustix::process::geteuid().is_root(),
        "the root file system can only be made by root, for most of it is root's: as root, type: cargo xtask rootfs"
    );
    debian::install(&MAKERS)?;
    let _progress = Progress::new("making a Debian root file system");
    let folder = Folder::new(layout.kept().join("rootfs.partial"))?;
    let tree = folder.0.join("root");
    let partial = folder.0.join("rootfs.ext4");

    let customize = layout.root.join("resources/rootfs/customize");
    // It removes its mounts when it is asked to end.
    let mut mmdebstrap = bound_to_us("TERM", "mmdebstrap");
    mmdebstrap
        .args(["--quiet", "--variant=apt", "--mode=root", "--format=directory"])
        .args(LEFT_OUT.map(|path| format!("--dpkgopt=path-exclude={path}")))
        // Nobody needs half of it after a power failure.
        .arg("--dpkgopt=force-unsafe-io")
        .arg("--aptopt=Acquire::Languages \"none\"")
        .arg(format!("--include={PACKAGES}"))
        // By name: a hook that fails is shown in full, before what it said.
        .arg(r#"--customize-hook=sh "$CUSTOMIZE" "$1""#)
        .arg(SUITE)
        .arg(&tree)
        .args(sources()?)
        .env("CUSTOMIZE", &customize)
        .env("KERNEL_MODULES", &kit.modules)
        .env("SOURCE_DATE_EPOCH", EPOCH);
    run(&mut mmdebstrap)?;
    let mut mkfs = Command::new("mkfs.ext4");
    mkfs.args(["-q", "-F", "-L", "chronovisor", "-m", "0", "-J", "size=16", "-U", UUID])
        // All of it now: a guest would do the rest, at its first boot.
        .args([
            "-E",
            &format!("hash_seed={HASH_SEED},lazy_itable_init=0,lazy_journal_init=0"),
        ])
        .arg("-d")
        .args([&tree, &partial])
        .arg(SIZE)
        .env("SOURCE_DATE_EPOCH", EPOCH);
    run(&mut mkfs)?;

    // An image that another recipe made is gone before the new recipe is there.
    fs::rename(&partial, &image)?;
    fs::write(&made_by, recipe)?;
    Ok(image)
}

/// All that decides what is in the image, but for Debian's packages of the day.
fn recipe(layout: &Layout, kit: &Kit) -> Result<String> {
    let customize = layout.root.join("resources/rootfs/customize");
    let customize = fs::read_to_string(&customize).with_context(|| format!("cannot read {}", customize.display()))?;
    let kernel = kit.modules.file_name().unwrap_or_default().to_string_lossy();
    let left_out = LEFT_OUT.join(" ");
    Ok(format!("{SUITE} {PACKAGES} {SIZE} {kernel}\n{left_out}\n{customize}"))
}

/// Where this machine's apt has [`SUITE`] from, updates and security included: a line of `sources.list` for each.
fn sources() -> Result<Vec<String>> {
    let output = Command::new("apt-get")
        .args(["indextargets", "--format", "deb $(REPO_URI) $(CODENAME) $(COMPONENT)"])
        .args(["Created-By: Packages", "Origin: Debian"])
        .output()
        .context("cannot run apt-get: is this Debian?")?;
    let lines = String::from_utf8_lossy(&output.stdout).into_owned();
    let sources = of_suite(&lines);
    ensure!(
        sources.iter().any(|line| line.contains(&format!(" {SUITE} "))),
        "apt-get has no list of {SUITE}'s packages: as root, type: apt-get update"
    );
    Ok(sources)
}

/// The lines about the suite itself, and what is added to it.
fn of_suite(lines: &str) -> Vec<String> {
    let of_suite = |line: &&str| {
        let codename = line.split(' ').nth(2).unwrap_or_default();
        [
            SUITE.to_owned(),
            format!("{SUITE}-updates"),
            format!("{SUITE}-security"),
        ]
        .contains(&codename.to_owned())
    };
    lines.lines().filter(of_suite).map(str::to_owned).collect()
}

/// Runs `command`; what it says is told only if it fails.
fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let last: Vec<_> = said.lines().rev().take(20).collect();
        let last: Vec<_> = last.into_iter().rev().collect();
        bail!("{name}: {}:\n{}", output.status, last.join("\n"));
    }
    Ok(())
}

/// A folder that goes when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(path: PathBuf) -> Result<Self> {
        remove(&path)?;
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.0) {
            eprintln!("{error:#}");
        }
    }
}

/// Removes `path`, and nothing that is mounted in it: a run that was killed may have left its mounts.
fn remove(path: &Path) -> Result<()> {
    if path.exists() {
        let mut rm = Command::new("rm");
        run(rm.args(["-rf", "--one-file-system", "--"]).arg(path))
            .with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_has_its_packages_from_where_this_machine_has_them_and_only_of_its_suite() {
        let lines = "deb http://mirror/debian/ bookworm main\n\
                     deb http://mirror/debian/ bookworm-backports main\n\
                     deb http://mirror/debian-security/ bookworm-security main\n\
                     deb http://mirror/debian/ trixie main\n";
        assert_eq!(
            of_suite(lines),
            [
                "deb http://mirror/debian/ bookworm main",
                "deb http://mirror/debian-security/ bookworm-security main"
            ]
        );
        assert!(of_suite("").is_empty());
    }
}
