//! Which blocks of a finished filesystem image must reach a card, and their checksums. Computed
//! once, by the stage that creates the image, on all cores; assembling only copies.

use std::fs::File;

use anyhow::{Context, Result};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::bmap::{BlockRange, LONGEST_RANGE};
use super::ext4_blocks;
use super::layout::BLOCK;
use super::windows::{FileWindows, set_bit_runs};
use crate::artifact;
use crate::parallel;

/// The first bytes of each partition are mapped even where they are zero: the superblocks of an old
/// filesystem on the card are in the first 64 KiB (btrfs), an old journal follows.
pub(super) const ALWAYS_MAPPED: u64 = 1 << 20;
const ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];

/// A filesystem image with its part of a block map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChecksummedImage {
    /// The image; it must not change afterwards.
    pub path: Utf8PathBuf,
    /// Its length in bytes.
    pub size: u64,
    /// The mapped blocks, counted from the image's start, in order.
    pub ranges: Vec<BlockRange>,
}

/// Reads an image once, on all cores, and computes the checksums of what must reach a card: every
/// block that is not zero, its first MiB, and, of an ext4, every block in use.
///
/// # Errors
/// When the image cannot be read or its ext4 is inconsistent.
pub fn sum_image(path: &Utf8Path) -> Result<ChecksummedImage> {
    let context = || format!("computing the checksums of {path}");
    let file = File::open(path).with_context(context)?;
    let size = file.metadata().with_context(context)?.len();
    let needed = always_mapped_blocks(&file, size).with_context(context)?;
    // Ranges end at multiples of the longest one, so the pieces between them are independent.
    let pieces: Vec<u64> = (0..size.div_ceil(BLOCK)).step_by(LONGEST_RANGE as usize).collect();
    let ranges = parallel::map(&pieces, parallel::cores(), |&first| {
        let piece = first..first + LONGEST_RANGE;
        let mut sums = BlockChecksums::default();
        FileWindows::new(&file, size, piece, &needed).each(|window| {
            sums.add(window.first, window.mapped | window.filled, window.bytes);
            Ok(())
        })?;
        Ok(sums.finish())
    })
    .with_context(context)?;
    Ok(ChecksummedImage { path: path.to_owned(), size, ranges: ranges.concat() })
}

/// Blocks that are mapped even where they are zero, in order and without overlap.
fn always_mapped_blocks(file: &File, size: u64) -> Result<Vec<std::ops::Range<u64>>> {
    let used = ext4_blocks::used_bytes(file)?.unwrap_or_default();
    // In the map's blocks: a smaller block of the volume maps the whole block.
    let head = 0..size.min(ALWAYS_MAPPED).div_ceil(BLOCK);
    let blocks = used.into_iter().map(|r| r.start / BLOCK..r.end.div_ceil(BLOCK));
    let mut needed: Vec<std::ops::Range<u64>> = Vec::new();
    for range in std::iter::once(head).chain(blocks) {
        match needed.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => needed.push(range),
        }
    }
    Ok(needed)
}

/// Computes checksums of blocks in order; a range ends at a gap and at its maximum length.
#[derive(Default)]
pub(super) struct BlockChecksums {
    done: Vec<BlockRange>,
    /// First block, the block after the last, and the hash so far.
    open: Option<(u64, u64, Sha256)>,
}

impl BlockChecksums {
    /// Adds the blocks that are set in `mask` of a window that starts at block `first`; without
    /// bytes all are zero.
    pub(super) fn add(&mut self, first: u64, mask: u64, bytes: Option<&[u8]>) {
        for (start, end) in set_bit_runs(mask) {
            let (mut at, end) = (first + start, first + end);
            while at < end {
                let stop = end.min((at / LONGEST_RANGE + 1) * LONGEST_RANGE);
                let follows = self
                    .open
                    .as_ref()
                    .is_some_and(|(_, after, _)| *after == at && !at.is_multiple_of(LONGEST_RANGE));
                if !follows {
                    self.close();
                }
                let (_, after, hasher) = self.open.get_or_insert_with(|| (at, at, Sha256::new()));
                match bytes {
                    Some(bytes) => {
                        let from = ((at - first) * BLOCK) as usize;
                        let to = ((stop - first) * BLOCK) as usize;
                        hasher.update(&bytes[from..to]);
                    }
                    None => (at..stop).for_each(|_| hasher.update(ZEROS)),
                }
                *after = stop;
                at = stop;
            }
        }
    }

    fn close(&mut self) {
        if let Some((first, after, hasher)) = self.open.take() {
            let sha256 = artifact::hex(&hasher.finalize());
            self.done.push(BlockRange { first, last: after - 1, sha256 });
        }
    }

    /// The ranges, in order.
    pub(super) fn finish(mut self) -> Vec<BlockRange> {
        self.close();
        self.done
    }
}
