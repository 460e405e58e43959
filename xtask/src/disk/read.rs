//! Reads a card image back, for `inspect` and `verify`: the tables with every check that a foreign
//! tool would make, the files of a FAT, the boot-state sectors. Everything that it reads is
//! untrusted.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, anyhow, bail, ensure};
use camino::Utf8Path;
use gpt::disk::LogicalBlockSize;
use gpt::header::{Header, read_header_from_arbitrary_device};
use gpt::mbr::ProtectiveMBR;
use gpt::partition::{Partition, PartitionAttributes, file_read_partitions};
use serde::{Deserialize, Serialize};

use super::layout::FIRST_LOGICAL;
use super::layout::{DiskLayout, SECTOR, TableKind, exact_size};
use super::seek_position;
use super::table::{EXTENDED_KINDS, PROTECTIVE, mbr_type};

/// The largest file that is read whole from a FAT.
const LARGEST_FILE: u64 = 256 << 20;
/// The maximum depth of nested directories.
const DEEPEST: usize = 16;
/// The maximum number of files and directories of a FAT.
const MOST_FILES: usize = 1 << 18;
/// The maximum total length of their paths in bytes.
const MOST_NAMES: usize = 64 << 20;

/// The tables of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskTables {
    /// The kind of table.
    pub table: TableKind,
    /// Bytes of the image.
    pub size: u64,
    /// The disk's GUID, with a GPT.
    pub disk_guid: Option<String>,
    /// The signature in the MBR.
    pub mbr_signature: u32,
    /// The partitions, by number.
    pub partitions: Vec<FoundPartition>,
    /// The records of the MBR that are in use: all records of an MBR table; of a hybrid also those
    /// besides the protective one.
    pub mbr: Vec<MbrRecord>,
    /// All errors, one sentence for each; empty when the tables are valid.
    pub findings: Vec<String>,
}

/// A partition as a table lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundPartition {
    /// Its number, from 1.
    pub number: u32,
    /// Its name; an MBR has none.
    pub name: Option<String>,
    /// Its GUID; an MBR has none.
    pub guid: Option<String>,
    /// Its type: a GUID, or two hexadecimal digits in an MBR.
    pub kind: String,
    /// Byte offset.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// Active, or legacy-bootable.
    pub bootable: bool,
}

/// A record of the MBR.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MbrRecord {
    /// Its slot, from 1.
    pub slot: u32,
    /// Its type.
    pub kind: u8,
    /// First sector.
    pub first_sector: u64,
    /// Size in sectors.
    pub sectors: u64,
    /// The active flag.
    pub active: bool,
}

/// A file or directory of a FAT.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FatEntry {
    /// Its path, without a leading `/`.
    pub path: String,
    /// Bytes; 0 for a directory.
    pub size: u64,
    /// Whether it is a directory.
    pub folder: bool,
}

/// What a FAT volume holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FatListing {
    /// The label.
    pub label: String,
    /// The serial number.
    pub volume_id: u32,
    /// 16 or 32.
    pub width: u8,
    /// Free space in bytes.
    pub free: u64,
    /// By path.
    pub entries: Vec<FatEntry>,
}

