//! `release create`: creates a signed release in the local store from verified results.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use bundle::Version;
use camino::Utf8Path;
use serde::Serialize;

use super::LOCAL;
use super::collect::{self, CollectedBuild};
use super::notes::{self, PastRelease};
use crate::artifact::Artifact;
use crate::build::Program;
use crate::program;
use crate::publish::{self, SigningAuthority, change_channel, load_channel};
use crate::scratch::create_scratch_dir;
use crate::store::directory::DirectoryStore;
use crate::store::format::{
    Channel, ChannelEntry, ChannelIndex, ReleaseManifest, ReleaseObject, StoreFile,
};
use crate::store::index::Retention;
use crate::store::{FileStore, ReleaseStore};
use crate::time::now;

/// What to release.
#[derive(Debug)]
pub struct ReleaseRequest<'a> {
    /// The workspace.
    pub root: &'a Utf8Path,
    /// The product.
    pub product: &'a str,
    /// Boards; empty: all boards of the product.
    pub boards: &'a [String],
    /// The target channel.
    pub channel: Channel,
    /// Which releases to keep.
    pub retention: Retention,
    /// Also accept results that were built from uncommitted changes.
    pub allow_changes: bool,
    /// Makes the programs of the release: [`crate::build::programs`].
    pub programs: fn(&Utf8Path, Option<&str>, bool) -> Result<Vec<Program>>,
}

/// A created release.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CreatedRelease {
    /// The channel.
    pub channel: Channel,
    /// It existed already, with the same content.
    pub existed: bool,
    /// Its entry in the channel.
    pub entry: ChannelEntry,
    /// The release.
    pub manifest: ReleaseManifest,
}

/// The local store.
pub fn local_store(root: &Utf8Path) -> DirectoryStore {
    DirectoryStore::new(&root.join(LOCAL))
}

/// Makes a release from the build results, and adds it to a channel.
///
/// # Errors
/// When a result is missing or damaged, the version does not increase, or there is no key for its
/// kind.
pub fn create_release(
    request: &ReleaseRequest<'_>,
    authority: &mut SigningAuthority,
) -> Result<CreatedRelease> {
    let store = local_store(request.root);
    let collected = collect::collect_builds(
        request.root,
        request.product,
        request.boards,
        authority.keys(),
        request.allow_changes,
    )?;
    // Check early: the channel would reject the release in the end anyway.
    authority.pins().check_product(request.channel, &collected.product, collected.kind)?;
    authority.begin(&store)?;
    let mut channels = BTreeMap::new();
    for channel in Channel::ALL {
        channels.insert(channel, load_channel(&store, channel, authority)?.0);
    }
    if let Some(created) = find_existing(&store, &channels, &collected, request.channel, authority)?
    {
        return Ok(created);
    }
    let past = find_past_release(&store, &channels, &collected, request.channel, authority)?;
    let text = notes::write_notes(request.root, &collected, past.as_ref())?;
    let (_keep, dir) = create_scratch_dir()?;
    let notes_file = dir.join("notes.md");
    std::fs::write(&notes_file, &text).context("writing the notes")?;
    let written = Artifact::from_file(&notes_file)?;
    let mut sources = collected.sources.clone();
    sources.insert(written.sha256.clone(), notes_file);
    let name = format!("{}-{}.md", collected.product, collected.version);
    let notes = ReleaseObject {
        role: "notes".to_owned(),
        name,
        size: written.size,
        sha256: written.sha256,
        unpacked: None,
    };
    let made =
        (request.programs)(request.root, collected.commit.as_deref(), request.allow_changes)?;
    let mut programs = Vec::new();
    for Program { name, binary, .. } in made {
        let Artifact { path, size, sha256 } = binary;
        sources.insert(sha256.clone(), path);
        programs.push(ReleaseObject {
            role: "program".to_owned(),
            name,
            size,
            sha256,
            unpacked: None,
        });
    }
    let manifest = ReleaseManifest {
        format: ReleaseManifest::format_of(&programs),
        product: collected.product.clone(),
        title: collected.title.clone(),
        version: collected.version.clone(),
        kind: collected.kind,
        commit: collected.commit.clone(),
        epoch: collected.epoch,
        previous: past.map(|past| past.manifest.version),
        notes,
        boards: collected.boards.clone(),
        programs,
    };
    let wanted: Vec<(String, u64)> =
        manifest.objects().map(|o| (o.sha256.clone(), o.size)).collect();
    let present = store.present(&wanted)?;
    for (sha256, _) in wanted.iter().filter(|(sha256, _)| !present.contains(sha256)) {
        let source = sources.get(sha256).context("every object has a source")?;
        store.put(sha256, source)?;
    }
    let text = manifest.to_text()?;
    let signature = manifest.sign(&text, authority.signer(manifest.kind)?);
    let file = StoreFile::manifest(&manifest.product, &manifest.version, &text);
    store.write(&file.signature(), &signature)?;
    store.write(&file.path, &text)?;
    let entry = ChannelEntry {
        product: manifest.product.clone(),
        version: manifest.version.clone(),
        kind: manifest.kind,
        commit: manifest.commit.clone(),
        added: now()?,
        manifest: file,
        yanked: None,
    };
    add_to_channel(&store, request.channel, &entry, request.retention, authority)?;
    Ok(CreatedRelease { channel: request.channel, existed: false, entry, manifest })
}

