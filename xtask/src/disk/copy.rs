//! Moves the content of regions into the image in one pass: each window is read once and written to
//! each of its places. Checksums of small contents are computed on the way; filesystem images come
//! with checksums.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};

use super::bmap::BlockRange;
use super::layout::BLOCK;
use super::pages::SparsePages;
use super::sums::{BlockChecksums, ChecksummedImage};
use super::windows::{FileWindows, WINDOW, WINDOW_BLOCKS, bit_mask, non_zero, set_bit_runs};
use crate::progress::ProgressStep;

/// The maximum size of a write in bytes. The page cache allocates one block of memory for each
/// write. Up to this size (Linux: PAGE_ALLOC_COSTLY_ORDER, eight pages) it reuses recently freed
/// memory. Larger blocks come from memory that was free for a long time, which a virtual machine
/// has returned to its host: several times slower.
const PIECE: usize = 32 << 10;

const ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];

/// What fills a region.
#[derive(Debug)]
pub enum RegionContent<'a> {
    /// Blocks in memory; blocks that were written are mapped.
    Memory(&'a SparsePages),
    /// An open filesystem image; the blocks of its ranges are mapped.
    Image(&'a File, &'a ChecksummedImage),
    /// This many blocks of zeros, all mapped.
    Zeros(u64),
}

/// A region, and its byte offsets in the image.
#[derive(Debug)]
pub struct ImageRegion<'a> {
    /// Its content.
    pub payload: RegionContent<'a>,
    /// Multiples of the block size.
    pub places: Vec<u64>,
}

/// The result.
#[derive(Debug, Default)]
pub struct CopyResult {
    /// The mapped ranges of the image, in order.
    pub ranges: Vec<BlockRange>,
    /// Bytes written.
    pub bytes: u64,
}

/// Writes all regions into the image, which must read as zeros everywhere.
///
/// # Errors
/// When reading or writing fails.
pub fn write_regions(
    regions: &[ImageRegion<'_>],
    image: &File,
    step: &ProgressStep,
) -> Result<CopyResult> {
    let mut writer = Writer { image, step, bytes: 0 };
    let mut ranges = Vec::new();
    for region in regions {
        let places = &region.places;
        let own = match &region.payload {
            RegionContent::Memory(pages) => &writer.memory(pages, places)?,
            RegionContent::Image(file, summed) => {
                writer.image(file, summed, places)?;
                &summed.ranges
            }
            RegionContent::Zeros(blocks) => &zero_ranges(*blocks),
        };
        for place in places {
            let shift = place / BLOCK;
            ranges.extend(own.iter().map(|range| BlockRange {
                first: range.first + shift,
                last: range.last + shift,
                sha256: range.sha256.clone(),
            }));
        }
    }
    ranges.sort();
    Ok(CopyResult { ranges, bytes: writer.bytes })
}

/// The ranges of blocks that are zero and mapped.
fn zero_ranges(blocks: u64) -> Vec<BlockRange> {
    let mut sums = BlockChecksums::default();
    for first in (0..blocks).step_by(WINDOW_BLOCKS as usize) {
        sums.add(first, bit_mask(0, (blocks - first).min(WINDOW_BLOCKS)), None);
    }
    sums.finish()
}

struct Writer<'a> {
    image: &'a File,
    step: &'a ProgressStep,
    bytes: u64,
}

impl Writer<'_> {
    fn memory(&mut self, pages: &SparsePages, places: &[u64]) -> Result<Vec<BlockRange>> {
        let mut sums = BlockChecksums::default();
        let mut buffer = vec![0; WINDOW];
        for first in (0..pages.blocks()).step_by(WINDOW_BLOCKS as usize) {
            let present = |bit: &u64| pages.block(first + bit).is_some();
            let mapped = (0..WINDOW_BLOCKS).filter(present).fold(0, |all, bit| all | 1 << bit);
            if mapped == 0 {
                continue;
            }
            for (bit, to) in (0..WINDOW_BLOCKS).zip(buffer.chunks_exact_mut(BLOCK as usize)) {
                to.copy_from_slice(pages.block(first + bit).unwrap_or(&ZEROS));
            }
            sums.add(first, mapped, Some(&buffer));
            self.write(first, non_zero(&buffer), &buffer, places)?;
        }
        Ok(sums.finish())
    }

    fn image(&mut self, file: &File, summed: &ChecksummedImage, places: &[u64]) -> Result<()> {
        let mapped: Vec<_> = summed.ranges.iter().map(|r| r.first..r.last + 1).collect();
        let blocks = 0..summed.size.div_ceil(BLOCK);
        FileWindows::new(file, summed.size, blocks, &mapped).each(|window| match window.bytes {
            Some(bytes) => self.write(window.first, window.filled, bytes, places),
            None => Ok(()),
        })
    }

    /// Writes the blocks of a window that are set in `mask`.
    fn write(&mut self, first: u64, mask: u64, bytes: &[u8], places: &[u64]) -> Result<()> {
        for place in places {
            for (start, end) in set_bit_runs(mask) {
                let run = &bytes[(start * BLOCK) as usize..(end * BLOCK) as usize];
                let mut offset = place + (first + start) * BLOCK;
                for piece in run.chunks(PIECE) {
                    self.image
                        .write_all_at(piece, offset)
                        .with_context(|| format!("writing {} bytes at {offset}", piece.len()))?;
                    offset += piece.len() as u64;
                }
                self.bytes += run.len() as u64;
                self.step.advance(run.len() as u64);
            }
        }
        Ok(())
    }
}
