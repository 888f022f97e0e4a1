//! `cargo xtask faults`: has every fault point of a start fail, one at a time. tests/src/bin/faults.rs does; its report goes to
//! docs/faults.md.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::build;
use crate::layout::Layout;
use crate::machine::Machine;
use crate::process::follow;

const PROMISE: &str = "
Each system call that a start makes, from the first one of `main` on, is made to fail once, with each error that it may well meet: the
kernel asks a supervisor before it does the call (seccomp's user notification), so that the program is the one that ships. A start
then keeps one of two promises.

* It is *refused*: one line on standard error that says what failed, a status that is not 0, and nothing is left behind: no socket, no
  tap, no mount, no cgroup, no process.
* It *went on*, since what failed is tried again, or has another way, or is not needed: then it answers, its readings keep the laws, and
  it ends when its guest does, with its guest's status, and leaves nothing behind either.

*Not reached*: threads share these calls, so that some of them make one fewer, or in another order, than the start that was counted.

Calls of the running guest and of its end are among them: a KVM_RUN that fails ends the microVM (status 5).
";

/// Makes them fail, and writes the report.
pub fn faults(layout: &Layout, every: u32) -> Result<()> {
    let program = build::of_tests(layout, "faults")?;
    let mut report = String::new();
    let mut command = Command::new(&program);
    command.arg(every.to_string()).env("CHRONOVISOR_BED", layout.bed());
    let kept = follow(&mut command, |line| {
        println!("{line}");
        report += line;
        report.push('\n');
    })?;
    let Machine { date, cpus, kernel } = Machine::look();
    let path = layout.root.join("docs/faults.md");
    let head = format!(
        "# Faults, one at a time\n\nBy `cargo xtask faults --every {every}`, {date}, on {cpus}, Linux {kernel}: each fault point for 1, \
         every seventh for 7.\n{PROMISE}\n"
    );
    fs::write(&path, head + &report).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{}", path.display());
    ensure!(kept, "some starts did not keep the promise: they are named above");
    Ok(())
}
