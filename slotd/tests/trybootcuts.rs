//! The flow of the Raspberry Pi's firmware: trials, commits and refusals against a model of that firmware
//! (`bootmodel::firmware`, each rule with its source), and every write cut at every byte, on a card with a
//! volatile cache.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[path = "common/card.rs"]
mod card;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Cursor, Write};
use std::path::Path;

use bootmodel::firmware::{Firmware, FirmwareStart, PreferredTable, RestartFlags, select};
use bundle::bootstate::Slot;
use card::{Op, Part, Place};
use slotd::RootDir;
use slotd::boot::{BootControl, SlotTrial, Tryboot};

const MIB: usize = 1 << 20;
/// First byte of `boot`, `boot-a`, `boot-b`, and the size of each.
const STARTS: [usize; 3] = [MIB, 6 * MIB, 11 * MIB];
const SIZE: usize = 5 * MIB;
const SINCE: &str = "2022-11-25";
/// 13 May 2024.
const MADE: u32 = 1_715_613_301;

/// A card: its partition table, and its parts. `boot` is the part outside of the slots.
struct Card {
    table: Vec<u8>,
    parts: card::Card,
}

fn volume(files: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = Cursor::new(vec![0; SIZE]);
    fatfs::format_volume(&mut bytes, fatfs::FormatVolumeOptions::new()).unwrap();
    let volume = fatfs::FileSystem::new(&mut bytes, fatfs::FsOptions::new()).unwrap();
    for (name, text) in files {
        volume.root_dir().create_file(name).unwrap().write_all(text.as_bytes()).unwrap();
    }
    volume.unmount().unwrap();
    bytes.into_inner()
}

impl Card {
    fn new() -> Self {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let autoboot = fs::read_to_string(workspace.join("board/common/autoboot.txt.j2")).unwrap();
        let autoboot = autoboot
            .replace("{{ partitions.boot_a.number }}", "2")
            .replace("{{ partitions.boot_b.number }}", "3");
        let slot = [
            ("start4.elf", "x"),
            ("board.dtb", "x"),
            ("config.txt", "kernel=kernel8.img\ninitramfs initrd.img followkernel\n"),
            ("tryboot.txt", "kernel=kernel8.img\ninitramfs initrd.img followkernel\n"),
            ("kernel8.img", "x"),
            ("initrd.img", "x"),
            ("cmdline.txt", "slipway.tryboot=2:a,3:b\n"),
        ];
        let mut table = vec![0; 512];
        for (index, start) in STARTS.into_iter().enumerate() {
            let record = &mut table[446 + index * 16..][..16];
            record[4] = 0x0e;
            record[8..12].copy_from_slice(&(start as u32 / 512).to_le_bytes());
            record[12..16].copy_from_slice(&(SIZE as u32 / 512).to_le_bytes());
        }
        table[510..512].copy_from_slice(&[0x55, 0xaa]);
        let boot = volume(&[("autoboot.txt", autoboot.as_str())]);
        Self::with(table, [boot, volume(&slot), volume(&slot)])
    }

    fn with(table: Vec<u8>, [boot, boot_a, boot_b]: [Vec<u8>; 3]) -> Self {
        let content = [boot, Vec::new(), Vec::new(), boot_a, boot_b];
        Self { table, parts: card::Card::new(content, None) }
    }

    /// The whole card as a restart would find it, without unflushed writes.
    fn bytes(&self) -> Vec<u8> {
        let [boot, _, _, boot_a, boot_b] = self.parts.content();
        let mut bytes = vec![0; 16 * MIB];
        bytes[..512].copy_from_slice(&self.table);
        for (start, part) in STARTS.into_iter().zip([boot, boot_a, boot_b]) {
            bytes[start..start + SIZE].copy_from_slice(&part);
        }
        bytes
    }

    /// A card with this content.
    fn of(bytes: &[u8]) -> Self {
        let part = |start: usize| bytes[start..start + SIZE].to_vec();
        Self::with(bytes[..512].to_vec(), STARTS.map(part))
    }
}

