//! Flashing to plain files and to faulty cards of our own; disks that are refused; kills.

use crate::common::{noise, text, tool};
use crate::flash_support;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use camino::Utf8Path;
use flash_support::*;
use xtask::disk::{TableKind, bmap, compress, read};
use xtask::flash::card::{CardDevice, CardIo};
use xtask::flash::device::{self, ObjectionKind};
use xtask::flash::source::ImageSource;
use xtask::flash::{self as flasher, FlashRequest};

#[test]
fn every_mapped_byte_reaches_a_file_from_every_form() {
    let folder = Folder::new();
    let image = image(&folder, TableKind::Hybrid, 1).path;
    compress::compress_image(&image, 3).expect("compressing");
    tool("xz").args(["-0", "--keep", image.as_str()]).run().expect("xz");
    let card = folder.at("card");
    for form in ["", ".zst", ".xz"] {
        let from = format!("{image}{form}");
        old_card(&card, SIZE + 40 * MIB);
        let printed = good(&[&from, card.as_str(), "--yes"]);
        assert!(printed.contains("written and verified"), "{printed}");
        assert_eq!(differences(&image, &card), Vec::<u64>::new(), "{from}");
        tool("sfdisk").args(["--dump", card.as_str()]).run().expect("sfdisk");
        // A larger card's own end has no old backup of a GPT.
        let end = part(&card, SIZE + 39 * MIB, MIB as usize);
        assert!(end.iter().all(|byte| *byte == 0), "{from}");
        assert_eq!(fs::metadata(&card).expect("card").len(), SIZE + 40 * MIB);
    }
}

/// Frames of an odd size, with empty and skippable ones between them, as other tools make them.
fn odd_frames(bytes: &[u8]) -> Vec<u8> {
    let frame = |part: &[u8]| {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).expect("a frame");
        encoder.set_pledged_src_size(Some(part.len() as u64)).expect("its size");
        encoder.write_all(part).and_then(|()| encoder.finish()).expect("packing")
    };
    let skipped = [&0x184d_2a53_u32.to_le_bytes()[..], &5_u32.to_le_bytes(), b"hello"].concat();
    let parts = bytes.chunks(1_000_003).map(|part| [frame(part), skipped.clone(), frame(b"")]);
    parts.flatten().flatten().collect()
}

#[test]
fn zstd_files_of_every_make_become_the_same_card() {
    let folder = Folder::new();
    let image = image(&folder, TableKind::Gpt, 4).path;
    let (bytes, map) = (fs::read(&image).expect("reading"), bmap::path_for(&image));
    let packed = compress::path_for(&image);
    compress::compress_image(&image, 3).expect("compressing");
    let ours = fs::read(&packed).expect("reading");
    let one = tool("zstd").args(["-q", "-c", image.as_str()]).read_bytes().expect("zstd");
    // The length of a pipe is unknown, so no header contains it.
    let unsized_one = zstd::encode_all(&bytes[..], 1).expect("packing");
    let card = folder.at("card");
    for (name, form) in
        [("ours", ours), ("one", one), ("unsized", unsized_one), ("odd", odd_frames(&bytes))]
    {
        fs::write(&packed, form).expect("writing");
        tool("zstd").args(["-q", "-t", packed.as_str()]).run().expect("zstd -t");
        old_card(&card, SIZE);
        good(&[packed.as_str(), card.as_str(), "--yes"]);
        assert_eq!(differences(&image, &card), Vec::<u64>::new(), "{name}");
        fs::rename(&map, folder.at("map")).expect("without its map");
        old_card(&card, SIZE);
        good(&[packed.as_str(), card.as_str(), "--yes"]);
        assert!(fs::read(&card).expect("reading") == bytes, "{name}");
        fs::rename(folder.at("map"), &map).expect("with its map");
    }
    let mut cut = odd_frames(&bytes);
    cut.truncate(cut.len() / 2);
    for bad in [cut, odd_frames(&bytes[..bytes.len() - 512])] {
        fs::write(&packed, bad).expect("writing");
        let message = refused(&[packed.as_str(), card.as_str(), "--yes"]);
        assert!(message.contains("card.img.zst"), "{message}");
        assert!(!has_table(&card));
    }
}

