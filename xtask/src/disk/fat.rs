//! A FAT volume with the same bytes on every run: fixed serial number and times, files in the given
//! order. It is created in memory (its content is a boot partition's firmware, tens of MiB).

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, anyhow, bail};
use camino::Utf8Path;
use fatfs::{
    Date, DateTime, FileSystem, FormatVolumeOptions, FsOptions, Time, TimeProvider, format_volume,
};

use super::layout::{BLOCK, PlacedPartition, SECTOR};
use super::pages::SparsePages;
use super::spec::{FatFile, FileSource, PartitionContent};
use super::table::{HEADS, SECTORS_PER_TRACK};
use crate::progress;
use crate::time::civil_date;

/// From this size on a volume with clusters of one sector has more than the 65,524 clusters of a
/// FAT16 (Microsoft's FAT specification 1.03), and is a FAT32, which then has about 80,000
/// clusters.
const FAT32_FROM: u64 = 40 << 20;
/// A drive number that says "fixed disk" (BIOS interrupt 13h).
const FIXED_DISK: u8 = 0x80;
/// Offset of "hidden sectors" in the boot sector: how many sectors precede the volume on the disk.
const HIDDEN_SECTORS: u64 = 0x1c;
/// Offset of the time and date of last change in a directory entry.
const ENTRY_CHANGED: u64 = 22;

/// Bytes in a directory entry.
const ENTRY: usize = 32;
/// First byte of a deleted entry.
const DELETED: u8 = 0xe5;
/// Attribute of a directory.
const FOLDER: u8 = 0x10;
/// Attribute of the label; together with others, of a long name.
const LABEL: u8 = 0x08;

/// Whether a volume of this size is FAT32; smaller ones are FAT16.
pub fn is_fat32(size: u64) -> bool {
    size >= FAT32_FROM
}

/// Bytes in a cluster. One sector where the kind of FAT allows it, else four: what every boot ROM
/// of the Raspberry Pi reads (raspberrypi/firmware, issue 1738; rpi-eeprom, issue 818). The kind of
/// a volume depends only on its number of clusters. Readers disagree for numbers near 65,525, so
/// such volumes are never created.
fn cluster_size(size: u64) -> u32 {
    const MIB: u64 = 1 << 20;
    let sectors = match size {
        s if is_fat32(s) => 1 + 3 * u64::from(s > 512 * MIB),
        // 2 from 30 MiB on: at most 40,960 clusters.
        s => 1 + u64::from(s > 30 * MIB),
    };
    (sectors * SECTOR) as u32
}

/// Always returns the same time.
#[derive(Debug)]
struct Fixed(DateTime);

impl TimeProvider for Fixed {
    fn get_current_date(&self) -> Date {
        self.0.date
    }

    fn get_current_date_time(&self) -> DateTime {
        self.0
    }
}

/// Makes the volume for a partition; `says_where` writes the partition's offset into it.
///
/// # Errors
/// When a file cannot be read or does not fit, a name cannot be stored, or two names are the same.
pub fn make_fat(
    placed: &PlacedPartition,
    label: &str,
    volume_id: u32,
    says_where: bool,
    files: &[FatFile],
    epoch: u64,
    size_key: &str,
) -> Result<SparsePages> {
    let name = &placed.name;
    let context = || format!("making the FAT volume of `{name}`");
    let label = stored_label(label).with_context(context)?;
    let now = dos_time(epoch);
    let mut pages = SparsePages::new(placed.size);
    let options = FormatVolumeOptions::new()
        .bytes_per_sector(SECTOR as u16)
        .bytes_per_cluster(cluster_size(placed.size))
        .total_sectors(u32::try_from(placed.sectors).with_context(context)?)
        .sectors_per_track(SECTORS_PER_TRACK as u16)
        .heads(HEADS as u16)
        .drive_num(FIXED_DISK)
        .volume_id(volume_id)
        .volume_label(label);
    format_volume(&mut pages, options).with_context(context)?;
    let hidden = if says_where { placed.first_sector } else { 0 };
    finish_format(&mut pages, hidden, now).with_context(context)?;
    // fatfs needs a `'static` clock; leaking it costs 16 bytes for each volume.
    let clock: &'static Fixed = Box::leak(Box::new(Fixed(now)));
    let volume =
        FileSystem::new(&mut pages, FsOptions::new().time_provider(clock)).with_context(context)?;
    for file in files {
        write_file(&volume, file, placed, size_key)
            .with_context(|| format!("{}: writing {}", context(), file.path))?;
    }
    volume.unmount().with_context(context)?;
    finish_dirs(&mut pages).with_context(context)?;
    Ok(pages)
}