/// Every release that must agree: Pi 4 and Pi 5, with and without the partition walk, and with a
/// `start4.elf` from before `tryboot_a_b`.
fn releases() -> Vec<Firmware> {
    let mut all = Vec::new();
    for generation in [4, 5] {
        for walks in [false, true] {
            for knows_a_b in [false, true] {
                all.push(Firmware { generation, table: PreferredTable::Mbr, walks, knows_a_b });
            }
        }
    }
    all
}

/// The slot that all of them start.
fn starts(bytes: &[u8], restart: RestartFlags) -> Result<FirmwareStart, String> {
    let mut results: Vec<_> =
        releases().into_iter().map(|firmware| select(bytes, firmware, restart)).collect();
    results.iter_mut().flatten().for_each(|start| start.config = "");
    results.dedup();
    assert_eq!(results.len(), 1, "releases differ: {results:?}");
    results.remove(0)
}

fn slot(start: &FirmwareStart) -> Slot {
    assert_eq!(start.cmdline, "slipway.tryboot=2:a,3:b");
    if start.partition == 2 { Slot::A } else { Slot::B }
}

/// A robot with this card.
struct Robot {
    dir: tempfile::TempDir,
    card: Card,
    boots: u32,
    running: Slot,
}

impl Robot {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut robot = Self { dir, card: Card::new(), boots: 0, running: Slot::A };
        for folder in ["dev", "proc/sys/kernel/random", "proc/device-tree/chosen/bootloader"] {
            fs::create_dir_all(robot.dir.path().join(folder)).unwrap();
        }
        robot.put("dev/vcio", b"");
        robot.put("proc/device-tree/chosen/bootloader/build-timestamp", &MADE.to_be_bytes());
        robot.restart(RestartFlags::default());
        robot
    }

    fn put(&self, path: &str, bytes: &[u8]) {
        fs::write(self.dir.path().join(path), bytes).unwrap();
    }

    fn root(&self) -> RootDir {
        RootDir::new(self.dir.path())
    }

    fn restart(&mut self, restart: RestartFlags) -> Slot {
        let start = starts(&self.card.bytes(), restart).unwrap();
        self.boots += 1;
        self.running = slot(&start);
        let told = "proc/device-tree/chosen/bootloader";
        self.put(&format!("{told}/partition"), &start.partition.to_be_bytes());
        self.put(&format!("{told}/tryboot"), &u32::from(start.tryboot).to_be_bytes());
        self.put("proc/sys/kernel/random/boot_id", format!("boot-{}\n", self.boots).as_bytes());
        self.running
    }

    fn flow(&self) -> Tryboot<Part> {
        Tryboot::new(self.card.parts.part(Place::Gap), [2, 3], SINCE, self.running, &self.root())
            .unwrap()
    }

    fn trial(&self) -> (Slot, Option<SlotTrial>) {
        let status = self.flow().status().unwrap();
        assert_eq!(status.damage, [""; 0]);
        (status.active, status.trial)
    }
}

const PLAIN: RestartFlags = RestartFlags { partition: 0, tryboot: false };
const TRY: RestartFlags = RestartFlags { partition: 0, tryboot: true };

