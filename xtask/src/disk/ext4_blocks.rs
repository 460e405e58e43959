//! Reads from an ext4 image what the disk stage needs: how full it is, and which blocks it uses. A
//! used block may be a hole in the image (all zero), but must be written as zeros to the card.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use camino::Utf8Path;
use serde::{Deserialize, Serialize};

/// Offset of the superblock in the volume.
const SUPERBLOCK: u64 = 1024;
/// `s_magic`.
const MAGIC: u16 = 0xef53;
/// `s_feature_incompat`: group descriptors have the size in `s_desc_size`.
const INCOMPAT_64BIT: u32 = 0x80;
/// `s_feature_incompat`: descriptors are spread over the volume; Slipway's images never use this.
const INCOMPAT_META_BG: u32 = 0x10;
/// `s_feature_ro_compat`: superblock copies only in groups 0, 1 and powers of 3, 5 and 7.
const RO_COMPAT_SPARSE_SUPER: u32 = 0x1;
/// `bg_flags`: the group's block bitmap is not written, only metadata blocks are used.
const BLOCK_UNINIT: u16 = 0x2;

/// How full an ext4 volume is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ext4Usage {
    /// Bytes in a block.
    pub block_size: u64,
    /// Bytes of the whole volume.
    pub size: u64,
    /// Bytes in use, metadata included.
    pub used: u64,
    /// Bytes free.
    pub free: u64,
    /// The maximum number of files, directories and links.
    pub inodes: u64,
    /// How many of these are free.
    pub free_inodes: u64,
    /// The volume's UUID.
    pub uuid: String,
    /// Its label.
    pub label: String,
}

/// The fields of the superblock that we read (Linux, `Documentation/filesystems/ext4/super.rst`).
struct Super {
    bytes: [u8; 1024],
}

impl Super {
    fn read(file: &File) -> Result<Option<Self>> {
        let mut bytes = [0; 1024];
        if file.read_exact_at(&mut bytes, SUPERBLOCK).is_err() {
            // Too short to contain one.
            return Ok(None);
        }
        let this = Self { bytes };
        if this.u16(56) != MAGIC {
            return Ok(None);
        }
        ensure!(this.u32(24) <= 6, "invalid superblock: 2^{} bytes in a block", this.u32(24) + 10);
        ensure!(this.u32(32) > 0 && this.u32(40) > 0, "invalid superblock: empty groups");
        Ok(Some(this))
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }

    fn wide(&self, low: usize, high: usize) -> u64 {
        let high = if self.u32(96) & INCOMPAT_64BIT != 0 { self.u32(high) } else { 0 };
        u64::from(self.u32(low)) | u64::from(high) << 32
    }

    fn block_size(&self) -> u64 {
        1024 << self.u32(24)
    }

    fn blocks(&self) -> u64 {
        self.wide(4, 0x150)
    }
}

/// How full a volume is.
///
/// # Errors
/// When the file cannot be read or is not an ext4 volume.
pub fn read_usage(image: &Utf8Path) -> Result<Ext4Usage> {
    let context = || format!("reading the ext4 volume {image}");
    let file = File::open(image).with_context(context)?;
    let Some(volume) = Super::read(&file).with_context(context)? else {
        bail!("{}: no ext4 superblock", context());
    };
    let block_size = volume.block_size();
    let (size, free) = (volume.blocks() * block_size, volume.wide(12, 0x158) * block_size);
    let id = &volume.bytes[104..120];
    let label = &volume.bytes[120..136];
    Ok(Ext4Usage {
        block_size,
        size,
        used: size.saturating_sub(free),
        free,
        inodes: volume.u32(0).into(),
        free_inodes: volume.u32(16).into(),
        uuid: uuid::Uuid::from_slice(id).with_context(context)?.to_string(),
        label: String::from_utf8_lossy(label).trim_end_matches('\0').to_owned(),
    })
}

