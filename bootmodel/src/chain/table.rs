//! Stage 1, the partition table: where each partition is, and whether the firmware reads this kind of table.
//!
//! Sources: UEFI specification 2.10, 5.2 and 5.3; the hybrid table: raspberrypi/firmware#1465 ("has never been
//! supported"), #1457, #1628; moved entries: raspberrypi/rpi-eeprom#585, home-assistant/operating-system#3437; FAT:
//! raspberrypi/firmware#1738, raspberrypi/rpi-eeprom#818 (the firmware tells a FAT's kind by its number of clusters).

use super::card::{FatVolume, GptLayout, MbrEntry};
use super::{CardLocation, Run};
use crate::firmware::{ReadOnlyDisk, TablePartition};

const SECTOR: u64 = 512;
/// Types of extended partitions.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// Partition types of FAT volumes, with the FAT width of each.
const FAT_TYPES: [(u8, u32); 6] =
    [(0x01, 12), (0x04, 16), (0x06, 16), (0x0e, 16), (0x0b, 32), (0x0c, 32)];
/// Maximum number of logical partitions; this ends a circular chain.
const MOST_LOGICAL: u32 = 60;

fn u32_at(bytes: &[u8], at: usize) -> u64 {
    let four = bytes.get(at..at + 4).and_then(|four| four.try_into().ok());
    u64::from(u32::from_le_bytes(four.unwrap_or_default()))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u32_at(bytes, at) | u32_at(bytes, at + 4) << 32
}

fn read_sector(disk: &dyn ReadOnlyDisk, number: u64) -> Result<[u8; 512], String> {
    let mut bytes = [0; 512];
    let read = disk.read_at(number.saturating_mul(SECTOR), &mut bytes);
    read.map_err(|error| format!("sector {number} cannot be read: {error}"))?;
    Ok(bytes)
}

/// Number, type, first sector and sector count of each used record in a sector.
fn records_of(bytes: &[u8; 512]) -> Vec<(u32, u8, u64, u64)> {
    let records = (1..).zip(bytes[446..510].chunks(16));
    let records = records.map(|(n, r)| (n, r[4], u32_at(r, 8), u32_at(r, 12)));
    records.filter(|(_, kind, _, count)| *kind != 0 && *count != 0).collect()
}

/// The MBR's records, the GPT, and the partitions of the table that applies.
pub(crate) type PartitionTables = (Vec<MbrEntry>, Option<GptLayout>, Vec<TablePartition>);

/// Reads both tables.
///
/// # Errors
/// When the card has no MBR, or ends before its tables.
pub(crate) fn read_partitions(disk: &dyn ReadOnlyDisk) -> Result<PartitionTables, String> {
    let mbr = read_sector(disk, 0)?;
    if mbr[510..] != [0x55, 0xaa] {
        return Err("the disk has no MBR".to_owned());
    }
    let mut records = Vec::new();
    for (number, kind, first, count) in records_of(&mbr) {
        let (offset, size) = (first * SECTOR, count * SECTOR);
        records.push(MbrEntry { number, kind, offset, size });
        if !EXTENDED.contains(&kind) {
            continue;
        }
        // Each logical partition has a table of its own: itself, relative to that table, and the next
        // table, relative to the extended partition.
        let mut at = first;
        for number in 5..5 + MOST_LOGICAL {
            let table = read_sector(disk, at)?;
            let mut next = None;
            for (_, kind, start, count) in records_of(&table) {
                if EXTENDED.contains(&kind) {
                    next = Some(first + start);
                } else {
                    let (offset, size) = ((at + start) * SECTOR, count * SECTOR);
                    records.push(MbrEntry { number, kind, offset, size });
                }
            }
            let Some(next) = next else { break };
            at = next;
        }
    }
    if !records.iter().any(|record| record.kind == 0xee) {
        let data = records.iter().filter(|record| !EXTENDED.contains(&record.kind));
        let partition = |r: &MbrEntry| TablePartition {
            number: r.number,
            name: String::new(),
            offset: r.offset,
            size: r.size,
        };
        let partitions = data.map(partition).collect();
        return Ok((records, None, partitions));
    }
    let header = read_sector(disk, 1)?;
    if !header.starts_with(b"EFI PART") {
        return Err("the MBR announces a GPT, but there is none".to_owned());
    }
    let (entries, count, size) = (u64_at(&header, 72), u32_at(&header, 80), u32_at(&header, 84));
    let gpt = GptLayout { first_usable: u64_at(&header, 40), entries };
    let mut partitions = Vec::new();
    for index in 0..count.min(128) {
        let mut entry = [0; 128];
        disk.read_at(entries.saturating_mul(SECTOR).saturating_add(index * size), &mut entry)
            .map_err(|error| format!("reading the GPT: {error}"))?;
        let (first, end) = (u64_at(&entry, 32), u64_at(&entry, 40));
        if entry[..16] == [0; 16] || end < first {
            continue;
        }
        let name: Vec<u16> = entry[56..128]
            .chunks_exact(2)
            .map(|two| u16::from_le_bytes([two[0], two[1]]))
            .take_while(|unit| *unit != 0)
            .collect();
        let (offset, size) =
            (first.saturating_mul(SECTOR), (end - first + 1).saturating_mul(SECTOR));
        let (number, name) = (index as u32 + 1, String::from_utf16_lossy(&name));
        partitions.push(TablePartition { number, name, offset, size });
    }
    Ok((records, Some(gpt), partitions))
}

