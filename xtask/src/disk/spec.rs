//! The input and the result of `assemble`. Everything that could differ between two builds
//! (identifiers, times, order of files) is an input here.

use camino::Utf8PathBuf;
use uuid::Uuid;

use super::layout::DiskLayout;
use super::sums::ChecksummedImage;
use crate::artifact::Artifact;

/// A disk to write: a layout and its contents.
#[derive(Debug, Clone)]
pub struct DiskSpec {
    /// The layout.
    pub layout: DiskLayout,
    /// The GUID of the disk in a GPT; unused with an MBR table.
    pub disk_guid: Uuid,
    /// The disk signature in the MBR, from which Linux derives the PARTUUIDs of an MBR table.
    pub mbr_signature: u32,
    /// Seconds since 1970: the time of every file in a FAT.
    pub epoch: u64,
    /// The first bytes of each boot-state sector, in the layout's order; the rest of a sector is
    /// zero, and so is a sector without bytes.
    pub states: Vec<Vec<u8>>,
    /// One for each partition of the layout, in its order.
    pub partitions: Vec<PartitionSpec>,
}

/// The content of one partition.
#[derive(Debug, Clone)]
pub struct PartitionSpec {
    /// The GUID of the GPT entry; unused with an MBR table.
    pub guid: Uuid,
    /// Its content.
    pub content: PartitionContent,
    /// The key of its size, for messages: `partitions.boot.size in board/<board>/board.toml`.
    pub size_key: String,
}

/// The content of a partition.
#[derive(Debug, Clone)]
pub enum PartitionContent {
    /// Zeros: the first blocks are written, so that no old filesystem is found.
    Empty,
    /// A FAT filesystem, created here.
    Fat {
        /// The volume's label, at most 11 characters; stored in capitals.
        label: String,
        /// The volume's serial number.
        volume_id: u32,
        /// Whether the volume contains its offset on the disk. A volume that both slots share does
        /// not: it has the same bytes in both.
        placed: bool,
        /// In the order in which they are written; missing directories are made.
        files: Vec<FatFile>,
    },
    /// A finished filesystem image no larger than the partition; holes stay holes. Partitions that
    /// name the same path share one pass over it.
    Image(ChecksummedImage),
}

/// A file in a FAT.
#[derive(Debug, Clone)]
pub struct FatFile {
    /// Its path in the volume, with `/` between directories.
    pub path: String,
    /// The source of its bytes.
    pub source: FileSource,
}

/// The source of a file's bytes.
#[derive(Debug, Clone)]
pub enum FileSource {
    /// A file on the host.
    File(Utf8PathBuf),
    /// Bytes in memory.
    Bytes(Vec<u8>),
}

/// A finished card image.
#[derive(Debug, Clone)]
pub struct DiskImage {
    /// Its path.
    pub path: Utf8PathBuf,
    /// Bytes of the whole disk; the file has the same size, mostly holes.
    pub size: u64,
    /// Bytes that must reach the card: what the block map lists.
    pub mapped: u64,
    /// Bytes that were written to the image; the other mapped bytes are zero and in holes.
    pub written: u64,
    /// The block map, `<image>.bmap`. It contains checksums of all mapped bytes, so its own SHA-256
    /// identifies the image's content without reading gigabytes of zeros.
    pub bmap: Artifact,
}
