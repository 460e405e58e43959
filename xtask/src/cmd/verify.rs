//! `verify`: checks an image against its block map and tables, or a bundle against its signatures.

use anyhow::{Result, bail};

use crate::cli::{OutputFormat, VerifyArgs};
use crate::inspect::{OutputFileKind, detect_kind};
use crate::verify::{verify_bundle, verify_image};
use crate::{outln, text};

/// `cargo xtask verify`. Exit status 0 means that every byte was checked and is correct.
///
/// # Errors
/// Whatever is wrong.
pub fn verify(options: &VerifyArgs) -> Result<()> {
    let result = match detect_kind(&options.file)? {
        OutputFileKind::Bundle => verify_bundle(&options.file, options.keys.as_deref())?,
        OutputFileKind::Image => verify_image(&options.file)?,
        OutputFileKind::SlotImage => bail!(
            "{} is a slot image, which contains no hashes or signatures of its own\n\
             help: verify the bundle or the card image that contains it",
            options.file
        ),
    };
    match options.format {
        OutputFormat::Json => outln!("{}", text::to_json(&result.0)?),
        OutputFormat::Text => outln!("{}", result.1),
    }
    Ok(())
}
