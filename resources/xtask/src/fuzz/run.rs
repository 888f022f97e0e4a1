//! One target under libFuzzer: its arguments, and what its log says (<https://llvm.org/docs/LibFuzzer.html>).

use std::fmt::Write;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

use super::Target;
use crate::process::bound_to_us;
use crate::progress::Progress;
use crate::setup;

/// In the target's folder of work.
pub const LOG: &str = "log";

/// Longest input, in bytes: a kernel's headers and a few segments, a body with all that a microVM can have.
const MAX_LEN: u32 = 8192;
/// An input for which a target takes longer than this has broken it: it does not end. Most take less than a millisecond; but the time
/// is the clock's, and a run may be stopped for minutes, and continued.
const TIMEOUT_S: u32 = 600;
/// A target that comes to have more than this has broken its promise to keep nothing.
const RSS_LIMIT_MIB: u32 = 1024;

/// What the repository keeps of a target's corpus: the shortest inputs, as many as fit.
const MAX_CORPUS_BYTES: u64 = 96 << 10;

/// What came of a run.
#[derive(Debug)]
pub struct Ran {
    /// Which target.
    pub target: String,
    /// How long, by the clock.
    pub seconds: u64,
    /// How long, by the CPU.
    pub cpu: Duration,
    /// Inputs tried.
    pub executions: u64,
    /// Edges of the program's control flow that were reached.
    pub coverage: u64,
    /// Inputs found in this run that reach something new.
    pub found: u64,
    /// What broke it, if something did.
    pub broke: Option<Broke>,
}

/// How a run ended before its time.
#[derive(Debug, PartialEq, Eq)]
pub struct Broke {
    /// The log's line that says what happened.
    pub says: String,
    /// The input that did it.
    pub input: Option<PathBuf>,
}

impl Ran {
    /// Above [`Ran::line`]s.
    pub const HEAD: &str = "target          seconds   CPU s    executions  coverage  new inputs";

    /// As a line of a table.
    pub fn line(&self) -> String {
        format!(
            "{:<14} {:>8} {:>7.0} {:>13} {:>9} {:>11}{}",
            self.target,
            self.seconds,
            self.cpu.as_secs_f64(),
            self.executions,
            self.coverage,
            self.found,
            if self.broke.is_some() { "  BROKE" } else { "" }
        )
    }
}

/// Runs it for `seconds`.
pub fn run(program: &Path, target: &Target, seconds: u32) -> Result<Ran> {
    let (mut command, _lock) = start(program, target)?;
    let _progress = Progress::new(format!("fuzzing {}", target.name));
    command
        .arg(&target.found)
        .args(&target.inputs)
        .arg(format!("-max_total_time={seconds}"))
        .args(["-print_final_stats=1", "-detect_leaks=0", "-verbosity=1"]);
    if target.dictionary.is_file() {
        command.arg(format!("-dict={}", target.dictionary.display()));
    }
    let started = std::time::Instant::now();
    let (status, cpu) = to_its_end(command)?;
    let seconds = started.elapsed().as_secs();
    let log = fs::read(target.work.join(LOG))?;
    let log = String::from_utf8_lossy(&log);
    let mut ran = read(&log, (!status.success()).then(|| status.to_string()))
        .with_context(|| format!("{}: see {}", target.name, target.work.join(LOG).display()))?;
    ran.target.clone_from(&target.name);
    (ran.seconds, ran.cpu) = (seconds, cpu);
    Ok(ran)
}

