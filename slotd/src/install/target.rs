//! The idle slot as a whole: its partitions, and the first blocks that are kept back until the end.

use std::io;

use bundle::bootstate::Slot;
use bundle::index::sha256;
use bundle::{BLOCK_SIZE, Index, Manifest};
use serde_json::json;

use super::Machine;
use crate::buffer::Buffer;
use crate::device::{Device, slot_role};
use crate::record;
use crate::refusal::{Refusal, Result};
use crate::storage::Storage;

/// The component that goes into slots.
const SYSTEM: &str = "system";

/// How the partitions of slots are opened.
pub trait Slots: Sync {
    /// The partition for payloads of `role` in `slot`. Only the idle slot is opened for writing.
    ///
    /// # Errors
    /// `wrong-layout` or `io`.
    fn open(&self, slot: Slot, role: &str) -> Result<Box<dyn Storage>>;

    /// The disk, and the sectors of it in which two copies of what must not be forgotten begin; `None`: this image
    /// knows of none.
    fn trust_area(&self, _writable: bool) -> Option<Result<TrustArea>> {
        None
    }
}

/// A disk with two places on it.
pub type TrustArea = (Box<dyn Storage>, [u64; 2]);

impl Slots for Device {
    fn open(&self, slot: Slot, role: &str) -> Result<Box<dyn Storage>> {
        let disk = self.open_partition(&slot_role(role, slot), slot != self.running)?;
        Ok(Box::new(disk))
    }

    fn trust_area(&self, writable: bool) -> Option<Result<TrustArea>> {
        let [first, second] = self.about.trust.sectors.as_slice() else { return None };
        let sectors = [*first, *second];
        Some(self.open_disk(writable).map(|disk| (Box::new(disk) as Box<dyn Storage>, sectors)))
    }
}

/// The idle slot, ready to be written.
pub(super) struct Target<'a> {
    machine: Machine<'a>,
    slot: Slot,
    /// One for each payload, in the manifest's order.
    pub parts: Vec<Part>,
    /// Whether the first blocks are zero on the device.
    invalid: bool,
}

/// One partition of the slot.
pub(super) struct Part {
    /// The payload's role.
    pub role: String,
    /// The partition.
    pub device: Box<dyn Storage>,
    /// The payload's first block, while it is not on the device.
    pub first: Option<Buffer>,
    /// The payload's size in bytes.
    size: u64,
}

impl<'a> Target<'a> {
    /// Opens the partition of each payload, when the bundle has exactly what a slot consists of.
    pub fn open(machine: &Machine<'a>, slot: Slot, manifest: &Manifest) -> Result<Self> {
        let suffix = slot_role("", slot);
        let roles = machine.about.partitions.keys();
        let mut missing: Vec<&str> = roles.filter_map(|role| role.strip_suffix(&suffix)).collect();
        let mut parts = Vec::new();
        for component in &manifest.components {
            for payload in &component.payloads {
                let role = payload.role.as_str();
                let known = missing.iter().position(|one| *one == role);
                let (true, Some(at)) = (component.name == SYSTEM, known) else {
                    return Err(Refusal::new(
                        "unknown-payload",
                        format!(
                            "the bundle has a payload {}/{role}, for which this robot's slots have no place",
                            component.name
                        ),
                        "take the bundle that was made for this board",
                    ));
                };
                missing.swap_remove(at);
                let device = machine.slots.open(slot, role)?;
                if payload.size > device.size() {
                    return Err(Refusal::new(
                        "too-large",
                        format!(
                            "system/{role} has {} bytes, the partition {} has {}",
                            payload.size,
                            slot_role(role, slot),
                            device.size()
                        ),
                        "build the product with a smaller system; this card was partitioned for less",
                    ));
                }
                parts.push(Part { role: role.to_owned(), device, first: None, size: payload.size });
            }
        }
        if !missing.is_empty() {
            return Err(Refusal::new(
                "incomplete-bundle",
                format!("a slot consists of {} more than the bundle has", missing.join(", ")),
                "take the bundle that was made for this board",
            ));
        }
        Ok(Self { machine: *machine, slot, parts, invalid: false })
    }

