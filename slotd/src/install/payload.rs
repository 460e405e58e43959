//! Writes one payload from the bundle to its partition, and verifies it.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bundle::index::{Sha256Hash, sha256};
use bundle::{BLOCK_SIZE, BlockIndex, BundleInput, Frame, PayloadReader};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::local::LocalBlocks;
use super::queue::{self, BlockSet, WriteQueue};
use super::target::{IdleSlot, read_back_differs};
use super::{Counts, InstallOptions, InstallStep, Progress, from_source, scan};
use crate::buffer::{AlignedBuffer, TRANSFER};
use crate::device::slot_role;
use crate::machine::RobotContext;
use crate::record::{self, InstallJournal};
use crate::refusal::{Refusal, Result};
use crate::storage::Storage;

/// Bytes after which, at the end of a frame, the device is flushed and the journal updated: every second
/// frame of 16 MiB. A card writes them in about three seconds.
pub const CHECKPOINT: u64 = 24 << 20;

/// Maximum number of blocks that are searched in the running slot, 1.4 GiB of content: each needs nine bytes,
/// and the memory of an install must stay below 32 MiB in total.
const MOST_LOCAL: u32 = 350_000;

/// State shared by all payloads of an install.
pub(super) struct InstallState<'a> {
    pub robot: &'a RobotContext<'a>,
    pub options: &'a InstallOptions,
    pub progress: &'a (dyn Fn(Progress) + Sync),
    /// The journal of an interrupted install.
    pub journal: Option<&'a InstallJournal>,
    /// The journal of this install, before the first frame of this payload.
    pub fresh: InstallJournal,
}

/// What is already in place.
struct Survey {
    held: BlockSet,
    /// For each frame: whether nothing of it needs to be written.
    done: Vec<bool>,
}

impl Survey {
    /// Number of leading frames that are in place, except for the first block, which is written last.
    fn leading(&self, index: &BlockIndex) -> u32 {
        let Some(first) = index.frames().first() else { return 0 };
        let rest = (1..first.blocks).all(|block| self.held.contains(block));
        let after = self.done.iter().skip(1).take_while(|done| **done);
        // At most MAX_FRAMES.
        if rest { 1 + after.count() as u32 } else { 0 }
    }
}

