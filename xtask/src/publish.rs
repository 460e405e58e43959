//! Stores of releases, and publishing releases to them. Objects come first, then manifests, and the
//! channel's index last, by compare-and-swap: a reader never finds an index with missing objects,
//! and two concurrent publishers do not lose each other's releases.

pub mod memory;
pub mod pins;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bundle::{BuildKind, KeySet};
use camino::{Utf8Path, Utf8PathBuf};

use crate::artifact::hash_bytes;
use crate::config::workspace_root;
use crate::keys::{self, KeyDirectory, SigningKey};
use crate::progress::{ProgressStep, ProgressUnit, format_bytes};
use crate::store::directory::DirectoryStore;
use crate::store::format::{
    Channel, ChannelEntry, ChannelIndex, ReleaseManifest, RetiredRelease, StoreFile,
};
use crate::store::index::Retention;
use crate::store::{ChannelToken, ReleaseStore};
use crate::time::now;
use memory::{IndexMemory, SeenIndex};
use pins::PinnedKinds;

/// How often the change of a channel is retried after a conflict. One publisher succeeds each time,
/// so this limits how many may publish at once.
const ATTEMPTS: u32 = 50;
/// The longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// The trusted keys and the signing keys: the key directory, with each key opened once; the pinned
/// kinds; and the serials seen before. Nothing of it comes from a store.
pub struct SigningAuthority {
    dir: Utf8PathBuf,
    set: KeySet,
    signers: BTreeMap<&'static str, SigningKey>,
    pins: PinnedKinds,
    memory: IndexMemory,
}

impl SigningAuthority {
    /// Reads the key set, and the pins of the workspace that this is called in; outside of a workspace, those
    /// of the channels from [`pins::FILE`] in the key directory. `restored`: accept the current state of stores, whatever was seen before.
    ///
    /// # Errors
    /// When the key directory or the workspace's files cannot be used.
    pub fn open(restored: bool) -> Result<Self> {
        let dir = keys::key_directory()?;
        let pins = match workspace_root() {
            Ok(root) => PinnedKinds::read(&root)?,
            Err(_) => PinnedKinds::of_channels(&dir)?,
        };
        Self::open_dir(&dir, pins, IndexMemory::locate(restored)?)
    }

    /// Reads the key set of this key directory.
    ///
    /// # Errors
    /// When it cannot be used.
    pub fn open_dir(dir: &Utf8Path, pins: PinnedKinds, memory: IndexMemory) -> Result<Self> {
        let set = KeyDirectory::open(dir)?.set().clone();
        Ok(Self { dir: dir.to_owned(), set, signers: BTreeMap::new(), pins, memory })
    }

    /// The pinned kinds.
    pub fn pins(&self) -> &PinnedKinds {
        &self.pins
    }

    /// What was seen before.
    pub fn memory(&self) -> &IndexMemory {
        &self.memory
    }

    /// Must be called before anything is written to a store. If the store does not exist, what was
    /// remembered about an earlier store at this address is forgotten.
    ///
    /// # Errors
    /// When the memory cannot be written.
    pub fn begin(&self, store: &dyn ReleaseStore) -> Result<()> {
        if store.exists() { Ok(()) } else { self.memory.forget(store) }
    }

    /// The trusted keys.
    pub fn keys(&self) -> &KeySet {
        &self.set
    }

    /// The key that signs for products of this kind.
    ///
    /// # Errors
    /// When there is none, or its password is wrong.
    pub fn signer(&mut self, kind: BuildKind) -> Result<&SigningKey> {
        let name = match kind {
            BuildKind::Development => "development",
            BuildKind::Release => "release",
        };
        if !self.signers.contains_key(name) {
            let mut keys = KeyDirectory::open(&self.dir)?;
            let signer = keys.signer(kind)?;
            // The first development key is created on first use.
            self.set = keys.set().clone();
            self.signers.insert(name, signer);
        }
        self.signers.get(name).context("the key was just opened")
    }
}