/// Writes the volume that both slots share to a file, for an update bundle.
///
/// # Errors
/// As [`make_fat`], or when the file cannot be written.
pub fn write_shared(
    placed: &PlacedPartition,
    content: &PartitionContent,
    epoch: u64,
    size_key: &str,
    out: &Utf8Path,
) -> Result<()> {
    let PartitionContent::Fat { label, volume_id, placed: says_where, files } = content else {
        bail!("`{}` contains no FAT volume", placed.name);
    };
    let pages = make_fat(placed, label, *volume_id, *says_where, files, epoch, size_key)?;
    let context = || format!("writing {out}");
    let file = File::create(out).with_context(context)?;
    file.set_len(placed.size).with_context(context)?;
    for index in 0..pages.blocks() {
        if let Some(block) = pages.block(index) {
            file.write_all_at(block, index * BLOCK).with_context(context)?;
        }
    }
    Ok(())
}

/// The layout of a volume, read from its boot sector.
struct Geometry {
    fat32: bool,
    /// Byte offset of the first allocation table.
    table: u64,
    /// Byte offset of the first cluster.
    data: u64,
    /// Byte offset of the root directory of a FAT16.
    root: u64,
    /// First cluster of the root directory of a FAT32.
    root_cluster: u64,
    /// Bytes in a cluster.
    cluster: u64,
    /// Byte offset of the boot sector's copy in a FAT32.
    backup: u64,
}

impl Geometry {
    fn read(pages: &mut SparsePages) -> Result<Self> {
        let mut boot = [0u8; 512];
        pages.read_at(0, &mut boot)?;
        let u16_at = |at: usize| u64::from(u16::from_le_bytes([boot[at], boot[at + 1]]));
        let u32_at = |at: usize| u16_at(at) | u16_at(at + 2) << 16;
        let fat32 = u16_at(22) == 0;
        let sectors = if fat32 { u32_at(36) } else { u16_at(22) };
        let table = u16_at(14) * SECTOR;
        let root = table + u64::from(boot[16]) * sectors * SECTOR;
        Ok(Self {
            fat32,
            table,
            data: root + u16_at(17) * ENTRY as u64,
            root,
            root_cluster: u32_at(44),
            cluster: u64::from(boot[13]) * SECTOR,
            backup: u16_at(50) * SECTOR,
        })
    }

    /// Byte offset of a cluster; the first one has number 2.
    fn cluster_at(&self, cluster: u64) -> u64 {
        self.data + cluster.saturating_sub(2) * self.cluster
    }

    /// The pieces of the directory that starts at this cluster: byte offset and length.
    fn folder(&self, pages: &mut SparsePages, first: u64) -> Result<Vec<(u64, u64)>> {
        let mut pieces = Vec::new();
        let (width, end) = if self.fat32 { (4, 0x0fff_fff8) } else { (2, 0xfff8) };
        let mut cluster = first;
        while (2..end).contains(&cluster) {
            pieces.push((self.cluster_at(cluster), self.cluster));
            let mut next = [0u8; 4];
            pages.read_at(self.table + cluster * width, &mut next[..width as usize])?;
            cluster = u64::from(u32::from_le_bytes(next)) & 0x0fff_ffff;
        }
        Ok(pieces)
    }
}

/// Sets what `fatfs` omits when it formats: the offset of the volume on the disk, which firmware
/// reads instead of the partition table, and the time of the label.
fn finish_format(pages: &mut SparsePages, hidden: u64, now: DateTime) -> Result<()> {
    let geometry = Geometry::read(pages)?;
    let hidden = u32::try_from(hidden).unwrap_or(0).to_le_bytes();
    pages.write_at(HIDDEN_SECTORS, &hidden)?;
    if geometry.fat32 {
        pages.write_at(geometry.backup + HIDDEN_SECTORS, &hidden)?;
    }
    let root =
        if geometry.fat32 { geometry.cluster_at(geometry.root_cluster) } else { geometry.root };
    let (date, time) = (now.date, now.time);
    let time = time.hour << 11 | time.min << 5 | (time.sec / 2);
    let date = (date.year - 1980) << 9 | date.month << 5 | date.day;
    pages.write_at(root + ENTRY_CHANGED, &time.to_le_bytes())?;
    pages.write_at(root + ENTRY_CHANGED + 2, &date.to_le_bytes())?;
    Ok(())
}

/// Writes the entries `.` and `..` as the specification requires: `fatfs` 0.3 gives them long names
/// and points `..` at the root's cluster in a FAT32, and `fsck.fat` rejects both.
fn finish_dirs(pages: &mut SparsePages) -> Result<()> {
    let geometry = Geometry::read(pages)?;
    let mut left = if geometry.fat32 {
        geometry.folder(pages, geometry.root_cluster)?
    } else {
        vec![(geometry.root, geometry.data - geometry.root)]
    };
    while let Some((offset, length)) = left.pop() {
        for at in (offset..offset + length).step_by(ENTRY) {
            let mut entry = [0u8; ENTRY];
            pages.read_at(at, &mut entry)?;
            if entry[0] == 0 {
                break;
            }
            let dir = entry[11] & (FOLDER | LABEL) == FOLDER;
            if !dir || entry[0] == DELETED || entry[0] == b'.' {
                continue;
            }
            let low = u64::from(u16::from_le_bytes([entry[26], entry[27]]));
            let high = u64::from(u16::from_le_bytes([entry[20], entry[21]]));
            let first = low | if geometry.fat32 { high << 16 } else { 0 };
            finish_dir(pages, geometry.cluster_at(first), geometry.root_cluster)?;
            left.extend(geometry.folder(pages, first)?);
        }
    }
    Ok(())
}