/// Whether a record is of a FAT volume.
pub(crate) fn is_fat(kind: u8) -> bool {
    FAT_TYPES.iter().any(|(known, _)| *known == kind)
}

/// Checks that this board's firmware reads the table and the volumes that it uses.
pub(super) fn check(run: &mut Run<'_>, read: &[&FatVolume]) {
    let table = run.card.table();
    if !run.soc.table.iter().any(|known| known == table) {
        run.stop(
            "table-kind",
            CardLocation::card(),
            format!(
                "the firmware of the {} does not read a partition table of the kind `{table}`",
                run.soc.name
            ),
            format!("set `disk.table` in board.toml to one of {}", run.soc.table.join(", ")),
        );
    }
    if let Some(gpt) = run.card.gpt
        && (gpt.first_usable, gpt.entries) != (34, 2)
    {
        run.stop(
            "gpt-moved",
            CardLocation::card(),
            format!(
                "the GPT's entries are at sector {} and its first usable sector is {}: EEPROMs before October 2024 expect the entries at sector 2, and other tools move them unless the first usable sector is 34",
                gpt.entries, gpt.first_usable
            ),
            "create the GPT with its entries at sector 2 and sector 34 as the first usable one".to_owned(),
        );
    }
    for (place, volume) in (0..).zip(read) {
        check_volume(run, volume, place == 0);
    }
}

fn check_volume(run: &mut Run<'_>, volume: &FatVolume, first: bool) {
    let width = volume.width();
    let place = || CardLocation::partition(volume.number);
    if let Some(reason) = &volume.unread {
        run.stop(
            "fat-unreadable",
            place(),
            format!("the files of this volume cannot be read: {reason}"),
            "build the image again".to_owned(),
        );
        return;
    }
    if !volume.left_out.is_empty() {
        let some: Vec<&String> = volume.left_out.iter().take(5).collect();
        run.degrade(
            "fat-large",
            place(),
            format!(
                "{} files are too large to be checked, such as {some:?}",
                volume.left_out.len()
            ),
            "do not put large files on the partition that a board starts from".to_owned(),
        );
    }
    if volume.sector != SECTOR {
        run.stop(
            "fat-sector",
            place(),
            format!(
                "the volume's sectors have {} bytes, but the card's have {SECTOR}",
                volume.sector
            ),
            "use a FAT with sectors of 512 bytes".to_owned(),
        );
    }
    let stated: u32 = volume.says.trim_start_matches("FAT").parse().unwrap_or(0);
    if stated != 0 && stated != width {
        run.stop(
            "fat-width",
            place(),
            format!(
                "the volume was formatted as FAT{stated}, but has {} clusters, so that the firmware reads it as FAT{width}",
                volume.clusters
            ),
            "choose a cluster size that gives a FAT16 4,085 to 65,524 clusters, or a FAT32 more".to_owned(),
        );
    }
    if let Some(kind) = volume.kind {
        let stands = FAT_TYPES.iter().find(|(known, _)| *known == kind).map(|(_, width)| *width);
        if stands != Some(width) {
            run.stop(
                "fat-type",
                place(),
                format!(
                    "the partition's type in the MBR is {kind:02x}, but the volume is a FAT{width}"
                ),
                "use type 0e for a FAT16, 0c for a FAT32".to_owned(),
            );
        }
    }
    if first && !run.soc.fat_widths.contains(&width) {
        run.degrade(
            "fat-kind",
            place(),
            format!(
                "the volume is a FAT{width}; not every boot ROM of the {} reads one",
                run.soc.name
            ),
            format!("use a FAT with one of the widths {:?}", run.soc.fat_widths),
        );
    }
    if first && !run.soc.cluster_sectors.contains(&volume.cluster_sectors) {
        run.degrade(
            "fat-clusters",
            place(),
            format!(
                "the volume's clusters have {} sectors; not every boot ROM of the {} reads such a FAT",
                volume.cluster_sectors, run.soc.name
            ),
            format!("use a cluster size from {:?} (sectors)", run.soc.cluster_sectors),
        );
    }
}
