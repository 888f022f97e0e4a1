//! Builds the workspace's programs and tests so that they run anywhere: linked statically, for this machine, for a guest
//! and for the emulated host alike.

use std::ffi::OsString;
use std::fs;
use std::io::{IsTerminal, stderr};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::layout::{Layout, cargo};

/// With a target named, cargo keeps the flags from build scripts and procedural macros, which cannot be static.
const TARGET: &str = "x86_64-unknown-linux-gnu";
const STATIC: &str = "-C target-feature=+crt-static";
/// Optimised enough for an emulated host, and checked, and quick to build: see the root Cargo.toml.
const PROFILE: &str = "bed";

/// A test program.
#[derive(Clone, Debug)]
pub struct TestProgram {
    /// `crate` for unit tests, `crate::file` for those of `crate/tests/file.rs`.
    pub name: String,
    /// The file of an integration test, without its extension; `None` for unit tests.
    pub suite: Option<String>,
    /// The executable.
    pub executable: PathBuf,
    /// The crate's folder, where cargo would run it.
    pub package: PathBuf,
}

/// What a build of everything gives.
#[derive(Debug)]
pub struct Built {
    /// The `chronovisor` program.
    pub chronovisor: PathBuf,
    /// Every test program.
    pub tests: Vec<TestProgram>,
}