/// Turns the first four entries of a directory (long name of `.`, `.`, long name of `..`, `..`)
/// into `.`, `..` and two deleted ones.
fn finish_dir(pages: &mut SparsePages, at: u64, root_cluster: u64) -> Result<()> {
    let mut entries = [0u8; 4 * ENTRY];
    pages.read_at(at, &mut entries)?;
    let is = |n: usize, name: &[u8]| entries[n * ENTRY..].starts_with(name);
    if !is(1, b".          ") || !is(3, b"..         ") {
        bail!("fatfs has written a directory in an unexpected form");
    }
    entries.copy_within(ENTRY..2 * ENTRY, 0);
    entries.copy_within(3 * ENTRY..4 * ENTRY, ENTRY);
    entries[2 * ENTRY..].fill(0);
    entries[2 * ENTRY] = DELETED;
    entries[3 * ENTRY] = DELETED;
    let parent = &mut entries[ENTRY..2 * ENTRY];
    let cluster = u64::from(u16::from_le_bytes([parent[26], parent[27]]))
        | u64::from(u16::from_le_bytes([parent[20], parent[21]])) << 16;
    if cluster == root_cluster {
        parent[20..22].fill(0);
        parent[26..28].fill(0);
    }
    Ok(pages.write_at(at, &entries)?)
}

fn stored_label(label: &str) -> Result<[u8; 11]> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || " _-".contains(c);
    if label.is_empty() || label.len() > 11 || !label.chars().all(allowed) {
        bail!(
            "the label `{label}` cannot be stored: a FAT label has 1 to 11 letters, digits, spaces, `-` or `_`"
        );
    }
    let mut stored = [b' '; 11];
    stored[..label.len()].copy_from_slice(label.to_ascii_uppercase().as_bytes());
    Ok(stored)
}

/// The time in FAT's format: from 1980 to 2107, in steps of two seconds.
fn dos_time(epoch: u64) -> DateTime {
    /// 1 January 1980 in seconds since 1970.
    const FIRST: u64 = 315_532_800;
    /// 31 December 2107, 23:59:58.
    const LAST: u64 = 4_354_819_198;
    let seconds = epoch.clamp(FIRST, LAST);
    let ((year, month, day), second) = (civil_date(seconds / 86_400), seconds % 86_400);
    DateTime {
        date: Date { year: year as u16, month: month as u16, day: day as u16 },
        time: Time {
            hour: (second / 3600) as u16,
            min: (second / 60 % 60) as u16,
            sec: (second % 60 / 2 * 2) as u16,
            millis: 0,
        },
    }
}

fn write_file(
    volume: &FileSystem<&mut SparsePages>,
    file: &FatFile,
    placed: &PlacedPartition,
    size_key: &str,
) -> Result<()> {
    let parts: Vec<&str> = file.path.split('/').collect();
    if parts.iter().any(|part| part.is_empty() || *part == "." || *part == "..") {
        bail!("`{}` is not a valid path in a volume", file.path);
    }
    let mut dir = volume.root_dir();
    let (name, dirs) = parts.split_last().ok_or_else(|| anyhow!("the file has no name"))?;
    for part in dirs {
        dir = dir.create_dir(part)?;
    }
    if dir.iter().any(|e| e.is_ok_and(|e| e.file_name().eq_ignore_ascii_case(name))) {
        bail!("the volume already contains this name (FAT ignores case)");
    }
    let mut bytes = Vec::new();
    let content: &[u8] = match &file.source {
        FileSource::Bytes(bytes) => bytes,
        FileSource::File(path) => {
            File::open(path)
                .and_then(|mut f| f.read_to_end(&mut bytes))
                .with_context(|| format!("reading {path}"))?;
            &bytes
        }
    };
    let stats = volume.stats()?;
    let free = u64::from(stats.free_clusters()) * u64::from(stats.cluster_size());
    let too_large = || {
        anyhow!(
            "the file has {}, but `{}` ({}) has only {} free\nhelp: raise {size_key}",
            progress::format_bytes(content.len() as u64),
            placed.name,
            progress::format_bytes(placed.size),
            progress::format_bytes(free),
        )
    };
    if content.len() as u64 > free {
        return Err(too_large());
    }
    let mut target = dir.create_file(name)?;
    // In memory, the only possible error is a full volume: the directory may have used the last
    // clusters.
    target.write_all(content).map_err(|_| too_large())?;
    target.flush()?;
    Ok(())
}
