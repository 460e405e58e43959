//! Walks a sparse file window by window: holes are not read, and blocks are divided into those that
//! are not zero and those that are wanted whatever their content is.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::layout::BLOCK;

/// Blocks that move at once. 256 KiB fit into a core's cache between reading them and writing them
/// to both slots; that is faster than larger windows, and than copying in the kernel.
pub(super) const WINDOW_BLOCKS: u64 = 64;
pub(super) const WINDOW: usize = (WINDOW_BLOCKS * BLOCK) as usize;
const ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];

/// A window of a file.
pub(super) struct FileWindow<'a> {
    /// Its first block.
    pub first: u64,
    /// The wanted blocks: bit 0 is the first.
    pub mapped: u64,
    /// The blocks that are not all zero.
    pub filled: u64,
    /// The bytes, whole blocks with zeros after the file's end; `None` in a hole.
    pub bytes: Option<&'a [u8]>,
}

/// A part of a file, window by window.
pub(super) struct FileWindows<'a> {
    file: &'a File,
    size: u64,
    blocks: Range<u64>,
    /// Wanted blocks, in order and without overlap.
    wanted: &'a [Range<u64>],
    /// The current extent: the space between extents reads as zeros.
    extent: Range<u64>,
}

impl<'a> FileWindows<'a> {
    /// The windows of `blocks` of a file with `size` bytes; `blocks` starts at a multiple of
    /// [`WINDOW_BLOCKS`] and may reach beyond the end.
    pub(super) fn new(
        file: &'a File,
        size: u64,
        blocks: Range<u64>,
        wanted: &'a [Range<u64>],
    ) -> Self {
        let skipped = wanted.partition_point(|range| range.end <= blocks.start);
        Self { file, size, blocks, wanted: &wanted[skipped..], extent: 0..0 }
    }

    /// Calls back for every window in which something is wanted or not zero.
    pub(super) fn each(
        mut self,
        mut visit: impl FnMut(FileWindow<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut buffer = vec![0; WINDOW];
        let end = self.blocks.end.min(self.size.div_ceil(BLOCK));
        for first in (self.blocks.start..end).step_by(WINDOW_BLOCKS as usize) {
            let offset = first * BLOCK;
            let length = (self.size - offset).min(WINDOW as u64);
            let mapped = self.wanted_in(first);
            if self.next_data(offset)? >= offset + length {
                if mapped != 0 {
                    visit(FileWindow { first, mapped, filled: 0, bytes: None })?;
                }
                continue;
            }
            self.file
                .read_exact_at(&mut buffer[..length as usize], offset)
                .with_context(|| format!("reading {length} bytes at {offset}"))?;
            buffer[length as usize..].fill(0);
            let filled = non_zero(&buffer);
            if mapped | filled != 0 {
                visit(FileWindow { first, mapped, filled, bytes: Some(&buffer) })?;
            }
        }
        Ok(())
    }

    fn wanted_in(&mut self, first: u64) -> u64 {
        let end = first + WINDOW_BLOCKS;
        let mut mask = 0;
        while let Some(range) = self.wanted.first() {
            if range.start >= end {
                break;
            }
            mask |= bit_mask(
                range.start.saturating_sub(first),
                range.end.min(end).saturating_sub(first),
            );
            if range.end > end {
                break;
            }
            self.wanted = &self.wanted[1..];
        }
        mask
    }

    /// The offset of the first data at or after `offset`; the file's size when there is none.
    fn next_data(&mut self, offset: u64) -> Result<u64> {
        if offset < self.extent.end {
            return Ok(offset.max(self.extent.start));
        }
        self.extent = match seek(self.file, SeekFrom::Data(offset)) {
            Ok(start) => {
                start..seek(self.file, SeekFrom::Hole(start)).context("looking for a hole")?
            }
            // No data up to the end.
            Err(Errno::NXIO) => self.size..u64::MAX,
            // A filesystem without holes.
            Err(Errno::INVAL) => offset..self.size,
            Err(error) => return Err(error).context("looking for data"),
        };
        Ok(self.extent.start)
    }
}

/// A mask of the bits from `start` up to, not including, `end` (at most 64).
pub(super) fn bit_mask(start: u64, end: u64) -> u64 {
    let below = |n: u64| if n >= 64 { u64::MAX } else { (1 << n) - 1 };
    below(end) & !below(start)
}

/// The runs of set bits: first bit, first bit after the run.
pub(super) fn set_bit_runs(mask: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut left = mask;
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let start = u64::from(left.trailing_zeros());
        let length = u64::from((left >> start).trailing_ones());
        left &= !bit_mask(start, start + length);
        Some((start, start + length))
    })
}

/// The blocks of a window that are not all zero.
pub(super) fn non_zero(window: &[u8]) -> u64 {
    let blocks = window.chunks(BLOCK as usize);
    blocks
        .enumerate()
        .fold(0, |mask, (bit, block)| mask | u64::from(*block != ZEROS[..block.len()]) << bit)
}
