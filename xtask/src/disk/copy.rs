//! Moves the content of a region into the image in one pass: each window is read once, written to
//! every place where it belongs, and hashed on a second thread while the next one is read.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use anyhow::{Context, Result, anyhow};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use super::bmap::{LONGEST_RANGE, Range};
use super::layout::BLOCK;
use super::pages::Pages;
use crate::artifact;
use crate::progress::Step;

/// Blocks that move at once. 256 KiB stay in a core's cache between being read and being written to
/// both slots; that is faster than larger windows, and than copying in the kernel.
const WINDOW_BLOCKS: u64 = 64;
const WINDOW: usize = (WINDOW_BLOCKS * BLOCK) as usize;
/// Windows that may wait for the hashing thread.
const AHEAD: usize = 16;
const ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];

/// What fills a region.
#[derive(Debug)]
pub enum Payload<'a> {
    /// Blocks in memory; those that were written are mapped.
    Memory(&'a Pages),
    /// A file with holes.
    File {
        /// The file.
        file: &'a File,
        /// Its bytes.
        size: u64,
        /// Blocks that are mapped even where they are zero, in order and without overlap.
        needed: Vec<std::ops::Range<u64>>,
    },
    /// This many blocks of zeros, all mapped.
    Zeros(u64),
}

/// A region, and the byte offsets in the image where it belongs.
#[derive(Debug)]
pub struct Region<'a> {
    /// What fills it.
    pub payload: Payload<'a>,
    /// Multiples of the block size.
    pub places: Vec<u64>,
}

/// What was done.
#[derive(Debug, Default)]
pub struct Written {
    /// The mapped ranges of the image, in order.
    pub ranges: Vec<Range>,
    /// Bytes written.
    pub bytes: u64,
}

/// A window on its way to the hashing thread: which region, its first block, the blocks that are
/// mapped, and their bytes (none: all zero).
struct Window {
    region: usize,
    first: u64,
    mapped: u64,
    bytes: Option<Arc<Vec<u8>>>,
}

/// Writes all regions into the image, which must read as zeros everywhere.
///
/// # Errors
/// When reading or writing fails.
pub fn write(regions: &[Region<'_>], image: &File, step: &Step) -> Result<Written> {
    let (sender, receiver) = sync_channel(AHEAD);
    std::thread::scope(|scope| {
        let hashing = scope.spawn(|| hash(receiver));
        let mut writer = Writer { image, step, sender, buffers: Vec::new(), bytes: 0 };
        let done =
            regions.iter().enumerate().try_for_each(|(index, region)| writer.region(index, region));
        let bytes = writer.bytes;
        // Ends the hashing thread.
        drop(writer);
        let sums = hashing.join().map_err(|_| anyhow!("the hashing thread died"))?;
        done?;
        let mut ranges = Vec::new();
        for (index, range) in sums {
            for place in regions.get(index).map_or(&[][..], |r| &r.places) {
                let shift = place / BLOCK;
                let (first, last) = (range.first + shift, range.last + shift);
                ranges.push(Range { first, last, sha256: range.sha256.clone() });
            }
        }
        ranges.sort();
        Ok(Written { ranges, bytes })
    })
}

struct Writer<'a> {
    image: &'a File,
    step: &'a Step,
    sender: SyncSender<Window>,
    buffers: Vec<Arc<Vec<u8>>>,
    bytes: u64,
}

