//! The block index of one payload: the hashes of the stored frames, and of each block that is not
//! zero. It is checked against the manifest, then read as a whole; lengths in it are never trusted.
//!
//! Blocks keep the first 12 bytes of their SHA-256, because full hashes would cost 2 % of a typical
//! bundle. These 96 bits find the blocks that a device already has: a false match among 2^20
//! blocks has a probability of 2^-56. The proof is a frame's `content` hash over the blocks' *full*
//! hashes: a device that assembles a frame from blocks that it already has compares all 256 bits of
//! it. A frame that is decompressed instead is authenticated by the full hashes of its pieces.

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::limits::{
    BLOCK_HASH, BLOCK_SIZE, MAX_FRAME_BLOCKS, MAX_FRAMES, MAX_INDEX, MAX_STORED_FRAME, PIECE,
};
use crate::manifest::Payload;

/// Bytes of a full SHA-256.
const HASH: usize = 32;

/// A full SHA-256.
pub type Sha256Hash = [u8; HASH];

/// What the index keeps of a block's SHA-256: its first [`BLOCK_HASH`] bytes.
pub type BlockHash = [u8; BLOCK_HASH];

/// The first eight bytes of every index.
pub const MAGIC: [u8; 8] = *b"SLIPIDX1";

/// Bytes before the frame table.
const HEAD: usize = 36;

/// Bytes of one entry of the frame table.
const ENTRY: usize = 40;

/// SHA-256 of some bytes.
pub fn sha256(bytes: &[u8]) -> Sha256Hash {
    Sha256::digest(bytes).into()
}

/// The part of a block's SHA-256 that the index keeps.
pub fn truncate_hash(hash: &Sha256Hash) -> BlockHash {
    let mut out = [0; BLOCK_HASH];
    for (to, from) in out.iter_mut().zip(hash) {
        *to = *from;
    }
    out
}

/// Lower-case hexadecimal.
pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Whether every byte is zero; a block for which this holds has no hash.
pub fn is_zero(bytes: &[u8]) -> bool {
    static ZERO: [u8; BLOCK_SIZE] = [0; BLOCK_SIZE];
    bytes.chunks(BLOCK_SIZE).all(|chunk| ZERO.get(..chunk.len()) == Some(chunk))
}

/// One frame, as the index describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// Its number, from 0.
    pub number: u32,
    /// The first block of the payload that it holds.
    pub first_block: u32,
    /// How many blocks it holds.
    pub blocks: u32,
    /// Its length as stored, in bytes.
    pub stored: u32,
    /// Where it starts in the payload's `.zst` member.
    pub data_offset: u64,
    /// The number, in the payload's list, of the frame's first piece.
    first_piece: u32,
    /// SHA-256 of the full SHA-256s of its blocks that are not zero, one after the other.
    pub content: Sha256Hash,
    /// The number of this frame's first hash: how many hashes the index has before it.
    pub first_hash: u32,
}

/// A checked index.
#[derive(Debug, Clone)]
pub struct BlockIndex {
    size: u64,
    frames: Vec<Frame>,
    /// The hashes of the stored pieces of all frames.
    pieces: Vec<u8>,
    /// One bit per block, lowest bit first: 1 where the block is not zero.
    used: Vec<u8>,
    hashes: Vec<u8>,
}

/// Takes fixed-width little-endian fields off the front.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let (head, rest) = self
            .0
            .split_at_checked(n)
            .ok_or_else(|| Error::BadIndex { reason: "the index is too short".to_owned() })?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }
}

