//! What `assemble` is given and what it gives back. Everything that could differ between two
//! builds (identifiers, times, order of files) is an input here, so nothing is left to chance.

use camino::Utf8PathBuf;
use uuid::Uuid;

use super::layout::Layout;
use super::sums::Summed;
use crate::artifact::Artifact;

/// A disk to write: a layout and what fills it.
#[derive(Debug, Clone)]
pub struct DiskSpec {
    /// Where everything lies.
    pub layout: Layout,
    /// The GUID of the disk in a GPT; unused with an MBR table.
    pub disk_guid: Uuid,
    /// The disk signature in the MBR, from which Linux makes the PARTUUIDs of an MBR table.
    pub mbr_signature: u32,
    /// Seconds since 1970: the time of every file in a FAT.
    pub epoch: u64,
    /// The first bytes of each boot-state sector, in the layout's order; the rest of a sector is
    /// zero, and so is a sector for which nothing is given.
    pub states: Vec<Vec<u8>>,
    /// One for each partition of the layout, in its order.
    pub partitions: Vec<PartitionSpec>,
}

/// What fills one partition.
#[derive(Debug, Clone)]
pub struct PartitionSpec {
    /// The GUID of the GPT entry; unused with an MBR table.
    pub guid: Uuid,
    /// What lies in it.
    pub content: Content,
    /// Where its size is set, for messages: `partitions.boot.size in board/<board>/board.toml`.
    pub size_key: String,
}

/// The content of a partition.
#[derive(Debug, Clone)]
pub enum Content {
    /// Zeros: what was there before must not be found again, so the first blocks are written.
    Empty,
    /// A FAT filesystem, made here.
    Fat {
        /// The volume's label, at most 11 characters; stored in capitals.
        label: String,
        /// The volume's serial number.
        volume_id: u32,
        /// Whether the volume says where it lies on the disk. One that two slots share does not:
        /// it has the same bytes in either.
        placed: bool,
        /// In the order in which they are written; missing folders are made.
        files: Vec<FatFile>,
    },
    /// A finished filesystem image no larger than the partition; holes stay holes. Partitions that
    /// name the same path share one pass over it.
    Image(Summed),
}

/// A file in a FAT.
#[derive(Debug, Clone)]
pub struct FatFile {
    /// Its path in the volume, with `/` between folders.
    pub path: String,
    /// Where its bytes come from.
    pub source: Source,
}

/// Where a file's bytes come from.
#[derive(Debug, Clone)]
pub enum Source {
    /// A file on the host.
    File(Utf8PathBuf),
    /// Bytes in memory.
    Bytes(Vec<u8>),
}

/// A finished card image.
#[derive(Debug, Clone)]
pub struct DiskImage {
    /// Where it lies.
    pub path: Utf8PathBuf,
    /// Bytes of the whole disk; the file has as many, most of them in holes.
    pub size: u64,
    /// Bytes that must reach the card: what the block map lists.
    pub mapped: u64,
    /// Bytes that were written to the image; the mapped rest is zero and lies in holes.
    pub written: u64,
    /// The block map, `<image>.bmap`. It holds a checksum of every mapped byte, so its own SHA-256
    /// stands for the image's content without a pass over gigabytes of zeros.
    pub bmap: Artifact,
}