    /// Before the first write: makes the slot unusable in one block for each partition, durably.
    /// `current`: the payload that is at hand; those before it are proven to be in place. Returns the
    /// bytes written.
    pub fn invalidate(&mut self, current: usize, index: &Index) -> Result<u64> {
        if self.invalid {
            return Ok(0);
        }
        let slot = self.slot;
        let failed = |error| Refusal::io(format!("making slot {slot} unusable"), &error);
        for (number, part) in self.parts.iter_mut().enumerate().take(current + 1) {
            let mut first = part.first_block();
            part.device.read_back(0, &mut first).map_err(failed)?;
            let hash = index.frames().first().and_then(|f| index.hashes(f).next()?.1);
            let held = hash.is_some_and(|hash| sha256(&first).starts_with(hash));
            // The one at hand is read from the bundle, if it is another.
            if number < current || held {
                part.first = Some(first);
            }
        }
        if let Err(error) = record::remove_slot(self.machine.root, slot) {
            let error = error.to_string();
            self.machine.events.add("not-recorded", json!({ "slot": slot, "error": error }));
        }
        let mut written = 0;
        for part in &self.parts {
            let mut found = part.first_block();
            part.device.read_back(0, &mut found).map_err(failed)?;
            let steps = [hidden(&found, &[0]), hidden(&found, &HEADS), part.first_block()];
            written += part.step_by_step(found, steps).map_err(failed)?;
        }
        self.invalid = true;
        Ok(written)
    }

    /// The last writes: the first blocks, when all else is proven. Returns the bytes written.
    pub fn complete(&mut self) -> Result<u64> {
        let mut written = 0;
        for part in &mut self.parts {
            let Some(first) = part.first.take() else { continue };
            let failed = |error| Refusal::io(format!("completing slot {}", self.slot), &error);
            let steps = [hidden(&first, &HEADS), hidden(&first, &[0]), Buffer::of(&first)];
            written += part.step_by_step(part.first_block(), steps).map_err(failed)?;
            let mut found = part.first_block();
            part.device.read_back(0, &mut found).map_err(failed)?;
            if *found != *first {
                return Err(differs(&part.role, self.slot, 1, 0));
            }
        }
        Ok(written)
    }
}

impl Part {
    /// Room for the first block.
    fn first_block(&self) -> Buffer {
        // At most BLOCK_SIZE.
        Buffer::new(self.size.min(BLOCK_SIZE as u64) as usize)
    }

    /// Takes the first block from one content to another, each step flushed. Returns the bytes written.
    fn step_by_step(&self, mut now: Buffer, steps: [Buffer; 3]) -> io::Result<u64> {
        let mut written = 0;
        for step in steps {
            if *step != *now {
                self.device.write_at(0, &step)?;
                self.device.flush()?;
                written += step.len() as u64;
            }
            now = step;
        }
        Ok(written)
    }
}

/// Sectors of 512 bytes in which file systems say what they are: FAT (and squashfs) in the first, ext4
/// (and erofs) in the third. Each is written alone, since a power cut may leave any of the sectors of
/// one write: the one that makes a system of the slot comes after all else, and goes first.
const HEADS: [usize; 2] = [0, 2];

/// The block without these sectors.
fn hidden(block: &Buffer, sectors: &[usize]) -> Buffer {
    let mut hidden = Buffer::of(block);
    for sector in sectors {
        hidden.chunks_mut(512).skip(*sector).take(1).for_each(|bytes| bytes.fill(0));
    }
    hidden
}

/// The device does not hold what was written to it.
pub(super) fn differs(role: &str, slot: Slot, blocks: usize, first: u32) -> Refusal {
    Refusal::new(
        "read-back",
        format!(
            "{blocks} blocks of {} do not hold what was written, the first of them at byte {}",
            slot_role(role, slot),
            Index::offset(first)
        ),
        "install again: only what is wrong is written; if it happens twice, replace the card",
    )
}
