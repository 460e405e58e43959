//! Boot flow `tryboot`: the Raspberry Pi's firmware chooses the slot. `autoboot.txt` names the boot partition
//! of the committed slot, and under `[tryboot]` that of the other slot; a restart with the argument
//! `0 tryboot` selects the latter once. `docs/concepts/boot-flows.md` has the rules and their sources.
//!
//! A commit swaps two digits of `autoboot.txt` in place, in one sector. Whatever part of the sector reaches
//! the card, each of the two lines has the old digit or the new one.

use std::fs;
use std::io;

use bundle::bootstate::Slot;
use serde::{Deserialize, Serialize};

use super::fat::{self, FatFileSectors};
use super::{BootControl, BootStatus, SlotTrial};
use crate::device::other_slot;
use crate::durable;
use crate::refusal::{Refusal, Result, failed};
use crate::root::RootDir;
use crate::storage::Storage;

/// The file's name as a FAT stores it.
const AUTOBOOT: &[u8; 11] = b"AUTOBOOTTXT";

/// What the firmware reports about itself, in the device tree that it passes to the kernel.
const TOLD: &str = "proc/device-tree/chosen/bootloader";

/// A device that only Raspberry Pi's kernel has. This kernel passes the restart argument `tryboot` to the
/// firmware; the kernel of kernel.org does not (`drivers/firmware/raspberrypi.c`).
const OWN_KERNEL: &str = "dev/vcio";

/// The record of a trial, because the firmware clears its flag as soon as it has started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ArmedTrial {
    slot: Slot,
    /// The kernel's boot id when the trial was armed: while it is the same, the trial has not started yet.
    boot: String,
}

/// `autoboot.txt` with its two partitions.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Autoboot {
    text: Vec<u8>,
    /// The positions of the digits after `boot_partition=`: the committed partition, and the one to try.
    digits: [usize; 2],
}

impl Autoboot {
    /// Accepts only the text of this product's images, byte by byte: a file that was written by hand must not
    /// be edited.
    fn parse(text: &[u8]) -> Option<Self> {
        let readable = std::str::from_utf8(text).ok()?;
        let (mut section, mut digits) = ("all", [None, None]);
        let mut at = 0;
        for line in readable.split_inclusive('\n') {
            let word = line.trim_end();
            match word {
                "[all]" => section = "all",
                "[tryboot]" => section = "tryboot",
                "" | "tryboot_a_b=1" => {}
                _ => {
                    let digit = word.strip_prefix("boot_partition=")?;
                    if digit.len() != 1 || !digit.bytes().all(|b| b.is_ascii_digit()) {
                        return None;
                    }
                    let place = digits.get_mut(usize::from(section == "tryboot"))?;
                    if place.replace(at + word.len() - 1).is_some() {
                        return None;
                    }
                }
            }
            at += line.len();
        }
        let [Some(committed), Some(tried)] = digits else { return None };
        Some(Self { text: text.to_vec(), digits: [committed, tried] })
    }

    fn partitions(&self) -> [u32; 2] {
        self.digits
            .map(|at| self.text.get(at).map_or(0, |digit| u32::from(digit.wrapping_sub(b'0'))))
    }

    fn with(&self, partitions: [u32; 2]) -> Self {
        let mut changed = self.clone();
        for (at, partition) in self.digits.into_iter().zip(partitions) {
            if let (Some(byte), Ok(number)) = (changed.text.get_mut(at), u8::try_from(partition)) {
                *byte = b'0' + number;
            }
        }
        changed
    }
}

/// The firmware's boot flow.
#[derive(Debug)]
pub struct Tryboot<S> {
    boot: S,
    /// The numbers of `boot-a` and `boot-b`.
    partitions: [u32; 2],
    /// Date of the oldest EEPROM release that can try a slot, in seconds since 1970.
    since: u64,
    running: Slot,
    root: RootDir,
}

impl<S: Storage> Tryboot<S> {
    /// `boot` is the partition with `autoboot.txt`, `partitions` are the numbers of `boot-a` and `boot-b`,
    /// `since` is the day of the oldest EEPROM release that can try a slot.
    ///
    /// # Errors
    /// `bad-device`: the day or the numbers are invalid.
    pub fn new(
        boot: S,
        partitions: [u32; 2],
        since: &str,
        running: Slot,
        root: &RootDir,
    ) -> Result<Self> {
        let bad = |why: String| {
            Refusal::new("bad-device", format!("device.toml: {why}"), crate::NEWER_IMAGE)
        };
        let seconds = parse_day(since)
            .ok_or_else(|| bad(format!("invalid date `{since}` in `eeprom-since`")))?;
        if partitions.iter().any(|number| !(1..=9).contains(number)) {
            return Err(bad(format!(
                "boot partitions {partitions:?}, expected numbers from 1 to 9"
            )));
        }
        Ok(Self { boot, partitions, since: seconds, running, root: root.clone() })
    }

