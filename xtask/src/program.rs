//! Which program runs: `cargo xtask` in a checkout, or `slipway`, the program for machines without one. Messages that name a
//! command take its name from here.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};

use crate::text;

/// The program for machines without a checkout.
pub const STANDALONE: &str = "slipway";

/// The tool of a checkout.
const CHECKOUT: &str = "cargo xtask";

static IS_STANDALONE: AtomicBool = AtomicBool::new(false);

/// Says that this process is [`STANDALONE`]: called once, first in its `main`.
pub fn set_standalone() {
    IS_STANDALONE.store(true, Ordering::Relaxed);
}

/// Whether this process is [`STANDALONE`]: it has no checkout, and installs nothing.
pub fn is_standalone() -> bool {
    IS_STANDALONE.load(Ordering::Relaxed)
}

/// What the user types before a verb: `slipway` or `cargo xtask`.
pub fn name() -> &'static str {
    if is_standalone() { STANDALONE } else { CHECKOUT }
}

/// Prints the error, if there is one; the exit code that says so.
pub fn exit_code(outcome: Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            crate::errln!("error: {}", text::describe_error(&error));
            ExitCode::FAILURE
        }
    }
}

/// Checks the directory for temporary files. Every program that we start inherits it, and each would report a missing one in its
/// own way.
///
/// # Errors
/// When it does not exist, or its path is not absolute.
pub fn check_temporary_directory() -> Result<()> {
    let directory = std::env::temp_dir();
    if directory.is_dir() && directory.is_absolute() {
        return Ok(());
    }
    bail!(
        "the directory for temporary files, {}, does not exist, or its path is not absolute\n\
         help: set TMPDIR to the absolute path of an existing directory, or unset it",
        directory.display()
    )
}
