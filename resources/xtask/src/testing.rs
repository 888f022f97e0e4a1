//! `cargo xtask test`: every test on the bed it is made for.
//!
//! * `anywhere`: unit tests, documentation tests, the suites in tests/tests/ that need nothing, and the models that the
//!   loom model checker runs.
//! * `kvm`: tests/tests/kvm_*.rs, flat guests on this machine's /dev/kvm.
//! * `nohz-full`: tests/tests/nohz_full_*.rs inside the emulated host, and kvm_*.rs there once more, on a real kvm-amd.
//! * `milan`: tests/tests/milan_*.rs inside the emulated host, whose processor is then AMD's Milan, which a CPU template is for;
//!   and kvm_cpu.rs there once more.
//!
//! A test that finds its bed lacking prints `SKIPPED bed: test: why` and returns; a bed that is lacking altogether skips its
//! tests by name. Neither counts as passed.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::build::{self, TestProgram};
use crate::layout::Layout;
use crate::libtest::{Parser, Tally};
use crate::process::follow;
use crate::{bed, chromium, clients, debian, prometheus, rootfs, setup};

/// Where tests run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Bed {
    /// Needs nothing.
    Anywhere,
    /// This machine's /dev/kvm, with flat guests.
    Kvm,
    /// The emulated host with tickless CPUs.
    NohzFull,
    /// The same as a Milan.
    Milan,
}

const BEDS: [Bed; 4] = [Bed::Anywhere, Bed::Kvm, Bed::NohzFull, Bed::Milan];

/// Suites that start no `chronovisor`, which a jail is nothing to; and those that make their own.
const NOT_JAILED: [&str; 11] = [
    "kvm_dodger",
    "kvm_example",
    "kvm_flat",
    "kvm_jail",
    "kvm_setup",
    "kvm_workloads",
    "nohz_full_bpf",
    "nohz_full_jail",
    "nohz_full_laws",
    "nohz_full_smoke",
    "nohz_full_truth",
];

/// One at a time, for they measure time; and the output of those that pass, for they may say that they were skipped.
const HARNESS: [&str; 2] = ["--test-threads=1", "--show-output"];
/// A run takes minutes; in this time a hung one is given up.
const NOHZ_FULL_LIMIT: Duration = Duration::from_secs(2400);
/// Starts the line that ends a test program's output in the emulated host, its exit status behind it. No test prints it.
const MARK: char = '\x01';

impl Bed {
    /// As on the command line and in the `SKIPPED` lines.
    const fn name(self) -> &'static str {
        match self {
            Self::Anywhere => "anywhere",
            Self::Kvm => "kvm",
            Self::NohzFull => "nohz-full",
            Self::Milan => "milan",
        }
    }

    fn has(self, program: &TestProgram) -> bool {
        let suite = program.suite.as_deref().unwrap_or_default();
        let [kvm, nohz_full, milan] = ["kvm_", "nohz_full_", "milan_"].map(|bed| suite.starts_with(bed));
        match self {
            Self::Anywhere => !kvm && !nohz_full && !milan,
            Self::Kvm => kvm,
            Self::NohzFull => kvm || nohz_full,
            Self::Milan => milan || suite == "kvm_cpu",
        }
    }
}

/// Runs the tests of `only`, or of all beds, whose names contain `filter`, with microVMs in a `jail` or without. True if none failed.
pub fn test(layout: &Layout, only: Option<Bed>, jail: bool, filter: Option<&str>) -> Result<bool> {
    if jail {
        anyhow::ensure!(
            rustix::process::geteuid().is_root(),
            "--jail: a jail is made by root: run it as root"
        );
        // What the tests write, the jail's user reads and writes.
        rustix::process::umask(rustix::fs::Mode::empty());
    }
    // What needs the guest, or QEMU, says so where it lacks: the other tests need neither.
    let kit = debian::install_missing().and_then(|()| setup::setup(layout));
    let on_kvm = only.is_none_or(|only| only == Bed::Kvm);
    let installed = if on_kvm {
        vec![
            ("CHRONOVISOR_CLIENTS", clients::install(layout)),
            ("CHRONOVISOR_CHROMIUM", chromium::install()),
            ("CHRONOVISOR_PROMETHEUS", prometheus::unpack(layout)),
        ]
    } else {
        Vec::new()
    };
    let built = build::everything(layout)?;
    let mut tallies = Vec::new();
    let has_microvms = |bed: &Bed| !jail || *bed != Bed::Anywhere;
    let wanted = BEDS.into_iter().filter(|&bed| only.is_none_or(|only| only == bed));
    for bed in wanted.filter(has_microvms) {
        println!("== bed {} ==", bed.name());
        let of_jail = |program: &&TestProgram| {
            let suite = program.suite.as_deref().unwrap_or_default();
            !jail || !NOT_JAILED.contains(&suite)
        };
        let of_bed = built.tests.iter().filter(|program| bed.has(program));
        let programs: Vec<&TestProgram> = of_bed.filter(of_jail).collect();
        let run = Run {
            layout,
            chronovisor: &built.chronovisor,
            programs: &programs,
            installed: &installed,
            jail,
            filter,
        };
        let tally = match bed {
            Bed::Anywhere => run.anywhere()?,
            Bed::Kvm => match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
                Ok(_) => run.here()?,
                Err(error) => run.skip_all(&format!("cannot open /dev/kvm: {error}"))?,
            },
            Bed::NohzFull | Bed::Milan => match &kit {
                Ok(kit) => run.in_emulated_host(kit, bed)?,
                Err(error) => run.skip_all(&format!("{error:#}"))?,
            },
        };
        tallies.push((bed, tally));
    }
    if let Some(filter) = filter {
        let beds: Vec<_> = tallies.iter().map(|(bed, _)| bed.name()).collect();
        let ran = tallies.iter().any(|(_, tally)| *tally != Tally::default());
        anyhow::ensure!(ran, nothing_matched(filter, &beds));
    }
    Ok(report(tallies))
}