/// Adds a release whose files exist to a channel. Returns whether it was not in the channel yet.
///
/// # Errors
/// When the version does not increase.
pub fn add_to_channel(
    store: &dyn ReleaseStore,
    channel: Channel,
    entry: &ChannelEntry,
    retention: Retention,
    authority: &mut SigningAuthority,
) -> Result<bool> {
    let add = |current: &ChannelIndex, _: &mut SigningAuthority| -> Result<Option<ChannelIndex>> {
        if current
            .find(&entry.product, &entry.version)
            .is_some_and(|e| e.manifest == entry.manifest)
        {
            return Ok(None);
        }
        let mut next = current.clone();
        next.add(entry.clone())?;
        next.retain(retention, entry.added);
        Ok(Some(next))
    };
    change_channel(store, channel, authority, add, |_, _| Ok(()))
        .with_context(|| format!("adding {} {} to {channel}", entry.product, entry.version))
}

/// The same release from an earlier call.
fn find_existing(
    store: &DirectoryStore,
    channels: &BTreeMap<Channel, ChannelIndex>,
    collected: &CollectedBuild,
    channel: Channel,
    authority: &SigningAuthority,
) -> Result<Option<CreatedRelease>> {
    for (found, index) in channels {
        let Some(entry) = index.find(&collected.product, &collected.version) else { continue };
        let manifest = publish::load_manifest(store, entry, authority.keys())?;
        ensure!(
            manifest.boards == collected.boards && manifest.commit == collected.commit,
            "{} {} is in the channel {found} with other content\n\
             help: versions must increase: raise `version` in configs/{}.toml, or build with \
             --nightly",
            collected.product,
            collected.version,
            collected.product
        );
        if *found == channel {
            let entry = entry.clone();
            return Ok(Some(CreatedRelease { channel, existed: true, entry, manifest }));
        }
        bail!(
            "{} {} is already in the channel {found}\n\
             help: cargo xtask release promote {} --product {} --to {channel}",
            collected.product,
            collected.version,
            collected.version,
            collected.product
        );
    }
    Ok(None)
}

/// The release to compare with: the newest one below this version, preferably in this channel.
fn find_past_release(
    store: &DirectoryStore,
    channels: &BTreeMap<Channel, ChannelIndex>,
    collected: &CollectedBuild,
    channel: Channel,
    authority: &SigningAuthority,
) -> Result<Option<PastRelease>> {
    let newest = |index: &ChannelIndex| -> Option<ChannelEntry> {
        let mut older = index
            .releases_of(&collected.product)
            .filter(|e| e.version < collected.version && e.yanked.is_none());
        older.next_back().cloned()
    };
    let own = channels.get(&channel).and_then(newest);
    let any = || channels.values().filter_map(newest).max_by(|a, b| a.version.cmp(&b.version));
    let Some(entry) = own.or_else(any) else { return Ok(None) };
    Ok(Some(PastRelease::read(store, &entry, authority.keys())?))
}

/// Parses a version from the command line.
///
/// # Errors
/// When it is invalid.
pub fn parse_version(text: &str) -> Result<Version> {
    Version::parse(text).ok().with_context(|| {
        format!(
            "`{text}` is not a version such as 1.2.0 or 1.2.0-rc.1\n\
             help: `{} release list` shows the versions",
            program::name()
        )
    })
}
