//! The partition tables: MBR records and the hybrid table are written here, the GPT's headers,
//! entries and checksums by the `gpt` crate.

use std::collections::BTreeMap;
use std::io::{self, Read, Seek, SeekFrom, Write};

use anyhow::{Context, Result};
use gpt::disk::LogicalBlockSize;
use gpt::mbr::{PartRecord, ProtectiveMBR};
use gpt::partition::{Partition, PartitionAttributes};
use gpt::partition_types::{BASIC, LINUX_FS, LINUX_RESERVED, Type};
use uuid::Uuid;

use super::fat;
use super::layout::{
    BLOCK, DiskLayout, Filesystem, GPT_HEAD_SECTORS, PlacedPartition, SECTOR, TableKind,
};
use super::pages::SparsePages;
use super::seek_position;

/// Type of the protective MBR record (UEFI specification 2.10, table 5.4).
pub const PROTECTIVE: u8 = 0xee;
/// MBR type of an extended partition that is addressed by sector number.
pub const EXTENDED: u8 = 0x0f;
/// The types of extended partitions: by geometry, by sector number, Linux's.
pub const EXTENDED_KINDS: [u8; 3] = [0x05, EXTENDED, 0x85];
/// Offset of the first of the four records in an MBR, and of both before a logical partition.
const RECORDS: usize = 446;
/// MBR type of a Linux filesystem.
const MBR_LINUX: u8 = 0x83;
/// MBR type of bytes without a filesystem.
const MBR_RAW: u8 = 0xda;
/// MBR type of a FAT32 that is addressed by sector number; the Raspberry Pi's boot ROM supports it.
const MBR_FAT32_LBA: u8 = 0x0c;
/// MBR type of a FAT16 that is addressed by sector number; the Raspberry Pi's boot ROM supports it.
const MBR_FAT16_LBA: u8 = 0x0e;
/// The geometry that every partitioning tool assumes for disks which have none.
pub const HEADS: u32 = 255;
/// Sectors in a track of that geometry.
pub const SECTORS_PER_TRACK: u32 = 63;
/// Bytes at either end of the disk that hold tables, in whole blocks.
const END_BYTES: u64 = (GPT_HEAD_SECTORS * SECTOR).next_multiple_of(BLOCK);

/// The blocks at the start and at the end of a disk that hold its tables. They also exist for an
/// MBR: the zeros erase an old GPT on the card.
#[derive(Debug)]
pub struct TableBlocks {
    /// From the first byte of the disk.
    pub head: SparsePages,
    /// Up to the last byte of the disk.
    pub tail: SparsePages,
    size: u64,
    position: u64,
}

impl TableBlocks {
    fn blank(size: u64) -> io::Result<Self> {
        let mut tables = Self {
            head: SparsePages::new(END_BYTES),
            tail: SparsePages::new(END_BYTES),
            size,
            position: 0,
        };
        tables.head.write_at(0, &[0; END_BYTES as usize])?;
        tables.tail.write_at(0, &[0; END_BYTES as usize])?;
        Ok(tables)
    }

    /// The byte offset of the tail.
    pub fn tail_offset(&self) -> u64 {
        self.size - END_BYTES
    }

    /// The end of the disk with the current position, moved to the position.
    fn end(&mut self) -> io::Result<&mut SparsePages> {
        let tail = self.tail_offset();
        let (pages, offset) = match self.position {
            p if p < END_BYTES => (&mut self.head, p),
            p if p >= tail => (&mut self.tail, p - tail),
            p => return Err(io::Error::other(format!("a table at byte {p} of the disk"))),
        };
        pages.seek(SeekFrom::Start(offset))?;
        Ok(pages)
    }
}

impl Read for TableBlocks {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let count = self.end()?.read(out)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Write for TableBlocks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.end()?.write(bytes)?;
        self.position += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for TableBlocks {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.position = seek_position(to, self.size, self.position).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "seeking before the disk")
        })?;
        Ok(self.position)
    }
}

/// Writes the tables of a disk. `guids` are those of the partitions, in the layout's order.
///
/// # Errors
/// When the disk is too small for its tables.
pub fn make_tables(
    layout: &DiskLayout,
    disk_guid: Uuid,
    signature: u32,
    guids: &[Uuid],
) -> Result<TableBlocks> {
    let mut tables = TableBlocks::blank(layout.size).context("making the partition table")?;
    let mut mbr = ProtectiveMBR::with_lb_size(0);
    mbr.set_disk_signature(signature.to_le_bytes());
    for (slot, record) in mbr_records(layout).into_iter().enumerate() {
        mbr.set_partition(slot, record);
    }
    mbr.overwrite_lba0(&mut tables).context("making the MBR")?;
    if !layout.table.has_gpt() {
        return Ok(tables);
    }
    let mut disk = gpt::GptConfig::new()
        .writable(true)
        .logical_block_size(LogicalBlockSize::Lb512)
        .create_from_device(tables, Some(disk_guid))
        .context("making the GPT")?;
    let entries: BTreeMap<u32, Partition> = layout
        .partitions
        .iter()
        .zip(guids)
        .map(|(placed, &guid)| (placed.number, gpt_entry(placed, guid)))
        .collect();
    disk.update_partitions(entries).context("making the GPT")?;
    disk.write().context("making the GPT")
}

