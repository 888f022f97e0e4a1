//! Programs of tests/src/bin that measure `chronovisor`, and print a row of JSON a line.

use std::process::Command;

use anyhow::{Result, ensure};
use serde::de::DeserializeOwned;

use crate::build;
use crate::layout::Layout;
use crate::process::follow;
use crate::progress::Progress;

/// The rows that `program argument` prints; each is shown as it comes, in the words of `show`, if that has any.
pub fn rows<T: DeserializeOwned>(
    layout: &Layout,
    name: &str,
    argument: &str,
    show: impl Fn(&T) -> Option<String>,
) -> Result<Vec<T>> {
    let program = build::measuring(layout, name)?;
    let progress = || Progress::new(format!("{name} {argument}"));
    let mut waiting = Some(progress());
    let (mut rows, mut other) = (Vec::new(), Vec::new());
    let mut command = Command::new(&program);
    command.arg(argument).env("CHRONOVISOR_BED", layout.bed());
    let ended_well = follow(&mut command, |line| match serde_json::from_str::<T>(line) {
        Ok(row) => {
            if let Some(words) = show(&row) {
                // Its line is cleared before another is printed.
                waiting = None;
                println!("{words}");
                waiting = Some(progress());
            }
            rows.push(row);
        }
        Err(_) => other.push(line.to_owned()),
    })?;
    drop(waiting);
    ensure!(ended_well, "{} failed:\n{}", program.display(), other.join("\n"));
    Ok(rows)
}
