//! Computes where everything is on the card: turns a requested disk into a placed layout, or into
//! the list of all errors in it. Pure: accesses no files and does not depend on the host.

use serde::{Deserialize, Serialize};

/// Bytes in a sector. Cards and emulated disks always use this size.
pub const SECTOR: u64 = 512;
/// Bytes in a block of the block map; partitions start and end on one.
pub const BLOCK: u64 = 4096;
/// Sectors of a GPT at the start of a disk: protective MBR, header, 128 entries of 128 bytes (UEFI
/// specification 2.10, section 5.3).
pub const GPT_HEAD_SECTORS: u64 = 34;
/// Sectors of the backup GPT at the end of a disk: 128 entries of 128 bytes, header.
pub const GPT_TAIL_SECTORS: u64 = 33;
/// The smallest FAT that we make: below it a volume has fewer than 4085 clusters and would be FAT12.
pub const SMALLEST_VFAT: u64 = 4 << 20;
/// The limit of a 32-bit sector number of an MBR with 512-byte sectors: 2 TiB.
const MBR_LIMIT: u64 = (1 << 32) * SECTOR;
/// UTF-16 units in the name of a GPT entry.
const GPT_NAME_UNITS: usize = 36;
/// Slots in an MBR.
const MBR_SLOTS: usize = 4;
/// The maximum number of partitions of an MBR: SD cards have 16 minor numbers on many kernels, two
/// of which are used by the disk and the extended partition (`CONFIG_MMC_BLOCK_MINORS`).
const MOST_MBR: usize = 14;
/// The number of the first logical partition, independent of the used slots of the MBR (Linux,
/// `block/partitions/msdos.c`).
pub const FIRST_LOGICAL: u32 = 5;

/// Which partition table a board's firmware reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TableKind {
    /// The classic table: four records, 32-bit sector numbers. With more than four partitions,
    /// those from the fourth on are in an extended partition, each after a sector with its own
    /// record.
    Mbr,
    /// GUID partition table with a protective MBR and a backup at the end of the disk.
    Gpt,
    /// GPT whose MBR also lists up to three of the partitions, for firmware that reads only an MBR.
    Hybrid,
}

impl TableKind {
    /// The name in `board.toml`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mbr => "mbr",
            Self::Gpt => "gpt",
            Self::Hybrid => "hybrid",
        }
    }

    /// Whether there is a GPT.
    pub fn has_gpt(self) -> bool {
        !matches!(self, Self::Mbr)
    }
}

/// What a partition is formatted with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Filesystem {
    /// FAT16 below 40 MiB, FAT32 from there on.
    Vfat,
    /// ext4.
    Ext4,
    /// No filesystem: bytes.
    Raw,
}

/// One partition, as a board asks for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartitionRequest {
    /// The role's name (`boot`, `root-a`, …); the name of the GPT entry.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Byte offset, when the board fixes it; else the next aligned offset.
    pub start: Option<u64>,
    /// What it is formatted with.
    pub filesystem: Filesystem,
    /// The active flag of an MBR entry, the legacy-bootable attribute of a GPT entry.
    pub bootable: bool,
    /// Also listed in the MBR of a hybrid table; without meaning for the other tables.
    pub in_mbr: bool,
}

/// A whole disk, as a board asks for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRequest {
    /// The kind of the partition table.
    pub table: TableKind,
    /// Bytes of the whole disk.
    pub size: u64,
    /// Byte offset of the first partition; the space before it is for the table and the boot state.
    pub first_partition: u64,
    /// Every partition starts at a multiple of this many bytes; itself a multiple of 4 KiB.
    pub alignment: u64,
    /// Byte offset of each copy of the boot state: one sector, in a separate 4 KiB block.
    pub states: Vec<u64>,
    /// Byte offset of each copy of the trust record, [`bundle::area::COPY`] bytes each; none or
    /// two.
    pub trust: Vec<u64>,
    /// In their order on the disk, which is also that of their numbers.
    pub partitions: Vec<PartitionRequest>,
}

/// A partition with its offset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacedPartition {
    /// The number in the table, from 1.
    pub number: u32,
    /// The role's name.
    pub name: String,
    /// Byte offset.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// Offset in sectors.
    pub first_sector: u64,
    /// Size in sectors.
    pub sectors: u64,
    /// What it is formatted with.
    pub filesystem: Filesystem,
    /// The active flag or the legacy-bootable attribute.
    pub bootable: bool,
    /// Listed in the MBR: always with an MBR table, by choice with a hybrid one, never with a GPT.
    pub in_mbr: bool,
    /// Byte offset of the sector with its record, for a logical partition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record: Option<u64>,
}

