//! `check` and `test`: the same commands for a developer and for CI.

use anyhow::{Context, Result, bail};
use xshell::Shell;

use crate::cli::Test;
use crate::config::workspace_root;
use crate::progress::say;
use crate::tools::{self, Purpose};

/// Asks the system tests for what is too slow for every run.
pub const ALL: &str = "SLIPWAY_TEST_ALL";

/// `cargo xtask check`.
///
/// # Errors
/// When formatting or a lint is wrong.
pub fn check() -> Result<()> {
    cargo("formatting", &["fmt", "--all", "--check"], false)?;
    cargo(
        "lints",
        &["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"],
        false,
    )?;
    cargo("house rules", &["test", "--quiet", "--package", "xtask", "--test", "tidy"], false)
}

/// `cargo xtask test`.
///
/// # Errors
/// When something is missing or a test fails.
pub fn test(options: &Test) -> Result<()> {
    let mut purposes = vec![Purpose::Build, Purpose::Run, Purpose::Test];
    if options.all {
        purposes.push(Purpose::TestAll);
    }
    tools::require(&purposes, !options.no_install)?;
    check()?;
    cargo("tests", &["test", "--workspace"], options.all)?;
    if !options.quick {
        // One at a time: each builds an image or boots one, and says what it does meanwhile.
        let system = ["test", "--package", "xtask", "--test", "system", "--", "--nocapture"];
        cargo("system tests", &[&system[..], &["--test-threads=1"]].concat(), options.all)?;
    }
    Ok(())
}

fn cargo(what: &str, arguments: &[&str], all: bool) -> Result<()> {
    say("test", what);
    let shell = Shell::new().context("starting cargo")?;
    shell.change_dir(workspace_root()?);
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    // What it prints is the result, so it goes to this very terminal.
    let mut command: std::process::Command = shell.cmd(cargo).args(arguments).into();
    if all {
        command.env(ALL, "1");
    }
    let status = command.status().context("running cargo")?;
    if !status.success() {
        bail!("{what}: cargo {} failed: {status}", arguments.join(" "));
    }
    Ok(())
}
