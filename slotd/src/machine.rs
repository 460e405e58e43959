//! The robot as its verbs see it: its paths, its image's description, how slots are chosen and opened.

use bundle::bootstate::Slot;

use crate::boot::BootControl;
use crate::device::{DeviceFile, RobotDevice, slot_role};
use crate::events::EventLog;
use crate::files::FileChanges;
use crate::refusal::{Refusal, Result};
use crate::root::RootDir;
use crate::storage::Storage;

/// Everything of a robot that a change needs.
#[derive(Clone, Copy)]
pub struct RobotContext<'a> {
    /// The root of the robot's paths.
    pub root: &'a RootDir,
    /// The image's description.
    pub about: &'a DeviceFile,
    /// The running slot.
    pub running: Slot,
    /// How its slot is chosen.
    pub flow: &'a dyn BootControl,
    /// Access to the slots.
    pub slots: &'a dyn SlotStorage,
    /// The interface that changes the files of an API.
    pub files: &'a dyn FileChanges,
    /// Its log.
    pub events: &'a EventLog,
}

/// How the partitions of slots are opened.
pub trait SlotStorage: Sync {
    /// The partition for payloads of `role` in `slot`. Only the idle slot is opened for writing.
    ///
    /// # Errors
    /// `wrong-layout` or `io`.
    fn open(&self, slot: Slot, role: &str) -> Result<Box<dyn Storage>>;

    /// The disk, and the first sectors of the two copies of the trust area; `None`: this image has no trust area.
    fn trust_area(&self, _writable: bool) -> Option<Result<TrustArea>> {
        None
    }
}

/// A disk and the first sectors of the two copies.
pub type TrustArea = (Box<dyn Storage>, [u64; 2]);

impl SlotStorage for RobotDevice {
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

/// Refuses while it is undecided which slot is kept: a trial is pending, or the committed slot did not
/// start and the other one runs instead. The idle slot may then be the only good one.
///
/// # Errors
/// `trial-pending`, `not-committed`; `boot-state` or `io` when the state cannot be read.
pub fn require_decided(robot: &RobotContext<'_>) -> Result<()> {
    let status = robot.flow.status()?;
    let running = robot.running;
    if let Some(trial) = status.pending(running) {
        let place = if trial.slot == running { "running" } else { "not started yet" };
        return Err(Refusal::new(
            "trial-pending",
            format!("slot {} is on trial ({place})", trial.slot),
            "wait until the trial is committed (`slotd status` shows what it waits for), or end it with `slotd roll-back`",
        ));
    }
    if status.active != running {
        return Err(Refusal::new(
            "not-committed",
            format!("slot {running} is running, but slot {} is committed", status.active),
            "keep the running slot with `slotd commit`, or go back with `slotd boot-other`",
        ));
    }
    Ok(())
}
