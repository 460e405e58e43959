//! Extends `data` over the rest of the card: the image is as small as possible, cards are larger.
//!
//! Only the table is changed here; the file system is grown later, while it is mounted (`resize2fs`). After a
//! power cut at any moment there is a valid table: an MBR is one sector; a logical partition has its record in
//! its own sector, which is changed after the extended partition around it; and a GPT's new backup is complete at
//! the end of the card before the primary is changed, in one write of one block.

use std::io;

use crate::storage::Storage;

/// Bytes of a sector.
const SECTOR: u64 = 512;

/// Alignment of a grown partition's start and end, in sectors: 1 MiB, as in the builder.
const ALIGNMENT: u64 = 2048;

/// Growing by less than this (16 MiB, in sectors) is not worth a write.
const WORTH: u64 = 32_768;

/// The number of the first logical partition, independent of the number of MBR records in use.
const FIRST_LOGICAL: u32 = 5;

/// MBR types of extended partitions: by geometry, by sector number, Linux's.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// UEFI specification 2.10, table 5.5: length of a GPT header.
const HEADER: usize = 92;

/// Maximum bytes of entries that are supported: 128 entries of 128 bytes, as all tools create them.
const MOST_ENTRIES: u64 = 128 * 128;

/// The result of growing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GrowOutcome {
    /// Sectors before.
    pub from: u64,
    /// Sectors now; the same if there was nothing to gain.
    pub to: u64,
}

/// Extends partition `number`, which must be the last on the disk, to the disk's end. `start` is where it
/// begins, in sectors. Calling it again does nothing.
///
/// # Errors
/// When the disk fails, or its table was not made by the builder. Nothing is written then.
pub fn grow(disk: &dyn Storage, number: u32, start: u64) -> io::Result<GrowOutcome> {
    let mut mbr = [0; SECTOR as usize];
    disk.read_at(0, &mut mbr)?;
    if mbr.get(510..) != Some(&[0x55, 0xaa]) {
        return Err(wrong_table("there is no MBR"));
    }
    let records: Vec<Record> = (0..4).map(|index| Record::read(&mbr, index)).collect();
    if records.iter().any(|record| record.kind == 0xee) {
        grow_gpt(disk, &mut mbr, &records, number, start)
    } else if number >= FIRST_LOGICAL {
        grow_logical(disk, &mut mbr, &records, number, start)
    } else {
        grow_mbr(disk, &mut mbr, &records, number, start)
    }
}

/// A record of the MBR.
#[derive(Debug, Clone, Copy)]
struct Record {
    at: usize,
    kind: u8,
    first: u64,
    sectors: u64,
}

impl Record {
    fn read(mbr: &[u8], index: usize) -> Self {
        let at = 446 + index * 16;
        let kind = mbr.get(at + 4).copied().unwrap_or(0);
        Self { at, kind, first: read_u32(mbr, at + 8), sectors: read_u32(mbr, at + 12) }
    }

    /// Writes another length into the sector that the record is in.
    fn set_sectors(self, sector: &mut [u8], sectors: u64) {
        // Cylinder, head and sector: the maximum, which means that they do not apply.
        set_bytes(sector, self.at + 5, &[0xfe, 0xff, 0xff]);
        set_bytes(sector, self.at + 12, &u32::try_from(sectors).unwrap_or(u32::MAX).to_le_bytes());
    }
}

fn grow_mbr(
    disk: &dyn Storage,
    mbr: &mut [u8],
    records: &[Record],
    number: u32,
    start: u64,
) -> io::Result<GrowOutcome> {
    let index = number.checked_sub(1).map_or(usize::MAX, |index| index as usize);
    let record = *records.get(index).ok_or_else(|| wrong_table("no such partition"))?;
    if record.kind == 0 || record.first != start {
        return Err(wrong_table("the partition does not start where device.toml says"));
    }
    if records.iter().any(|other| other.kind != 0 && other.first > start) {
        return Err(wrong_table("another partition follows it"));
    }
    // A 32-bit number of sectors.
    let end = (disk.size() / SECTOR).min(start + u64::from(u32::MAX));
    let Some(to) = growable_sectors(start, record.sectors, end) else {
        return Ok(GrowOutcome { from: record.sectors, to: record.sectors });
    };
    record.set_sectors(mbr, to);
    write(disk, 0, mbr)?;
    Ok(GrowOutcome { from: record.sectors, to })
}