/// A channel in the store: verified, of the pinned kind, and not older than what was seen before.
///
/// # Errors
/// When it cannot be read, is not signed by a trusted key, or is older.
pub fn load_channel(
    store: &dyn ReleaseStore,
    channel: Channel,
    authority: &SigningAuthority,
) -> Result<(ChannelIndex, ChannelToken)> {
    // Read this before accessing the store: of two processes on this machine, the faster one must
    // not make the other's index appear old.
    let seen = authority.memory.last_seen(store, channel)?;
    let there = store.exists();
    let (file, token) = store.index(channel)?;
    let index = match &file {
        Some(file) => authority
            .pins
            .open(channel, file, &authority.set)
            .with_context(|| format!("trusting {}", store.name()))?,
        None => ChannelIndex::empty(channel),
    };
    if there {
        let sha256 = hash_bytes(file.as_deref().unwrap_or_default());
        let now = SeenIndex { serial: index.serial, sha256 };
        authority.memory.judge(store, channel, &seen, &now)?;
    }
    Ok((index, token))
}

/// A release's manifest, verified.
///
/// # Errors
/// When it is missing, does not match the index, is not of the kind in its channel, or is not
/// signed by a trusted key.
pub fn load_manifest(
    store: &dyn ReleaseStore,
    entry: &ChannelEntry,
    keys: &KeySet,
) -> Result<ReleaseManifest> {
    let [text, signature] = manifest_files(store, &entry.manifest)?;
    let manifest = ReleaseManifest::open(&entry.manifest, &text, &signature, keys)?;
    let found = (&manifest.product, &manifest.version, manifest.kind);
    ensure!(
        found == (&entry.product, &entry.version, entry.kind),
        "{}: the manifest is of {} {} ({}), but the channel lists it as {} {} ({})",
        entry.manifest.path,
        manifest.product,
        manifest.version,
        manifest.kind,
        entry.product,
        entry.version,
        entry.kind
    );
    Ok(manifest)
}

/// A manifest and its signature, unverified.
fn manifest_files(store: &dyn ReleaseStore, file: &StoreFile) -> Result<[Vec<u8>; 2]> {
    let read = |path: &str| {
        let found = store.read(path)?;
        found.with_context(|| format!("{} does not contain {path}", store.name()))
    };
    Ok([read(&file.path)?, read(&file.signature())?])
}

/// Changes a channel: `change` creates the new index from the current one (`None`: nothing to do),
/// `prepare` uploads everything that the new index refers to. Both are repeated after a conflict.
/// Returns whether anything changed.
///
/// # Errors
/// The errors of both; a store that cannot be written.
pub fn change_channel(
    store: &dyn ReleaseStore,
    channel: Channel,
    authority: &mut SigningAuthority,
    mut change: impl FnMut(&ChannelIndex, &mut SigningAuthority) -> Result<Option<ChannelIndex>>,
    mut prepare: impl FnMut(&ChannelIndex, &ChannelIndex) -> Result<()>,
) -> Result<bool> {
    let mut pause = Duration::from_millis(50);
    authority.begin(store)?;
    for _ in 0..ATTEMPTS {
        let (current, token) = load_channel(store, channel, authority)?;
        let Some(mut next) = change(&current, authority)? else {
            store.make_visible(channel)?;
            return Ok(false);
        };
        authority.pins.check(&next)?;
        prepare(&current, &next)?;
        next.serial = current.serial.checked_add(1).context("channel serial number overflow")?;
        let kind = authority.pins.channel(channel);
        let content = next.sign(authority.signer(kind)?)?;
        if store.swap(channel, &token, next.serial, &content)? {
            let now = SeenIndex { serial: next.serial, sha256: hash_bytes(&content) };
            authority.memory.remember_written(store, channel, &now)?;
            store.make_visible(channel)?;
            return Ok(true);
        }
        // Each process waits for a different time, so that one of them succeeds.
        let jitter = Duration::from_millis(u64::from(std::process::id()) % 50);
        std::thread::sleep(pause + jitter);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    bail!(
        "could not update the channel {channel} of {}: lost the race to other publishers \
         {ATTEMPTS} times\n\
         help: try again when fewer publishers are active",
        store.name()
    )
}

/// The result of publishing one channel.
#[derive(Debug, Clone, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PublishedChannel {
    /// The channel.
    pub channel: Channel,
    /// Whether its index changed.
    pub changed: bool,
    /// Releases that the target did not have: product and version.
    pub releases: Vec<String>,
    /// Objects that were sent.
    pub sent: usize,
    /// Their total size in bytes.
    pub bytes: u64,
    /// Objects that the target had already.
    pub kept: usize,
}

