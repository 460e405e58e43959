//! Cards of every layout: a card that was flashed with an earlier image accepts an update; logical partitions grow, are
//! read back by a standard tool and cut at every write; a boot state survives the loss of the flash around a write.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use bootmodel::script::{self, BootStateCopies, StartedKernel};
use bundle::bootstate::{BootState, SECTOR, Slot};
use common::{Plan, bundle_of, new_system, old_system, write};
use slotd::boot::{BootControl, Uboot};
use slotd::data::grow::grow;
use slotd::device::other_slot;
use slotd::storage::Storage;

const MIB: u64 = 1 << 20;

/// The robot's card was flashed with an earlier image; this image lists other positions, followed by the earlier ones.
#[test]
fn a_card_that_was_flashed_earlier_takes_updates_and_keeps_its_places() {
    let robot = Plan::default().make();
    let path = robot.path("usr/lib/slipway/device.toml");
    let text = fs::read_to_string(&path).unwrap();
    let (head, places) = text.split_at(text.find("[boot-state]").unwrap());
    let earlier = places
        .replace("[boot-state]", "[earlier-cards.boot-state]")
        .replace("[trust]", "[earlier-cards.trust]")
        .replace("[partitions]", "[earlier-cards.partitions]");
    let current = places
        .replace("sectors = [8, 16]", "sectors = [640, 1280]")
        .replace(&format!("sectors = {:?}", common::TRUST), "sectors = [1920, 2560]")
        .replace("number = 2, start-sector = 8192", "number = 5, start-sector = 65536")
        .replace("number = 3", "number = 6");
    let image = format!("{head}{current}[[earlier-cards]]\n{earlier}");
    // Without the earlier positions the robot does not recognise its own card.
    fs::write(&path, format!("{head}{current}")).unwrap();
    assert_eq!(robot.refused(&["status"]), (1, "unknown-slot".to_owned()));

    fs::write(&path, image).unwrap();
    let before = fs::read(robot.path("dev/disk")).unwrap();
    let new = new_system(4 * MIB, 1);
    let file = write(robot.dir.path(), "update.bundle", &bundle_of(&new));
    assert_eq!(robot.run(&["install", &file])["slot"], "b");
    assert_eq!(robot.slot(Slot::B), new);
    assert_eq!(robot.slot(Slot::A), old_system(Slot::A, 4 * MIB), "the running slot was touched");
    assert_eq!(robot.state().trial, Some(Slot::B));
    robot.start(Slot::B);
    assert_eq!(robot.run(&["commit"])["slot"], "b");
    assert_eq!((robot.state().active, robot.state().trial), (Slot::B, None));
    // Only this card's boot state and trust area have changed.
    let copies = common::TRUST.map(|first| first..first + bundle::area::COPY as u64 / 512);
    let after = fs::read(robot.path("dev/disk")).unwrap();
    for (at, (old, new)) in before.chunks(512).zip(after.chunks(512)).enumerate() {
        let at = at as u64;
        let ours = common::SECTORS.contains(&at) || copies.iter().any(|copy| copy.contains(&at));
        assert!(old == new || ours, "sector {at} has changed");
    }
}

/// A disk in memory that records every write.
struct Disk {
    bytes: Mutex<Vec<u8>>,
    writes: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl Disk {
    fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: Mutex::new(bytes), writes: Mutex::default() }
    }

    fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }
}