/// Cargo's message about a finished target; the other kinds of message are told apart by `reason`.
#[derive(Deserialize)]
struct Message {
    reason: String,
    target: Option<Target>,
    profile: Option<Profile>,
    executable: Option<PathBuf>,
    manifest_path: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// The guest's init.
pub fn guest_init(layout: &Layout) -> Result<PathBuf> {
    program(&cargo_build(layout, PROFILE, &["--package=guest-init"])?, "guest-init")
}

/// The `chronovisor` program.
pub fn chronovisor(layout: &Layout) -> Result<PathBuf> {
    into_bed(
        layout,
        program(
            &cargo_build(layout, PROFILE, &["--package=api", "--bins"])?,
            "chronovisor",
        )?,
    )
}

/// The `chronovisor` program and all tests, in one build: cargo then compiles each dependency once.
pub fn everything(layout: &Layout) -> Result<Built> {
    let messages = cargo_build(layout, PROFILE, &["--workspace", "--bins", "--tests"])?;
    let tests = messages.iter().filter_map(test_program).collect();
    Ok(Built {
        chronovisor: into_bed(layout, program(&messages, "chronovisor")?)?,
        tests,
    })
}

/// The unit tests of `accounting`, built for the model checker: those in modules named `model` are for it, and no other
/// runs there. In a target directory of its own, for its flags would have everything built anew by turns.
pub fn models(layout: &Layout) -> Result<TestProgram> {
    let mut command = base(layout);
    let mut rustflags = flags("RUSTFLAGS");
    rustflags.push(" --cfg loom");
    command
        .env("RUSTFLAGS", rustflags)
        .args(["test", "--no-run", "--package=accounting", "--lib"])
        .args(["--target", TARGET, "--profile", PROFILE, "--target-dir"])
        .arg(layout.target.join("loom"));
    let program = messages(&mut command)?.iter().find_map(test_program);
    let mut program = program.context("cargo built no tests of accounting")?;
    program.name.push_str(" under loom");
    Ok(program)
}

/// What measures, and what is measured, optimised as what is shipped is.
#[derive(Debug)]
pub struct Benches {
    /// The `chronovisor` program, which is linked into the bed.
    pub chronovisor: PathBuf,
    /// tests/src/bin/bench.rs
    pub bench: PathBuf,
    /// tests/src/bin/bench_vm, with bare_server.rs beside it
    pub bench_vm: PathBuf,
    /// tests/src/bin/floor.rs, beside it
    pub floor: PathBuf,
}

/// Builds [`Benches`].
pub fn benches(layout: &Layout) -> Result<Benches> {
    let messages = cargo_build(layout, "release", &["--package=api", "--package=tests", "--bins"])?;
    Ok(Benches {
        chronovisor: into_bed(layout, program(&messages, "chronovisor")?)?,
        bench: program(&messages, "bench")?,
        bench_vm: program(&messages, "bench_vm")?,
        floor: program(&messages, "floor")?,
    })
}

/// What is executed to count the instructions of the stamps.
pub fn stamps(layout: &Layout) -> Result<PathBuf> {
    program(
        &cargo_build(layout, "release", &["--package=tests", "--bin=stamps"])?,
        "stamps",
    )
}

/// The `chronovisor` program, and what holds readings against the truth.
pub fn accuracy(layout: &Layout) -> Result<(PathBuf, PathBuf)> {
    let messages = cargo_build(layout, PROFILE, &["--package=api", "--package=tests", "--bins"])?;
    Ok((
        into_bed(layout, program(&messages, "chronovisor")?)?,
        program(&messages, "accuracy")?,
    ))
}

/// The `chronovisor` program, linked into the bed, and the program of `tests/src/bin` that measures it.
pub fn measuring(layout: &Layout, name: &str) -> Result<PathBuf> {
    let bins = [
        "--package=api",
        "--package=tests",
        "--bin=chronovisor",
        &format!("--bin={name}"),
    ];
    let messages = cargo_build(layout, "release", &bins)?;
    into_bed(layout, program(&messages, "chronovisor")?)?;
    program(&messages, name)
}

/// A program of the tests' by its name, and the `chronovisor` program that it tries, which is linked into the bed.
pub fn of_tests(layout: &Layout, name: &str) -> Result<PathBuf> {
    let messages = cargo_build(layout, PROFILE, &["--package=api", "--package=tests", "--bins"])?;
    into_bed(layout, program(&messages, "chronovisor")?)?;
    program(&messages, name)
}

/// The fuzzers: one program, instrumented for libFuzzer as cargo-fuzz does it, but for its sanitizers, which stable Rust has not. In a
/// target directory of its own, for its flags would have everything built anew by turns.
///
/// Without `--cfg fuzzing`: by that smoltcp takes any checksum for right, and what is fuzzed shall be what is shipped.
pub fn fuzzers(layout: &Layout) -> Result<PathBuf> {
    const FLAGS: &str = " -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
        -Cllvm-args=-sanitizer-coverage-trace-compares";
    let mut rustflags = std::env::var_os("RUSTFLAGS").unwrap_or_default();
    rustflags.push(FLAGS);
    let mut command = base(layout);
    command
        .env("RUSTFLAGS", rustflags)
        .args([
            "build",
            "--package=fuzz",
            "--features=engine",
            "--target",
            TARGET,
            "--profile=fuzz",
            "--target-dir",
        ])
        .arg(layout.target.join("fuzz/build"));
    program(&messages(&mut command)?, "fuzz")
}

/// What takes screenshots, and the `chronovisor` program that they are of, which is linked into the bed.
pub fn screenshots(layout: &Layout) -> Result<PathBuf> {
    let messages = cargo_build(layout, PROFILE, &["--package=api", "--package=tests", "--bins"])?;
    into_bed(layout, program(&messages, "chronovisor")?)?;
    program(&messages, "screenshots")
}

/// `cargo test --doc`, built as the rest is.
pub fn doc_tests(layout: &Layout) -> Command {
    let mut command = base(layout);
    command
        .args(["test", "--doc", "--workspace"])
        .args(["--target", TARGET, "--profile", PROFILE]);
    command.env("RUSTDOCFLAGS", flags("RUSTDOCFLAGS"));
    command
}

/// `cargo test` of one unit test of `package`, built as the rest is.
pub fn unit_test(layout: &Layout, package: &str, test: &str) -> Command {
    let mut command = base(layout);
    command
        .args(["test", "--package", package, "--lib"])
        .args(["--target", TARGET, "--profile", PROFILE])
        .args(["--", "--exact", test]);
    command
}

/// Links the program into the folder where tests look for it, beside what they start in its place where it is to be in a jail.
fn into_bed(layout: &Layout, program: PathBuf) -> Result<PathBuf> {
    let link = layout.bed().join("chronovisor");
    fs::create_dir_all(layout.bed())?;
    fs::copy(layout.jailed(), layout.bed().join("jailed"))?;
    if fs::read_link(&link).is_ok_and(|to| to == program) {
        return Ok(program);
    }
    let _ = fs::remove_file(&link);
    symlink(&program, &link).with_context(|| format!("cannot link {} to {}", link.display(), program.display()))?;
    Ok(program)
}

fn test_program(message: &Message) -> Option<TestProgram> {
    let (target, executable, manifest) = (
        message.target.as_ref()?,
        message.executable.as_ref()?,
        message.manifest_path.as_ref()?,
    );
    if !message.profile.as_ref()?.test {
        return None;
    }
    let package = manifest.parent()?.to_owned();
    let crate_name = package.file_name()?.to_string_lossy();
    let (name, suite) = if target.kind.iter().any(|kind| kind == "test") {
        (format!("{crate_name}::{}", target.name), Some(target.name.clone()))
    } else {
        (crate_name.into_owned(), None)
    };
    Some(TestProgram {
        name,
        suite,
        executable: executable.clone(),
        package,
    })
}

fn program(messages: &[Message], name: &str) -> Result<PathBuf> {
    let made = |message: &&Message| {
        message
            .target
            .as_ref()
            .is_some_and(|target| target.name == name && target.kind == ["bin"])
            && message.profile.as_ref().is_some_and(|profile| !profile.test)
    };
    let message = messages
        .iter()
        .find(made)
        .with_context(|| format!("cargo built no program {name}"))?;
    message
        .executable
        .clone()
        .with_context(|| format!("cargo does not say where {name} is"))
}

fn cargo_build(layout: &Layout, profile: &str, args: &[&str]) -> Result<Vec<Message>> {
    let mut command = base(layout);
    command
        .args(["build", "--target", TARGET, "--profile", profile])
        .args(args);
    messages(&mut command)
}

/// Has cargo build, and gives what it says of each finished target.
fn messages(command: &mut Command) -> Result<Vec<Message>> {
    command.arg("--message-format=json-render-diagnostics");
    if !stderr().is_terminal() {
        command.arg("--quiet"); // errors and warnings are told all the same
    }
    let output = command.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "the build failed");
    let messages = String::from_utf8(output.stdout).context("cargo's messages are not UTF-8")?;
    let messages = messages
        .lines()
        .filter(|line| line.starts_with('{'))
        .map(serde_json::from_str::<Message>);
    let messages: Vec<Message> = messages
        .collect::<Result<_, _>>()
        .context("cannot read cargo's messages")?;
    Ok(messages
        .into_iter()
        .filter(|message| message.reason == "compiler-artifact")
        .collect())
}

fn base(layout: &Layout) -> Command {
    let mut command = cargo();
    command
        .current_dir(&layout.root)
        .stdin(Stdio::null())
        .env("RUSTFLAGS", flags("RUSTFLAGS"));
    command
}

/// The user's flags and ours: setting the variable would otherwise drop theirs.
fn flags(variable: &str) -> OsString {
    let mut flags = std::env::var_os(variable).unwrap_or_default();
    flags.push(" ");
    flags.push(STATIC);
    flags
}
