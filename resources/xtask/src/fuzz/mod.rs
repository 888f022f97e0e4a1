//! `cargo xtask fuzz`: targets of fuzz/ under libFuzzer, each for a while.
//!
//! The engine is LLVM's, by the crate libfuzzer-sys; the instrumentation that it steers by is a pass that stable Rust has, too. Sums
//! that overflow, and debug assertions, are panics there (`[profile.fuzz]`).
//!
//! ```text
//!  fuzz/seeds/TARGET         made by hand, or by something real
//!  fuzz/corpus/TARGET        what --minimize kept: the least that reaches what was ever reached
//!  fuzz/regressions/TARGET   whatever has broken it before
//!  fuzz/dictionaries/TARGET  words that it should know of
//!  target/fuzz/corpus/TARGET    what was found since
//!  target/fuzz/crashes/TARGET   what breaks it now
//!  target/fuzz/running/TARGET   where it runs; its log
//! ```

mod record;
mod run;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, bail, ensure};

use crate::layout::Layout;
use crate::progress::Progress;
use crate::{build, debian};
use run::Ran;

/// What libfuzzer-sys is built with: the command, and the package that has it.
const COMPILER: [(&str, &str); 1] = [("g++", "g++")];

/// Folders of the repository that hold inputs.
const KINDS: [&str; 3] = ["seeds", "corpus", "regressions"];

/// The command line.
#[derive(clap::Args)]
pub struct Fuzz {
    /// Which of them: all, if none is named
    targets: Vec<String>,
    /// How long each runs
    #[arg(long, default_value_t = 10)]
    seconds: u32,
    /// How many run at once
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// Afterwards, have fuzz/corpus be what reaches all that was reached, and no more
    #[arg(long)]
    minimize: bool,
    /// Add the runs to docs/fuzz.md
    #[arg(long)]
    record: bool,
}

/// Folders of one target.
struct Target {
    name: String,
    /// In the repository, those that are there.
    inputs: Vec<PathBuf>,
    dictionary: PathBuf,
    found: PathBuf,
    crashes: PathBuf,
    work: PathBuf,
    lock: PathBuf,
}

impl Target {
    fn new(layout: &Layout, name: &str) -> Self {
        let (source, made) = (layout.root.join("fuzz"), layout.target.join("fuzz"));
        let inputs = KINDS.map(|kind| source.join(kind).join(name));
        Self {
            name: name.to_owned(),
            inputs: inputs.into_iter().filter(|folder| folder.is_dir()).collect(),
            dictionary: source.join("dictionaries").join(name),
            found: made.join("corpus").join(name),
            crashes: made.join("crashes").join(name),
            work: made.join("running").join(name),
            lock: made.join("locks").join(name),
        }
    }
}

impl Fuzz {
    /// Builds, runs, and says what came of it. True if nothing broke.
    pub fn run(&self, layout: &Layout) -> Result<bool> {
        let targets = self.targets(layout)?;
        debian::install(&COMPILER)?;
        let program = {
            let _progress = Progress::new("building the fuzzers");
            build::fuzzers(layout)?
        };
        let mut all_well = true;
        if self.seconds > 0 {
            println!("{}", Ran::HEAD);
            let queue = Mutex::new(targets.iter());
            // Held while one is told of: what is on the terminal, and in the report, is whole lines.
            let told = Mutex::new(Ok(true));
            std::thread::scope(|scope| {
                for _ in 0..self.jobs.clamp(1, targets.len()) {
                    scope.spawn(|| {
                        loop {
                            let next = queue.lock().expect("no holder of this lock panics").next();
                            let Some(target) = next else { break };
                            let ran = run::run(&program, target, self.seconds);
                            let mut told = told.lock().expect("no holder of this lock panics");
                            let well = ran.and_then(|ran| self.tell(layout, &program, target, &ran));
                            *told = match (std::mem::replace(&mut *told, Ok(true)), well) {
                                (Ok(before), Ok(well)) => Ok(before && well),
                                (Err(error), _) | (_, Err(error)) => Err(error),
                            };
                        }
                    });
                }
            });
            all_well = told.into_inner().expect("no holder of this lock panics")?;
        }
        if self.minimize {
            for target in &targets {
                let _progress = Progress::new(format!("minimizing the corpus of {}", target.name));
                println!("{}", run::minimize(&program, target, &layout.root.join("fuzz"))?);
            }
        }
        Ok(all_well)
    }

    fn targets(&self, layout: &Layout) -> Result<Vec<Target>> {
        let seeds = layout.root.join("fuzz/seeds");
        let names = names_in(&seeds)?;
        if let Some(unknown) = self.targets.iter().find(|name| !names.contains(name)) {
            bail!("there is no target {unknown}: there are {}", names.join(", "));
        }
        // In the order in which they are named.
        let wanted = if self.targets.is_empty() { &names } else { &self.targets };
        Ok(wanted.iter().map(|name| Target::new(layout, name)).collect())
    }

    fn tell(&self, layout: &Layout, program: &Path, target: &Target, ran: &Ran) -> Result<bool> {
        println!("{}", ran.line());
        if self.record {
            record::add(layout, ran)?;
        }
        let Some(broke) = &ran.broke else { return Ok(true) };
        println!("\n{} broke: {}", ran.target, broke.says);
        match &broke.input {
            Some(input) => println!(
                "  the input   {input}\n  once more   CHRONOVISOR_FUZZ={} {} {input}\n  for good    mkdir -p fuzz/regressions/{0} && cp \
                 {input} fuzz/regressions/{0}/ && cargo test -p fuzz",
                ran.target,
                program.display(),
                input = input.display(),
            ),
            None => println!("  no input was kept"),
        }
        println!("  the log     {}\n", target.work.join(run::LOG).display());
        Ok(false)
    }
}

fn names_in(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut names = entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<_>>>()?;
    names.sort();
    ensure!(!names.is_empty(), "{} is empty", folder.display());
    Ok(names)
}