#[test]
fn without_a_map_all_of_the_image_is_written() {
    let folder = Folder::new();
    let image = image(&folder, TableKind::Mbr, 2).path;
    compress::compress_image(&image, 3).expect("compressing");
    fs::remove_file(bmap::path_for(&image)).expect("removing the map");
    let card = folder.at("card");
    for form in ["", ".zst"] {
        old_card(&card, SIZE + MIB);
        let arguments = [&format!("{image}{form}"), card.as_str(), "--yes", "--format", "json"];
        let printed: serde_json::Value = serde_json::from_str(&good(&arguments)).expect("JSON");
        assert_eq!(printed["bytes"].as_u64(), Some(SIZE));
        assert!(part(&card, 0, SIZE as usize) == part(&image, 0, SIZE as usize), "{form}");
    }
}

#[test]
fn a_damaged_image_never_becomes_a_card() {
    let folder = Folder::new();
    let image = image(&folder, TableKind::Gpt, 3).path;
    let card = folder.at("card");
    compress::compress_image(&image, 3).expect("compressing");
    let packed = compress::path_for(&image);
    let whole = fs::read(&packed).expect("reading");
    let arguments = [packed.as_str(), card.as_str(), "--yes"];
    let mut turned = whole.clone();
    turned[whole.len() / 2] ^= 1;
    for damaged in [turned, whole[..whole.len() - 4].to_vec(), [whole.clone(), whole].concat()] {
        fs::write(&packed, damaged).expect("writing");
        fs::copy(&image, &card).expect("copying");
        let output = flash(&arguments);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.contains("card.img.zst"), "{message}");
        assert!(message.contains("partition table not written"), "{message}");
        assert!(!has_table(&card));
    }
    let at = 4 * MIB + BOOT.1 + 100;
    let file = File::options().write(true).open(&image).expect("opening");
    file.write_all_at(b"x", at).expect("damaging");
    fs::copy(&image, &card).expect("copying");
    let message = refused(&[image.as_str(), card.as_str(), "--yes"]);
    assert!(message.contains("is damaged: bytes "), "{message}");
    assert!(!has_table(&card));
    file.set_len(SIZE - 4096).expect("cutting");
    let message = refused(&[image.as_str(), card.as_str(), "--yes"]);
    assert!(message.contains("its block map is for 67108864"), "{message}");
}

/// A card in memory that fails in chosen ways.
struct Faulty {
    bytes: Mutex<Vec<u8>>,
    /// At these offsets a bit flips, so many times.
    flips: Vec<(u64, AtomicUsize)>,
    /// Reading or writing this offset fails, so many times.
    broken: Option<(u64, AtomicUsize)>,
    /// What it really has; beyond, it begins again.
    real: u64,
    /// Takes nothing.
    dead: bool,
}

impl Faulty {
    fn new() -> Self {
        let bytes = Mutex::new(noise(SIZE as usize, 4));
        Self { bytes, flips: Vec::new(), broken: None, real: SIZE, dead: false }
    }

    fn take(count: &AtomicUsize) -> bool {
        count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok()
    }

    fn fails(&self, offset: u64, length: usize) -> io::Result<()> {
        match &self.broken {
            Some((at, count))
                if (offset..offset + length as u64).contains(at) && Self::take(count) =>
            {
                Err(rustix::io::Errno::IO.into())
            }
            _ => Ok(()),
        }
    }

    fn has_table(&self) -> bool {
        self.bytes.lock().expect("bytes")[..4096].iter().any(|byte| *byte != 0)
    }
}

