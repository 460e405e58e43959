//! Reads a slot from the device and compares it with a block index, on all cores: before an install, to
//! find the blocks that are already there; after it, to verify everything.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use bundle::index::{Sha256Hash, is_zero, sha256};
use bundle::{BLOCK_SIZE, BlockIndex, Frame};
use sha2::{Digest, Sha256};

use crate::buffer::{AlignedBuffer, LOOK};
use crate::storage::Storage;

/// Maximum number of threads: more would only cause seeks on a card.
const THREADS: usize = 4;

/// The result for one frame.
#[derive(Debug, Default)]
pub struct ScannedFrame {
    /// The blocks that differ from the index, by number in the payload.
    pub wrong: Vec<u32>,
    /// Whether the frame is verified: no block is wrong, and the full hashes of all blocks together match
    /// the index's content hash.
    pub proven: bool,
}

/// Compares frames with the device. `first` is the payload's first block if it is not on the device yet, because
/// it is written last. `each` is called in any order; an error passed to it is the device's.
///
/// # Errors
/// The error that `each` returns.
pub fn compare_frames<E: Send>(
    device: &dyn Storage,
    index: &BlockIndex,
    frames: &[Frame],
    first: Option<&[u8]>,
    each: impl Fn(&Frame, io::Result<ScannedFrame>) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let next = AtomicUsize::new(0);
    let failure: Mutex<Option<E>> = Mutex::new(None);
    let failed = || failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let work = || {
        let mut buffer = AlignedBuffer::new(LOOK);
        while let Some(frame) = frames.get(next.fetch_add(1, Ordering::Relaxed)) {
            if failed().is_some() {
                return;
            }
            let found = compare_frame(device, index, frame, first, &mut buffer);
            if let Err(error) = each(frame, found) {
                *failed() = Some(error);
                return;
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS);
    std::thread::scope(|scope| {
        for _ in 1..threads.min(frames.len()) {
            scope.spawn(work);
        }
        work();
    });
    failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).map_or(Ok(()), Err)
}

fn compare_frame(
    device: &dyn Storage,
    index: &BlockIndex,
    frame: &Frame,
    first: Option<&[u8]>,
    buffer: &mut AlignedBuffer,
) -> io::Result<ScannedFrame> {
    let mut found = ScannedFrame::default();
    let mut content = Sha256::new();
    let mut hashes = index.hashes(frame);
    let mut offset = BlockIndex::offset(frame.first_block);
    let end = offset + index.content_size(frame);
    while offset < end {
        // At most LOOK.
        let length = (end - offset).min(LOOK as u64) as usize;
        let bytes = buffer.first_mut(length);
        device.read_back(offset, bytes)?;
        if let (0, Some(first)) = (offset, first) {
            bytes.iter_mut().zip(first).for_each(|(to, from)| *to = *from);
        }
        for (block, (number, expected)) in bytes.chunks(BLOCK_SIZE).zip(&mut hashes) {
            let held = match expected {
                None => is_zero(block),
                Some(expected) => {
                    let hash = sha256(block);
                    content.update(hash);
                    hash.starts_with(expected)
                }
            };
            if !held {
                found.wrong.push(number);
            }
        }
        offset += length as u64;
    }
    found.proven = found.wrong.is_empty() && Sha256Hash::from(content.finalize()) == frame.content;
    Ok(found)
}

/// Whether enough of a payload seems to be in place to read the whole slot: samples blocks that are not zero,
/// evenly spread.
pub fn seems_similar(device: &dyn Storage, index: &BlockIndex) -> bool {
    let used = index.used_blocks();
    let step = (used / SAMPLES).max(1);
    let mut buffer = AlignedBuffer::new(BLOCK_SIZE);
    let (mut seen, mut held) = (0_u32, 0_u32);
    let blocks = index.frames().iter().flat_map(|frame| index.hashes(frame));
    let blocks = blocks.filter_map(|(block, hash)| Some((block, hash?)));
    for (block, expected) in blocks.step_by(step as usize) {
        let offset = BlockIndex::offset(block);
        // At most BLOCK_SIZE.
        let length = (index.size() - offset).min(BLOCK_SIZE as u64) as usize;
        let bytes = buffer.first_mut(length);
        seen += 1;
        if device.read_back(offset, bytes).is_ok() && sha256(bytes).starts_with(expected) {
            held += 1;
        }
    }
    held * WORTHWHILE >= seen.max(1)
}

/// Number of sampled blocks: enough to detect a share of one sixteenth, and even a card reads them in 0.2 s.
pub const SAMPLES: u32 = 128;

/// A slot is read as a whole if at least one block in this many is in place: reading a card is about four times as
/// fast as writing, and causes no wear.
pub const WORTHWHILE: u32 = 16;
