//! The pipeline from the image to the card: one thread reads and unpacks, one verifies the block
//! map's checksums, several write, several read back what was flushed, all in parallel and with a
//! fixed amount of memory.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::ScopedJoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use super::card::{AlignedMemory, CardIo};
use super::source::ImageSource;
use crate::artifact::hex;
use crate::disk::layout::BLOCK;
use crate::progress::{ProgressStep, ProgressUnit};

/// The maximum size of a write in bytes: the allocation unit of an SD card (SD specification, part
/// 1, 4.10.2: up to 4 MiB for cards below 64 GB). Pieces end at multiples of it.
pub const PIECE: u64 = 4 << 20;
/// How many bytes at either end of the image are written last: the partition table, and what a boot
/// ROM reads from the first sectors.
pub const EDGE: u64 = 1 << 20;
/// How many bytes are flushed, and then read back, together.
const BATCH: u64 = 64 << 20;
/// Threads that write: as many requests keep a device busy.
const WRITERS: usize = 3;
/// Threads that read back.
const CHECKERS: usize = 3;
/// Pieces in memory: 64 MiB.
const BUFFERS: usize = 16;
/// How long the reader waits for a buffer before it checks whether another thread has failed.
const BUFFER_TIMEOUT: Duration = Duration::from_millis(100);
/// With this many failed pieces the card is considered broken.
const MOST_WRONG: usize = 64;

/// The unit of writing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImagePiece {
    /// Byte offset.
    pub offset: u64,
    /// Bytes, at most [`PIECE`].
    pub size: usize,
    /// The range of the source that it belongs to.
    range: usize,
    /// Whether it is the last of its range.
    last: bool,
    /// Whether it is written last, after everything else was verified.
    pub held: bool,
}

/// Cuts what must reach the card into pieces.
pub fn cut_into_pieces(source: &ImageSource) -> Vec<ImagePiece> {
    let tail = source.size.saturating_sub(EDGE).max(EDGE);
    let mut pieces = Vec::new();
    for (index, range) in source.ranges.iter().enumerate() {
        let (mut at, end) = (range.offset, range.offset + range.size);
        while at < end {
            let cuts = [(at / PIECE + 1) * PIECE, BLOCK, EDGE, tail, end];
            let next = cuts.into_iter().filter(|cut| *cut > at).min().unwrap_or(end);
            pieces.push(ImagePiece {
                offset: at,
                size: (next - at) as usize,
                range: index,
                last: next == end,
                held: at < EDGE || at >= tail,
            });
            at = next;
        }
    }
    pieces
}

/// The expected checksum of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PieceChecksum {
    whole: [u8; 32],
    /// Of its first block.
    first: [u8; 32],
}

impl PieceChecksum {
    /// Of these bytes.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let first = &bytes[..bytes.len().min(BLOCK as usize)];
        Self { whole: Sha256::digest(bytes).into(), first: Sha256::digest(first).into() }
    }
}

/// The result of a pass over the image.
#[derive(Debug)]
pub struct PassResult {
    /// The expected checksum of each piece; `None` for those that are not read back.
    pub sums: Vec<Option<PieceChecksum>>,
    /// The pieces that are written last, with their bytes.
    pub held: Vec<(usize, AlignedMemory)>,
    /// The pieces that could not be written, or that failed verification, in order.
    pub wrong: Vec<usize>,
}

/// Whether the medium fails at this place only, rather than the whole device.
pub fn is_local(error: &io::Error) -> bool {
    let medium = [Errno::IO, Errno::REMOTEIO, Errno::NODATA, Errno::ILSEQ, Errno::TIMEDOUT];
    medium.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// Whether the card contains this piece. A place that cannot be read does not.
///
/// # Errors
/// When the device as a whole fails.
pub fn piece_matches(
    card: &dyn CardIo,
    piece: &ImagePiece,
    sum: &PieceChecksum,
    buffer: &mut AlignedMemory,
) -> Result<bool> {
    let bytes = buffer.part(piece.size);
    match card.read_at(piece.offset, bytes) {
        Ok(()) => Ok(PieceChecksum::from_bytes(bytes).whole == sum.whole),
        Err(error) if is_local(&error) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("reading back at {}", piece.offset)),
    }
}

/// Whether the card still contains the first block of this piece.
///
/// # Errors
/// As [`piece_matches`].
pub fn first_block_matches(
    card: &dyn CardIo,
    piece: &ImagePiece,
    sum: &PieceChecksum,
    buffer: &mut AlignedMemory,
) -> Result<bool> {
    let bytes = buffer.part(piece.size.min(BLOCK as usize));
    match card.read_at(piece.offset, bytes) {
        Ok(()) => Ok(PieceChecksum::from_bytes(bytes).first == sum.first),
        Err(error) if is_local(&error) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("reading back at {}", piece.offset)),
    }
}