impl CardIo for Faulty {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.fails(offset, buffer.len())?;
        let bytes = self.bytes.lock().expect("bytes");
        let at = (offset % self.real) as usize;
        buffer.copy_from_slice(&bytes[at..at + buffer.len()]);
        Ok(())
    }

    fn write_at(&self, offset: u64, written: &[u8]) -> io::Result<()> {
        self.fails(offset, written.len())?;
        if self.dead {
            return Ok(());
        }
        let mut bytes = self.bytes.lock().expect("bytes");
        let at = (offset % self.real) as usize;
        bytes[at..at + written.len()].copy_from_slice(written);
        for (place, count) in &self.flips {
            let inside = (offset..offset + written.len() as u64).contains(place);
            if inside && written.iter().any(|byte| *byte != 0) && Self::take(count) {
                bytes[*place as usize] ^= 0x10;
            }
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> anyhow::Result<bool> {
        Ok(false)
    }
}

fn attempt(source: &ImageSource, card: &Faulty) -> anyhow::Result<flasher::FlashOutcome> {
    flasher::flash(&FlashRequest { source, read_back: true, seed: None }, card)
}

#[test]
fn a_flipped_bit_is_found_and_written_again() {
    let folder = Folder::new();
    let made = image(&folder, TableKind::Hybrid, 5).path;
    let source = ImageSource::open(&made).expect("the image");
    let good = attempt(&source, &Faulty::new()).expect("a good card");
    assert_eq!(good.weak, []);
    // In the boot partition, in a slot, in the backup of the GPT and in the table itself.
    let places = [(5 * MIB, 2), (21 * MIB + 7, 1), (SIZE - 100, 1), (513, 1), (10, 3)];
    for (place, times) in places {
        let mut card = Faulty::new();
        card.flips.push((place, AtomicUsize::new(times)));
        let outcome = attempt(&source, &card).expect("it comes right");
        let weak = &outcome.weak;
        assert_eq!(weak.len(), 1, "{place}: {weak:?}");
        assert!((weak[0].offset..weak[0].offset + weak[0].size as u64).contains(&place));
        assert_eq!(weak[0].times, times, "{place}");
        let copy = folder.at("read-back");
        fs::write(&copy, &*card.bytes.lock().expect("bytes")).expect("writing");
        assert_eq!(differences(&made, &copy), Vec::<u64>::new(), "{place}");
        let mut card = Faulty::new();
        card.flips.push((place, AtomicUsize::new(usize::MAX)));
        let message = format!("{:#}", attempt(&source, &card).expect_err("a bad place"));
        assert!(message.contains("does not return the data that was written"), "{message}");
        assert!(message.contains("help: use another card"), "{message}");
        assert!(!card.has_table(), "{place}");
    }
}

#[test]
fn a_card_that_fails_in_other_ways_is_found_out() {
    let folder = Folder::new();
    let source = ImageSource::open(&image(&folder, TableKind::Mbr, 6).path).expect("the image");
    let mut once = Faulty::new();
    once.broken = Some((22 * MIB, AtomicUsize::new(1)));
    assert_eq!(attempt(&source, &once).expect("it comes right").weak.len(), 1);

    let mut broken = Faulty::new();
    broken.broken = Some((22 * MIB, AtomicUsize::new(usize::MAX)));
    let mut dead = Faulty::new();
    dead.dead = true;
    let mut small = Faulty::new();
    small.real = 16 * MIB;
    let mut hopeless = Faulty::new();
    hopeless.flips = (0..100).map(|n| (5 * MIB + n * 4096, AtomicUsize::new(usize::MAX))).collect();
    let cases = [
        (broken, "does not return the data that was written"),
        (dead, "the card ignores writes"),
        (small, "the card"),
        (hopeless, "does not return the data that was written"),
    ];
    for (card, expected) in cases {
        let dead = card.dead;
        let message = format!("{:#}", attempt(&source, &card).expect_err(expected));
        assert!(message.contains(expected), "{message}");
        assert!(dead || !card.has_table(), "{message}");
    }
}

#[test]
fn a_kill_leaves_no_table_or_the_whole_card() {
    let folder = Folder::new();
    let old = Folder::new();
    for (table, turns) in [(TableKind::Gpt, 12), (TableKind::Mbr, 8)] {
        let before = image(&old, table, 7).path;
        let made = image(&folder, table, 8).path;
        let card = folder.at("card");
        fs::copy(&before, &card).expect("copying");
        assert!(has_table(&card));
        let start = Instant::now();
        good(&[made.as_str(), card.as_str(), "--yes"]);
        let whole = start.elapsed();
        let mut cut = 0;
        for turn in 0..turns {
            fs::copy(&before, &card).expect("copying");
            let mut child = command(&[made.as_str(), card.as_str(), "--yes"])
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null())
                .spawn()
                .expect("the tool starts");
            std::thread::sleep(whole * (turn + 1) / turns);
            child.kill().expect("killing");
            let status = child.wait().expect("its end");
            if has_table(&card) {
                // Before its first write, or after its last.
                let same = |image| differences(image, &card).is_empty();
                assert!(same(&before) || same(&made), "{turn}: a table, and half an image");
            } else {
                assert!(part(&card, 0, 512).iter().all(|byte| *byte == 0));
                cut += usize::from(status.signal() == Some(9));
            }
        }
        assert!(cut >= 2, "only {cut} of {turns} kills came while it was writing");
        // And it can be flashed again.
        good(&[made.as_str(), card.as_str(), "--yes"]);
        assert_eq!(differences(&made, &card), Vec::<u64>::new());
    }
}

