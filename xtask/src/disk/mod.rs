//! The card image: its layout (`layout`), writing it once, in place and sparse (`assemble`), and
//! reading it back (`read`). Nothing is mounted and no loop device is used.

mod assemble;
pub mod bmap;
pub mod compress;
mod copy;
mod ext4_blocks;
pub(crate) mod ext4_read;
mod fat;
pub mod layout;
mod pages;
pub mod read;
mod spec;
mod sums;
mod table;
mod windows;

use std::io::SeekFrom;

pub use assemble::{assemble, assemble_checked};
pub use ext4_blocks::{Ext4Usage, read_usage};
pub use fat::write_shared;
pub use layout::{
    DiskLayout, DiskRequest, Filesystem, PartitionRequest, PlacedPartition, StateSector, TableKind,
    lay_out_disk,
};
pub use spec::{DiskImage, DiskSpec, FatFile, FileSource, PartitionContent, PartitionSpec};
pub use sums::{ChecksummedImage, sum_image};

/// The position that a seek leads to in something of this length; `None`: before its start.
pub(crate) fn seek_position(to: SeekFrom, length: u64, position: u64) -> Option<u64> {
    match to {
        SeekFrom::Start(offset) => Some(offset),
        SeekFrom::End(offset) => length.checked_add_signed(offset),
        SeekFrom::Current(offset) => position.checked_add_signed(offset),
    }
}