    fn number(&self, slot: Slot) -> u32 {
        let [a, b] = self.partitions;
        if slot == Slot::A { a } else { b }
    }

    fn slot(&self, number: u32) -> Option<Slot> {
        [Slot::A, Slot::B].into_iter().find(|slot| self.number(*slot) == number)
    }

    fn read(&self) -> Result<(FatFileSectors, Autoboot)> {
        let failed = |error: io::Error| Refusal::io("reading autoboot.txt", &error);
        let place = fat::find_file(&self.boot, AUTOBOOT).map_err(failed)?;
        let mut text = vec![0; place.length];
        self.boot.read_at(place.offset, &mut text).map_err(failed)?;
        let known = Autoboot::parse(&text).filter(|autoboot| {
            autoboot.partitions().iter().all(|number| self.slot(*number).is_some())
        });
        let autoboot = known.ok_or_else(|| {
            Refusal::new(
                "boot-state",
                "autoboot.txt on the boot partition differs from the image's",
                "restore the file of the card image: two lines `boot_partition=`, the second under [tryboot]",
            )
        })?;
        Ok((place, autoboot))
    }

    /// Makes `slot` the committed slot and the other one the slot to try.
    fn choose(&self, slot: Slot) -> Result<()> {
        let (place, autoboot) = self.read()?;
        let wanted = [self.number(slot), self.number(other_slot(slot))];
        if autoboot.partitions() == wanted {
            return Ok(());
        }
        let failed = |error: io::Error| Refusal::io("writing autoboot.txt", &error);
        // The whole sector unchanged, except for the two digits.
        let mut sector = [0; 512];
        self.boot.read_at(place.offset, &mut sector).map_err(failed)?;
        let changed = autoboot.with(wanted);
        sector.iter_mut().zip(&changed.text).for_each(|(to, from)| *to = *from);
        let mut found = [0; 512];
        self.boot
            .write_at(place.offset, &sector)
            .and_then(|()| self.boot.flush())
            .and_then(|()| self.boot.read_back(place.offset, &mut found))
            .map_err(failed)?;
        if found != sector {
            return Err(Refusal::new(
                "boot-state",
                "autoboot.txt on the boot partition differs from what was just written",
                "the card is failing: replace it",
            ));
        }
        Ok(())
    }

    /// A number that the firmware reports; big-endian, like all numbers in a device tree.
    fn firmware_number(&self, name: &str) -> Option<u32> {
        let bytes = fs::read(self.root.path(TOLD).join(name)).ok()?;
        Some(u32::from_be_bytes(bytes.try_into().ok()?))
    }

    /// The paths of a trial's record: in memory if `data` could not be written, otherwise on `data`. A record in memory
    /// ends with this start, and so does a trial that has not started yet.
    fn records(&self) -> [std::path::PathBuf; 2] {
        [self.root.run(), self.root.state()].map(|folder| folder.join("tryboot.json"))
    }

    fn boot_id(&self) -> Result<String> {
        self.root.boot_id().map_err(|error| Refusal::io("reading the kernel's boot id", &error))
    }

    /// The trial's record. A damaged record is reported and ignored: what the firmware starts does not depend on it.
    fn armed(&self, damage: &mut Vec<String>) -> Option<ArmedTrial> {
        self.records().iter().find_map(|path| match durable::read_json(path) {
            Ok(armed) => armed,
            Err(error) => {
                damage.push(format!("record of the trial {}: {error}", path.display()));
                None
            }
        })
    }

    fn record(&self, armed: &ArmedTrial) -> Result<()> {
        let [memory, kept] = self.records();
        let failed = |path: &std::path::Path| {
            let action = format!("writing {}", path.display());
            move |error: io::Error| Refusal::io(&action, &error)
        };
        match durable::write_json(&kept, armed) {
            Ok(()) => durable::remove(&memory).map_err(failed(&memory)),
            // `data` may be full, failing or itself in memory: this must not prevent an update.
            Err(error) => {
                crate::say!("slotd: {} is kept in memory: {error}", kept.display());
                durable::write_json(&memory, armed).map_err(failed(&memory))
            }
        }
    }

    fn forget(&self) -> Result<()> {
        for path in self.records().iter().filter(|path| path.symlink_metadata().is_ok()) {
            durable::remove(path).map_err(failed("removing", path))?;
        }
        Ok(())
    }
}

