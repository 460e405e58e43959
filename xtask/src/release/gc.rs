//! Removes files that no release refers to from a directory store.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use camino::Utf8PathBuf;
use serde::Serialize;

use crate::publish::{SigningAuthority, load_channel, load_manifest};
use crate::store::directory::{DirectoryStore, UNFINISHED};
use crate::store::format::{
    Channel, ChannelIndex, ReleaseManifest, ReleaseObject, RetiredRelease, StoreFile,
};
use crate::store::index::GRACE;
use crate::store::{FileStore, ReleaseStore};

/// The files that were, or would be, removed.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RemovedFiles {
    /// Paths in the store.
    pub files: Vec<Utf8PathBuf>,
    /// Their total size in bytes.
    pub bytes: u64,
}

/// Removes unreferenced objects and manifests and files of interrupted publishers, if they are
/// older than a day: younger files may belong to a release that is being published.
///
/// The files to keep are known from the indexes only. So each index must be verified, of the pinned
/// kind, and one that this machine has seen before, or a later one: else an older index would cause
/// the removal of newer releases.
///
/// # Errors
/// When an index or a manifest cannot be read, an index is older, or this machine has never seen it: nothing
/// is removed then.
pub fn collect_garbage(
    store: &DirectoryStore,
    authority: &SigningAuthority,
    dry_run: bool,
) -> Result<RemovedFiles> {
    let mut kept = BTreeSet::new();
    let (mut known, mut new) = (0, Vec::new());
    for channel in Channel::ALL {
        let seen = authority.memory().last_seen(store, channel)?;
        let (ChannelIndex { serial, releases, retired, .. }, _) =
            load_channel(store, channel, authority)?;
        match seen.iter().any(Option::is_some) {
            true => known += 1,
            false if serial > 0 => new.push(format!("{channel} (serial {serial})")),
            false => {}
        }
        for entry in &releases {
            collect_references(
                &entry.manifest,
                &load_manifest(store, entry, authority.keys())?,
                &mut kept,
            );
        }
        for RetiredRelease { product, version, manifest: file, .. } in &retired {
            let read = |path: &str| -> Result<Vec<u8>> {
                store
                    .read(path)?
                    .with_context(|| format!("{} does not contain {path}", store.root()))
            };
            let (text, signature) = (read(&file.path)?, read(&file.signature())?);
            let manifest = ReleaseManifest::open(file, &text, &signature, authority.keys())?;
            ensure!(
                (&manifest.product, &manifest.version) == (product, version),
                "{}: the manifest is of {} {}, but {channel} lists it as {product} {version}",
                file.path,
                manifest.product,
                manifest.version
            );
            collect_references(file, &manifest, &mut kept);
        }
    }
    if !dry_run && store.exists() && !authority.memory().restored() {
        let help = "help: check `release list` and `release gc --dry-run`";
        if !new.is_empty() {
            bail!(
                "nothing was removed from {}: this machine has not seen {} before, and with an \
                 older \
                 index newer releases would be deleted. The index is remembered now\n\
                 {help}; if everything is present, run this again",
                store.root(),
                new.join(", ")
            );
        }
        ensure!(
            known > 0,
            "nothing was removed from {}: the store has no index, and this machine has never seen \
             one of it\n\
             {help}; remove the directory by hand if it is not wanted",
            store.root()
        );
    }
    let mut removed = RemovedFiles::default();
    for top in ["objects", "releases", "channels"] {
        let mut dirs = vec![store.root().join(top)];
        while let Some(dir) = dirs.pop() {
            if !dir.is_dir() {
                continue;
            }
            for entry in dir.read_dir_utf8().with_context(|| format!("reading {dir}"))? {
                let path = entry.with_context(|| format!("reading {dir}"))?.into_path();
                let metadata =
                    fs::symlink_metadata(&path).with_context(|| format!("reading {path}"))?;
                if metadata.is_dir() {
                    dirs.push(path);
                    continue;
                }
                let name = path.strip_prefix(store.root()).context("a path in the store")?;
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

fn collect_references(file: &StoreFile, manifest: &ReleaseManifest, kept: &mut BTreeSet<String>) {
    kept.insert(file.path.clone());
    kept.insert(file.signature());
    kept.extend(manifest.objects().map(ReleaseObject::path));
}
