//! `verify`: says whether every byte of an image or a bundle is right.

use anyhow::{Result, bail};

use crate::cli::{Format, Verify};
use crate::inspect::{Subject, subject};
use crate::verify::{verify_bundle, verify_image};
use crate::{outln, text};

/// `cargo xtask verify`. Exit status 0 means that every byte was checked and is right.
///
/// # Errors
/// Whatever is wrong.
pub fn verify(options: &Verify) -> Result<()> {
    let result = match subject(&options.file)? {
        Subject::Bundle => verify_bundle(&options.file, options.keys.as_deref())?,
        Subject::Image => verify_image(&options.file)?,
        Subject::SlotImage => bail!(
            "{} is a slot image: nothing in it says what it should be\n\
             help: verify the bundle or the card image that holds it",
            options.file
        ),
    };
    match options.format {
        Format::Json => outln!("{}", text::json(&result.0)?),
        Format::Text => outln!("{}", result.1),
    }
    Ok(())
}