impl Storage for Disk {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let bytes = self.bytes.lock().unwrap();
        let part = bytes.get(offset as usize..).and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn read_back(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.bytes.lock().unwrap()[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        self.writes.lock().unwrap().push((offset, bytes.to_vec()));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// First sectors and sizes of the partitions of the card: three primary, three logical ones.
const PARTS: [(u64, u64); 6] = [
    (2048, 8192),
    (10_240, 8192),
    (18_432, 8192),
    (28_672, 16_384),
    (47_104, 16_384),
    (65_536, 32_768),
];
/// The number of `data`, the last of them.
const DATA: u32 = 7;

/// As created by `sfdisk`, an independent tool; made for a card of 48 MiB and written to one of 96 MiB.
fn card(dir: &Path) -> PathBuf {
    let image = dir.join("card.img");
    File::create(&image).unwrap().set_len(48 * MIB).unwrap();
    let mut script = "label: dos\n".to_owned();
    for (number, (start, size)) in [1, 2, 3, 5, 6, DATA].into_iter().zip(PARTS) {
        if number == 5 {
            script.push_str(&format!("4 : start=26624, size={}, type=f\n", 98_304 - 26_624));
        }
        script.push_str(&format!("{number} : start={start}, size={size}, type=83\n"));
    }
    let mut child = Command::new("sfdisk")
        .args(["-q", "--no-reread", "--no-tell-kernel"])
        .arg(&image)
        .stdin(std::process::Stdio::piped())
        .spawn()
        .expect("this test needs sfdisk");
    child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    fs::OpenOptions::new().write(true).open(&image).unwrap().set_len(96 * MIB).unwrap();
    image
}

/// The partitions except the extended one, as a standard tool reads them; it must report no problem.
fn dump(image: &Path) -> Vec<(u64, u64)> {
    let verified = Command::new("sfdisk").arg("--verify").arg(image).output().unwrap();
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
    let printed = Command::new("sfdisk").arg("-J").arg(image).output().unwrap();
    assert!(printed.status.success(), "{}", String::from_utf8_lossy(&printed.stderr));
    let printed: serde_json::Value = serde_json::from_slice(&printed.stdout).unwrap();
    let list = printed["partitiontable"]["partitions"].as_array().unwrap();
    let kept = list.iter().filter(|p| p["type"] != "f");
    kept.map(|p| (p["start"].as_u64().unwrap(), p["size"].as_u64().unwrap())).collect()
}

#[test]
fn the_last_logical_partition_takes_the_rest_of_the_card() {
    let dir = tempfile::tempdir().unwrap();
    let image = card(dir.path());
    let disk = Disk::new(fs::read(&image).unwrap());
    let grown = grow(&disk, DATA, PARTS[5].0).unwrap();
    assert_eq!((grown.from, grown.to), (PARTS[5].1, 96 * 2048 - PARTS[5].0));
    fs::write(&image, disk.bytes()).unwrap();
    let found = dump(&image);
    assert_eq!(found[..5], PARTS[..5]);
    assert_eq!(found[5], (PARTS[5].0, grown.to));
    // Again: nothing to do, nothing written.
    let writes = disk.writes.lock().unwrap().len();
    assert_eq!(writes, 2, "the MBR, and the sector in front of data");
    assert_eq!(grow(&disk, DATA, PARTS[5].0).unwrap().from, grown.to);
    assert_eq!(disk.writes.lock().unwrap().len(), writes);
}

#[test]
fn growth_of_a_logical_partition_cut_anywhere_leaves_all_partitions_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let image = card(dir.path());
    let before = fs::read(&image).unwrap();
    let disk = Disk::new(before.clone());
    let wanted = grow(&disk, DATA, PARTS[5].0).unwrap();
    let writes = disk.writes.lock().unwrap().clone();
    let mut bytes = before;
    let mut points = 0;
    for (offset, new) in &writes {
        let at = *offset as usize..*offset as usize + new.len();
        assert_eq!(new.len(), 512, "more than one sector in a write");
        // A sector reaches the card or not: states before this write, and after it.
        for state in [bytes[at.clone()].to_vec(), new.clone()] {
            bytes[at.clone()].copy_from_slice(&state);
            points += 1;
            fs::write(&image, &bytes).unwrap();
            let found = dump(&image);
            assert_eq!(found[..5], PARTS[..5]);
            assert!(found[5] == PARTS[5] || found[5] == (PARTS[5].0, wanted.to), "{found:?}");
            let disk = Disk::new(bytes.clone());
            grow(&disk, DATA, PARTS[5].0).unwrap();
            fs::write(&image, disk.bytes()).unwrap();
            assert_eq!(dump(&image)[5], (PARTS[5].0, wanted.to));
        }
    }
    assert_eq!(points, 4);
}

#[test]
fn a_chain_of_logical_partitions_that_is_not_ours_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let good = fs::read(card(dir.path())).unwrap();
    let refused = |change: &dyn Fn(&mut Vec<u8>), number: u32, start: u64| {
        let mut bytes = good.clone();
        change(&mut bytes);
        let disk = Disk::new(bytes);
        let why = grow(&disk, number, start).unwrap_err().to_string();
        assert!(disk.writes.lock().unwrap().is_empty(), "written: {why}");
        why
    };
    let nothing: &dyn Fn(&mut Vec<u8>) = &|_| {};
    assert!(
        refused(nothing, DATA, PARTS[5].0 + 8).contains("does not start where device.toml says")
    );
    // A partition that is not the last one.
    assert!(refused(nothing, 6, PARTS[4].0).contains("does not start where device.toml says"));
    let first = 26_624 * 512;
    // The first record's signature; its link, back to itself.
    assert!(refused(&|b| b[first + 510] = 0, DATA, PARTS[5].0).contains("is damaged"));
    let link = first + 446 + 16 + 8;
    assert!(refused(&|b| b[link..link + 4].fill(0), DATA, PARTS[5].0).contains("is damaged"));
    let kind = 446 + 3 * 16 + 4;
    assert!(refused(&|b| b[kind] = 0x83, DATA, PARTS[5].0).contains("no extended partition"));
}

/// What a cut during a write may destroy: everything in the same unit of the card's flash.
const UNITS: [u64; 2] = [4 * MIB, 8 * MIB];

/// A disk that has only the two sectors of the boot state.
struct States {
    places: [u64; 2],
    copies: Mutex<BootStateCopies>,
    writes: Mutex<Vec<(usize, [u8; SECTOR])>>,
}

impl States {
    fn index(&self, offset: u64) -> usize {
        self.places.iter().position(|place| *place == offset).expect("only the boot state is used")
    }
}

impl Storage for States {
    fn size(&self) -> u64 {
        self.places[1] + MIB
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.copy_from_slice(&self.copies.lock().unwrap()[self.index(offset)][..buffer.len()]);
        Ok(())
    }