/// Has `fuzz/corpus` be what of all inputs reaches what any of them reaches, as much of it as shall be kept, seeds apart; what came of
/// it, in words.
pub fn minimize(program: &Path, target: &Target, source: &Path) -> Result<String> {
    let corpus = source.join("corpus").join(&target.name);
    let merged = target.work.with_extension("merged");
    remove(&merged)?;
    fs::create_dir_all(&merged)?;
    let (mut command, _lock) = start(program, target)?;
    command.args(["-merge=1", "-use_counters=0"]).arg(&merged);
    // Those of the repository first, for of two that do as much the one that is known stays.
    command.args(&target.inputs).arg(&target.found);
    let (status, _) = to_its_end(command)?;
    ensure!(
        status.success(),
        "{}: see {}",
        target.name,
        target.work.join(LOG).display()
    );
    for seed in fs::read_dir(source.join("seeds").join(&target.name))? {
        let seed = fs::read(seed?.path())?;
        for kept in fs::read_dir(&merged)? {
            let kept = kept?.path();
            if fs::read(&kept)? == seed {
                fs::remove_file(kept)?;
            }
        }
    }
    remove(&corpus)?;
    fs::create_dir_all(&corpus)?;
    let kept = fs::read_dir(&merged)?.map(|kept| {
        let kept = kept?;
        Ok((kept.metadata()?.len(), kept.file_name()))
    });
    let mut kept = kept.collect::<Result<Vec<_>>>()?;
    kept.sort();
    let (mut count, mut bytes) = (0, 0);
    for (len, name) in &kept {
        if bytes + len > MAX_CORPUS_BYTES {
            break;
        }
        fs::copy(merged.join(name), corpus.join(name))?;
        bytes += len;
        count += 1;
    }
    remove(&merged)?;
    let (name, all, corpus) = (&target.name, kept.len(), corpus.display());
    Ok(format!(
        "{name:<14} {count} inputs of {all}, {bytes} bytes, in {corpus}"
    ))
}

