//! Reads one configuration file.

use anyhow::{Context, Result};
use camino::Utf8Path;

use super::reader::Source;

/// Reads one configuration file; `shown` is the path that messages use.
///
/// # Errors
/// When the file cannot be read, or is not text.
pub(super) fn source(root: &Utf8Path, shown: &Utf8Path) -> Result<Source> {
    let bytes = std::fs::read(root.join(shown)).with_context(|| format!("reading {shown}"))?;
    Source::new(shown, bytes)
}
