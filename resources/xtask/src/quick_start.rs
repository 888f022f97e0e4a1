//! `cargo xtask quick-start`: does what docs/quick-start.md tells a newcomer to do, command by command, as it stands there.
//!
//! Blocks marked `console` are typed in the source folder; those marked `console,host` one after the other in one shell of
//! the emulated host, which is where the page has its reader type them. A line that begins with `$ ` is a command, and goes on in the next
//! where it ends with a backslash. The first one that fails ends it.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::layout::Layout;
use crate::process::follow;
use crate::{bed, build, debian, setup};

const PAGE: &str = include_str!("../../../docs/quick-start.md");

/// For the part in the emulated host, which boots twice: the host, and a guest in it.
const LIMIT: Duration = Duration::from_secs(300);

/// Types it all.
pub fn quick_start(layout: &Layout) -> Result<()> {
    let script = script(PAGE, "console");
    println!("== in the source folder ==");
    let mut shell = Command::new("sh");
    shell.current_dir(&layout.root).args(["-ec", &script]);
    ensure!(
        follow(&mut shell, |line| println!("{line}"))?,
        "a command of docs/quick-start.md failed: see above"
    );
    println!("== in the emulated host ==");
    debian::install_missing()?;
    let kit = setup::setup(layout)?;
    let job = bed::Job {
        script: format!("set -e\n{}", self::script(PAGE, "console,host")),
        chronovisor: &build::chronovisor(layout)?,
        cpu: bed::Cpu::Any,
        programs: Vec::new(),
        disk: None,
        limit: LIMIT,
    };
    let outcome = bed::run(layout, &kit, &job, |line| println!("{line}")).context("in the emulated host")?;
    ensure!(
        outcome.status == 0,
        "a command of docs/quick-start.md ended with status {}: see above",
        outcome.status
    );
    Ok(())
}

/// The commands of the blocks marked `kind`, each shown before it is run.
fn script(page: &str, kind: &str) -> String {
    let mut script = String::new();
    let (mut inside, mut goes_on) = (false, false);
    for line in page.lines() {
        if let Some(mark) = line.strip_prefix("```") {
            (inside, goes_on) = (mark == kind, false);
            continue;
        }
        let command = if goes_on { Some(line) } else { line.strip_prefix("$ ") };
        let Some(command) = command.filter(|_| inside) else {
            continue;
        };
        if !goes_on {
            script += &format!("echo '$ {}'\n", command.trim_end_matches('\\').replace('\'', r"'\''"));
        }
        script += command;
        script.push('\n');
        goes_on = command.ends_with('\\');
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_taken_from_the_blocks_of_their_kind_as_they_stand() {
        let page = "```console\n$ one\nits output\n$ two \\\n  'more'\n```\n$ no\n```console,host\n$ three\n```\n```text\n$ no\n```\n";
        let expected = "echo '$ one'\none\necho '$ two '\ntwo \\\n  'more'\n";
        assert_eq!(script(page, "console"), expected);
        assert_eq!(script(page, "console,host"), "echo '$ three'\nthree\n");
    }

    #[test]
    fn the_page_has_commands_of_both_kinds() {
        assert!(script(PAGE, "console").contains("cargo xtask demo"));
        assert!(script(PAGE, "console,host").contains("chronovisor run"));
    }
}
