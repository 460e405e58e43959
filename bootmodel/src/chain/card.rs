//! Parses a card's bytes once: its partition table, the files of its FAT volumes, and the files of each slot that
//! take part in a start. Unreadable data is a finding, never a panic.

use std::collections::BTreeMap;
use std::rc::Rc;

use serde::Deserialize;

use super::fat;
use crate::firmware::{ReadOnlyDisk, TablePartition};

/// A FAT's kinds by its number of clusters (Microsoft's specification of FAT, 1.03, "FAT type determination").
const FAT12_BELOW: u64 = 4085;
const FAT16_BELOW: u64 = 65_525;
/// The largest file that is read; kernels and initrds are smaller.
const LARGEST: u64 = 96 << 20;
/// Maximum bytes of files kept for a whole card. Two boot partitions with a kernel, an initrd and firmware each need
/// less than half of it, and so do two slots.
const ROOM: u64 = 256 << 20;
/// The largest `device.toml`: a hundred times the size of Slipway's.
const LARGEST_DEVICE: u64 = 64 << 10;
/// The largest directory of a slot that is listed, in bytes; one with 500 modules has 20 KiB.
const LARGEST_FOLDER: u64 = 4 << 20;
/// The maximum number of files read in a slot; a link to a parent directory would make the list endless.
const MOST_ENTRIES: usize = 16_384;
/// The maximum number of models that a board is for; Raspberry Pi has made about thirty.
const MOST_MODELS: usize = 64;
/// The maximum number of block groups in a slot's filesystem: 8 TiB in groups of 128 MiB.
const MOST_GROUPS: u64 = 65_536;

/// A record of the MBR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MbrEntry {
    /// Its slot, from 1; from 5 on in an extended partition.
    pub number: u32,
    /// Its type.
    pub kind: u8,
    /// Byte offset.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// The position of a GPT's parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GptLayout {
    /// The first sector that partitions may have.
    pub first_usable: u64,
    /// The first sector of the entries.
    pub entries: u64,
}

/// A FAT volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FatVolume {
    /// The number of its partition.
    pub number: u32,
    /// Its name, where the table has names.
    pub name: String,
    /// Byte offset on the card.
    pub offset: u64,
    /// The type in the MBR, where it has a record there.
    pub kind: Option<u8>,
    /// The kind that its boot sector states: the text at offset 54 or 82 ("FAT16", "FAT32").
    pub says: String,
    /// How many clusters it has.
    pub clusters: u64,
    /// Sectors in a cluster.
    pub cluster_sectors: u32,
    /// The volume's sector size in bytes.
    pub sector: u64,
    /// The files, with their paths.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Files that were too large to be read; they are listed as empty.
    pub left_out: Vec<String>,
    /// Why its files cannot be read, if they cannot.
    pub unread: Option<String>,
}

impl FatVolume {
    /// 12, 16 or 32, by the number of clusters.
    pub fn width(&self) -> u32 {
        match self.clusters {
            n if n < FAT12_BELOW => 12,
            n if n < FAT16_BELOW => 16,
            _ => 32,
        }
    }

    /// A file by its name, ignoring upper and lower case.
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        let name = name.trim_start_matches('/');
        let exact = self.files.get(name);
        let any = || self.files.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, b)| b);
        exact.or_else(any).map(Vec::as_slice)
    }
}

/// A root filesystem with a system in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CardSlot {
    /// The number of its partition.
    pub number: u32,
    /// Files that take part in a start: below `/boot`, indexes of modules, systemd's settings.
    pub files: BTreeMap<String, Vec<u8>>,
}

/// What the system states about itself in `/usr/lib/slipway/device.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DeviceFacts {
    /// The board's name.
    pub board: String,
    /// The models that it is for.
    pub compatible: Vec<String>,
    /// `uboot` or `tryboot`.
    pub boot_flow: String,
    /// The oldest EEPROM release that it accepts.
    pub eeprom_since: Option<String>,
    /// Revisions that are known not to start, and are deliberately excluded.
    #[serde(default)]
    pub left_out_revisions: Vec<String>,
    /// Where the boot state is.
    #[serde(default)]
    pub boot_state: BootStatePlaces,
}

/// The copies of the boot state.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct BootStatePlaces {
    /// Their first sectors.
    #[serde(default)]
    pub sectors: Vec<u64>,
}

