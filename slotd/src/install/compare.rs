//! Compares a slot with the indexes of a signed bundle, block by block, to check that it is unchanged since the
//! install. A system has the same bytes in either slot, so each slot can be checked at any time.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use bundle::bootstate::Slot;
use bundle::{BLOCK_SIZE, BlockIndex, BundleInput, BundleReader};

use super::payload::write_thread_lost;
use super::target::IdleSlot;
use super::{InstallStep, Progress, from_source, scan};
use crate::device::{RobotDevice, slot_role};
use crate::machine::{RobotContext, SlotStorage, TrustArea};
use crate::record;
use crate::refusal::{Refusal, Result};
use crate::storage::Storage;

/// Maximum number of places that a refusal lists.
const LISTED: usize = 20;

/// The partitions of both slots, read-only.
pub(crate) struct ReadOnlySlots<'a>(pub &'a RobotDevice);

impl SlotStorage for ReadOnlySlots<'_> {
    fn open(&self, slot: Slot, role: &str) -> Result<Box<dyn Storage>> {
        Ok(Box::new(self.0.open_partition(&slot_role(role, slot), false)?))
    }

    fn trust_area(&self, _: bool) -> Option<Result<TrustArea>> {
        self.0.trust_area(false)
    }
}

/// Compares a slot with a bundle. Only the indexes of its payloads are read.
///
/// # Errors
/// `slot-differs`, with the places; `unknown-payload`, `incomplete-bundle`, `too-large`: the bundle is not for slots
/// of this robot. `io`, `source`, and the refusals of a bundle.
pub(crate) fn compare<I: BundleInput>(
    robot: &RobotContext<'_>,
    reader: &mut BundleReader<I>,
    slot: Slot,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<u64> {
    let target = IdleSlot::open(robot, slot, reader.manifest())?;
    let payloads = reader.manifest().components.iter().flat_map(|component| &component.payloads);
    let total = payloads.map(|payload| payload.size).sum();
    let done = AtomicU64::new(0);
    let (mut wrong_blocks, mut blocks, mut places) = (0, 0, Vec::new());
    for part in &target.parts {
        let role = slot_role(&part.role, slot);
        let payload = reader.next_payload().map_err(from_source)?;
        let mut payload = payload.ok_or_else(write_thread_lost)?;
        let index = payload.shared_index();
        while payload.next_frame().is_some() {
            payload.skip_frame().map_err(from_source)?;
        }
        let wrong = Mutex::new(Vec::new());
        scan::compare_frames(
            part.device.as_ref(),
            &index,
            index.frames(),
            None,
            |frame, found| -> Result<()> {
                let found =
                    found.map_err(|error| Refusal::io(format!("reading {role}"), &error))?;
                if !found.proven {
                    let mut wrong = wrong.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    // All blocks match the truncated hashes in the index, but not the full content hash.
                    if found.wrong.is_empty() {
                        wrong.extend(frame.first_block..frame.first_block + frame.blocks);
                    }
                    wrong.extend(found.wrong);
                }
                let size = index.content_size(frame);
                let done = done.fetch_add(size, Ordering::Relaxed) + size;
                progress(Progress { step: InstallStep::ReadBack, done, total });
                Ok(())
            },
        )?;
        let mut wrong = wrong.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        wrong.sort_unstable();
        wrong_blocks += wrong.len();
        blocks += index.blocks();
        places.extend(
            byte_ranges(&index, &wrong)
                .map(|(from, length)| format!("\n  {role}: {length} bytes from byte {from}")),
        );
    }
    // The archive's end.
    while reader.next_payload().map_err(from_source)?.is_some() {}
    if places.is_empty() {
        return Ok(total);
    }
    let count = format!("{wrong_blocks} of {blocks} blocks of 4 KiB");
    Err(slot_differs(robot, reader, slot, &count, &places))
}

/// Neighbouring blocks as one range each: its first byte and its length.
fn byte_ranges(index: &BlockIndex, blocks: &[u32]) -> impl Iterator<Item = (u64, u64)> {
    let size = index.size();
    let follows = |one: &u32, other: &u32| one + 1 == *other;
    blocks.chunk_by(follows).filter_map(move |run| {
        let from = BlockIndex::offset(*run.first()?);
        let length = (run.len() * BLOCK_SIZE) as u64;
        Some((from, length.min(size - from)))
    })
}

fn slot_differs<I: BundleInput>(
    robot: &RobotContext<'_>,
    reader: &BundleReader<I>,
    slot: Slot,
    count: &str,
    places: &[String],
) -> Refusal {
    let version = &reader.manifest().version;
    let mut message = format!("slot {slot} differs from {version} in {count}");
    message.extend(places.iter().take(LISTED).map(String::as_str));
    if places.len() > LISTED {
        message.push_str(&format!("\n  and {} more places", places.len() - LISTED));
    }
    let installed = record::read_slot(robot.root, slot);
    let help = match installed.filter(|known| known.manifest != reader.manifest_sha256()) {
        Some(known) => format!(
            "the installed bundle was {} (manifest {}): compare the slot with that one",
            known.version, known.manifest
        ),
        None if slot == robot.running => {
            "if this bundle was installed here, the card is failing: run `slotd boot-other`, then install into this slot; \
             if it happens twice, replace the card"
                .to_owned()
        }
        None => "if this bundle was installed here, install it again: only blocks that differ are written; if it \
                 happens twice, replace the card"
            .to_owned(),
    };
    Refusal::new("slot-differs", message, help)
}
