//! `bench`: runs the crate `bench`, which no other verb compiles.

use std::os::unix::process::CommandExt;

use anyhow::{Context, Result};

use crate::config::workspace_root;
use crate::exec::Tool;

/// `cargo xtask bench`: becomes that program, with the same arguments.
///
/// # Errors
/// When cargo cannot be started.
pub fn bench() -> Result<()> {
    let manifest = workspace_root()?.join("Cargo.toml");
    let tool = Tool::cargo()
        .with_tests()
        .args(["run", "--quiet", "--manifest-path", manifest.as_str(), "--package", "bench", "--"])
        // The verb is always the first argument.
        .args(std::env::args().skip(2));
    let command_line = tool.command_line();
    Err(tool.into_command().exec()).with_context(|| format!("running {command_line}"))
}
