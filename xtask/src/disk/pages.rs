//! A region of the disk in memory, of which only the blocks that were written exist. Tables and FAT
//! volumes are created here, so that their checksums can be computed without reading them back.

use std::io::{self, Read, Seek, SeekFrom, Write};

use super::layout::BLOCK;
use super::seek_position;

const PAGE: usize = BLOCK as usize;

/// A sparse, seekable byte store of a fixed length.
pub struct SparsePages {
    length: u64,
    position: u64,
    pages: Vec<Option<Box<[u8; PAGE]>>>,
}

impl std::fmt::Debug for SparsePages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let written = self.pages.iter().flatten().count();
        write!(f, "Pages({} bytes, {written} blocks written)", self.length)
    }
}

impl SparsePages {
    /// An unwritten region of `length` bytes.
    pub fn new(length: u64) -> Self {
        let count = usize::try_from(length.div_ceil(BLOCK)).unwrap_or(usize::MAX);
        Self { length, position: 0, pages: vec![None; count] }
    }

    /// Block `index`, if it was written.
    pub fn block(&self, index: u64) -> Option<&[u8; PAGE]> {
        let index = usize::try_from(index).ok()?;
        self.pages.get(index)?.as_deref()
    }

    /// How many blocks there are, written or not.
    pub fn blocks(&self) -> u64 {
        self.pages.len() as u64
    }

    /// How many blocks were written.
    pub fn written(&self) -> u64 {
        self.pages.iter().flatten().count() as u64
    }

    /// Writes at an offset, without moving the position.
    ///
    /// # Errors
    /// When the bytes reach beyond the region's end.
    pub fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let before = self.position;
        self.position = offset;
        let done = self.write_all(bytes);
        self.position = before;
        done
    }

    /// Reads at an offset, without moving the position.
    ///
    /// # Errors
    /// When the bytes reach beyond the region's end.
    pub fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let before = self.position;
        self.position = offset;
        let done = self.read_exact(bytes);
        self.position = before;
        done
    }

    /// The current position: page, offset in it, and how many of `wanted` bytes it can serve.
    fn span(&self, wanted: usize) -> (usize, usize, usize) {
        let page = (self.position / BLOCK) as usize;
        let within = (self.position % BLOCK) as usize;
        let left = self.length.saturating_sub(self.position);
        let count = wanted.min(PAGE - within).min(usize::try_from(left).unwrap_or(usize::MAX));
        (page, within, count)
    }
}

impl Read for SparsePages {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let (page, within, count) = self.span(out.len());
        match self.pages.get(page) {
            Some(Some(page)) => out[..count].copy_from_slice(&page[within..within + count]),
            _ => out[..count].fill(0),
        }
        self.position += count as u64;
        Ok(count)
    }
}

impl Write for SparsePages {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (page, within, count) = self.span(bytes.len());
        if let (Some(page), true) = (self.pages.get_mut(page), count > 0) {
            let page = page.get_or_insert_with(|| Box::new([0; PAGE]));
            page[within..within + count].copy_from_slice(&bytes[..count]);
        }
        self.position += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for SparsePages {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.position = seek_position(to, self.length, self.position).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "seeking to before the region's start")
        })?;
        Ok(self.position)
    }
}