/// The program, to be run in a folder of its own, what it says going into a file there; and what keeps others out of the folder.
fn start(program: &Path, target: &Target) -> Result<(Command, File)> {
    fs::create_dir_all(&target.lock).with_context(|| format!("cannot make {}", target.lock.display()))?;
    let lock = setup::lock(&target.lock)?;
    // What a run that was killed left there is of no use.
    remove(&target.work)?;
    for folder in [&target.work, &target.found, &target.crashes] {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let log = File::create(target.work.join(LOG))?;
    let program = program.to_str().context("the target directory's name is not UTF-8")?;
    let mut command = bound_to_us("TERM", program);
    command
        .current_dir(&target.work)
        .env("CHRONOVISOR_FUZZ", &target.name)
        // Sockets are made in it: their paths stay short, and they go with it.
        .env("TMPDIR", ".")
        .env("RUST_BACKTRACE", "1")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .arg(format!("-artifact_prefix={}/", target.crashes.display()))
        .args([
            format!("-max_len={MAX_LEN}"),
            format!("-timeout={TIMEOUT_S}"),
            format!("-rss_limit_mb={RSS_LIMIT_MIB}"),
        ]);
    Ok((command, lock))
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// Runs `command`: how it ended, and how much CPU time it took, children that it waited for included.
fn to_its_end(mut command: Command) -> Result<(ExitStatus, Duration)> {
    let mut child = command.spawn().context("cannot run setpriv")?;
    let cpu = cpu_when_ended(&child);
    Ok((child.wait()?, cpu.unwrap_or_default()))
}

/// Waits, and reads what /proc says of a process that has ended and was not yet waited for (proc(5), stat: fields 14 to 17).
fn cpu_when_ended(child: &Child) -> Option<Duration> {
    let pid = Pid::from_child(child);
    while waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)
        .is_err_and(|e| e == rustix::io::Errno::INTR)
    {}
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    // What follows the name is field 3.
    let times = fields.split_whitespace().skip(14 - 3).take(4);
    let ticks: u64 = times.map_while(|time| time.parse::<u64>().ok()).sum();
    Some(Duration::from_millis(
        ticks * 1000 / rustix::param::clock_ticks_per_second(),
    ))
}

/// What the log says of a run that ended well, or `badly`: how.
fn read(log: &str, badly: Option<String>) -> Result<Ran> {
    let number_after = |line: &str, word: &str| -> Option<u64> {
        let (_, rest) = line.split_once(word)?;
        rest.split_whitespace().next()?.parse().ok()
    };
    let last = |word: &str| log.lines().rev().find_map(|line| number_after(line, word));
    // A run that broke ends without its statistics: then it is the number of the last line, which each begins with.
    let told = log
        .lines()
        .rev()
        .filter_map(|line| line.strip_prefix('#')?.split_whitespace().next()?.parse().ok());
    let executions = last("stat::number_of_executed_units:").or_else(|| told.max());
    let broke = badly.map(|badly| {
        let says = |line: &&str| line.contains("panicked at") || line.contains("ERROR: libFuzzer");
        let at = log.lines().position(|line| says(&line));
        // What a panic says follows the line that says where.
        let mut says = at.map_or_else(String::new, |at| {
            log.lines().skip(at).take(2).fold(String::new(), |mut text, line| {
                let _ = write!(text, "{line} ");
                text
            })
        });
        if says.is_empty() {
            says = badly;
        }
        let input = log
            .lines()
            .find_map(|line| line.split_once("Test unit written to ").map(|(_, path)| path.into()));
        Broke {
            says: says.trim_end().to_owned(),
            input,
        }
    });
    if broke.is_none() {
        ensure!(
            executions.is_some(),
            "libFuzzer's log does not say how many inputs it tried"
        );
    }
    Ok(Ran {
        target: String::new(),
        seconds: 0,
        cpu: Duration::ZERO,
        executions: executions.unwrap_or(0),
        coverage: last("cov: ").unwrap_or(0),
        found: last("stat::new_units_added:").unwrap_or(0),
        broke,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_read_from_its_log() {
        let log = "INFO: Running with entropic power schedule (0xFF, 100).\n#2\tINITED cov: 10 ft: 11 corp: 1/1b exec/s: 0 rss: 40Mb\n\
            #4096\tNEW    cov: 1230 ft: 15 corp: 2/5b lim: 4 exec/s: 0 rss: 40Mb L: 4/4 MS: 1 InsertByte-\n\
            #50000\tDONE   cov: 1234 ft: 4321 corp: 98/12Kb lim: 4096 exec/s: 4545 rss: 60Mb\nDone 50000 runs in 11 second(s)\n\
            stat::number_of_executed_units: 50000\nstat::average_exec_per_sec:     4545\nstat::new_units_added:          96\n";
        let ran = read(log, None).unwrap();
        assert_eq!((ran.executions, ran.coverage, ran.found), (50_000, 1234, 96));
        assert_eq!(ran.broke, None);
        assert!(read("nothing of use\n", None).is_err());
    }

    #[test]
    fn what_broke_a_target_is_told_with_its_input() {
        let log = "#2\tINITED cov: 10 ft: 11\n#77\tNEW    cov: 20 ft: 30 corp: 2/5b\n\
            thread '<unnamed>' (1) panicked at vmm/src/x.rs:1:2:\nattempt to add with overflow\nnote: run with\n\
            ==1== ERROR: libFuzzer: deadly signal\nartifact_prefix='/t/'; Test unit written to /t/crash-abc\n";
        let ran = read(log, Some("exit status: 77".to_owned())).unwrap();
        let broke = ran.broke.unwrap();
        assert_eq!(
            broke.says,
            "thread '<unnamed>' (1) panicked at vmm/src/x.rs:1:2: attempt to add with overflow"
        );
        assert_eq!(broke.input, Some("/t/crash-abc".into()));
        assert_eq!((ran.executions, ran.coverage), (77, 20));
        let killed = read("#2\tINITED cov: 10 ft: 11\n", Some("signal: 13 (SIGPIPE)".to_owned())).unwrap();
        let broke = killed.broke.unwrap();
        assert_eq!((broke.says.as_str(), broke.input), ("signal: 13 (SIGPIPE)", None));
    }
}