#[test]
fn wrong_targets_are_refused() {
    let folder = Folder::new();
    let made = image(&folder, TableKind::Mbr, 9).path;
    let (small, locked) = (folder.at("small"), folder.at("other"));
    old_card(&small, SIZE - MIB);
    old_card(&locked, SIZE);
    let before = part(&small, 0, MIB as usize);
    let message = refused(&[made.as_str(), small.as_str(), "--yes"]);
    assert!(message.contains("small cannot be flashed: the device has 63 MiB"), "{message}");
    assert!(part(&small, 0, MIB as usize) == before, "it was written to");
    let message = refused(&[made.as_str(), locked.as_str()]);
    assert!(message.contains("there is no terminal to confirm it") && message.contains("--yes"));
    let message = refused(&[made.as_str()]);
    assert!(message.contains("no device was given"), "{message}");
    let message = refused(&[made.as_str(), "no-such-device", "--yes"]);
    assert!(message.contains("no-such-device") && message.contains("--list"), "{message}");
    for (target, expected) in [
        ("/dev/null", "neither a block device nor a plain file"),
        (made.parent().expect("a directory").as_str(), "neither a block device nor a plain file"),
        (made.as_str(), "the image and the target are the same file"),
    ] {
        let message = refused(&[made.as_str(), target, "--yes"]);
        assert!(message.contains(expected), "{message}");
    }
    let held = File::open(&locked).expect("opening");
    let lock = rustix::fs::FlockOperation::NonBlockingLockExclusive;
    rustix::fs::flock(&held, lock).expect("locking");
    let message = refused(&[made.as_str(), locked.as_str(), "--yes"]);
    assert!(message.contains("another program is writing to the file"), "{message}");
    let message = refused(&[folder.at("robot.txt").as_str(), locked.as_str(), "--yes"]);
    assert!(message.contains("is not a card image"), "{message}");
    // The disk of this system, if it has one.
    let devices = device::list_all_devices().expect("lsblk");
    for root in devices.iter().filter(|d| d.mounted.iter().any(|(_, at)| at == "/")) {
        let message = refused(&[made.as_str(), root.path.as_str(), "--yes"]);
        assert!(message.contains("the running system is on it"), "{message}");
        let allowed = ["--non-removable", root.name.as_str()];
        let arguments = [&[made.as_str(), root.path.as_str(), "--yes"][..], &allowed].concat();
        assert!(refused(&arguments).contains("the running system is on it"));
    }
}