/// Pieces that are flushed together.
struct Batch {
    pieces: Range<usize>,
    left: AtomicUsize,
}

fn group_into_batches(pieces: &[ImagePiece]) -> Vec<Batch> {
    let mut batches = Vec::new();
    let (mut start, mut size, mut count) = (0, 0, 0);
    for (index, piece) in pieces.iter().enumerate() {
        if !piece.held {
            size += piece.size as u64;
            count += 1;
        }
        if size >= BATCH || index + 1 == pieces.len() {
            batches.push(Batch { pieces: start..index + 1, left: AtomicUsize::new(count) });
            (start, size, count) = (index + 1, 0, 0);
        }
    }
    batches
}

struct Sending<'a> {
    source: &'a ImageSource,
    pieces: &'a [ImagePiece],
    card: &'a dyn CardIo,
    read_back: bool,
    batches: Vec<Batch>,
    sums: Vec<OnceLock<PieceChecksum>>,
    wrong: Mutex<Vec<usize>>,
    /// A thread has failed: all others end.
    stop: AtomicBool,
    written: ProgressStep,
    checked: Option<ProgressStep>,
}

type Full = (usize, AlignedMemory);

/// Sends all pieces but the held ones to the card, and reads them back on request.
///
/// # Errors
/// When the image cannot be read or is not what its block map says, the device as a whole fails, or
/// too many pieces fail.
pub fn send_pieces(
    source: &ImageSource,
    pieces: &[ImagePiece],
    card: &dyn CardIo,
    read_back: bool,
) -> Result<PassResult> {
    let total = pieces.iter().filter(|p| !p.held).map(|p| p.size as u64).sum();
    let name = source.path.file_name().unwrap_or("image");
    let sending = Sending {
        source,
        pieces,
        card,
        read_back,
        batches: group_into_batches(pieces),
        sums: pieces.iter().map(|_| OnceLock::new()).collect(),
        wrong: Mutex::default(),
        stop: AtomicBool::new(false),
        written: ProgressStep::new("write", name, total, ProgressUnit::Bytes),
        checked: read_back
            .then(|| ProgressStep::new("check", "reading back", total, ProgressUnit::Bytes)),
    };
    let held = sending.run()?;
    card.flush().context("flushing the card")?;
    let mut wrong = sending.wrong.into_inner().unwrap_or_else(PoisonError::into_inner);
    wrong.sort_unstable();
    wrong.dedup();
    let sums = sending.sums.into_iter().map(OnceLock::into_inner).collect();
    Ok(PassResult { sums, held, wrong })
}

