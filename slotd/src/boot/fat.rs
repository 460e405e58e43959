//! Finds a small file in a FAT12 or FAT16 volume, to be rewritten where it lies: without touching a
//! folder or an allocation table, so that one sector is all that a power cut can hit. Names and numbers
//! are those of Microsoft's "FAT: General Overview of On-Disk Format", version 1.03.

use std::io;

use crate::storage::Storage;

/// Bytes of a sector.
const SECTOR: u64 = 512;

/// Bytes of an entry in a folder.
const ENTRY: usize = 32;

/// First byte of an entry behind the last.
const END: u8 = 0;

/// Attributes of what is no file: a label (and with it every part of a long name), a folder.
const NO_FILE: u8 = 0x08 | 0x10;

/// The most entries of a root folder that are looked at; a volume has 512 as a rule.
const MOST_ENTRIES: u64 = 4096;

/// Where a file lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Byte offset of its first sector in the volume.
    pub offset: u64,
    /// Its length in bytes, within that sector.
    pub length: usize,
}

/// Finds a file of at most one sector in the root folder. `name` is as a FAT stores it, such as
/// `AUTOBOOTTXT`.
///
/// # Errors
/// When the volume cannot be read, is no such FAT, or has no such file.
pub(super) fn find(volume: &dyn Storage, name: &[u8; 11]) -> io::Result<Place> {
    let mut boot = [0; SECTOR as usize];
    volume.read_at(0, &mut boot)?;
    let u8_at = |at: usize| u64::from(boot.get(at).copied().unwrap_or(0));
    let u16_at = |at: usize| u8_at(at) | u8_at(at + 1) << 8;
    let wrong = |why: &str| io::Error::other(format!("the volume is no FAT16: {why}"));
    let (sector, cluster) = (u16_at(11), u8_at(13));
    let (reserved, tables, entries, table) = (u16_at(14), u8_at(16), u16_at(17), u16_at(22));
    if u16_at(510) != 0xaa55 || sector != SECTOR || !cluster.is_power_of_two() {
        return Err(wrong("its first sector describes none"));
    }
    if entries == 0 || entries > MOST_ENTRIES || table == 0 || tables == 0 || reserved == 0 {
        return Err(wrong("it has no root folder of a fixed size"));
    }
    let folder = (reserved + tables * table) * SECTOR;
    let data = folder + (entries * ENTRY as u64).next_multiple_of(SECTOR);
    let mut listing = vec![0; (data - folder) as usize];
    volume.read_at(folder, &mut listing)?;
    for entry in listing.chunks_exact(ENTRY) {
        let byte = |at: usize| entry.get(at).copied().unwrap_or(0);
        if byte(0) == END {
            break;
        }
        if !entry.starts_with(name) || byte(11) & NO_FILE != 0 {
            continue;
        }
        let first = u64::from(u16::from_le_bytes([byte(26), byte(27)]));
        let length = u32::from_le_bytes([byte(28), byte(29), byte(30), byte(31)]) as usize;
        let offset = data + first.saturating_sub(2) * cluster * SECTOR;
        if first < 2 || length > SECTOR as usize || offset + SECTOR > volume.size() {
            return Err(io::Error::other(format!(
                "the file has {length} bytes from cluster {first} on, expected at most {SECTOR} in the volume"
            )));
        }
        return Ok(Place { offset, length });
    }
    Err(io::Error::new(io::ErrorKind::NotFound, "the volume has no such file"))
}
