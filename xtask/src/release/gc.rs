//! Removes from a folder store what no release refers to any more.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use camino::Utf8PathBuf;
use serde::Serialize;

use super::format::{Channel, File, Index, Manifest};
use super::index::GRACE;
use crate::publish::directory::{Directory, UNFINISHED};
use crate::publish::{Authority, Files, load};

/// What was, or would be, removed.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Removed {
    /// Paths in the store.
    pub files: Vec<Utf8PathBuf>,
    /// Their bytes.
    pub bytes: u64,
}

/// Removes unreferenced objects and manifests and what interrupted publishers left, if they are older
/// than a day: a younger one may belong to a release that is just being published.
///
/// # Errors
/// When an index or a manifest cannot be read: nothing is removed then.
pub fn collect(store: &Directory, authority: &Authority, dry_run: bool) -> Result<Removed> {
    let mut kept = BTreeSet::new();
    for channel in Channel::ALL {
        let (Index { releases, retired, .. }, _) = load(store, channel, authority.keys())?;
        let files = releases.into_iter().map(|e| e.manifest);
        for file in files.chain(retired.into_iter().map(|r| r.manifest)) {
            references(store, &file, authority, &mut kept)?;
        }
    }
    let mut removed = Removed::default();
    for top in ["objects", "releases", "channels"] {
        let mut folders = vec![store.root().join(top)];
        while let Some(folder) = folders.pop() {
            if !folder.is_dir() {
                continue;
            }
            for entry in folder.read_dir_utf8().with_context(|| format!("reading {folder}"))? {
                let path = entry.with_context(|| format!("reading {folder}"))?.into_path();
                let metadata =
                    fs::symlink_metadata(&path).with_context(|| format!("reading {path}"))?;
                if metadata.is_dir() {
                    folders.push(path);
                    continue;
                }
                let name = path.strip_prefix(store.root()).context("a path of the store")?;
                let unfinished = path.file_name().is_some_and(|n| n.starts_with(UNFINISHED));
                let referenced = top == "channels" || kept.contains(name.as_str());
                let modified = metadata.modified().with_context(|| format!("reading {path}"))?;
                let age = SystemTime::now().duration_since(modified).unwrap_or_default();
                if (referenced && !unfinished) || age < Duration::from_secs(GRACE) {
                    continue;
                }
                if !dry_run {
                    fs::remove_file(&path).with_context(|| format!("removing {path}"))?;
                }
                removed.bytes += metadata.len();
                removed.files.push(name.to_owned());
            }
        }
    }
    removed.files.sort();
    Ok(removed)
}

fn references(
    store: &Directory,
    file: &File,
    authority: &Authority,
    kept: &mut BTreeSet<String>,
) -> Result<()> {
    let read = |path: &str| -> Result<Vec<u8>> {
        store.read(path)?.with_context(|| format!("{} lacks {path}", store.root()))
    };
    let (text, signature) = (read(&file.path)?, read(&file.signature())?);
    let manifest = Manifest::open(file, &text, &signature, authority.keys())?;
    kept.insert(file.path.clone());
    kept.insert(file.signature());
    kept.extend(manifest.objects().map(super::format::Object::path));
    Ok(())
}
