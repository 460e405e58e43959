//! `doctor`: what this machine lacks, all at once.

use anyhow::{Result, bail};

use crate::cli::{Doctor, Format};
use crate::tools::{self, Purpose};

/// `cargo xtask doctor`.
///
/// # Errors
/// When something is missing and was not installed.
pub fn doctor(options: &Doctor) -> Result<()> {
    let purposes = [Purpose::Build, Purpose::Run, Purpose::Test];
    if options.install {
        tools::require(&purposes, true)?;
    }
    let lacking = tools::missing(&purposes);
    if options.format == Format::Json {
        println!("{}", serde_json::to_string_pretty(&lacking)?);
    }
    match (lacking.is_empty(), options.format) {
        (true, Format::Text) => println!("This machine has all that building and testing need."),
        (true, Format::Json) => {}
        (false, _) => bail!("{}", tools::describe(&lacking)),
    }
    Ok(())
}
