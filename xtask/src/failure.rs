//! The note that a failed build leaves in place of a report.

use anyhow::{Context, Result};
use camino::Utf8Path;

use crate::artifact::{none_if_missing, write_atomically};

/// The file that a failed build leaves beside its results.
pub const FAILURE: &str = "failure.json";

/// Why a build failed, for the summary of several.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct BuildFailure {
    /// The stage.
    pub stage: String,
    /// Its log, relative to the workspace, if any.
    pub log: Option<String>,
    /// The error, outermost first.
    pub error: String,
}

impl BuildFailure {
    /// Removes the note of an earlier failure.
    ///
    /// # Errors
    /// When it exists and cannot be removed.
    pub fn forget(dist: &Utf8Path) -> Result<()> {
        let path = dist.join(FAILURE);
        none_if_missing(std::fs::remove_file(&path)).with_context(|| format!("removing {path}"))?;
        Ok(())
    }

    /// The note in a directory of results, if its build has failed.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    pub fn read(dist: &Utf8Path) -> Result<Option<Self>> {
        let path = dist.join(FAILURE);
        let context = || format!("reading {path}");
        let text = none_if_missing(std::fs::read(&path)).with_context(context)?;
        text.map(|text| serde_json::from_slice(&text).with_context(context)).transpose()
    }

    /// Writes the note into a directory of results.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, dist: &Utf8Path) -> Result<()> {
        let json = serde_json::to_vec_pretty(self).context("describing the failure")?;
        write_atomically(&dist.join(FAILURE), |out| Ok(out.write_all(&json)?))
    }
}