/// Reads the tables and validates them.
///
/// # Errors
/// When the image cannot be read or has no partition table at all.
pub fn read_tables(image: &Utf8Path) -> Result<DiskTables> {
    let context = || format!("reading the partition table of {image}");
    let mut file = File::open(image).with_context(context)?;
    // The metadata of a block device do not contain its size.
    let size = file.seek(SeekFrom::End(0)).with_context(context)?;
    let mbr = ProtectiveMBR::from_disk(&mut file, LogicalBlockSize::Lb512)
        .map_err(|error| anyhow!("{}: {error}", context()))?;
    let records: Vec<MbrRecord> = (1..=4u32)
        .filter_map(|slot| Some((slot, mbr.partition(slot as usize - 1)?)))
        .filter(|(_, record)| record.os_type != 0)
        .map(|(slot, record)| MbrRecord {
            slot,
            kind: record.os_type,
            first_sector: record.lb_start.into(),
            sectors: record.lb_size.into(),
            active: record.boot_indicator == 0x80,
        })
        .collect();
    let protective = records.iter().any(|r| r.kind == PROTECTIVE);
    let table = match (protective, records.len()) {
        (false, _) => TableKind::Mbr,
        (true, 1) => TableKind::Gpt,
        (true, _) => TableKind::Hybrid,
    };
    let mut found = DiskTables {
        table,
        size,
        disk_guid: None,
        mbr_signature: u32::from_le_bytes(*mbr.disk_signature()),
        partitions: Vec::new(),
        mbr: records,
        findings: Vec::new(),
    };
    if table.has_gpt() {
        read_gpt(&file, &mut found).with_context(context)?;
        check_mbr_against_gpt(&mut found);
    } else {
        let extended = |record: &&MbrRecord| EXTENDED_KINDS.contains(&record.kind);
        found.partitions =
            found.mbr.iter().filter(|record| !extended(record)).map(from_record).collect();
        if let Some(record) = found.mbr.iter().find(extended).cloned() {
            read_logical(&file, &record, &mut found).with_context(context)?;
        }
    }
    check_partitions(&mut found);
    Ok(found)
}

fn from_record(record: &MbrRecord) -> FoundPartition {
    FoundPartition {
        number: record.slot,
        name: None,
        guid: None,
        kind: format!("{:02x}", record.kind),
        offset: record.first_sector * SECTOR,
        size: record.sectors * SECTOR,
        bootable: record.active,
    }
}

/// Follows the chain of records in an extended partition.
fn read_logical(file: &File, extended: &MbrRecord, found: &mut DiskTables) -> Result<()> {
    /// More than any disk has; a circular chain is longer.
    const MOST: u32 = 64;
    let end = extended.first_sector + extended.sectors;
    let mut at = extended.first_sector;
    for number in FIRST_LOGICAL..FIRST_LOGICAL + MOST {
        let mut sector = [0u8; SECTOR as usize];
        file.read_exact_at(&mut sector, at.saturating_mul(SECTOR))?;
        let record = |index: usize| {
            let bytes = &sector[446 + index * 16..][..16];
            let word = |at: usize| {
                u64::from(u32::from_le_bytes([
                    bytes[at],
                    bytes[at + 1],
                    bytes[at + 2],
                    bytes[at + 3],
                ]))
            };
            (bytes[0], bytes[4], word(8), word(12))
        };
        if sector[510..] != [0x55, 0xaa] {
            found.findings.push(format!(
                "sector {at}, which should contain the record of partition {number}, contains none"
            ));
            return Ok(());
        }
        let ((active, kind, first, sectors), (_, link, next, _)) = (record(0), record(1));
        if kind != 0 {
            let first_sector = at + first;
            if first_sector + sectors > end {
                found.findings.push(format!(
                    "partition {number} ends after the extended partition that contains it"
                ));
            }
            let active = active == 0x80;
            let record = MbrRecord { slot: number, kind, first_sector, sectors, active };
            found.partitions.push(from_record(&record));
        }
        if !EXTENDED_KINDS.contains(&link) {
            return Ok(());
        }
        at = extended.first_sector + next;
    }
    found.findings.push("the chain of logical partitions has no end".to_owned());
    Ok(())
}

