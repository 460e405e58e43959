//! What a robot remembers of its bundles, as small files in `/data/slotd`: an install that is under way,
//! what was put into each slot, and the floor that committed bundles have set.

use std::io;

use bundle::bootstate::Slot;
use bundle::{Manifest, SignedBy};
pub use contract::answer::{Floor, InstalledSlot, Journal};

use crate::device::Description;
use crate::durable;
use crate::root::Root;

/// The journal, if an install was interrupted. A damaged one is as good as none: then nothing is
/// known to be in place, and everything is looked at.
pub fn read_journal(root: &Root) -> Option<Journal> {
    durable::read_json(&root.state().join("journal.json")).ok().flatten()
}

/// Keeps the journal. What it says is on the slot already; an older journal, or a damaged one, only
/// makes the next install look at more. So nobody waits for it to be on the disk.
///
/// # Errors
/// When `data` fails or is full.
pub fn write_journal(root: &Root, journal: &Journal) -> io::Result<()> {
    let json = serde_json::to_vec_pretty(journal)?;
    durable::replace(&root.state().join("journal.json"), &json)
}

/// No install is under way any more.
///
/// # Errors
/// When `data` fails.
pub fn remove_journal(root: &Root) -> io::Result<()> {
    durable::remove(&root.state().join("journal.json"))
}

/// What a verified bundle puts into a slot.
pub fn installed_by(manifest: &Manifest, sha256: &str, signed_by: &[SignedBy]) -> InstalledSlot {
    InstalledSlot {
        manifest: sha256.to_owned(),
        version: manifest.version.clone(),
        minimum_version: manifest.minimum_version.clone(),
        key_epoch: manifest.key_epoch,
        signed_by: signed_by.iter().map(|by| by.id.clone()).collect(),
    }
}

/// What is known of a system that was flashed, by what itself says; `None`: it says too little.
pub fn flashed(about: &Description) -> Option<InstalledSlot> {
    Some(InstalledSlot {
        manifest: String::new(),
        version: about.version.clone(),
        minimum_version: about.minimum_version.clone()?,
        key_epoch: about.key_epoch,
        signed_by: Vec::new(),
    })
}

/// What is known of a slot; nothing of one that is being written, or was never started.
pub fn read_slot(root: &Root, slot: Slot) -> Option<InstalledSlot> {
    durable::read_json(&root.state().join(format!("slot-{slot}.json"))).ok().flatten()
}

/// Keeps what is known of a slot.
///
/// # Errors
/// When `data` fails or is full.
pub fn write_slot(root: &Root, slot: Slot, installed: &InstalledSlot) -> io::Result<()> {
    durable::write_json(&root.state().join(format!("slot-{slot}.json")), installed)
}

/// Nothing is known of this slot any more.
///
/// # Errors
/// When `data` fails.
pub fn remove_slot(root: &Root, slot: Slot) -> io::Result<()> {
    durable::remove(&root.state().join(format!("slot-{slot}.json")))
}

/// The floor in `floor.json`, which agents before `trust.json` have kept; `None` when there is none.
///
/// # Errors
/// When the file is there and cannot be read.
pub fn read_floor(root: &Root) -> io::Result<Option<Floor>> {
    durable::read_json(&root.state().join("floor.json"))
}

/// Keeps the floor in `floor.json`.
///
/// # Errors
/// When `data` fails or is full.
pub fn write_floor(root: &Root, floor: &Floor) -> io::Result<()> {
    durable::write_json(&root.state().join("floor.json"), floor)
}
