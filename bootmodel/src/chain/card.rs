//! A card as bytes, taken apart once: its table, the files of its FAT volumes, and of each slot what takes part in
//! a start. What cannot be read is a finding, never a panic.

use std::collections::BTreeMap;
use std::io::Read;
use std::rc::Rc;

use serde::Deserialize;

use crate::firmware::{Disk, Partition, Window};

/// A FAT's kinds by its number of clusters (Microsoft's specification of FAT, 1.03, "FAT type determination").
const FAT12_BELOW: u64 = 4085;
const FAT16_BELOW: u64 = 65_525;
/// The largest file that is read: kernels and initrds are below.
const LARGEST: u64 = 256 << 20;

/// A record of the MBR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// Its slot, from 1; from 5 on in an extended partition.
    pub number: u32,
    /// Its type.
    pub kind: u8,
    /// Byte offset.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// Where a GPT has its parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gpt {
    /// The first sector that partitions may have.
    pub first_usable: u64,
    /// The first sector of the entries.
    pub entries: u64,
}

/// A FAT volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// The number of its partition.
    pub number: u32,
    /// Its name, where the table has names.
    pub name: String,
    /// Byte offset on the card.
    pub offset: u64,
    /// The type in the MBR, where it has a record there.
    pub kind: Option<u8>,
    /// Its kind as its boot sector says: the text at 54 or 82 ("FAT16", "FAT32").
    pub says: String,
    /// How many clusters it has.
    pub clusters: u64,
    /// Sectors in a cluster.
    pub cluster_sectors: u32,
    /// The files, with their paths.
    pub files: BTreeMap<String, Vec<u8>>,
}

impl Volume {
    /// 12, 16 or 32, by the number of clusters.
    pub fn width(&self) -> u32 {
        match self.clusters {
            n if n < FAT12_BELOW => 12,
            n if n < FAT16_BELOW => 16,
            _ => 32,
        }
    }

    /// A file, whatever the capitals of its name.
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        let name = name.trim_start_matches('/');
        let exact = self.files.get(name);
        let any = || self.files.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, b)| b);
        exact.or_else(any).map(Vec::as_slice)
    }
}

/// A root filesystem with a system in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// The number of its partition.
    pub number: u32,
    /// Files that take part in a start: below `/boot`, indexes of modules, systemd's settings.
    pub files: BTreeMap<String, Vec<u8>>,
}

/// What the system says of itself: `/usr/lib/slipway/device.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Device {
    /// The board's name.
    pub board: String,
    /// The models that it is for.
    pub compatible: Vec<String>,
    /// `uboot` or `tryboot`.
    pub boot_flow: String,
    /// The oldest EEPROM that it asks for.
    pub eeprom_since: Option<String>,
    /// Revisions that are known not to start, and are left out on purpose.
    #[serde(default)]
    pub left_out_revisions: Vec<String>,
    /// Where the boot state lies.
    #[serde(default)]
    pub boot_state: States,
}

/// The copies of the boot state.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct States {
    /// Their first sectors.
    #[serde(default)]
    pub sectors: Vec<u64>,
}

/// A card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Card {
    /// The MBR's records that are in use, those of extended partitions too.
    pub records: Vec<Record>,
    /// The GPT, where there is one.
    pub gpt: Option<Gpt>,
    /// Byte offset of every partition, by number.
    pub partitions: BTreeMap<u32, u64>,
    /// FAT volumes, by number.
    pub volumes: Vec<Volume>,
    /// Slots, by number.
    pub slots: Vec<Slot>,
    /// What the slots say of themselves.
    pub device: Device,
}

impl Card {
    /// Takes a card apart.
    ///
    /// # Errors
    /// A table that cannot be read, a volume that ends in the midst, no slot with a system.
    pub fn read(disk: Rc<dyn Disk>) -> Result<Self, String> {
        let (records, gpt, partitions) = super::table::partitions(disk.as_ref())?;
        let mut card = Self {
            records,
            gpt,
            partitions: partitions.iter().map(|p| (p.number, p.offset)).collect(),
            volumes: Vec::new(),
            slots: Vec::new(),
            device: Device::default(),
        };
        for partition in partitions {
            let mut head = vec![0; 2048];
            if disk.read_at(partition.offset, &mut head).is_err() {
                return Err(format!("partition {} lies behind the card's end", partition.number));
            }
            // ext4's magic number: superblock at 1024, field at 56; a FAT's boot sector ends in 55 aa.
            if head.get(1080..1082) == Some(&[0x53, 0xef]) {
                card.slots.extend(slot(&disk, &partition)?);
            } else if head.get(510..512) == Some(&[0x55, 0xaa]) {
                let kind = card.records.iter().find(|r| r.offset == partition.offset);
                let kind = kind.map(|record| record.kind);
                card.volumes.extend(volume(disk.as_ref(), &partition, kind, &head)?);
            }
        }
        let text = card.slots.first().and_then(|slot| slot.files.get(DEVICE));
        let text = text.ok_or("no slot has a system with usr/lib/slipway/device.toml")?;
        card.device = toml::from_str(&String::from_utf8_lossy(text))
            .map_err(|error| format!("{DEVICE}: {error}"))?;
        Ok(card)
    }