/// Reads both copies of the GPT and takes the partitions from the first valid copy.
fn read_gpt(file: &File, found: &mut DiskTables) -> Result<()> {
    ensure!(found.size >= 64 * SECTOR, "the image is too small for a GPT");
    let last = found.size / SECTOR - 1;
    let places =
        [("the GPT at the start of the disk", 1), ("the backup GPT at the end of the disk", last)];
    let mut sound = Vec::new();
    for (place, sector) in places {
        match read_copy(file, sector) {
            Ok(copy) => sound.push(copy),
            Err(error) => found.findings.push(format!("{place} is damaged: {error}")),
        }
    }
    let Some((header, partitions)) = sound.first() else {
        bail!("neither copy of the GPT can be read: {}", found.findings.join("; "));
    };
    found.disk_guid = Some(header.disk_guid.to_string());
    found.partitions = partitions
        .iter()
        .filter(|(_, partition)| partition.is_used())
        .map(|(&number, partition)| from_entry(number, partition))
        .collect();
    for partition in &found.partitions {
        let (first, end) = (
            partition.offset / SECTOR,
            partition.offset.saturating_add(partition.size).div_ceil(SECTOR),
        );
        if first < header.first_usable || end > header.last_usable.saturating_add(1) {
            found.findings.push(format!(
                "partition {} is outside of the GPT's usable sectors ({} to {})",
                partition.number, header.first_usable, header.last_usable
            ));
        }
    }
    let [(primary, entries), (backup, backup_entries)] = sound.as_slice() else { return Ok(()) };
    if primary.backup_lba != last || backup.backup_lba != 1 {
        found.findings.push(format!(
            "the GPT locates its copies at the sectors {} and {}, expected 1 and {last}",
            backup.backup_lba, primary.backup_lba
        ));
    }
    let usable = |header: &Header| (header.first_usable, header.last_usable);
    if primary.disk_guid != backup.disk_guid
        || usable(primary) != usable(backup)
        || entries != backup_entries
    {
        found.findings.push("the GPT at the start and its backup at the end differ".to_owned());
    }
    Ok(())
}

fn from_entry(number: u32, partition: &Partition) -> FoundPartition {
    let sectors = partition.last_lba.saturating_add(1).saturating_sub(partition.first_lba);
    FoundPartition {
        number,
        name: Some(partition.name.clone()),
        guid: Some(partition.part_guid.to_string()),
        kind: partition.part_type_guid.guid.to_string(),
        offset: partition.first_lba.saturating_mul(SECTOR),
        size: sectors.saturating_mul(SECTOR),
        bootable: partition.flags & PartitionAttributes::BOOTABLE.bits() != 0,
    }
}

/// Reads the copy of the GPT whose header is at this sector, and verifies both of its checksums.
fn read_copy(file: &File, sector: u64) -> Result<(Header, BTreeMap<u32, Partition>)> {
    // `gpt` reads a header from sector 1 only.
    let offset = (sector - 1) * SECTOR;
    let (size, left) = (2 * SECTOR, 64 * SECTOR);
    let mut part = Part { file: file.try_clone()?, offset, size, position: 0, left };
    let header = read_header_from_arbitrary_device(&mut part, LogicalBlockSize::Lb512)
        .map_err(|error| anyhow!("{error}"))?;
    ensure!(
        header.current_lba == sector,
        "its header contains the sector number {}",
        header.current_lba
    );
    let (count, size) = (header.num_parts, header.part_size);
    // `gpt` panics on other sizes.
    ensure!(
        size == 128 && count <= 1024,
        "invalid number or size of entries: {count} entries of {size} bytes"
    );
    // The entries have at most 128 KiB.
    let (size, left) = (u64::MAX, 1 << 20);
    let mut whole = Part { file: file.try_clone()?, offset: 0, size, position: 0, left };
    let partitions = file_read_partitions(&mut whole, &header, LogicalBlockSize::Lb512)
        .map_err(|error| anyhow!("its entries: {error}"))?;
    Ok((header, partitions))
}

fn check_mbr_against_gpt(found: &mut DiskTables) {
    for record in &found.mbr {
        if record.kind == PROTECTIVE {
            if record.first_sector != 1 {
                found.findings.push(format!(
                    "the protective record starts at sector {}, expected 1",
                    record.first_sector
                ));
            }
            continue;
        }
        let twin = found.partitions.iter().find(|p| p.number == record.slot);
        let same = twin.is_some_and(|p| {
            (p.offset, p.size) == (record.first_sector * SECTOR, record.sectors * SECTOR)
        });
        if !same {
            found.findings.push(format!(
                "slot {} of the hybrid MBR is not partition {} of the GPT",
                record.slot, record.slot
            ));
        }
    }
}

