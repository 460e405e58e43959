//! `release create`: creates a signed release in the local store from verified results.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use bundle::Version;
use camino::Utf8Path;
use serde::Serialize;

use super::LOCAL;
use super::collect::{self, Collected};
use super::notes::{self, Past};
use crate::artifact::Artifact;
use crate::build::Program;
use crate::publish::{self, Authority, change, load};
use crate::scratch::scratch;
use crate::store::directory::Directory;
use crate::store::format::{Channel, Entry, File, Index, Manifest, Object};
use crate::store::index::Retention;
use crate::store::{Files, Store};
use crate::time::now;

/// What to release.
#[derive(Debug)]
pub struct Request<'a> {
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
pub struct Created {
    /// The channel.
    pub channel: Channel,
    /// It existed already, with the same content.
    pub existed: bool,
    /// Its entry in the channel.
    pub entry: Entry,
    /// The release.
    pub manifest: Manifest,
}

/// The local store.
pub fn local(root: &Utf8Path) -> Directory {
    Directory::new(&root.join(LOCAL))
}

/// Makes a release from the build results, and adds it to a channel.
///
/// # Errors
/// When a result is missing or damaged, the version does not increase, or there is no key for its
/// kind.
pub fn create(request: &Request<'_>, authority: &mut Authority) -> Result<Created> {
    let store = local(request.root);
    let collected = collect::collect(
        request.root,
        request.product,
        request.boards,
        authority.keys(),
        request.allow_changes,
    )?;
    // Check early: the channel would reject the release in the end anyway.
    authority.pins().fits(request.channel, &collected.product, collected.kind)?;
    authority.begin(&store)?;
    let mut channels = BTreeMap::new();
    for channel in Channel::ALL {
        channels.insert(channel, load(&store, channel, authority)?.0);
    }
    if let Some(created) = existing(&store, &channels, &collected, request.channel, authority)? {
        return Ok(created);
    }
    let past = past(&store, &channels, &collected, request.channel, authority)?;
    let text = notes::notes(request.root, &collected, past.as_ref())?;
    let (_keep, dir) = scratch()?;
    let notes_file = dir.join("notes.md");
    std::fs::write(&notes_file, &text).context("writing the notes")?;
    let written = Artifact::of(&notes_file)?;
    let mut sources = collected.sources.clone();
    sources.insert(written.sha256.clone(), notes_file);
    let name = format!("{}-{}.md", collected.product, collected.version);
    let notes = Object {
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
        programs.push(Object { role: "program".to_owned(), name, size, sha256, unpacked: None });
    }
    let manifest = Manifest {
        format: Manifest::format_of(&programs),
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
    let file = File::manifest(&manifest.product, &manifest.version, &text);
    store.write(&file.signature(), &signature)?;
    store.write(&file.path, &text)?;
    let entry = Entry {
        product: manifest.product.clone(),
        version: manifest.version.clone(),
        kind: manifest.kind,
        commit: manifest.commit.clone(),
        added: now()?,
        manifest: file,
        yanked: None,
    };
    put(&store, request.channel, &entry, request.retention, authority)?;
    Ok(Created { channel: request.channel, existed: false, entry, manifest })
}

/// Adds a release whose files exist to a channel. Returns whether it was not in the channel yet.
///
/// # Errors
/// When the version does not increase.
pub fn put(
    store: &dyn Store,
    channel: Channel,
    entry: &Entry,
    retention: Retention,
    authority: &mut Authority,
) -> Result<bool> {
    let add = |current: &Index, _: &mut Authority| -> Result<Option<Index>> {
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
    change(store, channel, authority, add, |_, _| Ok(()))
        .with_context(|| format!("adding {} {} to {channel}", entry.product, entry.version))
}

/// The same release from an earlier call.
fn existing(
    store: &Directory,
    channels: &BTreeMap<Channel, Index>,
    collected: &Collected,
    channel: Channel,
    authority: &Authority,
) -> Result<Option<Created>> {
    for (found, index) in channels {
        let Some(entry) = index.find(&collected.product, &collected.version) else { continue };
        let manifest = publish::manifest(store, entry, authority.keys())?;
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
            return Ok(Some(Created { channel, existed: true, entry, manifest }));
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
fn past(
    store: &Directory,
    channels: &BTreeMap<Channel, Index>,
    collected: &Collected,
    channel: Channel,
    authority: &Authority,
) -> Result<Option<Past>> {
    let newest = |index: &Index| -> Option<Entry> {
        let mut older = index
            .of(&collected.product)
            .filter(|e| e.version < collected.version && e.yanked.is_none());
        older.next_back().cloned()
    };
    let own = channels.get(&channel).and_then(newest);
    let any = || channels.values().filter_map(newest).max_by(|a, b| a.version.cmp(&b.version));
    let Some(entry) = own.or_else(any) else { return Ok(None) };
    Ok(Some(Past::read(store, &entry, authority.keys())?))
}

/// Parses a version from the command line.
///
/// # Errors
/// When it is invalid.
pub fn version(text: &str) -> Result<Version> {
    Version::parse(text).with_context(|| format!("reading the version `{text}`"))
}
