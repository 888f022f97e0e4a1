//! docs/fuzz.md: how long each target has run, in all, and what came of it. Made of fuzz/runs.tsv, to which each run that is
//! recorded adds a line.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::run::Ran;
use crate::layout::Layout;
use crate::machine::Machine;

const HEAD: &str = "date\tmachine\ttarget\tseconds\tcpu_seconds\texecutions\tcoverage\tbroke\n";

/// Adds a run to both.
pub fn add(layout: &Layout, ran: &Ran) -> Result<()> {
    let path = layout.root.join("fuzz/runs.tsv");
    let mut runs = fs::read_to_string(&path).unwrap_or_else(|_| HEAD.to_owned());
    let machine = Machine::look();
    let broke = ran.broke.as_ref().map_or("no", |_| "yes");
    writeln!(
        runs,
        "{}\t{}, Linux {}\t{}\t{}\t{}\t{}\t{}\t{broke}",
        machine.date,
        machine.cpus,
        machine.kernel,
        ran.target,
        ran.seconds,
        ran.cpu.as_secs(),
        ran.executions,
        ran.coverage,
    )?;
    put(&path, &runs)?;
    put(&layout.root.join("docs/fuzz.md"), &page(&runs)?)
}

fn put(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// What a target has run, in all.
#[derive(Debug, Default)]
struct Sum {
    runs: u64,
    seconds: u64,
    cpu_seconds: u64,
    executions: u64,
    coverage: u64,
    broke: u64,
}

fn page(runs: &str) -> Result<String> {
    let mut sums: BTreeMap<&str, Sum> = BTreeMap::new();
    let mut last = ("", "");
    for line in runs.lines().skip(1) {
        let fields: Vec<&str> = line.split('\t').collect();
        let &[date, machine, target, seconds, cpu_seconds, executions, coverage, broke] = fields.as_slice() else {
            anyhow::bail!("fuzz/runs.tsv: not a run: {line:?}");
        };
        let number = |text: &str| {
            text.parse::<u64>()
                .with_context(|| format!("fuzz/runs.tsv: {text:?} in {line:?}"))
        };
        let sum = sums.entry(target).or_default();
        sum.runs += 1;
        sum.seconds += number(seconds)?;
        sum.cpu_seconds += number(cpu_seconds)?;
        sum.executions += number(executions)?;
        // What a later run starts from reaches what earlier ones did.
        sum.coverage = number(coverage)?;
        sum.broke += u64::from(broke == "yes");
        last = (date, machine);
    }
    let (date, machine) = last;
    let mut page = format!(
        "# What was fuzzed, and for how long\n\n\
         By `cargo xtask fuzz --seconds N --record`, the last run {date}, on {machine}. What the targets are, and what they hold the\n\
         program to, is in `fuzz/README.md`. Coverage is edges of the control flow that the target's inputs reach, libraries' included. \
         What\nbroke a target is in `fuzz/regressions` since, which every run of the tests replays.\n\n\
         | target | runs | minutes | CPU minutes | executions | coverage | broke |\n|---|---:|---:|---:|---:|---:|---:|\n"
    );
    for (target, sum) in &sums {
        writeln!(
            page,
            "| `{target}` | {} | {:.1} | {:.1} | {} | {} | {} |",
            sum.runs,
            minutes(sum.seconds),
            minutes(sum.cpu_seconds),
            grouped(sum.executions),
            grouped(sum.coverage),
            sum.broke
        )?;
    }
    let executions = sums.values().map(|sum| sum.executions).sum();
    writeln!(page, "\n{} executions in all.", grouped(executions))?;
    Ok(page)
}

#[expect(clippy::cast_precision_loss, reason = "it is written with one decimal")]
fn minutes(seconds: u64) -> f64 {
    seconds as f64 / 60.0
}

/// With a comma before each three digits.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_add_up() {
        let run = |target: &str, numbers: &str| format!("2026-01-01 00:00 UTC\ta machine\t{target}\t{numbers}\n");
        let runs = [
            HEAD.to_owned(),
            run("mmds", "900\t600\t1000000\t500\tno"),
            run("http", "60\t50\t7\t9\tyes"),
            run("mmds", "900\t840\t234567\t512\tno"),
        ];
        let page = page(&runs.concat()).unwrap();
        assert!(
            page.contains("| `mmds` | 2 | 30.0 | 24.0 | 1,234,567 | 512 | 0 |"),
            "{page}"
        );
        assert!(page.contains("| `http` | 1 | 1.0 | 0.8 | 7 | 9 | 1 |"), "{page}");
        assert!(page.ends_with("1,234,574 executions in all.\n"), "{page}");
        assert!(super::page("head\nnonsense\n").is_err());
    }
}