impl BlockIndex {
    /// Reads the index of `payload`. The caller has already compared its hash with the manifest.
    ///
    /// # Errors
    /// When a length, a sum or a bit is not what the format prescribes.
    pub fn parse(bytes: &[u8], payload: &Payload) -> Result<Self> {
        let bad = |reason: String| Error::BadIndex { reason };
        let mut fields = Fields(bytes);
        if fields.array::<8>()? != MAGIC {
            return Err(bad("the index does not begin with SLIPIDX1".to_owned()));
        }
        let size = fields.u64()?;
        if size != payload.size {
            return Err(bad(format!(
                "the index is for {size} bytes, but the payload has {}",
                payload.size
            )));
        }
        let (block, width) = (fields.u32()?, fields.u32()?);
        let (count, pieces, hashes) = (fields.u32()?, fields.u32()?, fields.u32()?);
        if (block as usize, width as usize) != (BLOCK_SIZE, BLOCK_HASH) {
            return Err(bad(format!(
                "the index has blocks of {block} bytes and hashes of {width} bytes"
            )));
        }
        if count > MAX_FRAMES {
            return Err(Error::BadLength {
                what: "the frame table".to_owned(),
                found: u64::from(count),
                allowed: u64::from(MAX_FRAMES),
            });
        }
        let blocks = payload.blocks();
        // The sizes of the parts must add up before any part is copied; u64 cannot overflow here.
        let expected = HEAD as u64
            + u64::from(count) * ENTRY as u64
            + u64::from(pieces) * HASH as u64
            + blocks.div_ceil(8)
            + u64::from(hashes) * BLOCK_HASH as u64;
        if expected != bytes.len() as u64 {
            return Err(bad(format!(
                "the index has {} bytes, but its parts need {expected}",
                bytes.len()
            )));
        }
        let table = fields.take(count as usize * ENTRY)?;
        let pieces = fields.take(pieces as usize * HASH)?.to_vec();
        let used = fields.take(blocks.div_ceil(8) as usize)?.to_vec();
        let hashes = fields.take(hashes as usize * BLOCK_HASH)?.to_vec();
        let frames = Vec::with_capacity(count as usize);
        let mut index = Self { size, frames, pieces, used, hashes };
        index.read_table(table, blocks, payload.data.size)?;
        Ok(index)
    }

    fn read_table(&mut self, table: &[u8], blocks: u64, data: u64) -> Result<()> {
        let bad = |reason: String| Error::BadIndex { reason };
        let (mut first_block, mut data_offset) = (0_u64, 0_u64);
        let (mut first_piece, mut first_hash) = (0_u32, 0_u32);
        for (number, entry) in (0_u32..).zip(table.chunks_exact(ENTRY)) {
            let mut fields = Fields(entry);
            let (count, stored) = (fields.u32()?, fields.u32()?);
            // Only the frame of an empty payload holds no block.
            if count > MAX_FRAME_BLOCKS || (count == 0) != (blocks == 0) {
                return Err(bad(format!("frame {number} has {count} blocks")));
            }
            if stored == 0 || stored > MAX_STORED_FRAME {
                return Err(bad(format!("frame {number} is stored in {stored} bytes")));
            }
            if first_block + u64::from(count) > blocks {
                return Err(bad(format!("frame {number} ends after the payload's end")));
            }
            let frame = Frame {
                number,
                // Bounded by `blocks`, which MAX_PAYLOAD keeps far below 2^32.
                first_block: first_block as u32,
                blocks: count,
                stored,
                data_offset,
                first_piece,
                content: fields.array()?,
                first_hash,
            };
            let end = first_block as u32 + count;
            first_hash +=
                (frame.first_block..end).map(|b| u32::from(!self.is_zero(b))).sum::<u32>();
            first_block += u64::from(count);
            data_offset += u64::from(stored);
            first_piece += stored.div_ceil(PIECE as u32);
            self.frames.push(frame);
        }
        if first_block != blocks || (blocks == 0 && self.frames.len() != 1) {
            return Err(bad(format!("the frames hold {first_block} of {blocks} blocks")));
        }
        if data_offset != data {
            return Err(bad(format!(
                "the frames have {data_offset} bytes, but the manifest says {data}"
            )));
        }
        if u64::from(first_piece) * HASH as u64 != self.pieces.len() as u64 {
            return Err(bad(format!(
                "the frames have {first_piece} pieces, but the number of piece hashes differs"
            )));
        }
        if u64::from(first_hash) * BLOCK_HASH as u64 != self.hashes.len() as u64 {
            return Err(bad(format!(
                "{first_hash} blocks are not zero, but the number of block hashes differs"
            )));
        }
        let beyond = (blocks..blocks.div_ceil(8) * 8).any(|b| !self.is_zero(b as u32));
        if beyond {
            return Err(bad("a bit is set for a block after the payload's end".to_owned()));
        }
        Ok(())
    }

    /// The payload's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How many blocks the payload has.
    pub fn blocks(&self) -> u32 {
        // MAX_PAYLOAD keeps this far below 2^32.
        self.size.div_ceil(BLOCK_SIZE as u64) as u32
    }

    /// The frames, in order.
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// How many blocks are not zero.
    pub fn used_blocks(&self) -> u32 {
        (self.hashes.len() / BLOCK_HASH) as u32
    }

