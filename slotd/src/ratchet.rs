//! What a robot must not forget when `data` is lost or the other slot starts: the floor, and which keys count.
//! It is kept as one text, `trust.json` on `data` and in raw sectors of the disk, and only ever rises.

use std::io;

use bundle::area::{COPY, Copy, Invalid};
use bundle::{KeySet, Version};
use serde::{Deserialize, Serialize};

use crate::device;
use crate::durable;
use crate::root::Root;
use crate::storage::Storage;

/// Most key sets of a chain. A rotation needs one; an image with a newer set makes all before it superfluous.
pub const MOST_LINKS: usize = 8;

/// A key set with the signature over it, both as they were carried here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// The key set's file.
    pub set: String,
    /// Its minisign signature file.
    pub signature: String,
}

/// What is kept. Fields that are not known are passed over.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Ratchet {
    /// The lowest version that is accepted; `None`: any.
    pub version: Option<Version>,
    /// The lowest key epoch.
    pub key_epoch: u32,
    /// The serial of the newest key set that has counted on this robot.
    pub serial: u32,
    /// Ids of the keys that counted in it: of an older set no others count.
    pub counted: Vec<String>,
    /// Key sets that were taken, each signed by a key of the one before it, oldest first.
    pub chain: Vec<Link>,
}

impl Ratchet {
    /// Raises it to a key set: older sets then trust no key that this one does not.
    pub fn raise_keys(&mut self, set: &KeySet) {
        if set.serial >= self.serial {
            self.serial = set.serial;
            self.counted = counting(set);
        }
    }

    /// What is left of a set: if it is older than the newest one, its keys must count in that one, too.
    #[must_use]
    pub fn limit(&self, mut set: KeySet) -> KeySet {
        if set.serial < self.serial {
            for key in &mut set.keys {
                key.revoked |= !self.counted.contains(&key.id);
            }
        }
        set
    }

    fn file(root: &Root) -> std::path::PathBuf {
        root.state().join("trust.json")
    }

    /// What `data` has; `None` when there is nothing.
    ///
    /// # Errors
    /// When it cannot be read or understood.
    pub fn on_data(root: &Root) -> io::Result<Option<Self>> {
        durable::read_json(&Self::file(root))
    }

    /// Keeps it on `data`.
    ///
    /// # Errors
    /// When `data` fails or is full.
    pub fn keep_on_data(&self, root: &Root) -> io::Result<()> {
        durable::write_json(&Self::file(root), self)
    }
}

/// Ids of the keys of a set that are not revoked.
pub fn counting(set: &KeySet) -> Vec<String> {
    set.keys.iter().filter(|key| !key.revoked).map(|key| key.id.clone()).collect()
}

/// The raw sectors: two copies, written alternately.
#[derive(Debug)]
pub struct Area<S> {
    disk: S,
    sectors: [u64; 2],
}

/// What the raw sectors hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Held {
    /// What counts; `None`: nothing was written yet, or nothing can be read.
    pub ratchet: Option<Ratchet>,
    /// What is damaged, for people.
    pub damage: Vec<String>,
    /// The sequence number and the place of what counts.
    newest: Option<(u64, usize)>,
}

impl Held {
    /// Nothing can be read.
    pub fn unreadable(why: String) -> Self {
        Self { damage: vec![why], ..Self::default() }
    }
}

impl<S: Storage> Area<S> {
    /// The copies begin at these sectors (of 512 bytes) of the disk.
    pub fn new(disk: S, sectors: [u64; 2]) -> Self {
        Self { disk, sectors }
    }

    /// Both copies, and which one counts.
    pub fn read(&self) -> Held {
        let mut held = Held::default();
        for (place, sector) in self.sectors.into_iter().enumerate() {
            let mut bytes = vec![0; COPY];
            let copy = match self.disk.read_at(sector * device::SECTOR, &mut bytes) {
                Ok(()) => Copy::decode(&bytes).map_err(|invalid| match invalid {
                    Invalid::Empty => None,
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

    /// Keeps it, in the copy that does not count.
    ///
    /// # Errors
    /// When the disk fails, does not hold what was written, or it is too long.
    pub fn write(&self, ratchet: &Ratchet) -> io::Result<()> {
        let (sequence, counts) = self.read().newest.unwrap_or((0, 1));
        let [first, second] = self.sectors;
        let sector = if counts == 0 { second } else { first };
        let copy = Copy {
            sequence: sequence
                .checked_add(1)
                .ok_or_else(|| io::Error::other("its sequence number cannot grow any more"))?,
            text: serde_json::to_vec(ratchet)?,
        };
        let bytes = copy.encode().ok_or_else(|| io::Error::other("it is too long"))?;
        let mut found = vec![0; bytes.len()];
        self.disk.write_at(sector * device::SECTOR, &bytes)?;
        self.disk.flush()?;
        self.disk.read_back(sector * device::SECTOR, &mut found)?;
        if found != bytes {
            return Err(io::Error::other("the disk does not hold what was just written to it"));
        }
        Ok(())
    }
}
