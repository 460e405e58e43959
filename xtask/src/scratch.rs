//! Temporary directories, and names that no other process uses.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use camino::Utf8PathBuf;

use crate::artifact::hash_bytes;

/// A name that no other process uses at the same time.
pub(crate) fn unique_name() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let nanoseconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    let text = format!(
        "{}-{}-{nanoseconds}-{}",
        rustix::system::uname().nodename().to_string_lossy(),
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    hash_bytes(text.as_bytes()).chars().take(16).collect()
}

/// A temporary directory for what is looked at and not kept; it goes with the first value.
///
/// # Errors
/// When no temporary directory can be made.
pub(crate) fn create_scratch_dir() -> Result<(tempfile::TempDir, Utf8PathBuf)> {
    let dir = tempfile::tempdir().context("making a temporary directory")?;
    let path = Utf8PathBuf::try_from(dir.path().to_owned()).context("the temporary directory")?;
    Ok((dir, path))
}