    /// Whether a block is all zeros (also true for blocks that the payload does not have).
    pub fn is_zero(&self, block: u32) -> bool {
        self.used.get(block as usize / 8).is_none_or(|byte| byte >> (block % 8) & 1 == 0)
    }

    /// The hash of this number, in payload order, from 0 to [`BlockIndex::used_blocks`].
    pub fn hash(&self, number: u32) -> Option<&[u8]> {
        let start = number as usize * BLOCK_HASH;
        self.hashes.get(start..start + BLOCK_HASH)
    }

    /// A frame's blocks with their hashes; `None` for a block of zeros.
    pub fn hashes(&self, frame: &Frame) -> impl Iterator<Item = (u32, Option<&[u8]>)> {
        let start = frame.first_hash as usize * BLOCK_HASH;
        let mut hashes = self.hashes.get(start..).unwrap_or_default().chunks_exact(BLOCK_HASH);
        (frame.first_block..frame.first_block + frame.blocks)
            .map(move |block| (block, if self.is_zero(block) { None } else { hashes.next() }))
    }

    /// The lengths and hashes of the pieces that a frame is stored in.
    pub fn pieces(&self, frame: &Frame) -> impl Iterator<Item = (usize, &[u8])> {
        let start = frame.first_piece as usize * HASH;
        let hashes = self.pieces.get(start..).unwrap_or_default().chunks_exact(HASH);
        let stored = frame.stored as usize;
        (0..stored).step_by(PIECE).map(move |at| (stored - at).min(PIECE)).zip(hashes)
    }

    /// Where a block starts in the payload, in bytes.
    pub fn offset(block: u32) -> u64 {
        u64::from(block) * BLOCK_SIZE as u64
    }

    /// How many bytes a frame decompresses to; less than the sum of its blocks if the last one is short.
    pub fn content_size(&self, frame: &Frame) -> u64 {
        let start = Self::offset(frame.first_block);
        Self::offset(frame.first_block + frame.blocks).min(self.size).saturating_sub(start)
    }
}

/// What the writer knows of one frame.
#[derive(Debug, Clone)]
pub(crate) struct FrameEntry {
    pub blocks: u32,
    pub stored: u32,
    pub pieces: Vec<Sha256Hash>,
    pub content: Sha256Hash,
}

/// Collects an index while frames are written.
#[derive(Debug, Default)]
pub(crate) struct IndexBuilder {
    pub frames: Vec<FrameEntry>,
    used: Vec<u8>,
    hashes: Vec<u8>,
    blocks: u32,
}

impl IndexBuilder {
    /// Adds the next block; `None` for zeros.
    pub fn block(&mut self, hash: Option<&BlockHash>) {
        if self.blocks.is_multiple_of(8) {
            self.used.push(0);
        }
        if let Some(hash) = hash {
            if let Some(byte) = self.used.last_mut() {
                *byte |= 1 << (self.blocks % 8);
            }
            self.hashes.extend_from_slice(hash);
        }
        self.blocks += 1;
    }

    /// The index's bytes.
    pub fn finish(&self, size: u64) -> Result<Vec<u8>> {
        let hashes = self.hashes.len() / BLOCK_HASH;
        let pieces: usize = self.frames.iter().map(|frame| frame.pieces.len()).sum();
        let length =
            HEAD + self.frames.len() * ENTRY + pieces * HASH + self.used.len() + self.hashes.len();
        if length as u64 > MAX_INDEX || self.frames.len() > MAX_FRAMES as usize {
            return Err(Error::BadLength {
                what: "the block index".to_owned(),
                found: length as u64,
                allowed: MAX_INDEX,
            });
        }
        let mut out = Vec::with_capacity(length);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&size.to_le_bytes());
        for value in [BLOCK_SIZE, BLOCK_HASH, self.frames.len(), pieces, hashes] {
            // MAX_INDEX bounds each of these numbers.
            out.extend_from_slice(&(value as u32).to_le_bytes());
        }
        for frame in &self.frames {
            out.extend_from_slice(&frame.blocks.to_le_bytes());
            out.extend_from_slice(&frame.stored.to_le_bytes());
            out.extend_from_slice(&frame.content);
        }
        for piece in self.frames.iter().flat_map(|frame| &frame.pieces) {
            out.extend_from_slice(piece);
        }
        out.extend_from_slice(&self.used);
        out.extend_from_slice(&self.hashes);
        Ok(out)
    }
}