fn check_partitions(found: &mut DiskTables) {
    let mut by_offset: Vec<&FoundPartition> = found.partitions.iter().collect();
    by_offset.sort_by_key(|p| p.offset);
    let mut findings = Vec::new();
    for partition in &by_offset {
        let end = partition.offset.checked_add(partition.size);
        if partition.size == 0 || end.is_none_or(|end| end > found.size) {
            findings.push(format!(
                "partition {} ({} at {}) does not fit the image ({})",
                partition.number,
                exact_size(partition.size),
                exact_size(partition.offset),
                exact_size(found.size)
            ));
        }
    }
    for pair in by_offset.windows(2) {
        let [first, second] = pair else { continue };
        if first.offset.saturating_add(first.size) > second.offset {
            findings.push(format!(
                "partition {} ({} at {}) overlaps partition {} (starts at {})",
                first.number,
                exact_size(first.size),
                exact_size(first.offset),
                second.number,
                exact_size(second.offset)
            ));
        }
    }
    found.findings.extend(findings);
}

/// The differences between the tables of an image and the expected layout.
pub fn table_differences(found: &DiskTables, layout: &DiskLayout) -> Vec<String> {
    let mut findings = Vec::new();
    let mut compare = |what: &str, expected: String, found: String| {
        if expected != found {
            findings.push(format!("{what} is {found}, expected {expected}"));
        }
    };
    compare("the table", layout.table.name().to_owned(), found.table.name().to_owned());
    compare("the image's size", exact_size(layout.size), exact_size(found.size));
    let counts = (layout.partitions.len(), found.partitions.len());
    compare("the number of partitions", counts.0.to_string(), counts.1.to_string());
    for (wanted, found) in layout.partitions.iter().zip(&found.partitions) {
        let name = &wanted.name;
        if let Some(found) = &found.name {
            compare(
                &format!("the name of partition {}", wanted.number),
                name.clone(),
                found.clone(),
            );
        }
        compare(
            &format!("the offset of `{name}`"),
            exact_size(wanted.offset),
            exact_size(found.offset),
        );
        compare(&format!("the size of `{name}`"), exact_size(wanted.size), exact_size(found.size));
    }
    for wanted in layout.partitions.iter().filter(|p| p.in_mbr) {
        let kind = found.mbr.iter().find(|r| r.slot == wanted.number).map(|r| r.kind);
        let logical =
            found.partitions.iter().find(|p| p.number == wanted.number && p.name.is_none());
        let shown = kind.map(|kind| format!("{kind:02x}")).or(logical.map(|p| p.kind.clone()));
        let shown = shown.unwrap_or_else(|| "missing".to_owned());
        let expected = format!("{:02x}", mbr_type(wanted.filesystem, wanted.size));
        compare(&format!("the MBR type of `{}`", wanted.name), expected, shown);
    }
    findings
}

/// Reads the boot-state sectors at these byte offsets.
///
/// # Errors
/// When the image cannot be read there.
pub fn read_boot_states(image: &Utf8Path, offsets: &[u64]) -> Result<Vec<Vec<u8>>> {
    let file = File::open(image).with_context(|| format!("opening {image}"))?;
    let read = |&offset: &u64| {
        let mut sector = vec![0; SECTOR as usize];
        file.read_exact_at(&mut sector, offset)
            .with_context(|| format!("reading the boot state at {offset} of {image}"))?;
        Ok(sector)
    };
    offsets.iter().map(read).collect()
}

/// A part of a file as a read-only stream.
struct Part {
    file: File,
    offset: u64,
    size: u64,
    position: u64,
    /// How many bytes may still be read: this limit ends a circular chain of clusters.
    left: u64,
}

