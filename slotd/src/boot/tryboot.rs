//! Boot flow `tryboot`: the Raspberry Pi's own firmware chooses. `autoboot.txt` names the boot partition
//! of the committed slot, and under `[tryboot]` that of the other; a restart with the argument
//! `0 tryboot` asks for the latter once. `docs/boot-flows.md` has the rules and their sources.
//!
//! A commit swaps two digits of `autoboot.txt` in place: one sector, and whatever part of it reaches the
//! card, each of the two lines holds the old digit or the new one.

use std::fs;
use std::io;

use bundle::bootstate::Slot;
use serde::{Deserialize, Serialize};

use super::fat::{self, Place};
use super::{BootFlow, BootStatus, Trial};
use crate::device::other;
use crate::durable;
use crate::refusal::{Refusal, Result};
use crate::root::Root;
use crate::storage::Storage;

/// The file's name as a FAT stores it.
const AUTOBOOT: &[u8; 11] = b"AUTOBOOTTXT";

/// What the firmware tells about itself, in the device tree that it hands over.
const TOLD: &str = "proc/device-tree/chosen/bootloader";

/// A device that only Raspberry Pi's own kernel has. The same kernel passes the word `tryboot` of a
/// restart on to the firmware; the kernel of kernel.org does not (`drivers/firmware/raspberrypi.c`).
const OWN_KERNEL: &str = "dev/vcio";

/// What a robot keeps of a trial, since the firmware forgets its flag as soon as it has started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Armed {
    slot: Slot,
    /// The kernel's boot id when it was armed: the trial is still to come while that start lasts.
    boot: String,
}

/// `autoboot.txt` with its two partitions.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Autoboot {
    text: Vec<u8>,
    /// Where the digit after `boot_partition=` stands: the committed one, and the one to try.
    digits: [usize; 2],
}

impl Autoboot {
    /// Understands only what this product's images hold, byte by byte: a file that somebody has written by
    /// hand is not to be edited.
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

/// The boot flow of the firmware.
#[derive(Debug)]
pub struct Tryboot<S> {
    boot: S,
    /// The numbers of `boot-a` and `boot-b`.
    partitions: [u32; 2],
    /// Seconds since 1970 of the oldest EEPROM release that can try a slot.
    since: u64,
    running: Slot,
    root: Root,
}

impl<S: Storage> Tryboot<S> {
    /// `boot` is the partition with `autoboot.txt`, `partitions` are the numbers of `boot-a` and `boot-b`,
    /// `since` is the day of the oldest EEPROM release that can try a slot.
    ///
    /// # Errors
    /// `bad-device`: the day or the numbers make no sense.
    pub fn new(
        boot: S,
        partitions: [u32; 2],
        since: &str,
        running: Slot,
        root: &Root,
    ) -> Result<Self> {
        let bad = |why: String| {
            let help = "build the image again with a current `cargo xtask`";
            Refusal::new("bad-device", format!("device.toml: {why}"), help)
        };
        let seconds =
            day(since).ok_or_else(|| bad(format!("`eeprom-since` is `{since}`, no day")))?;
        if partitions.iter().any(|number| !(1..=9).contains(number)) {
            return Err(bad(format!("boot partitions {partitions:?}, expected 1 to 9")));
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

    fn read(&self) -> Result<(Place, Autoboot)> {
        let failed = |error: io::Error| Refusal::io("reading autoboot.txt", &error);
        let place = fat::find(&self.boot, AUTOBOOT).map_err(failed)?;
        let mut text = vec![0; place.length];
        self.boot.read_at(place.offset, &mut text).map_err(failed)?;
        let known = Autoboot::parse(&text).filter(|autoboot| {
            autoboot.partitions().iter().all(|number| self.slot(*number).is_some())
        });
        let autoboot = known.ok_or_else(|| {
            Refusal::new(
                "boot-state",
                "autoboot.txt on the boot partition is not as this image has made it",
                "put back the file of the card image: two lines `boot_partition=`, the second under [tryboot]",
            )
        })?;
        Ok((place, autoboot))
    }

    /// Makes `slot` the committed one and the other the one to try.
    fn choose(&self, slot: Slot) -> Result<()> {
        let (place, autoboot) = self.read()?;
        let wanted = [self.number(slot), self.number(other(slot))];
        if autoboot.partitions() == wanted {
            return Ok(());
        }
        let failed = |error: io::Error| Refusal::io("writing autoboot.txt", &error);
        // The whole sector as it is, with two other digits.
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
                "the boot partition does not hold the autoboot.txt that was just written to it",
                "the card is failing: replace it",
            ));
        }
        Ok(())
    }

    /// A number that the firmware has told; big-endian, as all numbers of a device tree.
    fn told(&self, name: &str) -> Option<u32> {
        let bytes = fs::read(self.root.path(TOLD).join(name)).ok()?;
        Some(u32::from_be_bytes(bytes.try_into().ok()?))
    }