/// Grows a logical partition. Before each one there is a sector with its record, relative to that sector, and a link
/// to the next such sector, relative to the extended partition's start.
fn grow_logical(
    disk: &dyn Storage,
    mbr: &mut [u8],
    records: &[Record],
    number: u32,
    start: u64,
) -> io::Result<GrowOutcome> {
    let extended = records.iter().find(|record| EXTENDED.contains(&record.kind));
    let extended = *extended.ok_or_else(|| wrong_table("there is no extended partition"))?;
    if records.iter().any(|other| other.kind != 0 && other.first > extended.first) {
        return Err(wrong_table("another partition follows the extended one"));
    }
    let mut sector = [0; SECTOR as usize];
    let mut at = extended.first;
    for _ in FIRST_LOGICAL..=number {
        disk.read_at(at.saturating_mul(SECTOR), &mut sector)?;
        if sector.get(510..) != Some(&[0x55, 0xaa]) {
            return Err(wrong_table("the chain of logical partitions is damaged"));
        }
        let link = Record::read(&sector, 1);
        let own = Record::read(&sector, 0);
        let last = !EXTENDED.contains(&link.kind);
        if at.saturating_add(own.first) == start && own.kind != 0 && last {
            return grow_last_logical(disk, mbr, extended, &mut sector, at, own);
        }
        if last {
            break;
        }
        // Forwards only: this ends a circular chain.
        let next = extended.first.saturating_add(link.first);
        if next <= at {
            return Err(wrong_table("the chain of logical partitions is damaged"));
        }
        at = next;
    }
    Err(wrong_table(
        "the partition does not start where device.toml says, or another partition follows it",
    ))
}

/// `sector` is the content of sector `at` before the last logical partition, and `own` the partition's record in it.
fn grow_last_logical(
    disk: &dyn Storage,
    mbr: &mut [u8],
    extended: Record,
    sector: &mut [u8],
    at: u64,
    own: Record,
) -> io::Result<GrowOutcome> {
    let start = at.saturating_add(own.first);
    // Both counts are 32 bits long.
    let most = extended.first.min(start).saturating_add(u64::from(u32::MAX));
    let end = (disk.size() / SECTOR).min(most);
    let Some(to) = growable_sectors(start, own.sectors, end) else {
        return Ok(GrowOutcome { from: own.sectors, to: own.sectors });
    };
    // The extended partition first: its size does not affect the partitions in it.
    let around = start.saturating_add(to).saturating_sub(extended.first);
    if around > extended.sectors {
        extended.set_sectors(mbr, around);
        write(disk, 0, mbr)?;
    }
    own.set_sectors(sector, to);
    write(disk, at.saturating_mul(SECTOR), sector)?;
    Ok(GrowOutcome { from: own.sectors, to })
}

fn grow_gpt(
    disk: &dyn Storage,
    mbr: &mut [u8],
    records: &[Record],
    number: u32,
    start: u64,
) -> io::Result<GrowOutcome> {
    let sectors = disk.size() / SECTOR;
    let last = sectors.checked_sub(1).ok_or_else(|| wrong_table("the disk is empty"))?;
    // The primary; or, after an interrupted write of it, the backup that was written before.
    let (mut header, mut entries) = read_gpt(disk, 1).or_else(|_| read_gpt(disk, last))?;
    let (count, size) = (read_u32(&header, 80), read_u32(&header, 84));
    let index = u64::from(number.wrapping_sub(1));
    if index >= count || read_u64(&entries, (index * size) as usize + 32) != start {
        return Err(wrong_table("the partition does not start where device.toml says"));
    }
    let behind = (0..count).any(|other| {
        let at = (other * size) as usize;
        entries.get(at..at + 16).is_some_and(|kind| kind.iter().any(|byte| *byte != 0))
            && read_u64(&entries, at + 32) > start
    });
    if behind {
        return Err(wrong_table("another partition follows it"));
    }
    let at = (index * size) as usize + 40;
    let from = (read_u64(&entries, at) + 1).saturating_sub(start);
    let table = (entries.len() as u64).div_ceil(SECTOR);
    // Space for the backup: its entries, then its header in the last sector.
    let end = last.saturating_sub(table);
    let to = growable_sectors(start, from, end);
    let moved = read_u64(&header, 32) != last || read_u64(&header, 24) != 1;
    let (same, valid) = (read_gpt(disk, last), read_gpt(disk, 1).is_ok());
    if to.is_none() && !moved && valid && same.is_ok_and(|(_, backup)| backup == entries) {
        return Ok(GrowOutcome { from, to: from });
    }
    let to = to.unwrap_or(from);
    set_bytes(&mut entries, at, &(start + to - 1).to_le_bytes());
    set_bytes(&mut header, 48, &(end - 1).to_le_bytes());
    set_bytes(&mut header, 88, &crc32fast::hash(&entries).to_le_bytes());

    let backup = seal_header(&header, last, 1, end);
    write(disk, end * SECTOR, &entries)?;
    write(disk, last * SECTOR, &backup)?;

    // One write from the MBR to the last entry: the sectors that differ are in the first block.
    let primary = seal_header(&header, 1, last, 2);
    if let Some(record) = records.iter().find(|record| record.kind == 0xee && record.first == 1) {
        // Only a plain protective record covers the disk; in a hybrid MBR it ends before the first partition.
        if records.iter().filter(|other| other.kind != 0).count() == 1 {
            let covered = u32::try_from(last).unwrap_or(u32::MAX);
            set_bytes(mbr, record.at + 12, &covered.to_le_bytes());
        }
    }
    write(disk, 0, &[&*mbr, &primary, &entries].concat())?;
    Ok(GrowOutcome { from, to })
}