    /// The MBR's records, and the byte offset of each partition by number: all of a card's table, and nothing of its
    /// content.
    ///
    /// # Errors
    /// A table that cannot be read.
    pub fn table_of(disk: &dyn Disk) -> Result<(Vec<Record>, BTreeMap<u32, u64>), String> {
        let (records, _, partitions) = super::table::partitions(disk)?;
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
    pub fn volume(&self, number: u32) -> Option<&Volume> {
        self.volumes.iter().find(|volume| volume.number == number)
    }
}

/// Where the system says what it is.
pub const DEVICE: &str = "usr/lib/slipway/device.toml";

/// Where the kernel looks for the settings of Wi-Fi.
const WIFI: &str = "/usr/lib/firmware/brcm";

fn volume(
    disk: &dyn Disk,
    partition: &Partition,
    kind: Option<u8>,
    head: &[u8],
) -> Result<Option<Volume>, String> {
    let doing = |error: std::io::Error| {
        format!("the FAT volume of partition {} cannot be read: {error}", partition.number)
    };
    let window = Window::new(disk, partition);
    let files = fatfs::FileSystem::new(window, fatfs::FsOptions::new()).map_err(doing)?;
    let mut found = BTreeMap::new();
    collect(&files.root_dir(), "", &mut found, 0).map_err(doing)?;
    let stats = files.stats().map_err(doing)?;
    // Offsets of the text: in the boot sector of a FAT12 and FAT16, and of a FAT32.
    let fat32 = head.get(22..24) == Some(&[0, 0]);
    let says = head.get(if fat32 { 82..90 } else { 54..62 }).unwrap_or_default();
    Ok(Some(Volume {
        number: partition.number,
        name: partition.name.clone(),
        offset: partition.offset,
        kind,
        says: String::from_utf8_lossy(says).trim().to_owned(),
        clusters: u64::from(stats.total_clusters()),
        cluster_sectors: stats.cluster_size() / 512,
        files: found,
    }))
}

fn collect(
    folder: &fatfs::Dir<'_, Window<'_>>,
    path: &str,
    found: &mut BTreeMap<String, Vec<u8>>,
    depth: u32,
) -> std::io::Result<()> {
    for entry in folder.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if name == "." || name == ".." {
            continue;
        }
        let path = if path.is_empty() { name } else { format!("{path}/{name}") };
        if entry.is_dir() && depth < 8 {
            collect(&entry.to_dir(), &path, found, depth + 1)?;
        } else if entry.is_file() && entry.len() <= LARGEST {
            let mut bytes = Vec::new();
            entry.to_file().read_to_end(&mut bytes)?;
            found.insert(path, bytes);
        }
    }
    Ok(())
}

/// A partition as ext4's reader wants it.
struct Part {
    disk: Rc<dyn Disk>,
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

fn slot(disk: &Rc<dyn Disk>, partition: &Partition) -> Result<Option<Slot>, String> {
    let number = partition.number;
    let doing = |error: ext4_view::Ext4Error| format!("the ext4 of partition {number}: {error}");
    let part = Part { disk: Rc::clone(disk), offset: partition.offset };
    let files = ext4_view::Ext4::load(Box::new(part)).map_err(doing)?;
    let device = format!("/{DEVICE}");
    if !files.exists(device.as_str()).map_err(doing)? {
        return Ok(None);
    }
    let mut slot = Slot { number, files: BTreeMap::new() };
    let mut take = |path: &str| -> Result<(), ext4_view::Ext4Error> {
        if files.exists(path)? && !files.metadata(path)?.is_dir() {
            slot.files.insert(path.trim_start_matches('/').to_owned(), files.read(path)?);
        }
        Ok(())
    };
    take(&device).map_err(doing)?;
    take("/etc/systemd/system.conf").map_err(doing)?;
    // What a boot script loads, systemd's settings, indexes of modules.
    const INDEXES: [&str; 3] = ["modules.alias", "modules.builtin", "modules.builtin.modinfo"];
    for start in ["/boot", "/etc/systemd/system.conf.d", "/usr/lib/modules"] {
        let filter = |name: &str| match start {
            "/usr/lib/modules" => INDEXES.contains(&name),
            "/boot" => true,
            _ => name.ends_with(".conf"),
        };
        let mut left = vec![start.to_owned()];
        while let Some(folder) = left.pop() {
            if !files.exists(folder.as_str()).map_err(doing)? {
                continue;
            }
            let depth = folder.split('/').count();
            for entry in files.read_dir(folder.as_str()).map_err(doing)? {
                let entry = entry.map_err(doing)?;
                let name = entry.file_name();
                let Ok(name) = name.as_str() else { continue };
                let path = format!("{folder}/{name}");
                let kind = entry.file_type().map_err(doing)?;
                if kind.is_dir() && name != "." && name != ".." && depth < 6 && name != "kernel" {
                    left.push(path);
                } else if kind.is_regular_file() && filter(name) {
                    take(&path).map_err(doing)?;
                }
            }
        }
    }
    // Of Wi-Fi's settings the names alone: many of them are links.
    if files.exists(WIFI).map_err(doing)? {
        for entry in files.read_dir(WIFI).map_err(doing)? {
            let entry = entry.map_err(doing)?;
            if let Ok(name) = entry.file_name().as_str() {
                let path = format!("{}/{name}", WIFI.trim_start_matches('/'));
                slot.files.insert(path, Vec::new());
            }
        }
    }
    Ok(Some(slot))
}