impl Read for Part {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.size.saturating_sub(self.position)).unwrap_or(usize::MAX);
        let count = out.len().min(left);
        let at = self.offset.checked_add(self.position).ok_or(io::ErrorKind::InvalidInput)?;
        let count = self.file.read_at(&mut out[..count], at)?;
        self.position += count as u64;
        let Some(left) = self.left.checked_sub(count as u64) else {
            return Err(io::Error::other("a chain of clusters is circular"));
        };
        self.left = left;
        Ok(count)
    }
}

impl Seek for Part {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = seek_position(to, self.size, self.position);
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

impl Write for Part {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        // fatfs requires it even for reading, and writes only when something has changed.
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn open_fat(image: &Utf8Path, offset: u64, size: u64) -> Result<fatfs::FileSystem<Part>> {
    let file = File::open(image).with_context(|| format!("opening {image}"))?;
    // The size in the table may be larger than the file.
    let size = size.min(super::ext4_read::remaining_length(image, offset)?);
    // The tables, each directory, and one file: each byte is read a few times at most.
    let left = size.saturating_mul(4).saturating_add(LARGEST_FILE);
    let part = Part { file, offset, size, position: 0, left };
    fatfs::FileSystem::new(part, fatfs::FsOptions::new())
        .with_context(|| format!("reading the FAT volume at {offset} of {image}"))
}

/// Lists the FAT volume at this place of an image.
///
/// # Errors
/// When there is none, or it is damaged.
pub fn list_fat(image: &Utf8Path, offset: u64, size: u64) -> Result<FatListing> {
    let volume = open_fat(image, offset, size)?;
    let mut entries = Vec::new();
    list_directory(&volume.root_dir(), "", &mut entries, &mut 0, 0)
        .with_context(|| format!("listing the FAT volume at {offset} of {image}"))?;
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    let stats = volume.stats().with_context(|| format!("reading {image}"))?;
    Ok(FatListing {
        label: volume.volume_label(),
        volume_id: volume.volume_id(),
        width: match volume.fat_type() {
            fatfs::FatType::Fat12 => 12,
            fatfs::FatType::Fat16 => 16,
            fatfs::FatType::Fat32 => 32,
        },
        free: u64::from(stats.free_clusters()) * u64::from(stats.cluster_size()),
        entries,
    })
}

fn list_directory(
    folder: &fatfs::Dir<'_, Part>,
    path: &str,
    entries: &mut Vec<FatEntry>,
    names: &mut usize,
    depth: usize,
) -> Result<()> {
    ensure!(depth <= DEEPEST, "directories are nested deeper than {DEEPEST}: {path}");
    for entry in folder.iter() {
        let entry = entry.with_context(|| format!("reading the directory /{path}"))?;
        let name = entry.file_name();
        if name == "." || name == ".." {
            continue;
        }
        let path = if path.is_empty() { name } else { format!("{path}/{name}") };
        *names += path.len();
        ensure!(
            entries.len() < MOST_FILES && *names <= MOST_NAMES,
            "the volume lists more than {MOST_FILES} files, or more than {MOST_NAMES} bytes of names"
        );
        entries.push(FatEntry { path: path.clone(), size: entry.len(), folder: entry.is_dir() });
        if entry.is_dir() {
            list_directory(&entry.to_dir(), &path, entries, names, depth + 1)?;
        }
    }
    Ok(())
}

/// Reads one file of the FAT volume at this place of an image.
///
/// # Errors
/// When there is no such file, or it is larger than 256 MiB.
pub fn fat_file(image: &Utf8Path, offset: u64, size: u64, path: &str) -> Result<Vec<u8>> {
    let volume = open_fat(image, offset, size)?;
    let context = || format!("reading {path} from the FAT volume at {offset} of {image}");
    let file = volume.root_dir().open_file(path).with_context(context)?;
    let mut bytes = Vec::new();
    file.take(LARGEST_FILE + 1).read_to_end(&mut bytes).with_context(context)?;
    ensure!(bytes.len() as u64 <= LARGEST_FILE, "{}: the file is larger than 256 MiB", context());
    Ok(bytes)
}