/// A card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CardContent {
    /// The MBR's records that are in use, those of extended partitions too.
    pub records: Vec<MbrEntry>,
    /// The GPT, where there is one.
    pub gpt: Option<GptLayout>,
    /// Byte offset of every partition, by number.
    pub partitions: BTreeMap<u32, u64>,
    /// FAT volumes, by number.
    pub volumes: Vec<FatVolume>,
    /// Slots, by number.
    pub slots: Vec<CardSlot>,
    /// What the slots state about themselves.
    pub device: DeviceFacts,
}

impl CardContent {
    /// Parses a card.
    ///
    /// # Errors
    /// When a table or a slot cannot be read, or no slot has a system.
    pub fn read(disk: Rc<dyn ReadOnlyDisk>) -> Result<Self, String> {
        let (records, gpt, partitions) = super::table::read_partitions(disk.as_ref())?;
        let mut card = Self {
            records,
            gpt,
            partitions: partitions.iter().map(|p| (p.number, p.offset)).collect(),
            volumes: Vec::new(),
            slots: Vec::new(),
            device: DeviceFacts::default(),
        };
        let mut room = ROOM;
        let mut reasons = String::new();
        for partition in partitions {
            let mut head = vec![0; 2048];
            if disk.read_at(partition.offset, &mut head).is_err() {
                return Err(format!("partition {} begins after the card's end", partition.number));
            }
            // ext4's magic number: superblock at 1024, field at 56; a FAT's boot sector ends in 55 aa.
            if head.get(1080..1082) == Some(&[0x53, 0xef]) {
                let number = partition.number;
                let in_context = |reason| format!("the ext4 of partition {number}: {reason}");
                // A system's filesystem is never written to. One with a journal to replay cannot be judged.
                if needs_replay(&head, partition.size).map_err(in_context)? {
                    reasons
                        .push_str(&format!("; partition {number} was in use when it was copied"));
                    continue;
                }
                card.slots.extend(read_slot(&disk, &partition, &mut room).map_err(in_context)?);
            } else if head.get(510..512) == Some(&[0x55, 0xaa]) {
                let kind = card.records.iter().find(|r| r.offset == partition.offset);
                let kind = kind.map(|record| record.kind);
                card.volumes.extend(read_volume(disk.as_ref(), &partition, kind, &head, &mut room));
            }
        }
        let text = card.slots.first().and_then(|slot| slot.files.get(DEVICE));
        let text = text.ok_or_else(|| format!("no slot has a system with {DEVICE}{reasons}"))?;
        card.device = toml::from_str(&String::from_utf8_lossy(text))
            .map_err(|error| format!("{DEVICE}: {error}"))?;
        let all = std::mem::take(&mut card.device.compatible);
        for model in all {
            if !card.device.compatible.contains(&model) {
                card.device.compatible.push(model);
            }
        }
        if card.device.compatible.len() > MOST_MODELS {
            return Err(format!("{DEVICE} names more than {MOST_MODELS} models"));
        }
        Ok(card)
    }

    /// The MBR's records, and the byte offset of each partition by number. Reads only the partition table.
    ///
    /// # Errors
    /// When a table cannot be read.
    pub fn table_of(
        disk: &dyn ReadOnlyDisk,
    ) -> Result<(Vec<MbrEntry>, BTreeMap<u32, u64>), String> {
        let (records, _, partitions) = super::table::read_partitions(disk)?;
        Ok((records, partitions.iter().map(|p| (p.number, p.offset)).collect()))
    }

    /// `mbr`, `gpt` or `hybrid`.
    pub fn table(&self) -> &'static str {
        let others = self.records.iter().any(|record| record.kind != 0xee);
        match (self.gpt.is_some(), others) {
            (false, _) => "mbr",
            (true, false) => "gpt",
            (true, true) => "hybrid",
        }
    }

    /// The FAT volume of a partition.
    pub fn volume(&self, number: u32) -> Option<&FatVolume> {
        self.volumes.iter().find(|volume| volume.number == number)
    }
}

/// The file in which the system says what it is.
pub const DEVICE: &str = "usr/lib/slipway/device.toml";

/// Where the kernel looks for Wi-Fi settings.
const WIFI: &str = "/usr/lib/firmware/brcm";