impl PlacedPartition {
    /// The first byte after the partition.
    pub fn end(&self) -> u64 {
        self.offset + self.size
    }

    /// The first byte that it occupies: its record, or its own first byte.
    pub fn begin(&self) -> u64 {
        self.record.unwrap_or(self.offset)
    }
}

/// One copy of the boot state or of the trust record, with its offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateSector {
    /// Byte offset.
    pub offset: u64,
    /// The same in sectors, as boot loaders need it.
    pub sector: u64,
}

/// A disk with all offsets assigned; it has passed every check of [`lay_out_disk`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskLayout {
    /// The kind of the partition table.
    pub table: TableKind,
    /// Bytes of the whole disk.
    pub size: u64,
    /// Bytes in a sector.
    pub sector_size: u64,
    /// The copies of the boot state.
    pub states: Vec<StateSector>,
    /// The copies of the trust record.
    pub trust: Vec<StateSector>,
    /// The partitions, by offset and by number.
    pub partitions: Vec<PlacedPartition>,
}

impl DiskLayout {
    /// The partition with this name.
    pub fn partition(&self, name: &str) -> Option<&PlacedPartition> {
        self.partitions.iter().find(|p| p.name == name)
    }

    /// The extended partition of an MBR with more than four partitions: from the first record to the last byte.
    pub fn extended(&self) -> Option<(u64, u64)> {
        let first = self.partitions.iter().find_map(|p| p.record)?;
        Some((first, self.partitions.last()?.end() - first))
    }
}