impl<S: Storage> BootControl for Tryboot<S> {
    fn ready(&self) -> Result<()> {
        let old = |found: String| {
            Refusal::new(
                "old-eeprom",
                format!(
                    "the firmware in this board's EEPROM {found}; it could not roll back a bad update"
                ),
                "update the EEPROM with Raspberry Pi's rpi-eeprom-update, then install again",
            )
        };
        match self.firmware_number("build-timestamp") {
            None => return Err(old("does not report its build time".to_owned())),
            Some(made) if u64::from(made) < self.since => {
                let days = (self.since - u64::from(made)).div_ceil(86_400);
                return Err(old(format!("is {days} days too old (build time {made})")));
            }
            Some(_) => {}
        }
        if self.firmware_number("partition") != Some(self.number(self.running)) {
            return Err(Refusal::new(
                "boot-state",
                format!(
                    "slot {} runs, but the firmware reports that it has started boot partition {:?}",
                    self.running,
                    self.firmware_number("partition")
                ),
                "restart the robot; if this happens again, flash the card again",
            ));
        }
        if !self.root.path(OWN_KERNEL).exists() {
            return Err(Refusal::new(
                "no-tryboot",
                "this system's kernel does not pass the request for a trial to the firmware",
                "use an image with Raspberry Pi's own kernel, which is the only one that does",
            ));
        }
        self.read().map(drop)
    }

    fn status(&self) -> Result<BootStatus> {
        let (_, autoboot) = self.read()?;
        let [committed, tried] = autoboot.partitions();
        let active = self.slot(committed).unwrap_or(self.running);
        let mut damage = Vec::new();
        if tried == committed {
            damage.push(
                "autoboot.txt names the same partition twice: a write was interrupted".to_owned(),
            );
        }
        let on_trial = self.firmware_number("tryboot").is_some_and(|flag| flag != 0);
        let tries = |armed: &ArmedTrial, boot: &str| {
            let running = on_trial && armed.slot == self.running;
            u32::from(!running && armed.boot == boot)
        };
        let armed = self.armed(&mut damage).filter(|armed| armed.slot != active);
        let trial = match armed {
            Some(armed) => {
                let boot = self.boot_id()?;
                Some(SlotTrial { slot: armed.slot, tries: tries(&armed, &boot) })
            }
            // The record was lost with `data`, but the trial is running.
            None if on_trial && self.running != active => {
                Some(SlotTrial { slot: self.running, tries: 0 })
            }
            None => None,
        };
        Ok(BootStatus { active, trial, damage })
    }

    fn arm_trial(&self, slot: Slot) -> Result<()> {
        self.ready()?;
        // Writes the slot under [tryboot], which may be wrong after an interrupted write.
        self.choose(other_slot(slot))?;
        self.record(&ArmedTrial { slot, boot: self.boot_id()? })
    }

    fn commit(&self) -> Result<()> {
        self.choose(self.running)?;
        self.forget()
    }

    fn roll_back(&self) -> Result<()> {
        // Every other restart starts the committed slot.
        self.forget()
    }

    fn restart_argument(&self) -> Option<&'static str> {
        Some("0 tryboot")
    }
}

/// Midnight of `2024-05-13` in seconds since 1970.
fn parse_day(text: &str) -> Option<u64> {
    let mut parts = text.split('-').map(|part| part.parse::<u64>().ok());
    let (year, month, day) = (parts.next()??, parts.next()??, parts.next()??);
    if parts.next().is_some() || !(1970..=2999).contains(&year) {
        return None;
    }
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Civil date to days (Howard Hinnant, "chrono-compatible low-level date algorithms").
    let years = year - u64::from(month <= 2);
    let (era, of_era) = (years / 400, years % 400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year;
    Some((days - 719_468) * 86_400)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may fail by panicking")]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"[all]\ntryboot_a_b=1\nboot_partition=2\n[tryboot]\nboot_partition=3\n";

    #[test]
    fn only_our_own_file_is_understood() {
        let autoboot = Autoboot::parse(TEXT).unwrap();
        assert_eq!(autoboot.partitions(), [2, 3]);
        let swapped = autoboot.with([3, 2]);
        assert_eq!(swapped.partitions(), [3, 2]);
        assert_eq!(swapped.text.len(), TEXT.len());
        assert_eq!(Autoboot::parse(&swapped.text), Some(swapped));
        for other in [
            &b""[..],
            b"[all]\nboot_partition=2\n",
            b"boot_partition=2\n[tryboot]\nboot_partition=12\n",
            b"boot_partition=2\nboot_partition=3\n[tryboot]\nboot_partition=3\n",
            b"# mine\nboot_partition=2\n[tryboot]\nboot_partition=3\n",
            b"boot_partition=2\n[tryboot]\nboot_partition=\xff\n",
        ] {
            assert_eq!(Autoboot::parse(other), None, "{other:?}");
        }
    }

    #[test]
    fn days_become_seconds() {
        assert_eq!(parse_day("1970-01-01"), Some(0));
        assert_eq!(parse_day("2024-02-29"), Some(1_709_164_800));
        assert_eq!(parse_day("2024-05-13"), Some(1_715_558_400));
        for wrong in ["", "2024", "2024-13-01", "2024-05-13-1", "x-05-13"] {
            assert_eq!(parse_day(wrong), None, "{wrong}");
        }
    }
}
