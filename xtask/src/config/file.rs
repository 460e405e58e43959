//! Reads one configuration file.

use anyhow::{Context, Result};
use camino::Utf8Path;

use super::reader::ConfigSource;

/// Reads one configuration file; `shown` is the path that messages use.
///
/// # Errors
/// When the file cannot be read, or is not text.
pub(super) fn read_source(root: &Utf8Path, shown: &Utf8Path) -> Result<ConfigSource> {
    let bytes = std::fs::read(root.join(shown)).with_context(|| format!("reading {shown}"))?;
    ConfigSource::new(shown, bytes)
}