#[test]
fn a_trial_is_committed_or_comes_back() {
    use Slot::{A, B};
    let mut robot = Robot::new();
    assert_eq!((robot.running, robot.trial()), (A, (A, None)));
    robot.flow().arm_trial(B).unwrap();
    assert_eq!(robot.trial(), (A, Some(SlotTrial { slot: B, tries: 1 })));
    assert_eq!(robot.flow().restart_argument(), Some("0 tryboot"));
    assert_eq!(robot.restart(TRY), B);
    assert_eq!(robot.trial(), (A, Some(SlotTrial { slot: B, tries: 0 })));
    robot.flow().commit().unwrap();
    assert_eq!(robot.trial(), (B, None));
    assert_eq!(robot.restart(PLAIN), B);
    // Back to a, whose trial the watchdog ends.
    robot.flow().arm_trial(A).unwrap();
    assert_eq!(robot.restart(TRY), A);
    assert_eq!(robot.restart(PLAIN), B);
    assert_eq!(robot.trial(), (B, Some(SlotTrial { slot: A, tries: 0 })));
    let status = robot.flow().status().unwrap();
    assert_eq!(status.pending(B), None, "a trial that failed is over");
    // And one that a user ends.
    robot.flow().arm_trial(A).unwrap();
    robot.flow().roll_back().unwrap();
    assert_eq!(robot.trial(), (B, None));
    assert_eq!(robot.restart(PLAIN), B);
}

#[test]
fn a_lost_record_does_not_hide_a_running_trial() {
    let mut robot = Robot::new();
    robot.flow().arm_trial(Slot::B).unwrap();
    robot.restart(TRY);
    fs::remove_dir_all(robot.dir.path().join("data")).unwrap();
    assert_eq!(robot.trial(), (Slot::A, Some(SlotTrial { slot: Slot::B, tries: 0 })));
}

#[test]
fn every_write_cut_at_every_byte_starts_a_committed_slot() {
    let (mut points, mut distinct) = (0, 0);
    // Committing b over a, and a over b again.
    for committed in [Slot::A, Slot::B] {
        let mut robot = Robot::new();
        if committed == Slot::B {
            robot.flow().arm_trial(Slot::B).unwrap();
            robot.restart(TRY);
            robot.flow().commit().unwrap();
            robot.restart(PLAIN);
        }
        let tried = if committed == Slot::A { Slot::B } else { Slot::A };
        robot.flow().arm_trial(tried).unwrap();
        assert_eq!(robot.restart(TRY), tried);
        let before = robot.card.bytes();
        let earlier = robot.card.parts.ops().len();
        robot.flow().commit().unwrap();
        // What a power cut leaves at the moment when the commit is reported as done.
        assert_eq!(slot(&starts(&robot.card.bytes(), PLAIN).unwrap()), tried, "not durable");
        let ops = robot.card.parts.ops().split_off(earlier);
        let [(Op::Write(Place::Gap, at, new), _), (Op::Flush(Place::Gap), _)] = ops.as_slice()
        else {
            panic!("not one write with its flush: {} operations", ops.len())
        };
        assert_eq!((new.len(), at % 512), (512, 0), "not one sector");
        let at = STARTS[0] + *at as usize;
        // Possible content of the card afterwards: any number of bytes from the front or from the back.
        let old = before[at..at + 512].to_vec();
        let mut variants = BTreeSet::new();
        for cut in 0..=new.len() {
            variants.insert([&new[..cut], &old[cut..]].concat());
            variants.insert([&old[..cut], &new[cut..]].concat());
            points += 2;
        }
        for sector in &variants {
            let mut torn = before.clone();
            torn[at..at + 512].copy_from_slice(sector);
            let first = slot(&starts(&torn, PLAIN).unwrap());
            assert!(first == committed || first == tried);
            // The trial continues after the cut, finds the damage if any, and commits again.
            let again = robot_like(&robot, Card::of(&torn));
            copy_told(&robot, &again);
            let flow = again.flow();
            let damage = flow.status().unwrap().damage;
            assert_eq!(damage.len(), usize::from(*sector != old && sector != new), "{damage:?}");
            flow.commit().unwrap();
            assert_eq!(slot(&starts(&again.card.bytes(), PLAIN).unwrap()), tried);
        }
        distinct += variants.len();
    }
    println!("{points} cut points, {distinct} different contents");
    assert!(points > 2000 && distinct >= 8, "{points} cut points, {distinct} different contents");
}