    /// Where a trial's record is: in memory, where it needs no room, if `data` could not take it; or on `data`. One
    /// in memory ends with the start, as does what it says of a trial that is still to come.
    fn records(&self) -> [std::path::PathBuf; 2] {
        [self.root.run(), self.root.state()].map(|folder| folder.join("tryboot.json"))
    }

    fn boot_id(&self) -> Result<String> {
        self.root.boot_id().map_err(|error| Refusal::io("reading the kernel's boot id", &error))
    }

    /// The trial's record. One that is damaged is as good as none, and is told: what the firmware starts does not
    /// depend on it.
    fn armed(&self, damage: &mut Vec<String>) -> Option<Armed> {
        self.records().iter().find_map(|path| match durable::read_json(path) {
            Ok(armed) => armed,
            Err(error) => {
                damage.push(format!("the trial's record {}: {error}", path.display()));
                None
            }
        })
    }

    fn record(&self, armed: &Armed) -> Result<()> {
        let [memory, kept] = self.records();
        let failed = |path: &std::path::Path| {
            let doing = format!("writing {}", path.display());
            move |error: io::Error| Refusal::io(&doing, &error)
        };
        match durable::write_json(&kept, armed) {
            Ok(()) => durable::remove(&memory).map_err(failed(&memory)),
            // Full, failing or in memory itself: `data` decides about no update.
            Err(error) => {
                crate::say!("slotd: {} is kept in memory: {error}", kept.display());
                durable::write_json(&memory, armed).map_err(failed(&memory))
            }
        }
    }

    fn forget(&self) -> Result<()> {
        for path in self.records().iter().filter(|path| path.symlink_metadata().is_ok()) {
            durable::remove(path)
                .map_err(|error| Refusal::io(format!("removing {}", path.display()), &error))?;
        }
        Ok(())
    }
}

impl<S: Storage> BootFlow for Tryboot<S> {
    fn ready(&self) -> Result<()> {
        let old = |found: String| {
            Refusal::new(
                "old-eeprom",
                format!(
                    "the firmware in this board's EEPROM {found}; it would not come back from a bad update"
                ),
                "update the EEPROM with Raspberry Pi's rpi-eeprom-update, then install again",
            )
        };
        match self.told("build-timestamp") {
            None => return Err(old("does not say when it was made".to_owned())),
            Some(made) if u64::from(made) < self.since => {
                let days = (self.since - u64::from(made)).div_ceil(86_400);
                return Err(old(format!("is {days} days too old (build time {made})")));
            }
            Some(_) => {}
        }
        if self.told("partition") != Some(self.number(self.running)) {
            return Err(Refusal::new(
                "boot-state",
                format!(
                    "slot {} runs, but the firmware says that it has started boot partition {:?}",
                    self.running,
                    self.told("partition")
                ),
                "restart the robot; if this stays, flash the card again",
            ));
        }
        if !self.root.path(OWN_KERNEL).exists() {
            return Err(Refusal::new(
                "no-tryboot",
                "this system's kernel does not pass the request for a trial on to the firmware",
                "only Raspberry Pi's own kernel does: use an image with that one",
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
            damage.push("autoboot.txt names one partition twice: a write was cut".to_owned());
        }
        let on_trial = self.told("tryboot").is_some_and(|flag| flag != 0);
        let tries = |armed: &Armed, boot: &str| {
            let running = on_trial && armed.slot == self.running;
            u32::from(!running && armed.boot == boot)
        };
        let armed = self.armed(&mut damage).filter(|armed| armed.slot != active);
        let trial = match armed {
            Some(armed) => {
                let boot = self.boot_id()?;
                Some(Trial { slot: armed.slot, tries: tries(&armed, &boot) })
            }
            // Its record is lost with `data`, but it runs.
            None if on_trial && self.running != active => {
                Some(Trial { slot: self.running, tries: 0 })
            }
            None => None,
        };
        Ok(BootStatus { active, trial, damage })
    }

    fn arm_trial(&self, slot: Slot) -> Result<()> {
        self.ready()?;
        // Names the slot under [tryboot], which after a cut write it may not.
        self.choose(other(slot))?;
        self.record(&Armed { slot, boot: self.boot_id()? })
    }

    fn commit(&self) -> Result<()> {
        self.choose(self.running)?;
        self.forget()
    }

    fn roll_back(&self) -> Result<()> {
        // The committed slot is what any other restart starts.
        self.forget()
    }

    fn restart_argument(&self) -> Option<&'static str> {
        Some("0 tryboot")
    }
}

/// Midnight of `2024-05-13` in seconds since 1970.
fn day(text: &str) -> Option<u64> {
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
        assert_eq!(day("1970-01-01"), Some(0));
        assert_eq!(day("2024-02-29"), Some(1_709_164_800));
        assert_eq!(day("2024-05-13"), Some(1_715_558_400));
        for wrong in ["", "2024", "2024-13-01", "2024-05-13-1", "x-05-13"] {
            assert_eq!(day(wrong), None, "{wrong}");
        }
    }
}
