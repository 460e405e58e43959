//! Environment variables that configure this program: the one place that reads them.

use std::env::VarError;

use anyhow::{Result, bail};

/// The value of a variable; `None` when it is not set, or empty: CI systems export what is not set as an empty text.
///
/// # Errors
/// As [`find_or_empty`].
pub fn find(name: &str) -> Result<Option<String>> {
    Ok(find_or_empty(name)?.filter(|value| !value.is_empty()))
}

/// The value of a variable, which may be empty; `None` when it is not set.
///
/// # Errors
/// When it is not UTF-8. Without an error, the program would silently use another directory, server or password than the
/// user has set.
pub fn find_or_empty(name: &str) -> Result<Option<String>> {
    match std::env::var(name) {
        Ok(value) => Ok(Some(value)),
        Err(VarError::NotPresent) => Ok(None),
        // The value may be a password.
        Err(VarError::NotUnicode(_)) => bail!(
            "the value of the environment variable {name} is not UTF-8\n\
             help: set {name} to a value in UTF-8, or unset it"
        ),
    }
}
