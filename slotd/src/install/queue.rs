//! The writing half of an install: a thread that writes verified bytes to the device, in order, in large
//! aligned writes, while the next frame is verified.

use std::io;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel};

use bundle::index::is_zero;
use bundle::{BLOCK_SIZE, BlockIndex};

use crate::buffer::{AlignedBuffer, TRANSFER};
use crate::storage::Storage;

/// Number of buffers in flight, each of [`TRANSFER`] bytes.
const BUFFERS: usize = 3;

enum Message {
    Write(u64, AlignedBuffer, usize),
    /// From, to: write zeros where the device has other bytes.
    Zero(u64, u64),
    /// All frames before this one have been queued: make them durable and record it.
    Checkpoint(u32),
}

/// Combines writes and passes them to the thread.
pub struct WriteQueue {
    messages: SyncSender<Message>,
    free: Receiver<AlignedBuffer>,
    current: Option<(u64, AlignedBuffer, usize)>,
    /// Bytes queued since the last checkpoint.
    pending: u64,
}

/// The thread's side.
pub struct WriteWorker {
    messages: Receiver<Message>,
    free: Sender<AlignedBuffer>,
}

/// Both ends.
pub fn new_queue() -> (WriteQueue, WriteWorker) {
    let (messages, incoming) = sync_channel(BUFFERS);
    let (back, free) = channel();
    for _ in 0..BUFFERS {
        // The receiver is three lines above: this cannot fail.
        if back.send(AlignedBuffer::new(TRANSFER)).is_err() {
            break;
        }
    }
    let queue = WriteQueue { messages, free, current: None, pending: 0 };
    (queue, WriteWorker { messages: incoming, free: back })
}

/// The thread ended early: its own error says why, and is reported instead.
fn thread_stopped() -> io::Error {
    io::ErrorKind::BrokenPipe.into()
}

impl WriteQueue {
    /// Adds bytes at an offset. Adjacent bytes are combined into one write, up to a multiple of [`TRANSFER`].
    pub fn write(&mut self, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let fits =
                |(start, _, filled): &(u64, AlignedBuffer, usize)| start + *filled as u64 == offset;
            if !self.current.as_ref().is_some_and(fits) {
                self.send()?;
                let buffer = self.free.recv().map_err(|_| thread_stopped())?;
                self.current = Some((offset, buffer, 0));
            }
            let Some((start, buffer, filled)) = &mut self.current else {
                return Err(thread_stopped());
            };
            // A write ends on a multiple of TRANSFER, so that the next one begins there.
            let room = TRANSFER - (*start % TRANSFER as u64) as usize - *filled;
            let length = room.min(bytes.len());
            let (now, later) = bytes.split_at_checked(length).unwrap_or((bytes, &[]));
            if let Some(to) = buffer.get_mut(*filled..*filled + length) {
                to.copy_from_slice(now);
            }
            *filled += length;
            offset += length as u64;
            bytes = later;
            if length == room {
                self.send()?;
            }
        }
        Ok(())
    }

    /// Makes a range zero, without writing parts that are already zero.
    pub fn zero(&mut self, start: u64, end: u64) -> io::Result<()> {
        self.send()?;
        self.pending += end - start;
        self.messages.send(Message::Zero(start, end)).map_err(|_| thread_stopped())
    }

    /// Requests a checkpoint when enough bytes were queued since the last one.
    pub fn checkpoint(&mut self, frames: u32, every: u64) -> io::Result<()> {
        if self.pending < every {
            return Ok(());
        }
        self.pending = 0;
        self.send()?;
        self.messages.send(Message::Checkpoint(frames)).map_err(|_| thread_stopped())
    }

    /// Queues the rest. The thread ends when it has written it.
    pub fn finish(mut self) -> io::Result<()> {
        self.send()
    }

    fn send(&mut self) -> io::Result<()> {
        let Some((offset, buffer, filled)) = self.current.take() else { return Ok(()) };
        self.pending += filled as u64;
        self.messages.send(Message::Write(offset, buffer, filled)).map_err(|_| thread_stopped())
    }
}