impl InstallState<'_> {
    /// Writes the missing blocks and verifies the whole payload.
    pub fn run<I: BundleInput>(
        &self,
        mut payload: PayloadReader<'_, I>,
        target: &mut IdleSlot<'_>,
        counts: &mut Counts,
    ) -> Result<()> {
        let number = self.fresh.payload;
        // The target was made from the same manifest.
        let part = target.parts.get(number).ok_or_else(write_thread_lost)?;
        let device = part.device.as_ref();
        let survey = self.survey(device, payload.index());
        let index = payload.shared_index();
        let index = index.as_ref();
        let running;
        let fits = index.used_blocks() <= MOST_LOCAL;
        let local = if self.options.use_running_slot && fits && survey.done.contains(&false) {
            running = self.robot.slots.open(self.robot.running, &part.role)?;
            Some((LocalBlocks::read_running(index, running.as_ref()), running.as_ref()))
        } else {
            None
        };
        if survey.done.contains(&false) {
            // Blocks that an interrupted install wrote without a checkpoint are in place, but may not
            // be durable yet.
            let frames = survey.leading(index);
            if frames > 0 && device.flush().is_ok() {
                self.write_journal(&InstallJournal { frames, ..self.fresh.clone() });
            } else {
                self.write_journal(&self.fresh);
            }
            counts.written += target.invalidate(number, index)?;
        }
        let part = target.parts.get_mut(number).ok_or_else(write_thread_lost)?;
        let device = part.device.as_ref();
        let (queue, worker) = queue::new_queue();
        let mut writer = Writer {
            work: self,
            index,
            device,
            local,
            held: survey.held,
            queue,
            zeros: None,
            first: part.first.take(),
            counts,
        };
        let written = std::thread::scope(|scope| -> Result<u64> {
            let noting = std::thread::Builder::new().spawn_scoped(scope, move || {
                worker.run(device, &mut |frames| {
                    self.write_journal(&InstallJournal { frames, ..self.fresh.clone() });
                })
            });
            let thread = noting.map_err(|error| Refusal::io("starting a thread", &error))?;
            let read = writer.frames(&mut payload, &survey.done);
            let first = writer.first.take();
            let finished = writer.queue.finish();
            let written = thread.join().map_err(|_| write_thread_lost())?;
            // The device's error is reported first: the other two may be consequences of it.
            let role = slot_role(&part.role, self.fresh.slot);
            let written =
                written.map_err(|error| Refusal::io(format!("writing {role}"), &error))?;
            read?;
            finished.map_err(|error| Refusal::io(format!("writing {role}"), &error))?;
            part.first = first;
            Ok(written)
        })?;
        counts.written += written;
        let started = Instant::now();
        let role = part.role.clone();
        let first = part.first.as_deref();
        self.read_back(device, index, first, &role)?;
        counts.read_back += started.elapsed();
        Ok(())
    }

    /// Finds the blocks that are already in place.
    fn survey(&self, device: &dyn Storage, index: &BlockIndex) -> Survey {
        let mut survey =
            Survey { held: BlockSet::empty(index), done: vec![false; index.frames().len()] };
        // Frames that were flushed according to the journal are only checked at the end, except the
        // first frame, whose first block is written last.
        let known =
            self.journal.map_or(0, |journal| match journal.payload.cmp(&self.fresh.payload) {
                std::cmp::Ordering::Greater => index.frames().len(),
                std::cmp::Ordering::Equal => journal.frames as usize,
                std::cmp::Ordering::Less => 0,
            });
        for frame in index.frames().iter().take(known).skip(1) {
            for block in frame.first_block..frame.first_block + frame.blocks {
                survey.held.set(block, true);
            }
            if let Some(done) = survey.done.get_mut(frame.number as usize) {
                *done = true;
            }
        }
        if self.journal.is_none() && !scan::seems_similar(device, index) {
            return survey;
        }
        let look: Vec<Frame> = index
            .frames()
            .iter()
            .filter(|frame| survey.done.get(frame.number as usize) == Some(&false))
            .copied()
            .collect();
        let total = look.iter().map(|frame| index.content_size(frame)).sum();
        let done = AtomicU64::new(0);
        let shared = Mutex::new(survey);
        let each = |frame: &Frame, found: io::Result<scan::ScannedFrame>| -> Result<(), ()> {
            let size = index.content_size(frame);
            let done = done.fetch_add(size, Ordering::Relaxed) + size;
            (self.progress)(Progress { step: InstallStep::Survey, done, total });
            // Unreadable blocks are written: this may repair them.
            let Ok(found) = found else { return Ok(()) };
            let mut survey = lock(&shared);
            // A frame whose blocks match but whose content hash does not is read from the bundle.
            if found.proven || !found.wrong.is_empty() {
                for block in frame.first_block..frame.first_block + frame.blocks {
                    survey.held.set(block, true);
                }
                found.wrong.iter().for_each(|block| survey.held.set(*block, false));
            }
            if let Some(done) = survey.done.get_mut(frame.number as usize) {
                *done = found.proven;
            }
            Ok(())
        };
        // The closure never fails.
        if scan::compare_frames(device, index, &look, None, each).is_err() {
            return Survey {
                held: BlockSet::empty(index),
                done: vec![false; index.frames().len()],
            };
        }
        shared.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Reads the whole payload back from the device.
    fn read_back(
        &self,
        device: &dyn Storage,
        index: &BlockIndex,
        first: Option<&[u8]>,
        role: &str,
    ) -> Result<()> {
        let slot = self.fresh.slot;
        let (done, total) = (AtomicU64::new(0), index.size());
        let wrong: Mutex<(usize, u32)> = Mutex::new((0, u32::MAX));
        let each = |frame: &Frame, found: io::Result<scan::ScannedFrame>| -> Result<()> {
            let found = found.map_err(|error| {
                let action = format!("reading back {}", slot_role(role, slot));
                Refusal { code: "read-back".into(), ..Refusal::io(action, &error) }
            })?;
            if !found.proven {
                let mut wrong = lock(&wrong);
                wrong.0 += found.wrong.len().max(1);
                wrong.1 = wrong.1.min(found.wrong.first().copied().unwrap_or(frame.first_block));
            }
            let size = index.content_size(frame);
            let done = done.fetch_add(size, Ordering::Relaxed) + size;
            (self.progress)(Progress { step: InstallStep::ReadBack, done, total });
            Ok(())
        };
        let result =
            scan::compare_frames(device, index, index.frames(), first, each).and_then(|()| {
                let (blocks, first) = *lock(&wrong);
                if blocks == 0 { Ok(()) } else { Err(read_back_differs(role, slot, blocks, first)) }
            });
        if result.is_err() {
            // The journal is wrong: the next install must check everything.
            if let Err(error) = record::remove_journal(self.robot.root) {
                self.robot.events.add("not-recorded", json!({ "error": error.to_string() }));
            }
        }
        result
    }

    /// Writes the journal. A failure only costs time after an interruption.
    fn write_journal(&self, journal: &InstallJournal) {
        if let Err(error) = record::write_journal(self.robot.root, journal) {
            self.robot.events.add("not-recorded", json!({ "error": error.to_string() }));
        }
    }
}

