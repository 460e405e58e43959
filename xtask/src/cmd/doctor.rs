//! `doctor`: lists everything that this machine lacks.

use anyhow::{Result, bail};

use crate::cli::{DoctorArgs, OutputFormat};
use crate::tools::{self, ToolPurpose};
use crate::{outln, text};

/// `cargo xtask doctor`.
///
/// # Errors
/// When something is missing and was not installed.
pub fn doctor(options: &DoctorArgs) -> Result<()> {
    let purposes = required_purposes(options.buildroot);
    if options.install {
        tools::require_tools(&purposes, true)?;
    }
    let lacking = tools::missing_tools(&purposes);
    if options.format == OutputFormat::Json {
        outln!("{}", text::to_json(&lacking)?);
    }
    match (lacking.is_empty(), options.format) {
        (true, OutputFormat::Text) => {
            outln!("This machine has everything that building and testing need.")
        }
        (true, OutputFormat::Json) => {}
        (false, _) => bail!("{}", tools::describe_missing(&lacking)),
    }
    Ok(())
}

/// What a machine must be able to do; with `buildroot` also to build production systems.
pub fn required_purposes(buildroot: bool) -> Vec<ToolPurpose> {
    let mut purposes = vec![
        ToolPurpose::Build,
        ToolPurpose::Debian,
        ToolPurpose::Run,
        ToolPurpose::Local,
        ToolPurpose::Push,
        ToolPurpose::Flash,
        ToolPurpose::Test,
    ];
    purposes.extend(buildroot.then_some(ToolPurpose::Buildroot));
    purposes
}
