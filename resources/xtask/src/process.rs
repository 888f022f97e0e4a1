//! Child processes: they end when we do, and their output is followed.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

/// `program`, to be sent `signal` by the kernel when the thread that starts it, which must be the main one, is gone:
/// however we end, it does not outlive us. By setpriv, of util-linux, which every Debian has.
pub fn bound_to_us(signal: &str, program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", signal, "--", program]);
    command
}

/// Runs `command` and hands on each line it prints. True if it ended well.
pub fn follow(command: &mut Command, mut on_line: impl FnMut(&str)) -> Result<bool> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {name}"))?;
    let output = child.stdout.take().context("no stdout")?;
    for line in BufReader::new(output).split(b'\n') {
        on_line(&String::from_utf8_lossy(&line?));
    }
    Ok(child.wait()?.success())
}
