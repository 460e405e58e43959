//! The partitions of a small card.

use xtask::disk::{Filesystem, PartitionRequest};

/// With a size in MiB.
pub fn partition(name: &str, size: u64, filesystem: Filesystem) -> PartitionRequest {
    PartitionRequest {
        name: name.to_owned(),
        size: size << 20,
        start: None,
        filesystem,
        bootable: name == "boot",
        in_mbr: name == "boot",
    }
}