/// What is said where no test's name has `filter` in it: a filter that is mistyped must not pass for tests that passed.
fn nothing_matched(filter: &str, beds: &[&str]) -> String {
    let plural = if beds.len() == 1 { "" } else { "s" };
    format!(
        "no test of bed{plural} {} has {filter:?} in its name: a filter is part of a test's name, not of its file's \
         (`cargo xtask host` runs a file)",
        beds.join(", ")
    )
}

/// Says what became of each bed's tests, and of all. True if none failed.
fn report(tallies: Vec<(Bed, Tally)>) -> bool {
    println!();
    let mut total = Tally::default();
    for (bed, tally) in tallies {
        let (passed, failed, skipped) = (tally.passed, tally.failed.len(), tally.skipped.len());
        println!(
            "bed {}: {passed} passed, {failed} failed, {skipped} skipped",
            bed.name()
        );
        for (test, why) in &tally.skipped {
            println!("  skipped {test}: {}", why.replace('\n', " "));
        }
        for test in &tally.failed {
            println!("  FAILED {test}");
        }
        total.add(tally);
    }
    println!(
        "{} passed, {} failed, {} skipped",
        total.passed,
        total.failed.len(),
        total.skipped.len()
    );
    total.failed.is_empty()
}

/// The programs of one bed.
struct Run<'a> {
    layout: &'a Layout,
    chronovisor: &'a Path,
    programs: &'a [&'a TestProgram],
    /// What tests drive and this project does not build: the variable that says where it is, and where, or why it is not.
    installed: &'a [(&'static str, Result<PathBuf>)],
    /// Whether microVMs are in a jail.
    jail: bool,
    filter: Option<&'a str>,
}

