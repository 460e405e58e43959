//! Boot flow `uboot`: two raw sectors, written alternately. `boot.scr` reads them, and decrements the try
//! counter, before it starts a kernel. `docs/concepts/boot-flows.md` has the format.

use bundle::bootstate::{self, BootState, SECTOR, Slot};

use super::{BootControl, BootStatus, SlotTrial};
use crate::device;
use crate::refusal::{Refusal, Result};
use crate::storage::Storage;

/// How often a trial is started. Once: a system that needs a second start must not be kept, and after a
/// power cut during the trial another `install` finds everything already written.
const TRIES: u32 = 1;

type Copies = [[u8; SECTOR]; 2];

/// The boot state on a disk.
#[derive(Debug)]
pub struct Uboot<S> {
    disk: S,
    sectors: [u64; 2],
    running: Slot,
}

impl<S: Storage> Uboot<S> {
    /// `sectors` are the positions of the two copies, in units of 512 bytes; `running` is the slot of `/`.
    pub fn new(disk: S, sectors: [u64; 2], running: Slot) -> Self {
        Self { disk, sectors, running }
    }

    /// Both copies, and which one is used.
    fn read(&self) -> Result<(Copies, Option<(usize, BootState)>)> {
        let mut copies = [[0; SECTOR]; 2];
        for (copy, sector) in copies.iter_mut().zip(self.sectors) {
            self.disk.read_at(sector * device::SECTOR, copy).map_err(|error| {
                Refusal::io(format!("reading the boot state in sector {sector}"), &error)
            })?;
        }
        let newest = bootstate::find_newest(copies.iter().map(<[u8; SECTOR]>::as_slice));
        Ok((copies, newest))
    }

    /// Writes the copy that is not used, so that a torn write leaves the other one intact.
    fn write(&self, change: impl FnOnce(&mut BootState)) -> Result<()> {
        let (_, newest) = self.read()?;
        // Both copies are damaged: `boot.scr` then starts a slot that loads, which is the running
        // one. Sequence numbers start again.
        let (counts, mut state) = newest
            .unwrap_or((1, BootState { sequence: 0, active: self.running, trial: None, tries: 0 }));
        change(&mut state);
        state.sequence = state.sequence.checked_add(1).ok_or_else(|| {
            Refusal::new(
                "boot-state",
                "boot state sequence number overflow",
                "flash the card again",
            )
        })?;
        let [first, second] = self.sectors;
        let sector = if counts == 0 { second } else { first };
        let bytes = state.encode();
        let mut found = [0; SECTOR];
        self.disk
            .write_at(sector * device::SECTOR, &bytes)
            .and_then(|()| self.disk.flush())
            .and_then(|()| self.disk.read_back(sector * device::SECTOR, &mut found))
            .map_err(|error| {
                Refusal::io(format!("writing the boot state in sector {sector}"), &error)
            })?;
        if found != bytes {
            return Err(Refusal::new(
                "boot-state",
                format!("the boot state in sector {sector} differs from what was just written"),
                "the card is failing: replace it",
            ));
        }
        Ok(())
    }
}

impl<S: Storage> BootControl for Uboot<S> {
    fn status(&self) -> Result<BootStatus> {
        let (copies, newest) = self.read()?;
        let damage = copies.iter().enumerate().filter_map(|(number, copy)| {
            // A new card has one copy; the other is zero until the first write.
            let invalid = BootState::decode(copy).err().filter(|_| copy.iter().any(|b| *b != 0))?;
            Some(format!("boot state, copy {number}: {invalid}"))
        });
        let mut damage: Vec<String> = damage.collect();
        let Some((_, state)) = newest else {
            damage.push("no copy of the boot state is valid".to_owned());
            return Ok(BootStatus { active: self.running, trial: None, damage });
        };
        let trial = state.trial.map(|slot| SlotTrial { slot, tries: state.tries });
        Ok(BootStatus { active: state.active, trial, damage })
    }

    fn arm_trial(&self, slot: Slot) -> Result<()> {
        self.write(|state| {
            state.trial = Some(slot);
            state.tries = TRIES;
        })
    }

    fn commit(&self) -> Result<()> {
        self.write(|state| {
            state.active = self.running;
            state.trial = None;
            state.tries = 0;
        })
    }

    fn roll_back(&self) -> Result<()> {
        self.write(|state| {
            state.trial = None;
            state.tries = 0;
        })
    }
}