impl WriteWorker {
    /// Writes until the queue is finished; `note` records checkpoints. Returns the bytes written.
    ///
    /// # Errors
    /// The device's first error; nothing is written after it.
    pub fn run(self, device: &dyn Storage, note: &mut dyn FnMut(u32)) -> io::Result<u64> {
        std::thread::scope(|scope| {
            let (ranges, asked) = channel();
            let (answers, found) = channel();
            std::thread::Builder::new().spawn_scoped(scope, move || {
                for (start, end) in asked {
                    // The receiver is gone if writing has failed.
                    if answers.send(not_zero(device, start, end)).is_err() {
                        break;
                    }
                }
            })?;
            self.write(
                device,
                note,
                &mut Zeros { ranges, found, open: 0, zeros: AlignedBuffer::new(TRANSFER) },
            )
        })
    }

    fn write(
        self,
        device: &dyn Storage,
        note: &mut dyn FnMut(u32),
        zeros: &mut Zeros,
    ) -> io::Result<u64> {
        let mut written = 0;
        for message in self.messages {
            match message {
                Message::Write(offset, buffer, length) => {
                    device.write_at(offset, buffer.first(length))?;
                    written += length as u64 + zeros.write(device, false)?;
                    // The receiver is gone after the last frame.
                    if self.free.send(buffer).is_err() {
                        continue;
                    }
                }
                Message::Zero(start, end) => {
                    zeros.ranges.send((start, end)).map_err(|_| thread_stopped())?;
                    zeros.open += 1;
                    written += zeros.write(device, false)?;
                }
                Message::Checkpoint(frames) => {
                    written += zeros.write(device, true)?;
                    device.flush()?;
                    note(frames);
                }
            }
        }
        written += zeros.write(device, true)?;
        device.flush()?;
        Ok(written)
    }
}

/// Ranges that must become zero. Reading is faster than writing, and most free blocks of a slot are already
/// zero: a separate thread reads them while other blocks are written.
struct Zeros {
    ranges: Sender<(u64, u64)>,
    found: Receiver<Vec<(u64, u64)>>,
    /// Ranges that have not been answered.
    open: usize,
    /// The zeros to write.
    zeros: AlignedBuffer,
}

impl Zeros {
    /// Writes zeros for the available answers, or with `wait` for all answers. Returns the bytes written.
    fn write(&mut self, device: &dyn Storage, wait: bool) -> io::Result<u64> {
        let mut written = 0;
        while self.open > 0 {
            let runs = match self.found.try_recv() {
                Ok(runs) => runs,
                Err(TryRecvError::Empty) if !wait => break,
                Err(_) => self.found.recv().map_err(|_| thread_stopped())?,
            };
            self.open -= 1;
            for (start, end) in runs {
                let mut offset = start;
                while offset < end {
                    let room = TRANSFER as u64 - offset % TRANSFER as u64;
                    // At most TRANSFER.
                    let length = (end - offset).min(room) as usize;
                    device.write_at(offset, self.zeros.first(length))?;
                    offset += length as u64;
                }
                written += end - start;
            }
        }
        Ok(written)
    }
}

/// The parts of a range that are not zero, in order. This install has written nothing in the range, so nothing
/// is waiting to be flushed. Unreadable parts are included: writing may repair them.
fn not_zero(device: &dyn Storage, start: u64, end: u64) -> Vec<(u64, u64)> {
    let mut buffer = AlignedBuffer::new(TRANSFER);
    let mut found: Vec<(u64, u64)> = Vec::new();
    let mut at = start;
    while at < end {
        let room = TRANSFER as u64 - at % TRANSFER as u64;
        // At most TRANSFER.
        let bytes = buffer.first_mut((end - at).min(room) as usize);
        let known = device.read_back(at, bytes).is_ok();
        for block in bytes.chunks(BLOCK_SIZE) {
            let end = at + block.len() as u64;
            if !known || !is_zero(block) {
                match found.last_mut() {
                    Some((_, known)) if *known == at => *known = end,
                    _ => found.push((at, end)),
                }
            }
            at = end;
        }
    }
    found
}

/// Blocks of the payload as a set.
#[derive(Debug, Clone)]
pub struct BlockSet(Vec<u64>);

impl BlockSet {
    /// An empty set for an index's blocks.
    pub fn empty(index: &BlockIndex) -> Self {
        Self(vec![0; index.blocks().div_ceil(64) as usize])
    }

    /// Whether a block is in the set.
    pub fn contains(&self, block: u32) -> bool {
        self.0.get(block as usize / 64).is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    /// Adds or removes a block.
    pub fn set(&mut self, block: u32, member: bool) {
        if let Some(word) = self.0.get_mut(block as usize / 64) {
            let bit = 1 << (block % 64);
            if member { *word |= bit } else { *word &= !bit }
        }
    }
}
