//! Remembers what this machine has seen of stores: the last serial of each channel. An index is
//! signed, so it cannot be forged; but an attacker who can write to a store, or who is between the
//! store and this machine, can present an older one again.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};

use anyhow::{Context, Result, bail, ensure};
use camino::Utf8PathBuf;
use serde::{Deserialize, Serialize};

use crate::artifact::{hash_bytes, none_if_missing, write_atomically};
use crate::progress::warn;
use crate::store::ReleaseStore;
use crate::store::format::{Channel, to_pretty_json};
use crate::variable;

/// The format version of the memory's files.
const FORMAT: u32 = 1;

/// The option that disables the check after a store was restored from a backup on purpose.
pub const RESTORED: &str = "--store-was-restored";

/// The last index that was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenIndex {
    /// Its serial; 0: there was no index.
    pub serial: u64,
    /// SHA-256 of the channel's file, lower-case hexadecimal.
    pub sha256: String,
}

/// What is remembered about one store.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoreRecord {
    /// [`FORMAT`].
    format: u32,
    /// The store's address, informational; the name of the file is its hash.
    store: String,
    channels: BTreeMap<String, SeenIndex>,
}

/// The memory: a directory with one small file for each store.
#[derive(Debug, Clone)]
pub struct IndexMemory {
    dir: Utf8PathBuf,
    restored: bool,
}

impl IndexMemory {
    /// `$SLIPWAY_STATE`, else `$XDG_STATE_HOME/slipway`, else `~/.local/state/slipway`. `restored`:
    /// accept the current state of stores, whatever was seen before.
    ///
    /// # Errors
    /// When none of these is set, or one is not UTF-8.
    pub fn locate(restored: bool) -> Result<Self> {
        let dir = if let Some(dir) = variable::find("SLIPWAY_STATE")? {
            Utf8PathBuf::from(dir)
        } else if let Some(dir) = variable::find("XDG_STATE_HOME")? {
            Utf8PathBuf::from(dir).join("slipway")
        } else if let Some(home) = variable::find("HOME")? {
            Utf8PathBuf::from(home).join(".local/state/slipway")
        } else {
            bail!(
                "finding the state directory: HOME is not set\n\
             help: set SLIPWAY_STATE to a directory"
            )
        };
        Ok(Self::in_dir(dir, restored))
    }

    /// The memory in this state directory.
    pub fn in_dir(dir: Utf8PathBuf, restored: bool) -> Self {
        Self { dir: dir.join("stores"), restored }
    }

    /// Whether to accept the current state of stores, whatever was seen before.
    pub fn restored(&self) -> bool {
        self.restored
    }

    fn path(&self, store: &str) -> Utf8PathBuf {
        let name = hash_bytes(store.as_bytes());
        self.dir.join(format!("{}.json", name.get(..16).unwrap_or(&name)))
    }

    fn read(&self, store: &str) -> Result<StoreRecord> {
        let path = self.path(store);
        let empty =
            || StoreRecord { format: FORMAT, store: store.to_owned(), channels: BTreeMap::new() };
        let read = || -> Result<StoreRecord> {
            let text = none_if_missing(std::fs::read(&path)).context("the file cannot be read")?;
            let Some(text) = text else { return Ok(empty()) };
            let record: StoreRecord =
                serde_json::from_slice(&text).context("the file is damaged")?;
            ensure!(record.format == FORMAT, "the file has the format {}", record.format);
            ensure!(record.store == store, "the file belongs to another store, {}", record.store);
            Ok(record)
        };
        match read() {
            Err(_) if self.restored => Ok(empty()),
            record => record.with_context(|| {
                format!(
                    "reading {path}, which remembers the serials of {store}\n\
                     help: check the store (does it contain its newest release?); {RESTORED} then \
                     accepts its current state"
                )
            }),
        }
    }

    /// The last index of a channel that was seen, for each of the store's identities.
    ///
    /// # Errors
    /// When the memory is damaged, so that it is unknown.
    pub fn last_seen(
        &self,
        store: &dyn ReleaseStore,
        channel: Channel,
    ) -> Result<Vec<Option<SeenIndex>>> {
        let seen = |store: String| Ok(self.read(&store)?.channels.remove(channel.name()));
        store.identities()?.into_iter().map(seen).collect()
    }

