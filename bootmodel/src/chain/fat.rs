//! Reads an untrusted FAT volume: its geometry from the boot sector, and its files within bounds. Circular cluster
//! chains, circular directories and impossible sizes are errors and are detected quickly.
//!
//! Source: Microsoft's specification of FAT, 1.03 ("Boot Sector and BPB", "FAT type determination").

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{self, Read};

use crate::firmware::{PartitionStream, ReadOnlyDisk, TablePartition};

/// The maximum number of files and directories in a volume; a boot partition has a few hundred.
const MOST_ENTRIES: usize = 16_384;
/// The maximum depth of directories.
const DEEPEST: u32 = 8;
/// Maximum bytes of tables and directories that are read, not counting files.
const OVERHEAD: u64 = 64 << 20;

/// The content of a boot sector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FatBootSector {
    /// The text at 54 or 82: "FAT16", "FAT32".
    pub(super) says: String,
    /// How many clusters there are.
    pub(super) clusters: u64,
    /// Sectors of 512 bytes in a cluster.
    pub(super) cluster_sectors: u32,
    /// The volume's sector size in bytes.
    pub(super) sector: u64,
}

fn read_number(head: &[u8], at: usize, bytes: usize) -> u64 {
    let part = head.get(at..at + bytes).unwrap_or_default();
    part.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// The geometry of a volume; `None` when it is not a FAT volume.
pub(super) fn read_boot_sector(head: &[u8]) -> Option<FatBootSector> {
    let (sector, in_cluster) = (read_number(head, 11, 2), read_number(head, 13, 1));
    let (reserved, fats, root) =
        (read_number(head, 14, 2), read_number(head, 16, 1), read_number(head, 17, 2));
    let either = |at: usize, short: usize, other: usize| match read_number(head, at, short) {
        0 => read_number(head, other, 4),
        count => count,
    };
    let (sectors, table) = (either(19, 2, 32), either(22, 2, 36));
    let sound = [512, 1024, 2048, 4096].contains(&sector) && in_cluster.is_power_of_two();
    if !sound || reserved == 0 || fats == 0 || table == 0 {
        return None;
    }
    let data = reserved + fats * table + (root * 32).div_ceil(sector);
    let clusters = sectors.checked_sub(data)? / in_cluster;
    // In a FAT32 volume the 16-bit table size is zero.
    let text =
        head.get(if read_number(head, 22, 2) == 0 { 82..90 } else { 54..62 }).unwrap_or_default();
    Some(FatBootSector {
        says: String::from_utf8_lossy(text).trim().to_owned(),
        clusters,
        cluster_sectors: u32::try_from(in_cluster * sector / 512).unwrap_or(0),
        sector,
    })
}

/// The files of a volume.
pub(super) struct VolumeFiles {
    /// By path.
    pub(super) found: BTreeMap<String, Vec<u8>>,
    /// Files that exceeded the limit; they are listed as empty.
    pub(super) left_out: Vec<String>,
}

/// Reads the files of a volume as long as they fit into `room` bytes, and reduces `room`.
///
/// # Errors
/// When the volume is damaged or malicious.
pub(super) fn read_files(
    disk: &dyn ReadOnlyDisk,
    partition: &TablePartition,
    largest: u64,
    room: &mut u64,
) -> io::Result<VolumeFiles> {
    let budget = Cell::new(OVERHEAD);
    let window = PartitionStream::bounded(disk, partition, &budget);
    let volume = fatfs::FileSystem::new(window, fatfs::FsOptions::new())?;
    let mut reader = Reader {
        budget: &budget,
        room,
        largest,
        entries: 0,
        files: VolumeFiles { found: BTreeMap::new(), left_out: Vec::new() },
    };
    reader.folder(&volume.root_dir(), "", 0)?;
    Ok(reader.files)
}

struct Reader<'a> {
    budget: &'a Cell<u64>,
    room: &'a mut u64,
    largest: u64,
    entries: usize,
    files: VolumeFiles,
}

impl Reader<'_> {
    fn folder(
        &mut self,
        folder: &fatfs::Dir<'_, PartitionStream<'_>>,
        path: &str,
        depth: u32,
    ) -> io::Result<()> {
        for entry in folder.iter() {
            let entry = entry?;
            let name = entry.file_name();
            if name == "." || name == ".." {
                continue;
            }
            self.entries += 1;
            if self.entries > MOST_ENTRIES {
                return Err(io::Error::other(format!(
                    "the volume lists more than {MOST_ENTRIES} files"
                )));
            }
            let path = if path.is_empty() { name } else { format!("{path}/{name}") };
            if entry.is_dir() && depth < DEEPEST {
                self.folder(&entry.to_dir(), &path, depth + 1)?;
            } else if entry.is_file() {
                self.file(&entry, path)?;
            }
        }
        Ok(())
    }

    fn file(
        &mut self,
        entry: &fatfs::DirEntry<'_, PartitionStream<'_>>,
        path: String,
    ) -> io::Result<()> {
        let length = entry.len();
        let mut bytes = Vec::new();
        if length > self.largest || length > *self.room {
            self.files.left_out.push(path.clone());
        } else {
            *self.room -= length;
            // A cluster has a sector at least, and an entry of four bytes in the table.
            self.budget.set(self.budget.get().saturating_add(length + length / 128 + 4096));
            entry.to_file().read_to_end(&mut bytes)?;
        }
        self.files.found.insert(path, bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::read_boot_sector;

    #[test]
    fn a_boot_sector_says_what_it_is_or_is_none() {
        let mut head = vec![0; 512];
        head[11..13].copy_from_slice(&512u16.to_le_bytes());
        (head[13], head[14], head[16]) = (1, 32, 2);
        head[32..36].copy_from_slice(&131_072u32.to_le_bytes());
        head[36..40].copy_from_slice(&1008u32.to_le_bytes());
        head[82..90].copy_from_slice(b"FAT32   ");
        let found = read_boot_sector(&head).expect("a FAT");
        assert_eq!((found.clusters, found.cluster_sectors, found.sector), (129_024, 1, 512));
        assert_eq!(found.says, "FAT32");
        for (at, byte) in [(11, 1), (13, 3), (13, 0), (14, 0), (16, 0), (36, 0xff)] {
            let mut bad = head.clone();
            bad[at] = byte;
            if at == 36 {
                bad[36..40].fill(0xff);
            }
            assert_eq!(read_boot_sector(&bad), None, "byte {at}");
        }
        // exFAT and NTFS are not FAT.
        head[11..90].fill(0);
        assert_eq!(read_boot_sector(&head), None);
    }
}
