//! Records about bundles, as small files in `/data/slotd`: an install in progress, the bundle in each slot, and the
//! floor that committed bundles have set.

use std::io;

use bundle::bootstate::Slot;
use bundle::{Manifest, SignedBy, Version};
use serde::{Deserialize, Serialize};

use crate::device::Description;
use crate::durable;
use crate::root::Root;

/// An install in progress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Journal {
    /// SHA-256 of the bundle's manifest.
    pub manifest: String,
    /// The slot that is written.
    pub slot: Slot,
    /// The bundle's version, for display.
    pub version: Version,
    /// The payload that is being written, by its index in the manifest.
    pub payload: usize,
    /// Number of leading frames of that payload that are on the device, except for the first block.
    pub frames: u32,
}

impl Journal {
    /// The journal, if an install was interrupted. A damaged journal is treated as missing: then nothing is
    /// known to be in place, and everything is checked.
    pub fn read(root: &Root) -> Option<Self> {
        durable::read_json(&root.state().join("journal.json")).ok().flatten()
    }

    /// Writes the journal without waiting for the disk. Its content is already on the slot; an older or
    /// damaged journal only makes the next install check more.
    ///
    /// # Errors
    /// When `data` fails or is full.
    pub fn write(&self, root: &Root) -> io::Result<()> {
        let json = serde_json::to_vec_pretty(self)?;
        durable::replace(&root.state().join("journal.json"), &json)
    }

    /// Removes the journal: no install is in progress any more.
    ///
    /// # Errors
    /// When `data` fails.
    pub fn remove(root: &Root) -> io::Result<()> {
        durable::remove(&root.state().join("journal.json"))
    }
}

/// The bundle that was installed into a slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Installed {
    /// SHA-256 of the bundle's manifest; empty for a system that was flashed.
    pub manifest: String,
    /// The bundle's version.
    pub version: Version,
    /// The lowest version that may follow once this one is committed.
    pub minimum_version: Version,
    /// The lowest key epoch that is accepted once this one is committed.
    pub key_epoch: u32,
    /// Ids of the keys whose signatures were accepted.
    pub signed_by: Vec<String>,
}

impl Installed {
    /// From a verified bundle.
    pub fn new(manifest: &Manifest, sha256: &str, signed_by: &[SignedBy]) -> Self {
        Self {
            manifest: sha256.to_owned(),
            version: manifest.version.clone(),
            minimum_version: manifest.minimum_version.clone(),
            key_epoch: manifest.key_epoch,
            signed_by: signed_by.iter().map(|by| by.id.clone()).collect(),
        }
    }

    /// From the description of a flashed system; `None`: the description is incomplete.
    pub fn flashed(about: &Description) -> Option<Self> {
        Some(Self {
            manifest: String::new(),
            version: about.version.clone(),
            minimum_version: about.minimum_version.clone()?,
            key_epoch: about.key_epoch,
            signed_by: Vec::new(),
        })
    }

    /// Reads the record of a slot; `None` while the slot is being written, or if it never started.
    pub fn read(root: &Root, slot: Slot) -> Option<Self> {
        durable::read_json(&root.state().join(format!("slot-{slot}.json"))).ok().flatten()
    }

    /// Writes the record.
    ///
    /// # Errors
    /// When `data` fails or is full.
    pub fn write(&self, root: &Root, slot: Slot) -> io::Result<()> {
        durable::write_json(&root.state().join(format!("slot-{slot}.json")), self)
    }

    /// Removes the record of a slot.
    ///
    /// # Errors
    /// When `data` fails.
    pub fn remove(root: &Root, slot: Slot) -> io::Result<()> {
        durable::remove(&root.state().join(format!("slot-{slot}.json")))
    }
}

/// The lowest accepted version and key epoch. It only ever rises.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Floor {
    /// The lowest version; `None`: any.
    pub version: Option<Version>,
    /// The lowest key epoch.
    pub key_epoch: u32,
}

impl Floor {
    /// Reads the floor from `floor.json`, as written by agents before `trust.json`; `None` when there is none.
    ///
    /// # Errors
    /// When the file exists and cannot be read.
    pub fn read(root: &Root) -> io::Result<Option<Self>> {
        durable::read_json(&root.state().join("floor.json"))
    }

    /// Writes the record.
    ///
    /// # Errors
    /// When `data` fails or is full.
    pub fn write(&self, root: &Root) -> io::Result<()> {
        durable::write_json(&root.state().join("floor.json"), self)
    }

    /// The maximum of this floor and another one.
    #[must_use]
    pub fn raised(self, version: Option<&Version>, key_epoch: u32) -> Self {
        // `None` sorts below every version.
        let version = self.version.max(version.cloned());
        Self { version, key_epoch: self.key_epoch.max(key_epoch) }
    }
}
