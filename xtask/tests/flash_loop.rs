//! Flashing real block devices: loop devices, which need root and a kernel that has them.

use crate::common::skip::skip;
use crate::common::tool;
use crate::flash_support;

use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use camino::{Utf8Path, Utf8PathBuf};
use flash_support::*;
use xtask::disk::TableKind;
use xtask::flash::card::CardDevice;
use xtask::flash::device;

/// One test at a time: a device that a test puts something else into is free for a moment, and another would find it.
static TURN: Mutex<()> = Mutex::new(());

/// A loop device, detached with the test. A test has one.
struct Loop(
    Utf8PathBuf,
    #[expect(dead_code, reason = "held until the test ends")] MutexGuard<'static, ()>,
);

impl Loop {
    /// Attached to a file; `None` where this machine cannot.
    fn new(test: &str, file: &Utf8Path) -> Option<Self> {
        if let Err(why) = device::can_loop() {
            let why = format!("there are no loop devices ({why:#})");
            skip(&format!("flash_loop::{test}"), &why, "root, on a kernel that has loop devices");
            return None;
        }
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let attach = tool("losetup").args(["--find", "--show", file.as_str()]);
        Some(Self(attach.read().expect("attaching").trim().into(), turn))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        tool("losetup").args(["--detach", self.0.as_str()]).run().expect("detaching");
    }
}

#[test]
fn every_mapped_byte_reaches_a_loop_device() {
    let folder = Folder::new();
    let made = image(&folder, TableKind::Hybrid, 20).path;
    let card = folder.at("card");
    old_card(&card, SIZE + 8 * MIB);
    let Some(device) = Loop::new("every_mapped_byte_reaches_a_loop_device", &card) else { return };
    let printed = good(&[made.as_str(), device.0.as_str(), "--yes", "--format", "json"]);
    let printed: serde_json::Value = serde_json::from_str(&printed).expect("JSON");
    assert_eq!(printed["read-back"].as_bool(), Some(true), "{printed}");
    assert_eq!(printed["discarded"].as_bool(), Some(true), "{printed}");
    assert_eq!(differences(&made, &device.0), Vec::<u64>::new());
    assert!(has_table(&device.0));
    // What the image does not use has no old bytes: it was discarded.
    assert!(part(&device.0, SIZE + 2 * MIB, MIB as usize).iter().all(|byte| *byte == 0));
    // A bare name is one in /dev.
    let name = device.0.file_name().expect("a name");
    good(&[made.as_str(), name, "--yes", "--no-read-back"]);
    let listed = good(&["--list", "--format", "json"]);
    let listed: Vec<serde_json::Value> = serde_json::from_str(&listed).expect("JSON");
    let own = listed.iter().find(|d| d["path"] == device.0.as_str()).expect("it is listed");
    assert_eq!(own["size"].as_u64(), Some(SIZE + 8 * MIB));
    assert!(own["content"].as_str().is_some_and(|c| c.contains("root-a")), "{own}");
    assert_eq!(own["objections"].as_array().map(Vec::len), Some(0), "{own}");
}

#[test]
fn what_is_mounted_or_held_or_only_a_part_is_refused() {
    let folder = Folder::new();
    let made = image(&folder, TableKind::Mbr, 21).path;
    let card = folder.at("card");
    old_card(&card, SIZE + 8 * MIB);
    let test = "what_is_mounted_or_held_or_only_a_part_is_refused";
    let Some(device) = Loop::new(test, &card) else { return };
    let path = device.0.as_str();
    let arguments = [made.as_str(), path, "--yes"];

    // Another process holds it: the kernel refuses, whatever lsblk reports.
    let exclusive = i32::try_from(rustix::fs::OFlags::EXCL.bits()).expect("a flag");
    let held = File::options().read(true).custom_flags(exclusive).open(path).expect("holding it");
    assert!(refused(&arguments).contains("the device is in use"));
    drop(held);

    // The file behind it.
    let message = refused(&[made.as_str(), card.as_str(), "--yes"]);
    assert!(message.contains(&format!("the device is in use by {path} (loop)")), "{message}");

    // A partition, which the kernel lists whether or not it reads tables itself.
    tool("addpart").args([path, "1", "2048", "140000"]).run().expect("adding a partition");
    let partition = format!("{path}p1");
    let message = refused(&[made.as_str(), &partition, "--yes"]);
    assert!(
        message.contains("the device is a partition, but an image needs a whole disk"),
        "{message}"
    );
    assert!(message.contains(&format!("use its disk: {path}")), "{message}");

    // Mounted, by its partition.
    tool("mke2fs").args(["-q", "-F", &partition]).run().expect("mke2fs");
    let place = folder.at("mounted");
    fs::create_dir(&place).expect("a directory");
    tool("mount").args([&partition, place.as_str()]).run().expect("mounting");
    let message = refused(&arguments);
    tool("umount").arg(place.as_str()).run().expect("unmounting");
    assert!(
        message.contains(&format!("the device is mounted: {partition} at {place}")),
        "{message}"
    );
    assert!(message.contains(&format!("help: umount {partition}")), "{message}");
    tool("delpart").args([path, "1"]).run().expect("removing the partition");

    // Read-only.
    tool("blockdev").args(["--setro", path]).run().expect("locking");
    let message = refused(&arguments);
    assert!(message.contains("the device is read-only"), "{message}");
    tool("blockdev").args(["--setrw", path]).run().expect("unlocking");
    good(&arguments);
}

#[test]
fn another_card_of_the_same_size_in_the_same_place_is_refused() {
    let folder = Folder::new();
    let test = "another_card_of_the_same_size_in_the_same_place_is_refused";
    let [first, second] = ["first", "second"].map(|name| folder.at(name));
    old_card(&first, SIZE + 8 * MIB);
    old_card(&second, SIZE + 8 * MIB);
    let Some(reader) = Loop::new(test, &first) else { return };
    let shown = device::find_device(&reader.0).expect("it is shown");
    drop(CardDevice::open(&shown).expect("nothing has happened since"));
    if shown.identity.sequence.is_none() {
        skip(&format!("flash_loop::{test}"), "the kernel numbers no media", "Linux 5.15 or later");
        return;
    }
    // The user replaces the card by another one: the same path, numbers and size.
    tool("losetup").args(["--detach", reader.0.as_str()]).run().expect("taking it out");
    tool("losetup").args([reader.0.as_str(), second.as_str()]).run().expect("putting it in");
    let now = device::find_device(&reader.0).expect("it is there");
    assert_eq!((&now.path, &now.numbers, now.size), (&shown.path, &shown.numbers, shown.size));
    let message = format!("{:#}", CardDevice::open(&shown).expect_err("another card"));
    assert!(message.contains("the medium has changed since it was examined"), "{message}");
    assert!(message.contains("diskseq"), "{message}");
    drop(CardDevice::open(&now).expect("what was looked at again"));
}
