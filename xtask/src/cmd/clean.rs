//! `clean`: removes what can be rebuilt, and reports its size.

use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result};
use camino::{Utf8Path, Utf8PathBuf};

use crate::cache::Cache;
use crate::cli::CleanArgs;
use crate::config::workspace_root;
use crate::progress::{format_bytes, say};
use crate::release::LOCAL;

/// `cargo xtask clean`. Removes results, on request kept stages and downloads; never releases, keys, locks
/// or anything outside `dist/` and the cache.
///
/// # Errors
/// When something cannot be removed.
pub fn clean(options: &CleanArgs) -> Result<()> {
    let cache = Cache::locate()?;
    let root = workspace_root()?;
    let mut paths = list_results(&root.join("dist"), &root.join(LOCAL))?;
    if options.stages {
        paths.extend(["stages", "tools", "apt", "bench"].map(|name| cache.root.join(name)));
    }
    if options.downloads {
        paths.push(cache.root.join("downloads"));
    }
    for path in paths.iter().filter(|p| p.exists()) {
        let size = format_bytes(disk_usage(path)?);
        if options.dry_run {
            say("clean", format!("would remove {path} ({size})"));
        } else {
            remove_path(path)?;
            say("clean", format!("removed {path} ({size})"));
        }
    }
    Ok(())
}

/// What is in `dist/` except the releases: a build of another commit cannot reproduce those.
fn list_results(dist: &Utf8Path, releases: &Utf8Path) -> Result<Vec<Utf8PathBuf>> {
    if !dist.is_dir() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in dist.read_dir_utf8().with_context(|| format!("reading {dist}"))? {
        found.push(entry.with_context(|| format!("reading {dist}"))?.into_path());
    }
    found.retain(|path| path != releases && path.is_dir());
    found.sort();
    Ok(found)
}

fn remove_path(path: &Utf8Path) -> Result<()> {
    std::fs::remove_dir_all(path).with_context(|| format!("removing {path}"))
}

/// The disk usage of a directory in bytes: images are sparse.
fn disk_usage(dir: &Utf8Path) -> Result<u64> {
    let mut total = 0;
    let mut dirs: Vec<Utf8PathBuf> = vec![dir.to_owned()];
    while let Some(directory) = dirs.pop() {
        for entry in directory.read_dir_utf8().with_context(|| format!("reading {directory}"))? {
            let entry = entry.with_context(|| format!("reading {directory}"))?;
            let metadata = entry.metadata().with_context(|| format!("reading {}", entry.path()))?;
            if metadata.is_dir() {
                dirs.push(entry.into_path());
            } else {
                // st_blocks counts 512-byte units whatever the filesystem's block size (stat(2)).
                total += metadata.blocks() * 512;
            }
        }
    }
    Ok(total)
}