/// A write that a card acknowledges but drops is not a commit.
#[test]
fn a_card_that_keeps_nothing_is_not_believed() {
    let mut robot = Robot::new();
    robot.flow().arm_trial(Slot::B).unwrap();
    robot.restart(TRY);
    robot.card.parts.lose(Place::Gap);
    assert_eq!(robot.flow().commit().unwrap_err().code, "boot-state");
    assert_eq!(robot.restart(PLAIN), Slot::A);
}

fn robot_like(robot: &Robot, card: Card) -> Robot {
    Robot { dir: tempfile::tempdir().unwrap(), card, boots: robot.boots, running: robot.running }
}

fn copy_told(from: &Robot, to: &Robot) {
    for folder in ["dev", "proc/sys/kernel/random", "proc/device-tree/chosen/bootloader"] {
        fs::create_dir_all(to.dir.path().join(folder)).unwrap();
        for entry in fs::read_dir(from.dir.path().join(folder)).unwrap() {
            let entry = entry.unwrap();
            if entry.path().is_file() {
                fs::copy(entry.path(), to.dir.path().join(folder).join(entry.file_name())).unwrap();
            }
        }
    }
}

#[test]
fn a_lost_autoboot_or_boot_partition_still_starts_a_whole_slot() {
    let robot = Robot::new();
    let good = robot.card.bytes();
    let place = {
        let mut text = good.windows(14);
        text.position(|w| w == b"[all]\ntryboot_").unwrap()
    };
    for fill in [0, 0xff, 0x5a] {
        let mut bytes = good.clone();
        bytes[place..place + 512].fill(fill);
        assert_eq!(slot(&starts(&bytes, PLAIN).unwrap()), Slot::A, "the first bootable one");
        // Slot a is being written: its first block is zero.
        bytes[STARTS[1]..STARTS[1] + 4096].fill(0);
        assert_eq!(slot(&starts(&bytes, PLAIN).unwrap()), Slot::B);
    }
    // A committed slot that is not a FAT volume any more: only with the partition walk (EEPROM of August 2025).
    let mut bytes = good;
    bytes[STARTS[1]..STARTS[1] + 4096].fill(0);
    for firmware in releases() {
        let result = select(bytes.as_slice(), firmware, PLAIN).map(|start| start.partition);
        assert_eq!(result.is_ok(), firmware.walks, "{firmware:?}: {result:?}");
        assert!(result.is_err() || result == Ok(3));
    }
}

#[test]
fn what_could_not_come_back_is_refused_before_anything_is_written() {
    let code = |robot: &Robot| {
        let refused = robot.flow().arm_trial(Slot::B).unwrap_err();
        assert_eq!(robot.flow().ready().unwrap_err().code, refused.code);
        assert!(robot.card.parts.ops().is_empty(), "written before it was refused");
        assert!(!robot.root().state().join("tryboot.json").exists());
        refused.code
    };
    let told = "proc/device-tree/chosen/bootloader";
    let robot = Robot::new();
    robot.flow().ready().unwrap();
    robot.put(&format!("{told}/build-timestamp"), &1_619_712_685u32.to_be_bytes());
    assert_eq!(code(&robot), "old-eeprom");
    fs::remove_file(robot.dir.path().join(told).join("build-timestamp")).unwrap();
    assert_eq!(code(&robot), "old-eeprom");

    let robot = Robot::new();
    fs::remove_file(robot.dir.path().join("dev/vcio")).unwrap();
    assert_eq!(code(&robot), "no-tryboot");

    let robot = Robot::new();
    robot.put(&format!("{told}/partition"), &0u32.to_be_bytes());
    assert_eq!(code(&robot), "boot-state");

    let mut robot = Robot::new();
    let mut bytes = robot.card.bytes();
    let at = bytes.windows(14).position(|w| w == b"[all]\ntryboot_").unwrap();
    bytes[at..at + 5].copy_from_slice(b"[pi4]");
    robot.card = Card::of(&bytes);
    assert_eq!(code(&robot), "boot-state");
}