/// A size for messages: exact, in the largest unit that divides it.
pub fn exact_size(bytes: u64) -> String {
    let units = [(1u64 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(unit, _)| bytes > 0 && bytes.is_multiple_of(*unit)) {
        Some((unit, name)) => format!("{} {name}", bytes / unit),
        None => format!("{bytes} B"),
    }
}

/// Assigns an offset to every partition.
///
/// # Errors
/// All errors, one sentence for each, in the order of the request.
pub fn lay_out_disk(request: &DiskRequest) -> Result<DiskLayout, Vec<String>> {
    let mut findings = Vec::new();
    if request.alignment == 0 || !request.alignment.is_multiple_of(BLOCK) {
        findings.push(format!(
            "the alignment is {}, it must be a multiple of 4 KiB",
            exact_size(request.alignment)
        ));
        // All later rules depend on it.
        return Err(findings);
    }
    if !request.size.is_multiple_of(BLOCK) {
        findings.push(format!(
            "the disk is {}, it must be a multiple of 4 KiB",
            exact_size(request.size)
        ));
    }
    let partitions = place_partitions(request, &mut findings);
    check_names(request, &mut findings);
    check_table(request, &partitions, &mut findings);
    check_ends(request, &partitions, &mut findings);
    check_states(request, &partitions, &mut findings);
    if !findings.is_empty() {
        return Err(findings);
    }
    let sectors = |offsets: &[u64]| {
        offsets.iter().map(|&offset| StateSector { offset, sector: offset / SECTOR }).collect()
    };
    let (states, trust) = (sectors(&request.states), sectors(&request.trust));
    let (table, size) = (request.table, request.size);
    Ok(DiskLayout { table, size, sector_size: SECTOR, states, trust, partitions })
}

/// Bytes at the start of the disk that the table needs.
fn table_head(table: TableKind) -> u64 {
    if table.has_gpt() { GPT_HEAD_SECTORS * SECTOR } else { SECTOR }
}

/// Bytes at the end of the disk that the table needs.
fn table_tail(table: TableKind) -> u64 {
    if table.has_gpt() { GPT_TAIL_SECTORS * SECTOR } else { 0 }
}

fn place_partitions(request: &DiskRequest, findings: &mut Vec<String>) -> Vec<PlacedPartition> {
    let mut placed: Vec<PlacedPartition> = Vec::new();
    if request.partitions.is_empty() {
        findings.push("the disk has no partition".to_owned());
    }
    for (index, wanted) in request.partitions.iter().enumerate() {
        let name = &wanted.name;
        if wanted.size == 0 {
            findings.push(format!("`{name}` has size zero"));
        } else if !wanted.size.is_multiple_of(BLOCK) {
            findings.push(format!(
                "`{name}` has a size of {}, it must be a multiple of 4 KiB",
                exact_size(wanted.size)
            ));
        }
        if wanted.filesystem == Filesystem::Vfat && (1..SMALLEST_VFAT).contains(&wanted.size) {
            findings.push(format!(
                "`{name}` has a size of {}, a vfat partition needs at least {}",
                exact_size(wanted.size),
                exact_size(SMALLEST_VFAT)
            ));
        }
        let before = placed.last();
        let free = before.map_or(request.first_partition, PlacedPartition::end);
        let logical = request.table == TableKind::Mbr
            && request.partitions.len() > MBR_SLOTS
            && index >= MBR_SLOTS - 1;
        // The record has a separate unit of alignment: writing it must not endanger neighbouring
        // data.
        let room = if logical { request.alignment } else { 0 };
        let next = free.checked_next_multiple_of(request.alignment);
        let next = next.and_then(|next| next.checked_add(room));
        let Some(offset) = wanted.start.or(next).filter(|o| o.checked_add(wanted.size).is_some())
        else {
            findings.push(format!("`{name}` ends beyond what 64 bits can count"));
            continue;
        };
        if !offset.is_multiple_of(request.alignment) {
            findings.push(format!(
                "`{name}` starts at {}, which is not a multiple of the alignment {}",
                exact_size(offset),
                exact_size(request.alignment)
            ));
        }
        if let (Some(start), None) = (wanted.start, before)
            && start < request.first_partition
        {
            findings.push(format!(
                "`{name}` starts at {}, before the first partition may start ({})",
                exact_size(start),
                exact_size(request.first_partition)
            ));
        }
        if let Some(before) = before
            && offset < before.end().saturating_add(room)
        {
            findings.push(describe_overlap(before, name, offset, wanted.size));
        }
        placed.push(PlacedPartition {
            number: index as u32 + if logical { FIRST_LOGICAL - 3 } else { 1 },
            name: name.clone(),
            offset,
            size: wanted.size,
            first_sector: offset / SECTOR,
            sectors: wanted.size / SECTOR,
            filesystem: wanted.filesystem,
            bootable: wanted.bootable,
            in_mbr: match request.table {
                TableKind::Mbr => true,
                TableKind::Gpt => false,
                TableKind::Hybrid => wanted.in_mbr,
            },
            record: logical.then(|| offset.saturating_sub(room)),
        });
    }
    let head = table_head(request.table);
    if request.first_partition < head {
        findings.push(format!(
            "the first partition may start at {}, but the {} table takes the first {}",
            exact_size(request.first_partition),
            request.table.name(),
            exact_size(head)
        ));
    }
    placed
}

fn describe_overlap(before: &PlacedPartition, name: &str, offset: u64, size: u64) -> String {
    let first = &before.name;
    if offset + size <= before.offset {
        return format!(
            "`{name}` ({} at {}) is listed after `{first}` (starts at {}) but is before it: list \
             partitions in their order on the disk",
            exact_size(size),
            exact_size(offset),
            exact_size(before.offset)
        );
    }
    format!(
        "`{first}` ({} at {}) overlaps `{name}` (starts at {})",
        exact_size(before.size),
        exact_size(before.offset),
        exact_size(offset)
    )
}

fn check_names(request: &DiskRequest, findings: &mut Vec<String>) {
    for (index, partition) in request.partitions.iter().enumerate() {
        let name = &partition.name;
        if name.is_empty() {
            findings.push(format!("partition {} has no name", index + 1));
        }
        let first = request.partitions[..index].iter().position(|p| p.name == *name);
        if let Some(first) = first {
            findings.push(format!(
                "partitions {} and {} are both named `{name}`",
                first + 1,
                index + 1
            ));
        }
        let units = name.encode_utf16().count();
        if request.table.has_gpt() && units > GPT_NAME_UNITS {
            findings.push(format!(
                "the name `{name}` has {units} characters, a GPT entry holds {GPT_NAME_UNITS}"
            ));
        }
    }
}

fn check_table(request: &DiskRequest, placed: &[PlacedPartition], findings: &mut Vec<String>) {
    match request.table {
        TableKind::Mbr => {
            if placed.len() > MOST_MBR {
                findings.push(format!(
                    "an mbr table holds {MOST_MBR} partitions here, the disk has {}: use table = \"gpt\"",
                    placed.len()
                ));
            }
            for partition in placed.iter().filter(|p| p.end() > MBR_LIMIT) {
                findings.push(format!(
                    "`{}` ends at {}, an mbr table reaches 2 TiB: use table = \"gpt\"",
                    partition.name,
                    exact_size(partition.end())
                ));
            }
        }
        TableKind::Gpt => {
            if placed.len() > 128 {
                findings.push(format!("a gpt holds 128 partitions, the disk has {}", placed.len()));
            }
        }
        TableKind::Hybrid => check_hybrid(placed, findings),
    }
}

fn check_hybrid(placed: &[PlacedPartition], findings: &mut Vec<String>) {
    let listed: Vec<&PlacedPartition> = placed.iter().filter(|p| p.in_mbr).collect();
    if listed.is_empty() {
        findings.push(
            "a hybrid table lists no partition in its MBR: set in-mbr = true for the boot \
             partition, or use table = \"gpt\""
                .to_owned(),
        );
    }
    if listed.len() >= MBR_SLOTS {
        findings.push(format!(
            "a hybrid table has room for 3 partitions in its MBR, {} are marked in-mbr",
            listed.len()
        ));
    }
    for partition in listed {
        // A partition has the same number in both tables.
        if partition.number as usize > MBR_SLOTS {
            findings.push(format!(
                "`{}` is partition {}, only the first 4 can be in the MBR of a hybrid table",
                partition.name, partition.number
            ));
        }
        if partition.end() > MBR_LIMIT {
            findings.push(format!(
                "`{}` ends at {}, the MBR of a hybrid table reaches 2 TiB",
                partition.name,
                exact_size(partition.end())
            ));
        }
    }
}

fn check_ends(request: &DiskRequest, placed: &[PlacedPartition], findings: &mut Vec<String>) {
    let tail = table_tail(request.table);
    let usable = request.size.saturating_sub(tail);
    for partition in placed.iter().filter(|p| p.end() > usable) {
        let name = &partition.name;
        let (size, offset) = (exact_size(partition.size), exact_size(partition.offset));
        let disk = exact_size(request.size);
        findings.push(if partition.end() <= request.size {
            format!("`{name}` ({size} at {offset}) overlaps the backup GPT in the last {} of the {disk} disk", exact_size(tail))
        } else {
            format!("`{name}` ({size} at {offset}) does not fit the disk ({disk})")
        });
    }
}

fn check_states(request: &DiskRequest, placed: &[PlacedPartition], findings: &mut Vec<String>) {
    let head = table_head(request.table);
    // In whole blocks: a card erases and a block map records whole blocks.
    let states = request.states.iter().map(|&offset| ("boot-state", offset, BLOCK));
    let trust = request.trust.iter().map(|&offset| ("trust", offset, bundle::area::COPY as u64));
    let copies: Vec<_> = states.enumerate().chain(trust.enumerate()).collect();
    for (at, &(index, (kind, offset, length))) in copies.iter().enumerate() {
        let this = format!("{kind} copy {} (at {})", index + 1, exact_size(offset));
        if !offset.is_multiple_of(BLOCK) {
            findings.push(format!("{this} is not at a multiple of 4 KiB"));
        }
        if offset < head {
            findings.push(format!(
                "{this} is inside the {} table (the first {})",
                request.table.name(),
                exact_size(head)
            ));
        }
        let end = offset.saturating_add(length);
        let inside = placed.iter().find(|p| offset < p.end() && p.offset < end);
        if let Some(partition) = inside {
            findings.push(format!(
                "{this} is inside `{}` ({} at {})",
                partition.name,
                exact_size(partition.size),
                exact_size(partition.offset)
            ));
        } else if offset >= request.first_partition {
            findings.push(format!(
                "{this} is after the first partition's start ({})",
                exact_size(request.first_partition)
            ));
        }
        // Compare whole blocks: a boot state occupies all of its block.
        let shared = copies.iter().take(at).find(|(_, (_, other, length))| {
            offset / BLOCK * BLOCK < other / BLOCK * BLOCK + length && *other / BLOCK * BLOCK < end
        });
        if let Some((other, (other_kind, place, _))) = shared {
            findings.push(format!(
                "{other_kind} copy {} (at {}) and {kind} copy {} (at {}) overlap",
                other + 1,
                exact_size(*place),
                index + 1,
                exact_size(offset)
            ));
        }
    }
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