    /// Compares the store's current index with the one that was `seen` before, and remembers it.
    ///
    /// # Errors
    /// When it is older, or is another index with the same serial.
    pub fn judge(
        &self,
        store: &dyn ReleaseStore,
        channel: Channel,
        seen: &[Option<SeenIndex>],
        now: &SeenIndex,
    ) -> Result<()> {
        for seen in seen.iter().flatten().filter(|_| !self.restored) {
            let name = store.name();
            ensure!(
                now.serial >= seen.serial,
                "{name} has an older index of the channel {channel}: its serial is {}, but this \
                 machine \
                 has seen {}\n\
                 help: an older copy was stored, or newer ones are withheld: releases may be \
                 missing, and yanked releases may be offered again. If the store was restored from a \
                 backup on purpose, {RESTORED} accepts its serial as the newest",
                Shown(now.serial),
                seen.serial
            );
            ensure!(
                now.serial > seen.serial || now.sha256 == seen.sha256,
                "{name} has another index of the channel {channel} with the serial {} than this \
                 machine has seen (SHA-256 {}, not {})\n\
                 help: there are two signed histories of one channel. If the store was restored from \
                 a backup on purpose and published to since, {RESTORED} accepts its current state",
                now.serial,
                now.sha256,
                seen.sha256
            );
        }
        let is_known = |seen: &Option<SeenIndex>| match seen {
            Some(seen) => seen == now,
            None => now.serial == 0,
        };
        if seen.iter().all(is_known) {
            return Ok(());
        }
        let newest = seen.iter().flatten().max_by_key(|seen| seen.serial);
        if let Some(seen) = newest.filter(|seen| self.restored && seen.serial >= now.serial) {
            let (name, now) = (store.name(), Shown(now.serial));
            warn(format!("{name}: the serial of {channel} is now {now}, it was {}", seen.serial));
        }
        self.change(store, |channels| {
            let known = channels.get(channel.name()).map_or(0, |seen| seen.serial);
            // Another process on this machine may have seen a newer one in the meantime.
            if self.restored && now.serial == 0 {
                channels.remove(channel.name());
            } else if self.restored || now.serial > known {
                channels.insert(channel.name().to_owned(), now.clone());
            }
        })
    }

    /// Remembers an index that was just written.
    ///
    /// # Errors
    /// When it cannot be remembered.
    pub fn remember_written(
        &self,
        store: &dyn ReleaseStore,
        channel: Channel,
        now: &SeenIndex,
    ) -> Result<()> {
        self.change(store, |channels| {
            let known = channels.get(channel.name()).map_or(0, |seen| seen.serial);
            if now.serial > known {
                channels.insert(channel.name().to_owned(), now.clone());
            }
        })
    }

    /// Forgets a store.
    ///
    /// # Errors
    /// When the memory cannot be written.
    pub fn forget(&self, store: &dyn ReleaseStore) -> Result<()> {
        if store.identities()?.iter().any(|identity| self.path(identity).exists()) {
            self.change(store, BTreeMap::clear)
        } else {
            Ok(())
        }
    }

    fn change(
        &self,
        store: &dyn ReleaseStore,
        change: impl Fn(&mut BTreeMap<String, SeenIndex>),
    ) -> Result<()> {
        let _turn = self.lock()?;
        for identity in store.identities()? {
            let mut record = self.read(&identity)?;
            change(&mut record.channels);
            let text = to_pretty_json(&record)?;
            write_atomically(&self.path(&identity), |out| Ok(out.write_all(text.as_bytes())?))
                .with_context(|| format!("remembering the serials of {identity}"))?;
        }
        Ok(())
    }

    /// Processes on one machine take turns. The lock is released when the value is dropped or the
    /// process ends.
    fn lock(&self) -> Result<File> {
        let dir = &self.dir;
        let context = || {
            format!(
                "locking {dir}, the directory of remembered serials\n\
                 help: SLIPWAY_STATE selects another directory"
            )
        };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).with_context(context)?;
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).write(true).mode(0o600);
        let file = options.open(dir.join(".lock")).with_context(context)?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)
            .with_context(context)?;
        Ok(file)
    }
}

/// A serial in human-readable form.
struct Shown(u64);

impl std::fmt::Display for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 => f.write_str("0 (no index)"),
            serial => write!(f, "{serial}"),
        }
    }
}
