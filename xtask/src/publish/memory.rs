//! What this machine has seen of stores: the last serial of each channel. An index is signed, so nobody can
//! forge one; but whoever can write to a store, or stands between it and us, can show an older one again.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};

use anyhow::{Context, Result, bail, ensure};
use camino::Utf8PathBuf;
use serde::{Deserialize, Serialize};

use crate::artifact::{hash_bytes, write_atomically};
use crate::progress::warn;
use crate::store::Store;
use crate::store::format::{Channel, pretty};

/// The version of the memory's files.
const FORMAT: u32 = 1;

/// What is passed over when a store was restored from a backup on purpose.
pub const RESTORED: &str = "--store-was-restored";

/// An index as it was seen last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Its serial; 0: there was none.
    pub serial: u64,
    /// SHA-256 of the channel's file, lower-case hexadecimal.
    pub sha256: String,
}

/// What is remembered of one store.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    /// [`FORMAT`].
    format: u32,
    /// The store's address, for people; the file's name is its hash.
    store: String,
    channels: BTreeMap<String, Seen>,
}

/// The memory: a folder with one small file for each store.
#[derive(Debug, Clone)]
pub struct Memory {
    dir: Utf8PathBuf,
    restored: bool,
}

impl Memory {
    /// `$SLIPWAY_STATE`, else `$XDG_STATE_HOME/slipway`, else `~/.local/state/slipway`. `restored`: what
    /// the stores have now counts, whatever was seen before.
    ///
    /// # Errors
    /// When none of these is set.
    pub fn locate(restored: bool) -> Result<Self> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let dir = if let Some(dir) = variable("SLIPWAY_STATE") {
            Utf8PathBuf::from(dir)
        } else if let Some(dir) = variable("XDG_STATE_HOME") {
            Utf8PathBuf::from(dir).join("slipway")
        } else if let Some(home) = variable("HOME") {
            Utf8PathBuf::from(home).join(".local/state/slipway")
        } else {
            bail!("finding the state folder: HOME is not set\nhelp: set SLIPWAY_STATE to a folder")
        };
        Ok(Self::at(dir, restored))
    }

    /// The memory in this state folder.
    pub fn at(dir: Utf8PathBuf, restored: bool) -> Self {
        Self { dir: dir.join("stores"), restored }
    }

    /// Whether what stores have now counts, whatever was seen before.
    pub fn restored(&self) -> bool {
        self.restored
    }

    fn path(&self, store: &str) -> Utf8PathBuf {
        let name = hash_bytes(store.as_bytes());
        self.dir.join(format!("{}.json", name.get(..16).unwrap_or(&name)))
    }

    fn read(&self, store: &str) -> Result<Record> {
        let path = self.path(store);
        let empty =
            || Record { format: FORMAT, store: store.to_owned(), channels: BTreeMap::new() };
        let read = || -> Result<Record> {
            let text = match std::fs::read(&path) {
                Ok(text) => text,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(empty()),
                Err(error) => return Err(error).context("it cannot be read"),
            };
            let record: Record = serde_json::from_slice(&text).context("it is damaged")?;
            ensure!(record.format == FORMAT, "it has the format {}", record.format);
            ensure!(record.store == store, "it is about another store, {}", record.store);
            Ok(record)
        };
        match read() {
            Err(_) if self.restored => Ok(empty()),
            record => record.with_context(|| {
                format!(
                    "reading {path}, which remembers the serials of {store}\n\
                     help: look at the store (is its newest release there?); {RESTORED} then takes \
                     what it has now"
                )
            }),
        }
    }

    /// What was seen last of a channel.
    ///
    /// # Errors
    /// When the memory is damaged: then nobody knows.
    pub fn of(&self, store: &dyn Store, channel: Channel) -> Result<Option<Seen>> {
        Ok(self.read(&store.identity()?)?.channels.remove(channel.name()))
    }

    /// Compares what a store shows now with what had been `seen` before it was asked, and remembers it.
    ///
    /// # Errors
    /// When it is older, or another index of the same serial.
    pub fn judge(
        &self,
        store: &dyn Store,
        channel: Channel,
        seen: Option<&Seen>,
        now: &Seen,
    ) -> Result<()> {
        if let Some(seen) = seen.filter(|_| !self.restored) {
            let name = store.name();
            ensure!(
                now.serial >= seen.serial,
                "{name} shows an older index of the channel {channel}: it has the serial {}, and this \
                 machine has seen {}\n\
                 help: an older copy was put there, or newer ones are held back: releases may be \
                 missing, and yanked ones on offer again. If the store was restored from a backup on \
                 purpose, {RESTORED} takes its serial as the newest from now on",
                Shown(now.serial),
                seen.serial
            );
            ensure!(
                now.serial > seen.serial || now.sha256 == seen.sha256,
                "{name} shows another index of the channel {channel} with the serial {} than this \
                 machine has seen (SHA-256 {}, not {})\n\
                 help: two histories of one channel, both signed. If the store was restored from a \
                 backup on purpose and published to since, {RESTORED} takes what it has now",
                now.serial,
                now.sha256,
                seen.sha256
            );
        }
        if (now.serial == 0 && seen.is_none()) || seen == Some(now) {
            return Ok(());
        }
        if let Some(seen) = seen.filter(|seen| self.restored && seen.serial >= now.serial) {
            let (name, now) = (store.name(), Shown(now.serial));
            warn(format!(
                "{name}: the serial of {channel} is {now} from now on, was {}",
                seen.serial
            ));
        }
        self.change(store, |channels| {
            let known = channels.get(channel.name()).map_or(0, |seen| seen.serial);
            // Another process of ours may have seen a newer one meanwhile.
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
    pub fn wrote(&self, store: &dyn Store, channel: Channel, now: &Seen) -> Result<()> {
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
    pub fn forget(&self, store: &dyn Store) -> Result<()> {
        if self.path(&store.identity()?).exists() {
            self.change(store, BTreeMap::clear)
        } else {
            Ok(())
        }
    }

    fn change(
        &self,
        store: &dyn Store,
        change: impl FnOnce(&mut BTreeMap<String, Seen>),
    ) -> Result<()> {
        let _turn = self.lock()?;
        let identity = store.identity()?;
        let mut record = self.read(&identity)?;
        change(&mut record.channels);
        let text = pretty(&record)?;
        write_atomically(&self.path(&identity), |out| Ok(out.write_all(text.as_bytes())?))
            .with_context(|| format!("remembering the serials of {identity}"))
    }

    /// Processes of one machine take turns. The lock ends with the value, or with the process.
    fn lock(&self) -> Result<File> {
        let dir = &self.dir;
        let doing = || {
            format!(
                "locking {dir}, where serials of stores are remembered\nhelp: SLIPWAY_STATE names another folder"
            )
        };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).with_context(doing)?;
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).write(true).mode(0o600);
        let file = options.open(dir.join(".lock")).with_context(doing)?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).with_context(doing)?;
        Ok(file)
    }
}

/// A serial for people.
struct Shown(u64);

impl std::fmt::Display for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 => f.write_str("0 (there is none)"),
            serial => write!(f, "{serial}"),
        }
    }
}