    fn read_back(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let (index, sector) = (self.index(offset), bytes.try_into().expect("one sector"));
        self.copies.lock().unwrap()[index] = sector;
        self.writes.lock().unwrap().push((index, sector));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

fn start(copies: &BootStateCopies) -> StartedKernel {
    script::run(copies, |_| true, script::WriteBehavior::Good).started.expect("both slots load")
}

/// The copies after a cut in the write of copy `written`: those in its unit hold noise, and the table and the first
/// partition are whole or not.
fn wrecked(
    copies: &BootStateCopies,
    places: [u64; 2],
    written: usize,
    unit: u64,
) -> BootStateCopies {
    let mut left = *copies;
    for (copy, place) in left.iter_mut().zip(places) {
        if place / unit == places[written] / unit {
            copy.fill(0x5a);
        }
    }
    left
}

/// Every step of the agent and of the script, from every reachable state, at these positions: the number of cuts, and
/// after how many of them a different slot starts than without the step.
fn cuts(places: [u64; 2]) -> (usize, usize) {
    let sectors = places.map(|place| place / SECTOR as u64);
    let first = [BootState::first().encode(), [0; SECTOR]];
    let mut waiting = vec![(first, start(&first), 4)];
    let (mut points, mut wrong) = (0, 0);
    while let Some((copies, running, left)) = waiting.pop() {
        for step in 0..4 {
            let disk = States { places, copies: Mutex::new(copies), writes: Mutex::default() };
            let flow = Uboot::new(&disk, sectors, running.slot);
            let (writes, after, now) = if step == 3 {
                let run = script::run(&copies, |_| true, script::WriteBehavior::Good);
                (run.writes, run.copies, run.started.unwrap())
            } else {
                match step {
                    0 => flow.arm_trial(other_slot(running.slot)),
                    1 => flow.commit(),
                    _ => flow.roll_back(),
                }
                .unwrap();
                let writes = disk.writes.lock().unwrap().clone();
                let after = *disk.copies.lock().unwrap();
                (writes, after, running)
            };
            let mut before = copies;
            for (index, sector) in writes {
                for unit in UNITS {
                    points += 1;
                    let found = start(&wrecked(&before, places, index, unit));
                    wrong += usize::from(found.slot != start(&before).slot);
                }
                before[index] = sector;
            }
            if left > 0 {
                waiting.push((after, now, left - 1));
            }
        }
    }
    (points, wrong)
}

#[test]
fn a_write_that_takes_the_flash_around_it_along_costs_no_choice() {
    let (points, wrong) = cuts([8 * MIB, 16 * MIB]);
    assert!(points > 500, "only {points} cut points");
    assert_eq!(wrong, 0, "of {points}");
    // The copies of the trust area, at 24 MiB and 32 MiB, do not share a unit with anything either.
    for unit in UNITS {
        let units = [0, 8, 16, 24, 32, 40].map(|place| place * MIB / unit);
        assert!(units.windows(2).all(|pair| pair[0] != pair[1]), "{units:?}");
    }
    // As on cards until November 2026: both copies in one unit with the table.
    let (points, wrong) = cuts([MIB, MIB + 4096]);
    assert!(wrong > 0, "of {points} none: this test finds nothing");
}