fn gpt_entry(placed: &PlacedPartition, guid: Uuid) -> Partition {
    let flags = if placed.bootable { PartitionAttributes::BOOTABLE.bits() } else { 0 };
    Partition {
        part_type_guid: gpt_type(placed.filesystem),
        part_guid: guid,
        first_lba: placed.first_sector,
        last_lba: placed.first_sector + placed.sectors - 1,
        flags,
        name: placed.name.clone(),
    }
}

/// A FAT is "basic data", not an EFI system partition: systemd would mount the latter
/// automatically.
fn gpt_type(filesystem: Filesystem) -> Type {
    match filesystem {
        Filesystem::Vfat => BASIC,
        Filesystem::Ext4 => LINUX_FS,
        Filesystem::Raw => LINUX_RESERVED,
    }
}

/// The MBR type of a partition.
pub fn mbr_type(filesystem: Filesystem, size: u64) -> u8 {
    match filesystem {
        Filesystem::Vfat if fat::is_fat32(size) => MBR_FAT32_LBA,
        Filesystem::Vfat => MBR_FAT16_LBA,
        Filesystem::Ext4 => MBR_LINUX,
        Filesystem::Raw => MBR_RAW,
    }
}

/// The four records of the MBR. In a hybrid table each partition keeps its number, and the
/// protective record, which GPT readers look for in every slot, is in the last free slot. It covers
/// the space before the first listed partition, so that no two records overlap.
fn mbr_records(layout: &DiskLayout) -> [PartRecord; 4] {
    let mut records = [PartRecord::zero(); 4];
    let listed = || layout.partitions.iter().filter(|p| p.in_mbr);
    if let Some((first, size)) = layout.extended() {
        records[3] = record_for(EXTENDED, first / SECTOR, size / SECTOR, false);
    }
    for placed in listed() {
        if let Some(record) = records.get_mut(placed.number as usize - 1) {
            let kind = mbr_type(placed.filesystem, placed.size);
            *record = record_for(kind, placed.first_sector, placed.sectors, placed.bootable);
        }
    }
    if layout.table == TableKind::Mbr {
        return records;
    }
    let disk_sectors = layout.size / SECTOR;
    let end = listed().map(|p| p.first_sector).min().unwrap_or(disk_sectors);
    if let Some(free) = records.iter_mut().rev().find(|r| r.os_type == 0) {
        *free = record_for(PROTECTIVE, 1, end - 1, false);
    }
    if layout.table == TableKind::Gpt {
        // Without a hybrid it is where the specification requires it.
        records.swap(0, 3);
    }
    records
}

/// The sectors before logical partitions, by byte offset: the partition's own record, counted from
/// this sector, and that of the next such sector, counted from the first. Each with zeros to the
/// end of its block.
///
/// # Errors
/// None in practice: they are written in memory.
pub fn logical_sectors(layout: &DiskLayout) -> Result<Vec<(u64, SparsePages)>> {
    let Some((first, _)) = layout.extended() else { return Ok(Vec::new()) };
    let all: Vec<&PlacedPartition> =
        layout.partitions.iter().filter(|p| p.record.is_some()).collect();
    let mut made = Vec::new();
    for (index, placed) in all.iter().enumerate() {
        let at = placed.begin();
        let kind = mbr_type(placed.filesystem, placed.size);
        let own = record_for(kind, placed.first_sector, placed.sectors, placed.bootable);
        let mut records = vec![bytes_of(&own, (placed.offset - at) / SECTOR)];
        if let Some(next) = all.get(index + 1) {
            let (begin, end) = (next.begin() / SECTOR, next.end() / SECTOR);
            let link = record_for(EXTENDED_KINDS[0], begin, end - begin, false);
            records.push(bytes_of(&link, begin - first / SECTOR));
        }
        let mut pages = SparsePages::new(BLOCK);
        pages.write_at(0, &[0; BLOCK as usize])?;
        pages.write_at(RECORDS as u64, &records.concat())?;
        pages.write_at(SECTOR - 2, &[0x55, 0xaa])?;
        made.push((at, pages));
    }
    Ok(made)
}

/// A record in its stored form, with another first sector.
fn bytes_of(record: &PartRecord, first: u64) -> Vec<u8> {
    let mut bytes = vec![
        record.boot_indicator,
        record.start_head,
        record.start_sector,
        record.start_track,
        record.os_type,
        record.end_head,
        record.end_sector,
        record.end_track,
    ];
    bytes.extend(u32::try_from(first).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend(record.lb_size.to_le_bytes());
    bytes
}

fn record_for(kind: u8, first: u64, sectors: u64, active: bool) -> PartRecord {
    let (start_head, start_sector, start_track) = chs_address(first);
    let (end_head, end_sector, end_track) = chs_address(first + sectors - 1);
    PartRecord {
        boot_indicator: if active { 0x80 } else { 0 },
        start_head,
        start_sector,
        start_track,
        os_type: kind,
        end_head,
        end_sector,
        end_track,
        lb_start: u32::try_from(first).unwrap_or(u32::MAX),
        lb_size: u32::try_from(sectors).unwrap_or(u32::MAX),
    }
}

/// Head, sector with the cylinder's upper bits, cylinder; the largest values where it cannot be
/// expressed.
fn chs_address(sector: u64) -> (u8, u8, u8) {
    let track = u64::from(SECTORS_PER_TRACK);
    let cylinder = sector / (track * u64::from(HEADS));
    if cylinder > 1023 {
        return (0xfe, 0xff, 0xff);
    }
    let head = sector / track % u64::from(HEADS);
    let within = sector % track + 1;
    (head as u8, within as u8 | (cylinder >> 8 << 6) as u8, (cylinder & 0xff) as u8)
}
