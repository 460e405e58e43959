//! Finds a small file in a FAT12 or FAT16 volume, so that it can be rewritten in place. Directories and the
//! allocation table are not touched, so that a power cut can affect only one sector. Names and numbers are
//! those of Microsoft's "FAT: General Overview of On-Disk Format", version 1.03.

use std::io;

use crate::storage::Storage;

/// Bytes of a sector.
const SECTOR: u64 = 512;

/// Bytes of a directory entry.
const ENTRY: usize = 32;

/// First byte of the entry after the last one.
const END: u8 = 0;

/// Attributes of entries that are not files: a label (also set in every part of a long name), a directory.
const NO_FILE: u8 = 0x08 | 0x10;

/// Maximum number of root directory entries that are read; a volume usually has 512.
const MOST_ENTRIES: u64 = 4096;

/// The position of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FatFileSectors {
    /// Byte offset of its first sector in the volume.
    pub offset: u64,
    /// Its length in bytes, within that sector.
    pub length: usize,
}

/// Finds a file of at most one sector in the root directory. `name` is as a FAT stores it, such as
/// `AUTOBOOTTXT`.
///
/// # Errors
/// When the volume cannot be read, is not a FAT12 or FAT16, or has no such file.
pub(super) fn find_file(volume: &dyn Storage, name: &[u8; 11]) -> io::Result<FatFileSectors> {
    let mut boot = [0; SECTOR as usize];
    volume.read_at(0, &mut boot)?;
    let u8_at = |at: usize| u64::from(boot.get(at).copied().unwrap_or(0));
    let u16_at = |at: usize| u8_at(at) | u8_at(at + 1) << 8;
    let wrong = |why: &str| io::Error::other(format!("not a FAT16 volume: {why}"));
    let (sector, cluster) = (u16_at(11), u8_at(13));
    let (reserved, tables, entries, table) = (u16_at(14), u8_at(16), u16_at(17), u16_at(22));
    if u16_at(510) != 0xaa55 || sector != SECTOR || !cluster.is_power_of_two() {
        return Err(wrong("the first sector is not a FAT boot sector"));
    }
    if entries == 0 || entries > MOST_ENTRIES || table == 0 || tables == 0 || reserved == 0 {
        return Err(wrong("the root directory has no fixed size"));
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
                "the file has {length} bytes from cluster {first} on, expected at most {SECTOR} bytes within the volume"
            )));
        }
        return Ok(FatFileSectors { offset, length });
    }
    Err(io::Error::new(io::ErrorKind::NotFound, "the volume has no such file"))
}