impl Sending<'_> {
    fn run(&self) -> Result<Vec<Full>> {
        let (free, empty) = sync_channel(BUFFERS);
        for _ in 0..BUFFERS {
            free.send(AlignedMemory::new(PIECE as usize)).context("waiting for a buffer")?;
        }
        let (read, summing) = sync_channel(BUFFERS);
        let (summed, writing) = sync_channel(BUFFERS);
        let (flushed, checking) = channel();
        let (writing, checking) = (Mutex::new(writing), Mutex::new(checking));
        std::thread::scope(|scope| {
            let (writing, checking) = (&writing, &checking);
            let mut workers: Vec<ScopedJoinHandle<'_, Result<()>>> = Vec::new();
            for _ in 0..WRITERS {
                let (free, flushed) = (free.clone(), flushed.clone());
                workers
                    .push(scope.spawn(move || self.stopping(self.write(writing, &free, &flushed))));
            }
            for _ in 0..if self.read_back { CHECKERS } else { 0 } {
                workers.push(scope.spawn(move || self.stopping(self.check(checking))));
            }
            let summer = scope.spawn(move || self.stopping(self.sum(&summing, &summed, &free)));
            let reader = scope.spawn(move || self.stopping(self.read(&empty, &read)));
            // The checkers end when all senders are gone.
            drop(flushed);
            let dead = |_| anyhow!("a writing thread panicked");
            for worker in workers {
                worker.join().map_err(dead)??;
            }
            let held = summer.join().map_err(dead)?;
            reader.join().map_err(dead)??;
            held
        })
    }

    /// Stops the other threads when one has failed.
    fn stopping<T>(&self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            self.stop.store(true, Ordering::Relaxed);
        }
        result
    }

    fn read(&self, empty: &Receiver<AlignedMemory>, full: &SyncSender<Full>) -> Result<()> {
        let mut pass = self.source.pass()?;
        for (index, piece) in self.pieces.iter().enumerate() {
            // Threads that have failed do not return a buffer; they report why.
            let mut buffer = loop {
                match empty.recv_timeout(BUFFER_TIMEOUT) {
                    _ if self.stop.load(Ordering::Relaxed) => return Ok(()),
                    Ok(buffer) => break buffer,
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return Ok(()),
                }
            };
            pass.read_at(piece.offset, buffer.part(piece.size))?;
            if full.send((index, buffer)).is_err() {
                return Ok(());
            }
        }
        pass.finish()
    }

    /// Verifies the block map's checksums and collects the held pieces.
    fn sum(
        &self,
        full: &Receiver<Full>,
        summed: &SyncSender<Full>,
        free: &SyncSender<AlignedMemory>,
    ) -> Result<Vec<Full>> {
        let mut held = Vec::new();
        let mut hasher = Sha256::new();
        for (index, mut buffer) in full {
            let piece = &self.pieces[index];
            let range = &self.source.ranges[piece.range];
            let bytes = buffer.part(piece.size);
            if let Some(expected) = &range.sha256 {
                hasher.update(&*bytes);
                let found = if piece.last { hex(&hasher.finalize_reset()) } else { String::new() };
                if piece.last && found != *expected {
                    bail!(
                        "the image {} is damaged: bytes {} to {} have the SHA-256 {found}, but its \
                         block map says {expected}\n\
                         help: build or download it again",
                        self.source.path,
                        range.offset,
                        range.offset + range.size - 1,
                    );
                }
            }
            if piece.held {
                let mut copy = AlignedMemory::new(piece.size);
                copy.part(piece.size).copy_from_slice(bytes);
                self.sums[index].get_or_init(|| PieceChecksum::from_bytes(bytes));
                held.push((index, copy));
                // The reader may have ended already.
                drop(free.send(buffer));
            } else if summed.send((index, buffer)).is_err() {
                break;
            }
        }
        Ok(held)
    }

    fn write(
        &self,
        full: &Mutex<Receiver<Full>>,
        free: &SyncSender<AlignedMemory>,
        flushed: &Sender<usize>,
    ) -> Result<()> {
        loop {
            let next = lock(full).recv();
            let Ok((index, mut buffer)) = next else { return Ok(()) };
            if self.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            let piece = &self.pieces[index];
            let bytes = buffer.part(piece.size);
            if self.read_back {
                self.sums[index].get_or_init(|| PieceChecksum::from_bytes(bytes));
            }
            match self.card.write_at(piece.offset, bytes) {
                Ok(()) => {}
                Err(error) if is_local(&error) && self.read_back => self.went_wrong(index)?,
                Err(error) => {
                    return Err(error).with_context(|| format!("writing at {}", piece.offset));
                }
            }
            self.written.advance(piece.size as u64);
            // The reader may have ended already.
            drop(free.send(buffer));
            let batch = self.batches.iter().find(|batch| batch.pieces.contains(&index));
            let batch = batch.context("a piece is in no batch")?;
            if batch.left.fetch_sub(1, Ordering::AcqRel) == 1 && self.read_back {
                self.card.flush().context("flushing the card")?;
                for index in batch.pieces.clone().filter(|index| !self.pieces[*index].held) {
                    // The receiver outlives all threads.
                    flushed.send(index).context("queueing a batch for reading back")?;
                }
            }
        }
    }

    fn check(&self, flushed: &Mutex<Receiver<usize>>) -> Result<()> {
        let mut buffer = AlignedMemory::new(PIECE as usize);
        loop {
            let next = lock(flushed).recv();
            let Ok(index) = next else { return Ok(()) };
            if self.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            let piece = &self.pieces[index];
            let sum = self.sums[index].get().context("a piece has no checksum")?;
            if !piece_matches(self.card, piece, sum, &mut buffer)? {
                self.went_wrong(index)?;
            }
            if let Some(step) = &self.checked {
                step.advance(piece.size as u64);
            }
        }
    }

    fn went_wrong(&self, index: usize) -> Result<()> {
        let mut wrong = lock(&self.wrong);
        wrong.push(index);
        if wrong.len() > MOST_WRONG {
            bail!(
                "the card does not return the data that was written, in more than {MOST_WRONG} \
                 places\n\
                 help: use another card or another reader"
            );
        }
        Ok(())
    }
}

/// The data of a panicked thread is still valid: only checksums and indices.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
