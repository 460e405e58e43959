//! A buffer for direct access to a disk: its first byte is on a page boundary.

use std::ops::{Deref, DerefMut};

use crate::storage::ALIGNMENT;

/// Bytes of one large transfer: an SD card's allocation unit is a multiple of it, and a few such buffers
/// fit into a small machine's memory.
pub const TRANSFER: usize = 1 << 20;

/// Bytes of one large read; each reading thread has one such buffer.
pub const LOOK: usize = 1 << 19;

/// Aligned bytes of a fixed length.
#[derive(Debug)]
pub struct AlignedBuffer {
    store: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuffer {
    /// Zeros.
    pub fn new(length: usize) -> Self {
        // The buffer never grows, so the alignment stays.
        let store = vec![0; length + ALIGNMENT];
        let start = store.as_ptr().align_offset(ALIGNMENT);
        Self { store, start, length }
    }

    /// A copy of some bytes.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buffer = Self::new(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer
    }

    /// The first `n` bytes, or all when there are fewer.
    pub fn first(&self, n: usize) -> &[u8] {
        self.get(..n).unwrap_or(self)
    }

    /// The first `n` bytes, or all when there are fewer, mutable.
    pub fn first_mut(&mut self, n: usize) -> &mut [u8] {
        let n = n.min(self.length);
        self.get_mut(..n).unwrap_or_default()
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.store.get(self.start..self.start + self.length).unwrap_or_default()
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.store.get_mut(self.start..self.start + self.length).unwrap_or_default()
    }
}