/// Publishes everything of a channel from a store on this machine to another store.
///
/// # Errors
/// When the two stores contradict each other, a local object is damaged, or the target cannot be
/// written.
pub fn publish_channel(
    from: &DirectoryStore,
    to: &dyn ReleaseStore,
    channel: Channel,
    authority: &mut SigningAuthority,
    retention: Retention,
) -> Result<PublishedChannel> {
    let (ours, _) = load_channel(from, channel, authority)?;
    let keys = authority.keys().clone();
    let now = now()?;
    let mut done = PublishedChannel {
        channel,
        changed: false,
        releases: Vec::new(),
        sent: 0,
        bytes: 0,
        kept: 0,
    };
    let merge =
        |current: &ChannelIndex, _: &mut SigningAuthority| -> Result<Option<ChannelIndex>> {
            let mut next = current.clone();
            next.merge(&ours)?;
            next.retain(retention, now);
            // Releases that the target has retired are not added again.
            let known = |r: &RetiredRelease| {
                current.retired.contains(r) || current.find(&r.product, &r.version).is_some()
            };
            next.retired.retain(known);
            Ok((next.releases != current.releases).then_some(next))
        };
    let mut sent = BTreeSet::new();
    let prepare = |current: &ChannelIndex, next: &ChannelIndex| -> Result<()> {
        done.releases.clear();
        for entry in &next.releases {
            if current.find(&entry.product, &entry.version).is_some() {
                continue;
            }
            done.releases.push(format!("{} {}", entry.product, entry.version));
            let manifest = load_manifest(from, entry, &keys)?;
            let wanted: Vec<(String, u64)> = manifest
                .objects()
                .map(|o| (o.sha256.clone(), o.size))
                .filter(|(sha256, _)| !sent.contains(sha256))
                .collect();
            let present = to.present(&wanted)?;
            done.kept += present.len();
            let (sources, kept): (Vec<_>, Vec<_>) =
                wanted.into_iter().partition(|(sha256, _)| !present.contains(sha256));
            sent.extend(kept.into_iter().map(|(sha256, _)| sha256));
            let total = sources.iter().map(|(_, size)| size).sum();
            let what = format!("{} {} to {}", entry.product, entry.version, to.name());
            let step = ProgressStep::new("publish", what, total, ProgressUnit::Bytes);
            for (sha256, size) in sources {
                if !sent.insert(sha256.clone()) {
                    continue;
                }
                step.note(format!("{} {}", format_bytes(size), sha256));
                to.put(&sha256, &from.object(&sha256))
                    .with_context(|| format!("sending {sha256} to {}", to.name()))?;
                step.advance(size);
                done.sent += 1;
                done.bytes += size;
            }
            let [text, signature] = manifest_files(from, &entry.manifest)?;
            to.write(&entry.manifest.signature(), &signature)?;
            to.write(&entry.manifest.path, &text)?;
        }
        Ok(())
    };
    let changed = change_channel(to, channel, authority, merge, prepare)
        .with_context(|| format!("publishing the channel {channel} to {}", to.name()))?;
    done.changed = changed;
    Ok(done)
}
