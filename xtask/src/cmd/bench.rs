//! `bench`: compares our stages with the usual tools in one run, as ratios.

use std::time::SystemTime;

use anyhow::{Context, Result};
use camino::{Utf8Path, Utf8PathBuf};

use crate::bench::bundle::BundleBenchSettings;
use crate::bench::{bundle, cold, disk, flash, install};
use crate::cache::Cache;
use crate::cli::BenchArgs;
use crate::config::workspace_root;
use crate::out;
use crate::progress::say;
use crate::tools::{self, ToolPurpose};

/// How often each contender runs; the table shows medians.
const TURNS: usize = 5;

/// `cargo xtask bench`.
///
/// # Errors
/// When there is no root filesystem to measure with, or a contender fails.
pub fn bench(options: &BenchArgs) -> Result<()> {
    if options.only.as_deref() == Some("cold") {
        tools::require_tools(&[ToolPurpose::Debian], true)?;
        // Not in the cache: another disk may be faster, and the root must not be below a home
        // directory that others cannot enter.
        let dir = tempfile::Builder::new().prefix("slipway-bench-").tempdir()?;
        let dir = Utf8Path::from_path(dir.path()).context("a path that is not UTF-8")?;
        out!("{}", cold::table(&cold::run(&workspace_root()?, dir)?));
        return Ok(());
    }
    tools::require_tools(&[ToolPurpose::Test, ToolPurpose::Bench], true)?;
    let cache = Cache::locate()?;
    let payload = match &options.payload {
        Some(path) => path.clone(),
        None => newest_root(&cache)?,
    };
    // Two measurements at once disturb each other, but must not remove each other's files.
    let dir = cache.root.join(format!("bench-{}", std::process::id()));
    let wants = |name: &str| options.only.as_deref().is_none_or(|only| only == name);
    say(
        "bench",
        format!("{payload}, medians of {TURNS}; the ratios are valid on an idle machine only"),
    );
    if wants("disk") {
        out!("{}", disk::table(&disk::run(&payload, &dir, TURNS)?));
    }
    if wants("flash") {
        out!("{}", flash::table(&flash::run(&payload, &dir, TURNS)?));
    }
    if wants("install") {
        out!("{}", install::table(&install::run(&payload, &dir, TURNS)?));
    }
    if wants("bundle") {
        let settings =
            BundleBenchSettings { payload, scratch: dir.clone(), runs: TURNS, slow: options.slow };
        out!("{}", bundle::table(&bundle::run(&settings)?));
    }
    std::fs::remove_dir_all(&dir).with_context(|| format!("removing {dir}"))
}

/// The root filesystem that was composed last.
fn newest_root(cache: &Cache) -> Result<Utf8PathBuf> {
    let modified =
        |path: &Utf8Path| -> Option<SystemTime> { path.metadata().ok()?.modified().ok() };
    let composed = cache.stages().join("compose");
    let dirs = composed.read_dir_utf8().into_iter().flatten().flatten();
    dirs.map(|dir| dir.path().join("root.ext4"))
        .filter_map(|path| Some((modified(&path)?, path)))
        .max()
        .map(|(_, path)| path)
        .context(
            "there is no root filesystem to measure with\n\
             help: run `cargo xtask build-image` first, or name one with --payload",
        )
}
