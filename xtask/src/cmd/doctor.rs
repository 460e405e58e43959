//! `doctor`: lists everything that this machine lacks.

use anyhow::{Result, bail};

use crate::cli::{Doctor, Format};
use crate::tools::{self, Purpose};
use crate::{outln, text};

/// `cargo xtask doctor`.
///
/// # Errors
/// When something is missing and was not installed.
pub fn doctor(options: &Doctor) -> Result<()> {
    let purposes = purposes(options.buildroot);
    if options.install {
        tools::require(&purposes, true)?;
    }
    let lacking = tools::missing(&purposes);
    if options.format == Format::Json {
        outln!("{}", text::json(&lacking)?);
    }
    match (lacking.is_empty(), options.format) {
        (true, Format::Text) => {
            outln!("This machine has everything that building and testing need.")
        }
        (true, Format::Json) => {}
        (false, _) => bail!("{}", tools::describe(&lacking)),
    }
    Ok(())
}

/// What a machine must be able to do; with `buildroot` also to build production systems.
pub fn purposes(buildroot: bool) -> Vec<Purpose> {
    let mut purposes = vec![
        Purpose::Build,
        Purpose::Debian,
        Purpose::Run,
        Purpose::Local,
        Purpose::Push,
        Purpose::Flash,
        Purpose::Test,
    ];
    purposes.extend(buildroot.then_some(Purpose::Buildroot));
    purposes
}