impl Run<'_> {
    fn anywhere(&self) -> Result<Tally> {
        let mut tally = self.here()?;
        let mut command = build::doc_tests(self.layout);
        command.arg("--").args(HARNESS).args(self.filter);
        // One program for each crate: each has its own summary.
        let mut parser = Parser::default();
        let mut documented = Tally::default();
        let success = follow(&mut command, |line| {
            println!("{line}");
            parser.line(line);
            if line.starts_with("test result: ") {
                documented.add(std::mem::take(&mut parser).finish("documentation tests", true));
            }
        })?;
        if !success && documented.failed.is_empty() {
            documented.failed.push("documentation tests: the build".to_owned());
        }
        tally.add(documented);
        tally.add(self.models()?);
        Ok(tally)
    }

    /// The models of `accounting`, by name: outside of a model no other test can use what loom puts in place of atomics.
    fn models(&self) -> Result<Tally> {
        let program = build::models(self.layout)?;
        let models = self.list(&program)?.into_iter().filter(|test| test.contains("model::"));
        let models: Vec<String> = models.collect();
        if models.is_empty() {
            return Ok(Tally::default());
        }
        println!("-- {} --", program.name);
        self.run_here(&program, self.command(&program).arg("--exact").args(models))
    }

    fn here(&self) -> Result<Tally> {
        let mut tally = Tally::default();
        for program in self.programs {
            println!("-- {} --", program.name);
            tally.add(self.run_here(program, self.command(program).args(self.filter))?);
        }
        Ok(tally)
    }

    /// Runs `program` by `command`.
    fn run_here(&self, program: &TestProgram, command: &mut Command) -> Result<Tally> {
        let mut parser = Parser::default();
        let success = follow(command.args(HARNESS), |line| {
            println!("{line}");
            parser.line(line);
        })?;
        Ok(named(parser.finish("the program", success), program))
    }

    /// The names of `program`'s tests, as far as the filter lets them through.
    fn list(&self, program: &TestProgram) -> Result<Vec<String>> {
        let mut command = self.command(program);
        let output = command
            .args(self.filter)
            .args(["--list", "--format=terse"])
            .output()
            .with_context(|| format!("cannot run {}", program.executable.display()))?;
        let list = String::from_utf8_lossy(&output.stdout).into_owned();
        let names = list.lines().filter_map(|line| line.strip_suffix(": test"));
        Ok(names.map(str::to_owned).collect())
    }

    fn in_emulated_host(&self, kit: &setup::Kit, bed: Bed) -> Result<Tally> {
        if self.programs.is_empty() {
            return Ok(Tally::default());
        }
        let path = |program: &TestProgram| format!("tests/{}", program.suite.as_deref().unwrap_or(&program.name));
        let mut script = "cd /tests\n".to_owned();
        if self.jail {
            script += "umask 000\nexport CHRONOVISOR_JAILED=1\n";
        }
        for program in self.programs {
            let filter = self
                .filter
                .map(|filter| format!(" '{}'", filter.replace('\'', r"'\''")))
                .unwrap_or_default();
            script += &format!(
                "/{} {}{filter}\nprintf '\\n\\001%d\\n' $?\n",
                path(program),
                HARNESS.join(" ")
            );
        }
        let job = bed::Job {
            script,
            chronovisor: self.chronovisor,
            programs: self
                .programs
                .iter()
                .map(|program| (path(program), program.executable.clone()))
                .collect(),
            cpu: if bed == Bed::Milan {
                bed::Cpu::Milan
            } else {
                bed::Cpu::Any
            },
            disk: (bed == Bed::NohzFull)
                .then(|| rootfs::make(self.layout, kit))
                .and_then(|made| {
                    // The tests that want it say so, one by one.
                    made.inspect_err(|error| println!("no root file system: {error:#}"))
                        .ok()
                }),
            limit: NOHZ_FULL_LIMIT,
        };
        let mut tally = Tally::default();
        let mut parser = Parser::default();
        let mut programs = self.programs.iter();
        let mut current = programs.next();
        let outcome = bed::run(self.layout, kit, &job, |line| {
            match (line.strip_prefix(MARK), current) {
                (Some(status), Some(program)) => {
                    let ended = std::mem::take(&mut parser).finish("the program", status == "0");
                    tally.add(named(ended, program));
                    current = programs.next();
                }
                _ => {
                    println!("{line}");
                    parser.line(line);
                }
            }
        });
        match outcome {
            Ok(outcome) => println!("(the emulated host took {:.1} s to boot)", outcome.boot.as_secs_f64()),
            Err(error) => {
                println!("{error:#}");
                if current.is_none() {
                    tally.failed.push("the emulated host".to_owned());
                }
            }
        }
        // What was running when the host failed, and all that should have followed.
        if let Some(program) = current {
            tally.add(named(parser.finish("the program", false), program));
        }
        tally
            .failed
            .extend(programs.map(|program| format!("{}: did not run", program.name)));
        Ok(tally)
    }

    fn skip_all(&self, why: &str) -> Result<Tally> {
        println!("skipped: {why}");
        let mut tally = Tally::default();
        for program in self.programs {
            let tests = self.list(program)?.into_iter();
            tally
                .skipped
                .extend(tests.map(|test| (format!("{}::{test}", program.name), why.to_owned())));
        }
        Ok(tally)
    }

    /// Runs `program` as cargo would: in its crate's folder, told where that is.
    fn command(&self, program: &TestProgram) -> Command {
        let mut command = Command::new(&program.executable);
        command
            .current_dir(&program.package)
            .env("CARGO_MANIFEST_DIR", &program.package);
        command.env("CHRONOVISOR_BED", self.layout.bed()).stdin(Stdio::null());
        if self.jail {
            command.env("CHRONOVISOR_JAILED", "1");
        }
        for (name, path) in self.installed {
            match path {
                Ok(path) => command.env(name, path),
                // For the one line that says what was skipped.
                Err(error) => command.env(format!("{name}_LACK"), format!("{error:#}").replace('\n', " ")),
            };
        }
        command
    }
}

/// Puts the program's name before those of its tests.
fn named(tally: Tally, program: &TestProgram) -> Tally {
    let name = |test: String| format!("{}::{test}", program.name);
    Tally {
        passed: tally.passed,
        failed: tally.failed.into_iter().map(name).collect(),
        skipped: tally.skipped.into_iter().map(|(test, why)| (name(test), why)).collect(),
    }
}
