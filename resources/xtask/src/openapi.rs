//! `cargo xtask openapi`: writes resources/openapi.json from the code.
//!
//! What writes it is a test of `api`, which else compares: the types say what they look like in tests only, so that the program
//! has nothing of it.

use anyhow::{Context, Result, ensure};

use crate::build;
use crate::layout::Layout;

/// The test, which tells of each type.
const WRITER: &str = "routes::openapi::document::the_committed_document_is_what_the_code_says";
/// What has it write.
const WRITE: &str = "CHRONOVISOR_WRITE_OPENAPI";

/// Writes the document, and says where it is.
pub fn write(layout: &Layout) -> Result<()> {
    let mut command = build::unit_test(layout, "api", WRITER);
    let output = command.env(WRITE, "1").output().context("cannot run cargo")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let wrote = output.status.success() && said.contains("1 passed");
    ensure!(
        wrote,
        "{WRITER} wrote nothing:\n{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    println!("{}", layout.root.join("resources/openapi.json").display());
    Ok(())
}