/// The bytes that an ext4 volume uses, in order and without overlap; `None` when the file is not an
/// ext4 volume.
///
/// # Errors
/// When the file cannot be read, or the volume is inconsistent.
pub fn used_bytes(file: &File) -> Result<Option<Vec<Range<u64>>>> {
    let Some(volume) = Super::read(file)? else { return Ok(None) };
    let size = file.metadata()?.len();
    let (block, blocks) = (volume.block_size(), volume.blocks());
    ensure!(
        blocks.checked_mul(block).is_some_and(|bytes| bytes <= size),
        "the superblock counts {blocks} blocks of {block} bytes, but the file has {size} bytes"
    );
    ensure!(
        volume.u32(96) & INCOMPAT_META_BG == 0,
        "the volume has the feature meta_bg, which is not supported"
    );
    let first = u64::from(volume.u32(20));
    let per_group = u64::from(volume.u32(32));
    let groups = blocks.saturating_sub(first).div_ceil(per_group);
    let wide = volume.u32(96) & INCOMPAT_64BIT != 0;
    let descriptor = if wide { u64::from(volume.u16(254)).max(64) } else { 32 };
    let inode_table =
        (u64::from(volume.u32(40)) * u64::from(volume.u16(88)).max(128)).div_ceil(block);
    let table_blocks = (groups * descriptor).div_ceil(block);
    let reserved = u64::from(volume.u16(206));
    let boot_and_super = 0..first + 1;
    let mut used: Vec<Range<u64>> = vec![boot_and_super];
    let mut bitmap = vec![0; block as usize];
    for group in 0..groups {
        let mut bytes = vec![0; descriptor as usize];
        file.read_exact_at(&mut bytes, (first + 1) * block + group * descriptor)?;
        let u32_at = |at: usize| {
            u64::from(u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]))
        };
        let place =
            |low: usize, high: usize| u32_at(low) | if wide { u32_at(high) << 32 } else { 0 };
        let (blocks_at, inodes_at, table_at) = (place(0, 0x20), place(4, 0x24), place(8, 0x28));
        let flags = u16::from_le_bytes([bytes[0x12], bytes[0x13]]);
        used.extend([
            blocks_at..blocks_at + 1,
            inodes_at..inodes_at + 1,
            table_at..table_at + inode_table,
        ]);
        let start = first + group * per_group;
        if volume.u32(100) & RO_COMPAT_SPARSE_SUPER == 0 || has_copy(group) {
            used.push(start..start + 1 + table_blocks + reserved);
        }
        if flags & BLOCK_UNINIT != 0 {
            continue;
        }
        file.read_exact_at(&mut bitmap, blocks_at * block)
            .with_context(|| format!("reading the block bitmap of group {group}"))?;
        add_bitmap(&bitmap, start..(start + per_group).min(blocks), &mut used);
    }
    Ok(Some(merge_ranges(used, blocks, block)))
}

/// Whether a group contains a copy of the superblock.
fn has_copy(group: u64) -> bool {
    let is_power = |base: u64| {
        let mut power = base;
        while power < group {
            power *= base;
        }
        power == group
    };
    group <= 1 || [3, 5, 7].into_iter().any(is_power)
}

/// Adds the runs of set bits.
fn add_bitmap(bitmap: &[u8], group: Range<u64>, used: &mut Vec<Range<u64>>) {
    let mut run: Option<u64> = None;
    for block in group.clone() {
        let bit = block - group.start;
        let set = bitmap.get((bit / 8) as usize).is_some_and(|byte| byte >> (bit % 8) & 1 == 1);
        match (set, run) {
            (true, None) => run = Some(block),
            (false, Some(start)) => {
                used.push(start..block);
                run = None;
            }
            _ => {}
        }
    }
    used.extend(run.map(|start| start..group.end));
}

/// Sorts and joins ranges of blocks, cuts them at the volume's end, and converts them to bytes.
fn merge_ranges(mut used: Vec<Range<u64>>, blocks: u64, block: u64) -> Vec<Range<u64>> {
    used.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in used {
        let range = range.start.min(blocks) * block..range.end.min(blocks) * block;
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged.retain(|range| !range.is_empty());
    merged
}