/// The header in a sector and its entries, if both checksums are correct.
fn read_gpt(disk: &dyn Storage, sector: u64) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let mut header = vec![0; SECTOR as usize];
    disk.read_at(sector * SECTOR, &mut header)?;
    let checksum = read_u32(&header, 16);
    let mut unsealed = header.clone();
    set_bytes(&mut unsealed, 16, &[0; 4]);
    let covered = unsealed.get(..HEADER).unwrap_or_default();
    let fits = u64::from(crc32fast::hash(covered)) == checksum;
    if !header.starts_with(b"EFI PART") || read_u32(&header, 12) != HEADER as u64 || !fits {
        return Err(wrong_table("the GPT's header is damaged"));
    }
    if read_u64(&header, 24) != sector {
        return Err(wrong_table("the GPT's header belongs to another sector"));
    }
    let length = read_u32(&header, 80) * read_u32(&header, 84);
    if read_u32(&header, 84) != 128 || length > MOST_ENTRIES || !length.is_multiple_of(SECTOR) {
        return Err(wrong_table("the GPT has an unsupported layout"));
    }
    let mut entries = vec![0; length as usize];
    disk.read_at(read_u64(&header, 72).saturating_mul(SECTOR), &mut entries)?;
    if u64::from(crc32fast::hash(&entries)) != read_u32(&header, 88) {
        return Err(wrong_table("the GPT's entries are damaged"));
    }
    Ok((header, entries))
}

/// The header for one of its two positions, with its checksum.
fn seal_header(header: &[u8], own: u64, other: u64, entries: u64) -> Vec<u8> {
    let mut header = header.to_vec();
    set_bytes(&mut header, 16, &[0; 4]);
    set_bytes(&mut header, 24, &own.to_le_bytes());
    set_bytes(&mut header, 32, &other.to_le_bytes());
    set_bytes(&mut header, 72, &entries.to_le_bytes());
    let checksum = crc32fast::hash(header.get(..HEADER).unwrap_or_default());
    set_bytes(&mut header, 16, &checksum.to_le_bytes());
    header
}

/// How many sectors the partition may have, if growing is worth a write. `end` is the first sector that it may not use.
fn growable_sectors(start: u64, sectors: u64, end: u64) -> Option<u64> {
    let to = (end / ALIGNMENT * ALIGNMENT).checked_sub(start)?;
    (to >= sectors.saturating_add(WORTH)).then_some(to)
}

/// Writes durably, and reads the bytes back from the disk itself.
fn write(disk: &dyn Storage, offset: u64, bytes: &[u8]) -> io::Result<()> {
    disk.write_at(offset, bytes)?;
    disk.flush()?;
    let mut found = vec![0; bytes.len()];
    disk.read_back(offset, &mut found)?;
    if found == bytes {
        Ok(())
    } else {
        Err(wrong_table("the table differs from what was written"))
    }
}

fn wrong_table(why: &str) -> io::Error {
    io::Error::other(format!("partition table: {why}"))
}

fn set_bytes(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes.iter_mut().skip(at).zip(value).for_each(|(to, from)| *to = *from);
}

fn read_u32(bytes: &[u8], at: usize) -> u64 {
    let part = bytes.get(at..at + 4).unwrap_or_default();
    part.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn read_u64(bytes: &[u8], at: usize) -> u64 {
    read_u32(bytes, at) | read_u32(bytes, at + 4) << 32
}
