//! What a robot remembers of its bundles, as small files in `/data/slotd`: an install that is under way,
//! what was put into each slot, and the floor that committed bundles have set.

use std::io;

use bundle::bootstate::Slot;
use bundle::{Manifest, SignedBy, Version};
use serde::{Deserialize, Serialize};

use crate::device::Description;
use crate::durable;
use crate::root::Root;

/// An install under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Journal {
    /// SHA-256 of the bundle's manifest.
    pub manifest: String,
    /// The slot that is written.
    pub slot: Slot,
    /// The bundle's version, for people.
    pub version: Version,
    /// The payload that is being written, by its place in the manifest.
    pub payload: usize,
    /// Frames of that payload, from its first, that are on the device, except for the first block.
    pub frames: u32,
}

impl Journal {
    /// The journal, if an install was interrupted. A damaged one is as good as none: then nothing is
    /// known to be in place, and everything is looked at.
    pub fn read(root: &Root) -> Option<Self> {
        durable::read_json(&root.state().join("journal.json")).ok().flatten()
    }

    /// Keeps the journal. What it says is on the slot already; an older journal, or a damaged one, only
    /// makes the next install look at more. So nobody waits for it to be on the disk.
    ///
    /// # Errors
    /// When `data` fails or is full.
    pub fn write(&self, root: &Root) -> io::Result<()> {
        let json = serde_json::to_vec_pretty(self)?;
        durable::replace(&root.state().join("journal.json"), &json)
    }

    /// No install is under way any more.
    ///
    /// # Errors
    /// When `data` fails.
    pub fn remove(root: &Root) -> io::Result<()> {
        durable::remove(&root.state().join("journal.json"))
    }
}

/// What was installed into a slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Installed {
    /// SHA-256 of the bundle's manifest; empty for a system that was flashed.
    pub manifest: String,
    /// The bundle's version.
    pub version: Version,
    /// The lowest version that may follow once this one is committed.
    pub minimum_version: Version,
    /// The lowest key epoch that counts once this one is committed.
    pub key_epoch: u32,
    /// Ids of the keys whose signatures counted.
    pub signed_by: Vec<String>,
}

impl Installed {
    /// What a verified bundle says.
    pub fn new(manifest: &Manifest, sha256: &str, signed_by: &[SignedBy]) -> Self {
        Self {
            manifest: sha256.to_owned(),
            version: manifest.version.clone(),
            minimum_version: manifest.minimum_version.clone(),
            key_epoch: manifest.key_epoch,
            signed_by: signed_by.iter().map(|by| by.id.clone()).collect(),
        }
    }

    /// What is known of a system that was flashed, by what itself says; `None`: it says too little.
    pub fn flashed(about: &Description) -> Option<Self> {
        Some(Self {
            manifest: String::new(),
            version: about.version.clone(),
            minimum_version: about.minimum_version.clone()?,
            key_epoch: about.key_epoch,
            signed_by: Vec::new(),
        })
    }

    /// What is known of a slot; nothing of one that is being written, or was never started.
    pub fn read(root: &Root, slot: Slot) -> Option<Self> {
        durable::read_json(&root.state().join(format!("slot-{slot}.json"))).ok().flatten()
    }

    /// Keeps it.
    ///
    /// # Errors
    /// When `data` fails or is full.
    pub fn write(&self, root: &Root, slot: Slot) -> io::Result<()> {
        durable::write_json(&root.state().join(format!("slot-{slot}.json")), self)
    }

    /// Nothing is known of this slot any more.
    ///
    /// # Errors
    /// When `data` fails.
    pub fn remove(root: &Root, slot: Slot) -> io::Result<()> {
        durable::remove(&root.state().join(format!("slot-{slot}.json")))
    }
}

/// The lowest that is accepted. It only ever rises.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Floor {
    /// The lowest version; `None`: any.
    pub version: Option<Version>,
    /// The lowest key epoch.
    pub key_epoch: u32,
}

impl Floor {
    /// The floor in `floor.json`, which agents before `trust.json` have kept; `None` when there is none.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn read(root: &Root) -> io::Result<Option<Self>> {
        durable::read_json(&root.state().join("floor.json"))
    }

    /// Keeps it.
    ///
    /// # Errors
    /// When `data` fails or is full.
    pub fn write(&self, root: &Root) -> io::Result<()> {
        durable::write_json(&root.state().join("floor.json"), self)
    }

    /// Raises it to what another floor asks.
    #[must_use]
    pub fn raised(self, version: Option<&Version>, key_epoch: u32) -> Self {
        // `None` sorts below every version.
        let version = self.version.max(version.cloned());
        Self { version, key_epoch: self.key_epoch.max(key_epoch) }
    }
}