fn read_volume(
    disk: &dyn ReadOnlyDisk,
    partition: &TablePartition,
    kind: Option<u8>,
    head: &[u8],
    room: &mut u64,
) -> Option<FatVolume> {
    // Boot sectors of other filesystems end in the same bytes, but the firmware does not read NTFS or exFAT either.
    let shape = fat::read_boot_sector(head);
    if shape.is_none() && !kind.is_some_and(super::table::is_fat) {
        return None;
    }
    let empty =
        fat::FatBootSector { says: String::new(), clusters: 0, cluster_sectors: 0, sector: 512 };
    let (fat::FatBootSector { says, clusters, cluster_sectors, sector }, read) = match shape {
        Some(shape) => (shape, fat::read_files(disk, partition, LARGEST, room)),
        None => (empty, Err(std::io::Error::other("the boot sector is not that of a FAT volume"))),
    };
    let (files, left_out, unread) = match read {
        Ok(files) => (files.found, files.left_out, None),
        Err(error) => (BTreeMap::new(), Vec::new(), Some(error.to_string())),
    };
    Some(FatVolume {
        number: partition.number,
        name: partition.name.clone(),
        offset: partition.offset,
        kind,
        says,
        clusters,
        cluster_sectors,
        sector,
        files,
        left_out,
        unread,
    })
}

/// Whether a filesystem's journal has changes that must still be replayed. The sizes in the superblock are compared
/// with the partition first, because the reader allocates memory by them (Linux, Documentation/filesystems/ext4/super.rst).
fn needs_replay(head: &[u8], size: u64) -> Result<bool, String> {
    let number = |at: usize| {
        let four = head.get(1024 + at..1028 + at).and_then(|four| four.try_into().ok());
        u64::from(u32::from_le_bytes(four.unwrap_or_default()))
    };
    // `s_log_block_size` counts from 1 KiB; 64 KiB is the largest. `INCOMPAT_64BIT`: the numbers have upper halves.
    let (log, features) = (number(0x18), number(0x60));
    let upper = if features & 0x80 != 0 { number(0x150) } else { 0 };
    let (blocks, in_group) = (upper << 32 | number(0x4), number(0x20));
    let bytes = blocks.checked_mul(1024 << log.min(6));
    if log > 6 || bytes.is_none_or(|bytes| bytes > size) {
        return Err(format!(
            "the superblock claims {blocks} blocks of 2^{} bytes, but the partition has {size} bytes",
            log + 10
        ));
    }
    if in_group == 0 || blocks / in_group > MOST_GROUPS {
        return Err(format!("the superblock claims {blocks} blocks in groups of {in_group}"));
    }
    // `INCOMPAT_RECOVER`.
    Ok(features & 0x4 != 0)
}

/// A partition as ext4's reader wants it.
struct Part {
    disk: Rc<dyn ReadOnlyDisk>,
    offset: u64,
}

impl ext4_view::Ext4Read for Part {
    fn read(
        &mut self,
        start: u64,
        out: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        Ok(self.disk.read_at(self.offset.saturating_add(start), out)?)
    }
}

/// Reads the files of a slot that take part in a start.
struct Reader<'a> {
    files: ext4_view::Ext4,
    slot: CardSlot,
    entries: usize,
    room: &'a mut u64,
}

fn describe_error(error: &ext4_view::Ext4Error) -> String {
    error.to_string()
}

impl Reader<'_> {
    fn take(&mut self, path: &str, largest: u64) -> Result<(), String> {
        let in_context = |error| format!("{path}: {}", describe_error(&error));
        if !self.files.exists(path).map_err(in_context)? {
            return Ok(());
        }
        let metadata = self.files.metadata(path).map_err(in_context)?;
        if metadata.is_dir() {
            return Ok(());
        }
        let length = metadata.len();
        if length > largest.min(*self.room) {
            return Err(format!("{path} has {length} bytes, the maximum is {largest}"));
        }
        *self.room -= length;
        let bytes = self.files.read(path).map_err(in_context)?;
        self.slot.files.insert(path.trim_start_matches('/').to_owned(), bytes);
        Ok(())
    }

    /// The names in a directory, each with whether it is a directory and whether it is a file; empty without a directory.
    fn list(&mut self, folder: &str) -> Result<Vec<(String, bool, bool)>, String> {
        let in_context = |error| format!("{folder}: {}", describe_error(&error));
        if !self.files.exists(folder).map_err(in_context)? {
            return Ok(Vec::new());
        }
        let metadata = self.files.metadata(folder).map_err(in_context)?;
        if !metadata.is_dir() {
            return Ok(Vec::new());
        }
        if metadata.len() > LARGEST_FOLDER {
            return Err(format!(
                "the directory {folder} has {} bytes, the maximum is {LARGEST_FOLDER}",
                metadata.len()
            ));
        }
        let mut found = Vec::new();
        for entry in self.files.read_dir(folder).map_err(in_context)? {
            let entry = entry.map_err(in_context)?;
            self.entries += 1;
            if self.entries > MOST_ENTRIES {
                return Err(format!(
                    "the slot's directories up to {folder} list more than {MOST_ENTRIES} files"
                ));
            }
            let name = entry.file_name();
            let Ok(name) = name.as_str() else { continue };
            let kind = entry.file_type().map_err(in_context)?;
            found.push((name.to_owned(), kind.is_dir(), kind.is_regular_file()));
        }
        Ok(found)
    }
}

