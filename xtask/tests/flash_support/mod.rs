//! A small card image with everything that a real one has, and the tool that flashes it.

use crate::common::{find, noise, partition, text};

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::{Command, Output};

use camino::{Utf8Path, Utf8PathBuf};
use uuid::Uuid;
use xtask::disk::bmap::{self, BlockMap};
use xtask::disk::{
    DiskImage, DiskRequest, DiskSpec, FatFile, FileSource, Filesystem, PartitionContent,
    PartitionSpec, TableKind, assemble, lay_out_disk, sum_image,
};

pub const MIB: u64 = 1 << 20;
/// Bytes of the image.
pub const SIZE: u64 = 64 * MIB;
/// The offset of its boot partition, and its bytes.
pub const BOOT: (u64, u64) = (4 * MIB, 16 * MIB);

/// A directory that is removed at the end of the test.
pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }

    pub fn at(&self, name: &str) -> Utf8PathBuf {
        Utf8Path::from_path(self.0.path()).expect("UTF-8").join(name)
    }
}

/// Makes `card.img` and its block map: two slots of 18 MiB, half of them holes, and a FAT.
pub fn image(folder: &Folder, table: TableKind, seed: u64) -> DiskImage {
    let root = folder.at("root.img");
    let file = File::create(&root).expect("creating a slot");
    file.set_len(18 * MIB).expect("its size");
    for start in [0, 9] {
        let bytes = noise(5_000_000, seed + start);
        file.write_all_at(&bytes, start * MIB).expect("filling the slot");
    }
    let layout = lay_out_disk(&DiskRequest {
        table,
        size: SIZE,
        first_partition: BOOT.0,
        alignment: MIB,
        states: vec![MIB, 2 * MIB],
        trust: Vec::new(),
        partitions: vec![
            partition("boot", BOOT.1 / MIB, Filesystem::Vfat),
            partition("root-a", 18, Filesystem::Ext4),
            partition("root-b", 18, Filesystem::Ext4),
            partition("data", 6, Filesystem::Ext4),
        ],
    });
    let firmware = FileSource::Bytes(noise(3_000_000, seed));
    let boot = PartitionContent::Fat {
        label: "boot".to_owned(),
        volume_id: 0x5107,
        placed: true,
        files: vec![FatFile { path: "start.elf".to_owned(), source: firmware }],
    };
    let slot = PartitionContent::Image(sum_image(&root).expect("summing"));
    let contents = [boot, slot.clone(), slot, PartitionContent::Empty];
    let partitions = contents.into_iter().zip(1u128..).map(|(content, n)| PartitionSpec {
        guid: Uuid::from_u128(n),
        content,
        size_key: "the test".to_owned(),
    });
    let spec = DiskSpec {
        layout: layout.expect("a good layout"),
        disk_guid: Uuid::from_u128(9),
        mbr_signature: 9,
        epoch: 1_700_000_000,
        states: vec![b"seq=1".to_vec()],
        partitions: partitions.collect(),
    };
    assemble(&spec, &folder.at("card.img")).expect("assembling")
}

/// A file of this size with old bytes everywhere.
pub fn old_card(path: &Utf8Path, size: u64) {
    let file = File::create(path).expect("creating a card");
    let bytes = noise(MIB as usize, 0x01d);
    for start in (0..size).step_by(MIB as usize) {
        file.write_all_at(&bytes, start).expect("filling the card");
    }
    file.sync_all().expect("flushing");
}

/// Calls the tool.
pub fn flash(arguments: &[&str]) -> Output {
    command(arguments).output().expect("the tool starts")
}

/// The call, not started.
pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.arg("flash").args(arguments).stdin(std::process::Stdio::null());
    command.env_remove("SLIPWAY_WIFI_PASSWORD");
    command
}

/// It succeeds; what it prints.
pub fn good(arguments: &[&str]) -> String {
    let output = flash(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// It fails; its message.
pub fn refused(arguments: &[&str]) -> String {
    let output = flash(arguments);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {message}");
    assert!(message.contains("help: "), "no help in: {message}");
    message
}

/// The mapped ranges that differ, as byte offsets.
pub fn differences(image: &Utf8Path, card: &Utf8Path) -> Vec<u64> {
    let map = BlockMap::read(&bmap::path_for(image)).expect("the block map");
    let (image, card) = (File::open(image).expect("image"), File::open(card).expect("card"));
    let mut found = Vec::new();
    for range in &map.ranges {
        let at = range.first * map.block_size;
        let length = ((range.last + 1) * map.block_size - at) as usize;
        let (mut ours, mut theirs) = (vec![0; length], vec![0; length]);
        image.read_exact_at(&mut ours, at).expect("reading the image");
        card.read_exact_at(&mut theirs, at).expect("reading the card");
        if ours != theirs {
            found.push(at);
        }
    }
    assert!(map.ranges.len() > 5, "few ranges: {:?}", map.ranges);
    found
}

/// Whether there is a partition table: `sfdisk` and our own reader must agree.
pub fn has_table(card: &Utf8Path) -> bool {
    let dump =
        Command::new(find("sfdisk")).args(["--dump", card.as_str()]).output().expect("sfdisk");
    let ours = xtask::disk::read::read_tables(card).is_ok_and(|t| !t.partitions.is_empty());
    assert_eq!(dump.status.success(), ours, "sfdisk: {}", text(&dump.stderr));
    ours
}

/// The bytes of a part of a card.
pub fn part(card: &Utf8Path, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    File::open(card).expect("card").read_exact_at(&mut bytes, offset).expect("reading");
    bytes
}