impl Writer<'_> {
    fn region(&mut self, index: usize, region: &Region<'_>) -> Result<()> {
        match &region.payload {
            Payload::Memory(pages) => self.memory(index, pages, &region.places),
            Payload::File { file, size, needed } => {
                self.file(index, file, *size, needed, &region.places)
            }
            Payload::Zeros(blocks) => {
                (0..*blocks).step_by(WINDOW_BLOCKS as usize).try_for_each(|first| {
                    let count = (blocks - first).min(WINDOW_BLOCKS);
                    self.send(Window { region: index, first, mapped: bits(0, count), bytes: None })
                })
            }
        }
    }

    fn memory(&mut self, index: usize, pages: &Pages, places: &[u64]) -> Result<()> {
        for first in (0..pages.blocks()).step_by(WINDOW_BLOCKS as usize) {
            let present = |bit: &u64| pages.block(first + bit).is_some();
            let mapped = (0..WINDOW_BLOCKS).filter(present).fold(0, |all, bit| all | 1 << bit);
            if mapped == 0 {
                continue;
            }
            let mut buffer = self.buffer();
            let bytes = unshared(&mut buffer)?;
            for bit in 0..WINDOW_BLOCKS {
                let at = (bit * BLOCK) as usize;
                let block = pages.block(first + bit).unwrap_or(&ZEROS);
                bytes[at..at + BLOCK as usize].copy_from_slice(block);
            }
            self.window(index, first, mapped, buffer, places)?;
        }
        Ok(())
    }

    fn file(
        &mut self,
        index: usize,
        file: &File,
        size: u64,
        needed: &[std::ops::Range<u64>],
        places: &[u64],
    ) -> Result<()> {
        let mut needed = Needed { ranges: needed, next: 0 };
        let mut data = Data { file, size, start: 0, end: 0 };
        for first in (0..size.div_ceil(BLOCK)).step_by(WINDOW_BLOCKS as usize) {
            let offset = first * BLOCK;
            let length = (size - offset).min(WINDOW as u64);
            let mapped = needed.window(first);
            if data.next(offset)? >= offset + length {
                if mapped != 0 {
                    self.send(Window { region: index, first, mapped, bytes: None })?;
                }
                continue;
            }
            let mut buffer = self.buffer();
            let bytes = unshared(&mut buffer)?;
            file.read_exact_at(&mut bytes[..length as usize], offset)
                .with_context(|| format!("reading {length} bytes at {offset}"))?;
            bytes[length as usize..].fill(0);
            let filled = non_zero(bytes);
            if mapped | filled != 0 {
                self.window(index, first, mapped | filled, buffer, places)?;
            } else {
                self.buffers.push(buffer);
            }
        }
        Ok(())
    }

    /// Hands a window to the hashing thread and writes what is not zero in it.
    fn window(
        &mut self,
        region: usize,
        first: u64,
        mapped: u64,
        buffer: Arc<Vec<u8>>,
        places: &[u64],
    ) -> Result<()> {
        self.send(Window { region, first, mapped, bytes: Some(Arc::clone(&buffer)) })?;
        let filled = non_zero(&buffer) & mapped;
        for place in places {
            for (start, end) in runs(filled) {
                let piece = &buffer[(start * BLOCK) as usize..(end * BLOCK) as usize];
                let offset = place + (first + start) * BLOCK;
                self.image
                    .write_all_at(piece, offset)
                    .with_context(|| format!("writing {} bytes at {offset}", piece.len()))?;
                self.bytes += piece.len() as u64;
                self.step.advance(piece.len() as u64);
            }
        }
        self.buffers.push(buffer);
        Ok(())
    }

    fn send(&self, window: Window) -> Result<()> {
        self.sender.send(window).map_err(|_| anyhow!("the hashing thread died"))
    }

    /// A buffer that nobody else reads any more.
    fn buffer(&mut self) -> Arc<Vec<u8>> {
        match self.buffers.iter().position(|b| Arc::strong_count(b) == 1) {
            Some(free) => self.buffers.swap_remove(free),
            None => Arc::new(vec![0; WINDOW]),
        }
    }
}

fn unshared(buffer: &mut Arc<Vec<u8>>) -> Result<&mut Vec<u8>> {
    Arc::get_mut(buffer).ok_or_else(|| anyhow!("a buffer is still being read"))
}

/// A mask of the bits from `start` up to, not including, `end` (at most 64).
fn bits(start: u64, end: u64) -> u64 {
    let below = |n: u64| if n >= 64 { u64::MAX } else { (1 << n) - 1 };
    below(end) & !below(start)
}