#[test]
fn each_kind_of_disk_is_refused_with_its_reason() {
    let json = include_str!("fixtures/flash/lsblk.json");
    let devices = device::parse_lsblk(json, |name| name == "mmcblk1").expect("the output of lsblk");
    let reasons = |name: &str, allowed: Option<&str>| -> Vec<ObjectionKind> {
        let device = devices.iter().find(|d| d.name == name).expect(name);
        let objections = device.objections(4 << 30, allowed);
        assert!(objections.iter().all(|o| !o.message.is_empty() && !o.help.is_empty()));
        objections.iter().map(|objection| objection.reason).collect()
    };
    assert_eq!(
        reasons("nvme0n1", None),
        [ObjectionKind::System, ObjectionKind::Held, ObjectionKind::NotRemovable],
        "encrypted, with volumes"
    );
    assert_eq!(reasons("nvme0n1", Some("nvme0n1")), [ObjectionKind::System, ObjectionKind::Held]);
    assert_eq!(
        reasons("nvme0n1p1", None),
        [ObjectionKind::System, ObjectionKind::Partition, ObjectionKind::TooSmall]
    );
    assert_eq!(
        reasons("dm-0", None),
        [ObjectionKind::System, ObjectionKind::Held, ObjectionKind::NotADisk]
    );
    assert_eq!(reasons("sda", None), [ObjectionKind::NotRemovable], "a USB disk with backups");
    assert_eq!(reasons("sda", Some("sdb")), [ObjectionKind::NotRemovable]);
    assert_eq!(reasons("sda", Some("sda")), []);
    assert_eq!(reasons("sdb", None), [], "a card in a reader");
    assert_eq!(reasons("sdb2", None), [ObjectionKind::Partition, ObjectionKind::TooSmall]);
    assert_eq!(reasons("sdc", None), [ObjectionKind::Mounted]);
    assert_eq!(
        reasons("sdd", None),
        [ObjectionKind::Held, ObjectionKind::NotRemovable],
        "part of an array"
    );
    assert_eq!(reasons("md0", None), [ObjectionKind::NotADisk]);
    assert_eq!(reasons("sde", None), [ObjectionKind::Sectors]);
    assert_eq!(reasons("sr0", None), [ObjectionKind::NotADisk, ObjectionKind::TooSmall]);
    assert_eq!(reasons("mmcblk0", None), [], "a card in the machine's own slot");
    assert_eq!(reasons("mmcblk1", None), [ObjectionKind::NotRemovable], "soldered");
    assert_eq!(reasons("mmcblk2", None), [ObjectionKind::ReadOnly, ObjectionKind::TooSmall]);
    let card = devices.iter().find(|d| d.name == "sdb").expect("the card");
    assert_eq!(
        (card.model.as_str(), card.bus.as_str(), card.content.as_str()),
        ("Generic- SD/MMC", "usb", "dos: 64 MiB vfat BOOT, 1.0 GiB ext4 root")
    );
    assert!(device::parse_lsblk("{}", |_| false).is_err());
    let listed = good(&["--list", "--format", "json"]);
    assert!(serde_json::from_str::<Vec<serde_json::Value>>(&listed).is_ok(), "{listed}");
}

