//! Unpacks packages natively, without running anything that they contain.

use std::fs;

use anyhow::{Context, Result};
use camino::Utf8Path;

use crate::exec::Tool;

/// Unpacks the files of one package into a folder.
pub(super) fn deb(package: &Utf8Path, into: &Utf8Path) -> Result<()> {
    fs::create_dir_all(into).with_context(|| format!("creating {into}"))?;
    Tool::new("dpkg-deb").arg("--extract").arg(package).arg(into).run()
}
