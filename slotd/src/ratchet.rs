//! State that must survive when `data` is lost or the other slot starts: the floor, and which keys are accepted. It
//! is stored as one text, in `trust.json` on `data` and in raw sectors of the disk, and only ever rises.

use std::io;

use bundle::area::{AreaCopy, COPY, InvalidAreaCopy};
use bundle::{KeySet, Version};
use serde::{Deserialize, Serialize};

use crate::device;
use crate::durable;
use crate::root::RootDir;
use crate::storage::Storage;

/// Maximum number of key sets in a chain. A rotation needs one; an image with a newer set makes all earlier ones
/// superfluous.
pub const MOST_LINKS: usize = 8;

/// A key set with its signature, both as they were received.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedKeySet {
    /// The key set's file.
    pub set: String,
    /// Its minisign signature file.
    pub signature: String,
}

/// The stored state. Unknown fields are ignored.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Ratchet {
    /// The lowest version that is accepted; `None`: any.
    pub version: Option<Version>,
    /// The lowest key epoch.
    pub key_epoch: u32,
    /// The serial of the newest key set that was accepted on this robot.
    pub serial: u32,
    /// Ids of the accepted keys in it: in an older set no other keys are accepted.
    pub counted: Vec<String>,
    /// Key sets that were installed, each signed by a key of the previous one, oldest first.
    pub chain: Vec<SignedKeySet>,
}

impl Ratchet {
    /// Raises the state to a key set: keys of older sets are then trusted only if this set trusts them.
    pub fn raise_keys(&mut self, set: &KeySet) {
        if set.serial >= self.serial {
            self.serial = set.serial;
            self.counted = valid_key_ids(set);
        }
    }

    /// Restricts a set: if it is older than the newest one, only keys that the newest one accepts stay.
    #[must_use]
    pub fn limit(&self, mut set: KeySet) -> KeySet {
        if set.serial < self.serial {
            for key in &mut set.keys {
                key.revoked |= !self.counted.contains(&key.id);
            }
        }
        set
    }

    fn file(root: &RootDir) -> std::path::PathBuf {
        root.state().join("trust.json")
    }

    /// Reads the state on `data`; `None` when there is none.
    ///
    /// # Errors
    /// When it cannot be read or parsed.
    pub fn on_data(root: &RootDir) -> io::Result<Option<Self>> {
        durable::read_json(&Self::file(root))
    }

    /// Stores it on `data`.
    ///
    /// # Errors
    /// When `data` fails or is full.
    pub fn keep_on_data(&self, root: &RootDir) -> io::Result<()> {
        durable::write_json(&Self::file(root), self)
    }
}

/// Ids of the keys of a set that are not revoked.
pub fn valid_key_ids(set: &KeySet) -> Vec<String> {
    set.keys.iter().filter(|key| !key.revoked).map(|key| key.id.clone()).collect()
}

/// The raw sectors: two copies, written alternately.
#[derive(Debug)]
pub struct RatchetSectors<S> {
    disk: S,
    sectors: [u64; 2],
}

/// The content of the raw sectors.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RatchetContent {
    /// The valid state; `None`: nothing was written yet, or nothing can be read.
    pub ratchet: Option<Ratchet>,
    /// Damage, human-readable.
    pub damage: Vec<String>,
    /// The sequence number and the index of the valid copy.
    newest: Option<(u64, usize)>,
}

impl RatchetContent {
    /// The value when nothing can be read.
    pub fn unreadable(why: String) -> Self {
        Self { damage: vec![why], ..Self::default() }
    }
}

impl<S: Storage> RatchetSectors<S> {
    /// `sectors` are the first sectors (of 512 bytes) of the copies on the disk.
    pub fn new(disk: S, sectors: [u64; 2]) -> Self {
        Self { disk, sectors }
    }

    /// Reads both copies and selects the valid one.
    pub fn read(&self) -> RatchetContent {
        let mut held = RatchetContent::default();
        for (place, sector) in self.sectors.into_iter().enumerate() {
            let mut bytes = vec![0; COPY];
            let copy = match self.disk.read_at(sector * device::SECTOR, &mut bytes) {
                Ok(()) => AreaCopy::decode(&bytes).map_err(|invalid| match invalid {
                    InvalidAreaCopy::Empty => None,
                    other => Some(other.to_string()),
                }),
                Err(error) => Err(Some(error.to_string())),
            };
            let copy = copy.and_then(|copy| {
                let ratchet: Ratchet =
                    serde_json::from_slice(&copy.text).map_err(|error| Some(error.to_string()))?;
                Ok((copy.sequence, ratchet))
            });
            match copy {
                Ok((sequence, ratchet)) => {
                    if held.newest.is_none_or(|(known, _)| sequence > known) {
                        held.newest = Some((sequence, place));
                        held.ratchet = Some(ratchet);
                    }
                }
                Err(None) => {}
                Err(Some(why)) => {
                    held.damage.push(format!("copy {place} of the trust area: {why}"))
                }
            }
        }
        held
    }

    /// Writes the state to the copy that is not used.
    ///
    /// # Errors
    /// When the disk fails or reads back differently, or the state is too long.
    pub fn write(&self, ratchet: &Ratchet) -> io::Result<()> {
        let (sequence, counts) = self.read().newest.unwrap_or((0, 1));
        let [first, second] = self.sectors;
        let sector = if counts == 0 { second } else { first };
        let copy = AreaCopy {
            sequence: sequence
                .checked_add(1)
                .ok_or_else(|| io::Error::other("trust area sequence number overflow"))?,
            text: serde_json::to_vec(ratchet)?,
        };
        let bytes = copy.encode().ok_or_else(|| io::Error::other("the trust state is too long"))?;
        let mut found = vec![0; bytes.len()];
        self.disk.write_at(sector * device::SECTOR, &bytes)?;
        self.disk.flush()?;
        self.disk.read_back(sector * device::SECTOR, &mut found)?;
        if found != bytes {
            return Err(io::Error::other("the disk reads back differently than written"));
        }
        Ok(())
    }
}
