//! Records about bundles, as small files in `/data/slotd`: an install in progress, the bundle in each slot, and the
//! floor that committed bundles have set.

use std::io;

use bundle::bootstate::Slot;
use bundle::{BundleManifest, SignedBy};
pub use contract::answer::{Floor, InstallJournal, InstalledSlot};

use crate::device::DeviceFile;
use crate::durable;
use crate::root::RootDir;

/// The journal, if an install was interrupted. A damaged journal is treated as missing: then nothing is
/// known to be in place, and everything is checked.
pub fn read_journal(root: &RootDir) -> Option<InstallJournal> {
    durable::read_json(&root.state().join("journal.json")).ok().flatten()
}

/// Writes the journal without waiting for the disk. Its content is already on the slot; an older or
/// damaged journal only makes the next install check more.
///
/// # Errors
/// When `data` fails or is full.
pub fn write_journal(root: &RootDir, journal: &InstallJournal) -> io::Result<()> {
    let json = serde_json::to_vec_pretty(journal)?;
    durable::replace(&root.state().join("journal.json"), &json)
}

/// Removes the journal: no install is in progress any more.
///
/// # Errors
/// When `data` fails.
pub fn remove_journal(root: &RootDir) -> io::Result<()> {
    durable::remove(&root.state().join("journal.json"))
}

/// The record of a verified bundle.
pub fn installed_by(
    manifest: &BundleManifest,
    sha256: &str,
    signed_by: &[SignedBy],
) -> InstalledSlot {
    InstalledSlot {
        manifest: sha256.to_owned(),
        version: manifest.version.clone(),
        minimum_version: manifest.minimum_version.clone(),
        key_epoch: manifest.key_epoch,
        signed_by: signed_by.iter().map(|by| by.id.clone()).collect(),
    }
}

/// The record of a flashed system, from its description; `None`: the description is incomplete.
pub fn flashed(about: &DeviceFile) -> Option<InstalledSlot> {
    Some(InstalledSlot {
        manifest: String::new(),
        version: about.version.clone(),
        minimum_version: about.minimum_version.clone()?,
        key_epoch: about.key_epoch,
        signed_by: Vec::new(),
    })
}

/// Reads the record of a slot; `None` while the slot is being written, or if it never started.
pub fn read_slot(root: &RootDir, slot: Slot) -> Option<InstalledSlot> {
    durable::read_json(&root.state().join(format!("slot-{slot}.json"))).ok().flatten()
}

/// Writes the record of a slot.
///
/// # Errors
/// When `data` fails or is full.
pub fn write_slot(root: &RootDir, slot: Slot, installed: &InstalledSlot) -> io::Result<()> {
    durable::write_json(&root.state().join(format!("slot-{slot}.json")), installed)
}

/// Removes the record of a slot.
///
/// # Errors
/// When `data` fails.
pub fn remove_slot(root: &RootDir, slot: Slot) -> io::Result<()> {
    durable::remove(&root.state().join(format!("slot-{slot}.json")))
}

/// Reads the floor from `floor.json`, as written by agents before `trust.json`; `None` when there is none.
///
/// # Errors
/// When the file exists and cannot be read.
pub fn read_floor(root: &RootDir) -> io::Result<Option<Floor>> {
    durable::read_json(&root.state().join("floor.json"))
}

/// Writes the floor to `floor.json`.
///
/// # Errors
/// When `data` fails or is full.
pub fn write_floor(root: &RootDir, floor: &Floor) -> io::Result<()> {
    durable::write_json(&root.state().join("floor.json"), floor)
}