/// Decides for each frame where its blocks come from, and passes them to the queue.
struct Writer<'a> {
    work: &'a InstallState<'a>,
    index: &'a BlockIndex,
    device: &'a dyn Storage,
    local: Option<(LocalBlocks<'a>, &'a dyn Storage)>,
    held: BlockSet,
    queue: WriteQueue,
    /// A range that must become zero.
    zeros: Option<(u64, u64)>,
    first: Option<AlignedBuffer>,
    counts: &'a mut Counts,
}

impl Writer<'_> {
    fn frames<I: BundleInput>(
        &mut self,
        payload: &mut PayloadReader<'_, I>,
        done: &[bool],
    ) -> Result<()> {
        let total = self.index.size();
        let mut passed = 0;
        while let Some(frame) = payload.next_frame() {
            let size = self.index.content_size(&frame);
            if done.get(frame.number as usize) == Some(&true) {
                self.counts.held += size;
                payload.skip_frame().map_err(from_source)?;
            } else if self.is_zero(&frame) {
                // Nothing to verify: the index says that these are zeros.
                self.emit_zeros(&frame).map_err(write_error)?;
                payload.skip_frame().map_err(from_source)?;
            } else if self.is_local(&frame) && self.assemble_or_not(&frame).map_err(write_error)? {
                payload.skip_frame().map_err(from_source)?;
            } else {
                let mut sink = |offset: u64, bytes: &[u8]| Ok(self.emit(offset, bytes)?);
                payload.read_frame(&mut sink).map_err(from_source)?;
            }
            self.end_zeros().map_err(write_error)?;
            self.queue.checkpoint(frame.number + 1, CHECKPOINT).map_err(write_error)?;
            passed += size;
            (self.work.progress)(Progress { step: InstallStep::Write, done: passed, total });
        }
        Ok(())
    }

    fn is_zero(&self, frame: &Frame) -> bool {
        self.index.hashes(frame).all(|(_, hash)| hash.is_none())
    }

    fn emit_zeros(&mut self, frame: &Frame) -> io::Result<()> {
        let zeros = [0; BLOCK_SIZE];
        let end = BlockIndex::offset(frame.first_block) + self.index.content_size(frame);
        for block in frame.first_block..frame.first_block + frame.blocks {
            let offset = BlockIndex::offset(block);
            // At most BLOCK_SIZE.
            let length = (end - offset).min(BLOCK_SIZE as u64) as usize;
            self.emit(offset, zeros.get(..length).unwrap_or_default())?;
        }
        Ok(())
    }

    /// Receives verified bytes: whole blocks, and the payload's last one.
    fn emit(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let first = (offset / BLOCK_SIZE as u64) as u32;
        for (number, block) in (first..).zip(bytes.chunks(BLOCK_SIZE)) {
            let offset = BlockIndex::offset(number);
            if self.held.contains(number) {
                self.counts.held += block.len() as u64;
            } else if number == 0 {
                self.first = Some(AlignedBuffer::copy_of(block));
            } else if self.index.is_zero(number) {
                let end = offset + block.len() as u64;
                match &mut self.zeros {
                    Some((_, known)) if *known == offset => *known = end,
                    _ => {
                        self.end_zeros()?;
                        self.zeros = Some((offset, end));
                    }
                }
            } else {
                self.end_zeros()?;
                self.queue.write(offset, block)?;
            }
        }
        Ok(())
    }

    fn end_zeros(&mut self) -> io::Result<()> {
        let Some((start, end)) = self.zeros.take() else { return Ok(()) };
        self.queue.zero(start, end)
    }

    /// Whether every block of a frame is on the robot.
    fn is_local(&self, frame: &Frame) -> bool {
        let Some((local, _)) = &self.local else { return false };
        self.index.hashes(frame).all(|(block, hash)| {
            let here = |hash| self.held.contains(block) || local.place(hash).is_some();
            hash.is_none_or(here)
        })
    }

    fn assemble_or_not(&mut self, frame: &Frame) -> io::Result<bool> {
        let held = self.counts.held;
        let done = self.assemble(frame)?;
        if !done {
            self.counts.held = held;
            // No block of this frame is treated as in place any more.
            for block in frame.first_block..frame.first_block + frame.blocks {
                self.held.set(block, false);
            }
        }
        Ok(done)
    }

    /// Assembles a frame from blocks that the robot has. The index has 96 bits of each block's hash, so
    /// each block is compared with these, and all together with the frame's content hash, which covers
    /// the full hashes. Returns whether it matches; if not, the whole frame must be written.
    fn assemble(&mut self, frame: &Frame) -> io::Result<bool> {
        let index = self.index;
        let mut content = Sha256::new();
        let mut buffer = AlignedBuffer::new(TRANSFER);
        let mut blocks = index.hashes(frame).peekable();
        let mut taken = 0;
        while let Some((block, hash)) = blocks.next() {
            let size = index.size() - BlockIndex::offset(block);
            // At most BLOCK_SIZE.
            let mut length = size.min(BLOCK_SIZE as u64) as usize;
            let Some(hash) = hash else {
                let zeros = [0; BLOCK_SIZE];
                self.emit(BlockIndex::offset(block), zeros.get(..length).unwrap_or_default())?;
                continue;
            };
            let Some((here, start)) = self.source(block, hash) else { return Ok(false) };
            // As many consecutive blocks of the same source as possible.
            let mut run = vec![hash];
            while length < TRANSFER
                && let Some((next, Some(hash))) = blocks.peek().copied()
                && self.source(next, hash) == Some((here, start + run.len() as u32))
            {
                length += (index.size() - BlockIndex::offset(next)).min(BLOCK_SIZE as u64) as usize;
                run.push(hash);
                blocks.next();
            }
            let bytes = buffer.first_mut(length);
            let from = match &self.local {
                Some((_, running)) if !here => *running,
                _ => self.device,
            };
            if from.read_back(BlockIndex::offset(start), bytes).is_err() {
                return Ok(false);
            }
            for (block, expected) in bytes.chunks(BLOCK_SIZE).zip(run) {
                let hash = sha256(block);
                content.update(hash);
                if !hash.starts_with(expected) {
                    return Ok(false);
                }
            }
            if !here {
                taken += length as u64;
            }
            self.emit(BlockIndex::offset(block), buffer.first(length))?;
        }
        if Sha256Hash::from(content.finalize()) != frame.content {
            return Ok(false);
        }
        self.counts.taken += taken;
        Ok(true)
    }

    /// Where a block is: at its position in the idle slot, or somewhere in the running slot.
    fn source(&self, block: u32, hash: &[u8]) -> Option<(bool, u32)> {
        if self.held.contains(block) {
            return Some((true, block));
        }
        let (local, _) = self.local.as_ref()?;
        Some((false, local.place(hash)?))
    }
}

/// The error when the queue's thread has ended; the thread's own error is reported instead.
fn write_error(error: io::Error) -> Refusal {
    Refusal::io("writing the slot", &error)
}

pub(super) fn write_thread_lost() -> Refusal {
    Refusal::new("internal", "a thread of the install ended unexpectedly", "report this bug")
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
