//! One interface for both boot flows: which slot is committed, which is on trial, and how to change that
//! so that a power cut at any moment leaves either the old or the new choice.

mod fat;
mod tryboot;
mod uboot;

use bundle::bootstate::Slot;
pub use contract::answer::{BootStatus, SlotTrial};

pub(crate) use tryboot::ArmedTrial;
pub use tryboot::Tryboot;
pub use uboot::Uboot;

use crate::device::{BootFlow, RobotDevice, slot_role};
use crate::refusal::{Refusal, Result};

/// How the slot is chosen. Each change is durable when the call returns.
pub trait BootControl: Send + Sync {
    /// Checks, before anything is written, that this robot can roll back a bad update.
    ///
    /// # Errors
    /// What is missing: `old-eeprom`, `no-tryboot`, `boot-state`, `io`.
    fn ready(&self) -> Result<()> {
        Ok(())
    }

    /// What the boot loader will do.
    ///
    /// # Errors
    /// `io`; `boot-state`: there is no valid boot state.
    fn status(&self) -> Result<BootStatus>;

    /// Lets the next restart try `slot`, which must be complete.
    ///
    /// # Errors
    /// As [`BootControl::status`], or when reading back gives other bytes.
    fn arm_trial(&self, slot: Slot) -> Result<()>;

    /// Commits the running slot, and ends its trial.
    ///
    /// # Errors
    /// As [`BootControl::arm_trial`].
    fn commit(&self) -> Result<()>;

    /// Ends a trial: from the next restart on the committed slot runs.
    ///
    /// # Errors
    /// As [`BootControl::arm_trial`].
    fn roll_back(&self) -> Result<()>;

    /// The argument that the restart into a trial passes to the firmware (`reboot(2)`); `None`: no argument.
    fn restart_argument(&self) -> Option<&'static str> {
        None
    }
}

/// The boot flow of this robot.
///
/// # Errors
/// When its disk cannot be opened, or `device.toml` lists no sectors for the boot state.
pub fn open(device: &RobotDevice) -> Result<Box<dyn BootControl>> {
    match device.about.boot_flow {
        BootFlow::Uboot => {
            let sectors = device.about.boot_state.sectors.as_slice();
            let [first, second] = sectors else {
                return Err(Refusal::new(
                    "bad-device",
                    format!("device.toml lists {} boot-state sectors, expected 2", sectors.len()),
                    crate::NEWER_IMAGE,
                ));
            };
            let disk = device.open_disk(true)?;
            Ok(Box::new(Uboot::new(disk, [*first, *second], device.running)))
        }
        BootFlow::Tryboot => {
            let number = |slot: Slot| {
                let role = slot_role("boot", slot);
                device.about.partitions.get(&role).map_or(0, |partition| partition.number)
            };
            let numbers = [number(Slot::A), number(Slot::B)];
            let since = device.about.eeprom_since.as_deref().unwrap_or_default();
            let boot = device.open_partition("boot", true)?;
            Ok(Box::new(Tryboot::new(boot, numbers, since, device.running, device.root())?))
        }
    }
}
