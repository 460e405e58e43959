//! Images that were packed in many small zstd frames, as Slipway does: frames without data for the
//! card are skipped, the others are unpacked by several threads, a few frames ahead. Memory is
//! bounded by the frames' size; a file in one large frame is read as a stream.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use zstd::bulk::Decompressor;

use super::source::ImageRange;

/// The largest unpacked frame in bytes: twice the size of Slipway's frames.
const LARGEST: u64 = 64 << 20;
/// The most threads: each holds one frame, and fewer threads are already faster than any card.
const THREADS: usize = 3;
/// The magic number of a frame (RFC 8878, 3.1.1), and of a skippable frame without its last four
/// bits (3.1.2).
const MAGIC: u32 = 0xfd2f_b528;
const SKIPPABLE: u32 = 0x184d_2a50;
/// The longest header of a frame (RFC 8878, 3.1.1.1): magic number, descriptor, window, dictionary, size.
const HEADER: usize = 4 + 1 + 1 + 4 + 8;
/// zstd's own bound for incompressible data (`ZSTD_COMPRESSBOUND`), and space for headers.
const fn compressed_bound(size: u64) -> u64 {
    size + (size >> 8) + (128 << 10)
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFrame {
    /// Where it begins in the file.
    stored: u64,
    /// Its bytes in the file.
    length: u64,
    /// Where its content begins in the image.
    pub offset: u64,
    /// Bytes of its content.
    pub size: u64,
}

/// The frames of a file, from their headers only. `None` when it does not consist of small frames
/// with known sizes: reading it as a stream then reports what is wrong.
///
/// # Errors
/// When the file cannot be read.
pub fn scan_frames(file: &File) -> io::Result<Option<Vec<ImageFrame>>> {
    let end = file.metadata()?.len();
    let (mut at, mut offset, mut frames) = (0, 0, Vec::new());
    while at < end {
        let Some((length, size)) = read_frame_header(file, at, end)? else { return Ok(None) };
        if size > LARGEST || length > compressed_bound(size) {
            return Ok(None);
        }
        frames.push(ImageFrame { stored: at, length, offset, size });
        (at, offset) = (at + length, offset + size);
    }
    Ok(Some(frames))
}

/// Bytes of the frame at an offset, stored and unpacked.
fn read_frame_header(file: &File, at: u64, end: u64) -> io::Result<Option<(u64, u64)>> {
    let mut header = [0; HEADER];
    let there = HEADER.min(usize::try_from(end - at).unwrap_or(HEADER));
    file.read_exact_at(&mut header[..there], at)?;
    let number = |from: usize, count: usize| {
        let bytes = header[from..from + count].iter().rev();
        bytes.fold(0_u64, |all, byte| all << 8 | u64::from(*byte))
    };
    let magic = number(0, 4) as u32;
    if magic & !0xf == SKIPPABLE {
        let length = 8 + number(4, 4);
        return Ok((there >= 8 && length <= end - at).then_some((length, 0)));
    }
    let descriptor = header[4];
    // Bit 3 is reserved; no image needs a dictionary.
    if magic != MAGIC || descriptor & 0b1000 != 0 || descriptor & 0b11 != 0 {
        return Ok(None);
    }
    let single = descriptor >> 5 & 1 == 1;
    let field = 5 + usize::from(!single);
    let (size, width) = match (descriptor >> 6, single) {
        (0, false) => return Ok(None),
        (0, true) => (number(field, 1), 1),
        (1, _) => (number(field, 2) + 256, 2),
        (2, _) => (number(field, 4), 4),
        _ => (number(field, 8), 8),
    };
    let mut next = at + (field + width) as u64;
    loop {
        let mut block = [0; 3];
        if next + 3 > end {
            return Ok(None);
        }
        file.read_exact_at(&mut block, next)?;
        let bits = u64::from(block[0]) | u64::from(block[1]) << 8 | u64::from(block[2]) << 16;
        let content = match bits >> 1 & 3 {
            // Raw, one repeated byte, compressed.
            0 | 2 => bits >> 3,
            1 => 1,
            _ => return Ok(None),
        };
        next += 3 + content;
        if bits & 1 == 1 {
            break;
        }
    }
    let checksum = u64::from(descriptor >> 2 & 1) * 4;
    let length = next + checksum - at;
    Ok((length <= end - at).then_some((length, size)))
}

/// The frames with data for the card, unpacked in order.
pub struct FrameUnpacker {
    wanted: Vec<ImageFrame>,
    /// One for each thread; they take turns.
    unpacked: Vec<Receiver<io::Result<Vec<u8>>>>,
    /// How many frames were taken from the threads, and the last of them.
    taken: usize,
    content: Vec<u8>,
    /// Buffers for reuse: allocating them from the system for each frame takes as long as
    /// unpacking.
    spare: Spare,
}

type Spare = Arc<Mutex<Vec<Vec<u8>>>>;

impl FrameUnpacker {
    /// Starts to unpack. The threads end when this value is dropped.
    pub fn start(file: File, frames: &[ImageFrame], ranges: &[ImageRange]) -> Self {
        let reaches = |frame: &&ImageFrame| {
            let next = ranges.partition_point(|r| r.offset + r.size <= frame.offset);
            ranges.get(next).is_some_and(|r| r.offset < frame.offset + frame.size)
        };
        let wanted: Vec<ImageFrame> = frames.iter().filter(reaches).cloned().collect();
        let cores = crate::parallel::cores();
        let threads = cores.min(THREADS).min(wanted.len().max(1));
        let (file, spare) = (Arc::new(file), Spare::default());
        let unpacked = (0..threads)
            .map(|thread| {
                // No buffering: a thread that has unpacked a frame waits until the frame is taken.
                let (sender, receiver) = sync_channel(0);
                let own: Vec<ImageFrame> =
                    wanted.iter().skip(thread).step_by(threads).cloned().collect();
                let (file, spare) = (Arc::clone(&file), Arc::clone(&spare));
                std::thread::spawn(move || {
                    let mut stored = Vec::new();
                    for frame in own {
                        let free = spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
                        let mut content = free.unwrap_or_default();
                        let result = unpack_frame(&file, &frame, &mut stored, &mut content);
                        // The receiver is gone when the pass has ended early.
                        if sender.send(result.map(|()| content)).is_err() {
                            return;
                        }
                    }
                });
                receiver
            })
            .collect();
        Self { wanted, unpacked, taken: 0, content: Vec::new(), spare }
    }

    /// Fills a buffer from an offset within the ranges that is not before that of an earlier call.
    ///
    /// # Errors
    /// When a frame cannot be read or unpacked.
    pub fn read_at(&mut self, mut offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            let current = self.taken.checked_sub(1).and_then(|last| self.wanted.get(last));
            match current {
                Some(frame) if offset < frame.offset => {
                    return Err(io::ErrorKind::InvalidInput.into());
                }
                Some(frame) if offset < frame.offset + frame.size => {
                    let from = (offset - frame.offset) as usize;
                    let count = buffer.len().min(self.content.len() - from);
                    let (now, later) = buffer.split_at_mut(count);
                    now.copy_from_slice(&self.content[from..from + count]);
                    (buffer, offset) = (later, offset + count as u64);
                }
                _ => self.next()?,
            }
        }
        Ok(())
    }

    fn next(&mut self) -> io::Result<()> {
        if self.taken == self.wanted.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let threads = self.unpacked.len();
        let dead = |_| io::Error::other("an unpacking thread panicked");
        // Returned first, so that no thread needs more than one buffer.
        let used = std::mem::take(&mut self.content);
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).push(used);
        self.content = self.unpacked[self.taken % threads].recv().map_err(dead)??;
        self.taken += 1;
        Ok(())
    }
}

/// Unpacks a frame, whose content is as long as its header says.
fn unpack_frame(
    file: &File,
    frame: &ImageFrame,
    stored: &mut Vec<u8>,
    content: &mut Vec<u8>,
) -> io::Result<()> {
    let (length, size) = (frame.length as usize, frame.size as usize);
    stored.resize(length, 0);
    file.read_exact_at(stored, frame.stored)?;
    content.clear();
    content.reserve_exact(size);
    let unpacked = Decompressor::new()?.decompress_to_buffer(stored, content)?;
    if unpacked != size {
        let text = format!("a frame has {unpacked} bytes, but its header says {size}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok(())
}