/// Indexes of modules.
const INDEXES: [&str; 3] = ["modules.alias", "modules.builtin", "modules.builtin.modinfo"];

/// Directories of systemd's manager settings; earlier ones take precedence (systemd-system.conf(5)).
pub(super) const MANAGER: [&str; 3] =
    ["etc/systemd/system.conf", "usr/lib/systemd/system.conf", "lib/systemd/system.conf"];

fn read_slot(
    disk: &Rc<dyn ReadOnlyDisk>,
    partition: &TablePartition,
    room: &mut u64,
) -> Result<Option<CardSlot>, String> {
    let number = partition.number;
    let part = Part { disk: Rc::clone(disk), offset: partition.offset };
    let files = ext4_view::Ext4::load(Box::new(part)).map_err(|error| describe_error(&error))?;
    let device = format!("/{DEVICE}");
    if !files.exists(device.as_str()).map_err(|error| describe_error(&error))? {
        return Ok(None);
    }
    let slot = CardSlot { number, files: BTreeMap::new() };
    let mut reader = Reader { files, slot, entries: 0, room };
    reader.take(&device, LARGEST_DEVICE)?;
    // What a boot script loads, systemd's settings, indexes of modules.
    let mut left = vec!["/boot".to_owned(), "/usr/lib/modules".to_owned()];
    for file in &MANAGER[..2] {
        reader.take(&format!("/{file}"), LARGEST_DEVICE)?;
        left.push(format!("/{file}.d"));
    }
    while let Some(folder) = left.pop() {
        let depth = folder.split('/').count();
        let is_wanted = |name: &str| match folder.as_str() {
            folder if folder.starts_with("/usr/lib/modules") => INDEXES.contains(&name),
            folder if folder.starts_with("/boot") => true,
            _ => name.ends_with(".conf"),
        };
        for (name, is_folder, is_file) in reader.list(&folder)? {
            let path = format!("{folder}/{name}");
            if is_folder && name != "." && name != ".." && depth < 6 && name != "kernel" {
                left.push(path);
            } else if is_file && is_wanted(&name) {
                reader.take(&path, LARGEST)?;
            }
        }
    }
    // Only the names of Wi-Fi settings: many of them are links.
    for (name, _, _) in reader.list(WIFI)? {
        let path = format!("{}/{name}", WIFI.trim_start_matches('/'));
        reader.slot.files.insert(path, Vec::new());
    }
    Ok(Some(reader.slot))
}

#[cfg(test)]
mod tests {
    use super::needs_replay;

    #[test]
    fn a_superblock_is_compared_with_its_partition() {
        let mut head = vec![0; 2048];
        let mut set = |at: usize, value: u32| {
            head[1024 + at..1028 + at].copy_from_slice(&value.to_le_bytes());
            head.clone()
        };
        set(0x4, 262_144);
        set(0x18, 2);
        let good = set(0x20, 32_768);
        assert_eq!(needs_replay(&good, 1 << 30), Ok(false));
        assert_eq!(needs_replay(&set(0x60, 4), 1 << 30), Ok(true));
        assert!(needs_replay(&good, (1 << 30) - 1).is_err(), "larger than its partition");
        assert!(needs_replay(&set(0x18, 31), u64::MAX).is_err(), "blocks of 2 TiB");
        set(0x18, 0);
        assert!(needs_replay(&set(0x20, 1), 1 << 30).is_err(), "a group for each block");
        assert!(needs_replay(&set(0x20, 0), 1 << 30).is_err(), "no blocks in a group");
    }
}