#[test]
fn the_first_boot_is_seeded_and_the_image_stays() {
    let folder = Folder::new();
    let key = folder.at("key.pub");
    fs::write(
        &key,
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f me\r\n",
    )
    .expect("writing");
    let password = "a password of the test";
    for table in [TableKind::Mbr, TableKind::Hybrid] {
        let made = image(&folder, table, 10).path;
        let card = folder.at("card");
        let before = fs::read(&made).expect("reading");
        old_card(&card, SIZE);
        let mut call = command(&[made.as_str(), card.as_str(), "--yes", "--hostname", "bench-7"]);
        call.args(["--ssh-key", key.as_str(), "--wifi", "Lab \"2\""]);
        let output = call.env("SLIPWAY_WIFI_PASSWORD", password).output().expect("the tool");
        let printed = text(&output.stdout) + &text(&output.stderr);
        assert!(output.status.success(), "{printed}");
        assert!(printed.contains("the first boot applies hostname, ssh-keys, wifi"), "{printed}");
        assert!(!printed.contains(password), "the password is shown: {printed}");
        let seed = read::fat_file(&card, BOOT.0, BOOT.1, "slipway-seed.toml").expect("the seed");
        let seed: toml::Table = toml::from_str(&text(&seed)).expect("TOML");
        assert_eq!(seed["hostname"].as_str(), Some("bench-7"));
        assert_eq!(seed["ssh-keys"].as_array().map(Vec::len), Some(1));
        assert_eq!(seed["wifi"]["ssid"].as_str(), Some("Lab \"2\""));
        assert_eq!(seed["wifi"]["password"].as_str(), Some(password));
        let volume = folder.at("boot.vfat");
        fs::write(&volume, part(&card, BOOT.0, BOOT.1 as usize)).expect("writing");
        tool("fsck.fat").args(["-n", volume.as_str()]).run().expect("fsck.fat");
        let changed = differences(&made, &card);
        let inside = |at: &u64| (BOOT.0..BOOT.0 + BOOT.1).contains(at);
        assert!(!changed.is_empty() && changed.iter().all(inside), "{changed:?}");
        assert!(fs::read(&made).expect("reading") == before, "the image was changed");
    }
    let made = folder.at("card.img");
    let card = folder.at("card");
    let base = [made.as_str(), card.as_str(), "--yes"];
    let refusals: [(&[&str], &str); 5] = [
        (&["--hostname", "Bench_7"], "invalid host name"),
        (&["--wifi", "Lab"], "SLIPWAY_WIFI_PASSWORD"),
        (&["--ssh-key", key.as_str(), "--wifi", ""], "SLIPWAY_WIFI_PASSWORD"),
        (&["--ssh-key", "/etc/hostname"], "expected an SSH public key"),
        (&["--board", "pi3"], "--board needs a product"),
    ];
    for (more, expected) in refusals {
        let output = flash(&[&base[..], more].concat());
        let message = text(&output.stderr);
        assert!(!output.status.success() && message.contains(expected), "{more:?}: {message}");
    }
    assert!(Utf8Path::new(&card).is_file());
}

#[test]
fn another_file_of_the_same_size_under_the_same_name_is_refused() {
    let folder = Folder::new();
    let [card, other] = ["card", "other"].map(|name| folder.at(name));
    old_card(&card, SIZE);
    old_card(&other, SIZE);
    let shown = device::find_device(&card).expect("it is shown");
    fs::rename(&other, &card).expect("replacing it");
    let message = format!("{:#}", CardDevice::open(&shown).expect_err("another file"));
    assert!(
        message.contains("the medium has changed since it was examined: this medium has inode"),
        "{message}"
    );
}

#[test]
fn what_is_no_image_of_ours_is_told_as_such() {
    let folder = Folder::new();
    let card = folder.at("card");
    old_card(&card, SIZE);
    // By a bare name, outside of any workspace.
    fs::write(folder.at("x.img.gz"), "x").expect("writing");
    let mut call = command(&["x.img.gz", card.as_str(), "--yes"]);
    let output = call.current_dir(folder.at("")).output().expect("the tool");
    let printed = text(&output.stderr);
    assert!(
        !output.status.success() && printed.contains("x.img.gz is not a card image"),
        "{printed}"
    );
    // A window of 256 MiB, of a stream that says nowhere how long it is.
    let packed = folder.at("x.img.zst");
    let bytes = noise(MIB as usize, 1);
    let mut encoder =
        zstd::Encoder::new(File::create(&packed).expect("a file"), 1).expect("packing");
    encoder.window_log(28).expect("a window");
    encoder.write_all(&bytes).and_then(|()| encoder.finish()).expect("packing");
    let output = flash(&[packed.as_str(), card.as_str(), "--yes"]);
    let printed = text(&output.stderr);
    assert!(
        !output.status.success()
            && printed.contains("help: unpack the image with `zstd -d --long=31`"),
        "{printed}"
    );
}
