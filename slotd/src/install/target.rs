//! The idle slot as a whole: its partitions, and the first blocks, which are written last.

use std::io;

use bundle::bootstate::Slot;
use bundle::index::sha256;
use bundle::{BLOCK_SIZE, BlockIndex, BundleManifest};
use serde_json::json;

use crate::buffer::AlignedBuffer;
use crate::device::slot_role;
use crate::machine::RobotContext;
use crate::record;
use crate::refusal::{Refusal, Result};
use crate::storage::Storage;

/// The component that is installed into slots.
const SYSTEM: &str = "system";

/// The idle slot, ready to be written.
pub(super) struct IdleSlot<'a> {
    robot: RobotContext<'a>,
    slot: Slot,
    /// One for each payload, in the manifest's order.
    pub parts: Vec<IdlePartition>,
    /// Whether the first blocks are zero on the device.
    invalid: bool,
}

/// One partition of the slot.
pub(super) struct IdlePartition {
    /// The payload's role.
    pub role: String,
    /// The partition.
    pub device: Box<dyn Storage>,
    /// The payload's first block, as long as it is not on the device.
    pub first: Option<AlignedBuffer>,
    /// The payload's size in bytes.
    size: u64,
}

impl<'a> IdleSlot<'a> {
    /// Opens the partition of each payload, if the bundle has exactly the payloads of a slot.
    pub fn open(robot: &RobotContext<'a>, slot: Slot, manifest: &BundleManifest) -> Result<Self> {
        let suffix = slot_role("", slot);
        let roles = robot.about.partitions.keys();
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
                            "the bundle has a payload {}/{role}, but this robot's slots have no such partition",
                            component.name
                        ),
                        "use the bundle that was built for this board",
                    ));
                };
                missing.swap_remove(at);
                let device = robot.slots.open(slot, role)?;
                if payload.size > device.size() {
                    return Err(Refusal::new(
                        "too-large",
                        format!(
                            "system/{role} has {} bytes, but the partition {} has {}",
                            payload.size,
                            slot_role(role, slot),
                            device.size()
                        ),
                        "build the product with a smaller system; this card's partitions are too small for it",
                    ));
                }
                parts.push(IdlePartition {
                    role: role.to_owned(),
                    device,
                    first: None,
                    size: payload.size,
                });
            }
        }
        if !missing.is_empty() {
            return Err(Refusal::new(
                "incomplete-bundle",
                format!("the bundle lacks these parts of a slot: {}", missing.join(", ")),
                "use the bundle that was built for this board",
            ));
        }
        Ok(Self { robot: *robot, slot, parts, invalid: false })
    }

    /// Before the first write: durably makes the slot unusable, by one block in each partition. `current` is
    /// the payload that is being installed; those before it are verified to be in place. Returns the bytes
    /// written.
    pub fn invalidate(&mut self, current: usize, index: &BlockIndex) -> Result<u64> {
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
            // The first block of the current payload is read from the bundle if it differs.
            if number < current || held {
                part.first = Some(first);
            }
        }
        if let Err(error) = record::remove_slot(self.robot.root, slot) {
            let error = error.to_string();
            self.robot.events.add("not-recorded", json!({ "slot": slot, "error": error }));
        }
        let mut written = 0;
        for part in &self.parts {
            let mut found = part.first_block();
            part.device.read_back(0, &mut found).map_err(failed)?;
            let steps = [
                without_sectors(&found, &[0]),
                without_sectors(&found, &HEADS),
                part.first_block(),
            ];
            written += part.step_by_step(found, steps).map_err(failed)?;
        }
        self.invalid = true;
        Ok(written)
    }

    /// The last writes: the first blocks, after everything else is verified. Returns the bytes written.
    pub fn complete(&mut self) -> Result<u64> {
        let mut written = 0;
        for part in &mut self.parts {
            let Some(first) = part.first.take() else { continue };
            let failed = |error| Refusal::io(format!("completing slot {}", self.slot), &error);
            let steps = [
                without_sectors(&first, &HEADS),
                without_sectors(&first, &[0]),
                AlignedBuffer::copy_of(&first),
            ];
            written += part.step_by_step(part.first_block(), steps).map_err(failed)?;
            let mut found = part.first_block();
            part.device.read_back(0, &mut found).map_err(failed)?;
            if *found != *first {
                return Err(read_back_differs(&part.role, self.slot, 1, 0));
            }
        }
        Ok(written)
    }
}

impl IdlePartition {
    /// A buffer for the first block.
    fn first_block(&self) -> AlignedBuffer {
        // At most BLOCK_SIZE.
        AlignedBuffer::new(self.size.min(BLOCK_SIZE as u64) as usize)
    }

    /// Changes the first block in steps and flushes each step. Returns the bytes written.
    fn step_by_step(&self, mut now: AlignedBuffer, steps: [AlignedBuffer; 3]) -> io::Result<u64> {
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

/// Sectors of 512 bytes with the magic numbers of file systems: FAT (and squashfs) in the first, ext4 (and
/// erofs) in the third. Each is written separately, because after a power cut any sectors of one write may be
/// on the card: the sector that makes the slot bootable is written last and cleared first.
const HEADS: [usize; 2] = [0, 2];

/// The block without these sectors.
fn without_sectors(block: &AlignedBuffer, sectors: &[usize]) -> AlignedBuffer {
    let mut hidden = AlignedBuffer::copy_of(block);
    for sector in sectors {
        hidden.chunks_mut(512).skip(*sector).take(1).for_each(|bytes| bytes.fill(0));
    }
    hidden
}

/// The device reads back other bytes than were written.
pub(super) fn read_back_differs(role: &str, slot: Slot, blocks: usize, first: u32) -> Refusal {
    Refusal::new(
        "read-back",
        format!(
            "{blocks} blocks of {} differ from what was written, the first one at byte {}",
            slot_role(role, slot),
            BlockIndex::offset(first)
        ),
        "install again: only the wrong blocks are written; if it happens twice, replace the card",
    )
}