/// The runs of set bits: first bit, first bit after the run.
fn runs(mask: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut left = mask;
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let start = u64::from(left.trailing_zeros());
        let length = u64::from((left >> start).trailing_ones());
        left &= !bits(start, start + length);
        Some((start, start + length))
    })
}

/// Which blocks of a window are not all zero.
fn non_zero(window: &[u8]) -> u64 {
    let blocks = window.chunks(BLOCK as usize);
    blocks
        .enumerate()
        .fold(0, |mask, (bit, block)| mask | u64::from(*block != ZEROS[..block.len()]) << bit)
}

/// Walks ranges of blocks window by window.
struct Needed<'a> {
    ranges: &'a [std::ops::Range<u64>],
    next: usize,
}

impl Needed<'_> {
    fn window(&mut self, first: u64) -> u64 {
        let end = first + WINDOW_BLOCKS;
        let mut mask = 0;
        while let Some(range) = self.ranges.get(self.next) {
            if range.start >= end {
                break;
            }
            mask |=
                bits(range.start.saturating_sub(first), range.end.min(end).saturating_sub(first));
            if range.end > end {
                break;
            }
            self.next += 1;
        }
        mask
    }
}

/// Walks the extents of a file; what lies between them reads as zeros and need not be read.
struct Data<'a> {
    file: &'a File,
    size: u64,
    start: u64,
    end: u64,
}

impl Data<'_> {
    /// The offset of the first data at or after `offset`; the file's size when there is none.
    fn next(&mut self, offset: u64) -> Result<u64> {
        if offset < self.end {
            return Ok(offset.max(self.start));
        }
        match seek(self.file, SeekFrom::Data(offset)) {
            Ok(start) => {
                self.start = start;
                self.end = seek(self.file, SeekFrom::Hole(start)).context("looking for a hole")?;
            }
            // No data up to the end.
            Err(Errno::NXIO) => (self.start, self.end) = (self.size, u64::MAX),
            // A filesystem without holes.
            Err(Errno::INVAL) => (self.start, self.end) = (offset, self.size),
            Err(error) => return Err(error).context("looking for data"),
        }
        Ok(self.start)
    }
}

/// Hashes windows as they arrive; a range ends at a gap, at a region's end, and when it is long.
fn hash(windows: Receiver<Window>) -> Vec<(usize, Range)> {
    let mut done = Vec::new();
    let mut open: Option<(usize, u64, u64, Sha256)> = None;
    let close = |open: &mut Option<(usize, u64, u64, Sha256)>, done: &mut Vec<(usize, Range)>| {
        if let Some((region, first, after, hasher)) = open.take() {
            let sha256 = artifact::hex(&hasher.finalize());
            done.push((region, Range { first, last: after - 1, sha256 }));
        }
    };
    for window in windows {
        for (start, end) in runs(window.mapped) {
            let (start, end) = (window.first + start, window.first + end);
            let mut at = start;
            while at < end {
                let stop = end.min((at / LONGEST_RANGE + 1) * LONGEST_RANGE);
                let follows = open.as_ref().is_some_and(|(region, _, after, _)| {
                    *region == window.region && *after == at && !at.is_multiple_of(LONGEST_RANGE)
                });
                if !follows {
                    close(&mut open, &mut done);
                }
                let (_, _, after, hasher) =
                    open.get_or_insert_with(|| (window.region, at, at, Sha256::new()));
                match &window.bytes {
                    Some(bytes) => {
                        let from = ((at - window.first) * BLOCK) as usize;
                        let to = ((stop - window.first) * BLOCK) as usize;
                        hasher.update(&bytes[from..to]);
                    }
                    None => (at..stop).for_each(|_| hasher.update(ZEROS)),
                }
                *after = stop;
                at = stop;
            }
        }
    }
    close(&mut open, &mut done);
    done
}
