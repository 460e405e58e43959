//! Writes bundles: frames and index on all cores, then the archive. The bytes depend only on the
//! payload and the level, never on the number of cores or on timing.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard};

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::frames::{self, CompressionLevel, FrameEncoder};
use crate::index::{self, BlockHash, FrameEntry, IndexBuilder, Sha256Hash};
use crate::limits::{BLOCK_SIZE, MAX_DATA, MAX_PAYLOAD, MAX_SIGNATURE, MAX_SIGNATURES, PIECE};
use crate::manifest::{BundleManifest, DataRecord, IndexRecord, Payload};
use crate::reader::{MANIFEST, SIGNATURE};
use crate::ustar;

/// A payload, read by several threads at once.
pub trait PayloadSource: Sync {
    /// Its size in bytes, holes included.
    fn size(&self) -> u64;

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// When the payload ends before, or reading fails.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// The next range at or after `offset` that may hold anything except zeros; `None` when there is
    /// none. A source that cannot find holes returns one range.
    ///
    /// # Errors
    /// When the holes cannot be determined.
    fn data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok((offset < self.size()).then(|| offset..self.size()))
    }
}

impl PayloadSource for [u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = self.get(start..).and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// The result of compressing a payload, besides its frames.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompressedPayload {
    /// The payload's size in bytes.
    pub size: u64,
    /// The block index.
    pub index: Vec<u8>,
    /// Length of all frames in bytes.
    pub data_size: u64,
    /// How many blocks are not zero.
    pub used_blocks: u32,
}

impl CompressedPayload {
    /// The manifest's entry for this payload.
    pub fn describe(&self, role: impl Into<String>) -> Payload {
        Payload {
            role: role.into(),
            size: self.size,
            block_size: BLOCK_SIZE as u64,
            index: IndexRecord {
                size: self.index.len() as u64,
                sha256: index::to_hex(&index::sha256(&self.index)),
            },
            data: DataRecord { size: self.data_size },
        }
    }
}

/// One unit of the payload, compressed.
struct Unit {
    entry: FrameEntry,
    hashes: Vec<Option<BlockHash>>,
    stored: Vec<u8>,
}

/// What the workers and the writer share.
struct Ring {
    /// The unit that the next idle worker takes.
    next: u64,
    /// The unit that is written next; no worker runs ahead of it by more than the ring's length.
    written: u64,
    done: BTreeMap<u64, Result<Unit>>,
    /// Buffers to use again.
    free: Vec<Vec<u8>>,
    stop: bool,
}

/// Compresses a payload into `out`, in frames, with `workers` threads (at least one).
///
/// Memory: about two frames' length for each worker, whatever the payload's size. `progress` gets
/// payload bytes as they are finished, in order.
///
/// # Errors
/// When the payload is too large for the format, or reading or writing fails.
pub fn compress(
    source: &(impl PayloadSource + ?Sized),
    level: CompressionLevel,
    workers: usize,
    out: &mut dyn Write,
    progress: &mut dyn FnMut(u64),
) -> Result<CompressedPayload> {
    let size = source.size();
    if size > MAX_PAYLOAD {
        return Err(Error::BadLength {
            what: "a payload".to_owned(),
            found: size,
            allowed: MAX_PAYLOAD,
        });
    }
    let unit = level.unit() as u64;
    let count = size.div_ceil(unit).max(1);
    // More threads than units would only use memory.
    let workers = u64::try_from(workers).unwrap_or(1).clamp(1, count);
    let ring = Mutex::new(Ring {
        next: 0,
        written: 0,
        done: BTreeMap::new(),
        free: Vec::new(),
        stop: false,
    });
    let changed = Condvar::new();
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| compress_units(source, level, count, workers, &ring, &changed));
        }
        let result = write_units(size, unit, count, &ring, &changed, out, progress);
        // On success and on failure: no worker may wait after this.
        lock(&ring).stop = true;
        changed.notify_all();
        result
    })
}

/// A poisoned lock is safe to use: no thread leaves the ring half-changed while it holds the lock.
fn lock(ring: &Mutex<Ring>) -> MutexGuard<'_, Ring> {
    ring.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn wait<'a>(changed: &Condvar, guard: MutexGuard<'a, Ring>) -> MutexGuard<'a, Ring> {
    changed.wait(guard).unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Ends the wait for a worker that panicked (in a `PayloadSource`, say): the panic then reaches the caller
/// through the thread scope, instead of a hang.
struct Watch<'a>(&'a Mutex<Ring>, &'a Condvar);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            lock(self.0).stop = true;
            self.1.notify_all();
        }
    }
}

/// A worker: takes unit after unit until none is left.
fn compress_units(
    source: &(impl PayloadSource + ?Sized),
    level: CompressionLevel,
    count: u64,
    workers: u64,
    ring: &Mutex<Ring>,
    changed: &Condvar,
) {
    let _watch = Watch(ring, changed);
    let mut worker = Worker { encoder: None, buffer: Vec::new() };
    loop {
        let (number, stored) = {
            let mut guard = lock(ring);
            while !guard.stop && guard.next < count && guard.next >= guard.written + workers * 2 {
                guard = wait(changed, guard);
            }
            if guard.stop || guard.next >= count {
                return;
            }
            let number = guard.next;
            guard.next += 1;
            (number, guard.free.pop().unwrap_or_default())
        };
        let result = worker.unit(source, level, number, stored);
        lock(ring).done.insert(number, result);
        changed.notify_all();
    }
}

/// Writes the units in order and collects the index.
fn write_units(
    size: u64,
    unit: u64,
    count: u64,
    ring: &Mutex<Ring>,
    changed: &Condvar,
    out: &mut dyn Write,
    progress: &mut dyn FnMut(u64),
) -> Result<CompressedPayload> {
    let mut builder = IndexBuilder::default();
    let (mut data_size, mut used_blocks) = (0_u64, 0_u32);
    for number in 0..count {
        let finished = {
            let mut guard = lock(ring);
            loop {
                if let Some(finished) = guard.done.remove(&number) {
                    break finished?;
                }
                if guard.stop {
                    return Err(Error::Misuse { reason: "a worker failed".to_owned() });
                }
                guard = wait(changed, guard);
            }
        };
        out.write_all(&finished.stored)?;
        data_size += finished.stored.len() as u64;
        for hash in &finished.hashes {
            used_blocks += u32::from(hash.is_some());
            builder.block(hash.as_ref());
        }
        builder.frames.push(finished.entry);
        {
            let mut guard = lock(ring);
            guard.written = number + 1;
            guard.free.push(finished.stored);
        }
        changed.notify_all();
        progress(unit.min(size - number * unit));
    }
    if data_size > MAX_DATA {
        return Err(Error::BadLength {
            what: "a payload's frames".to_owned(),
            found: data_size,
            allowed: MAX_DATA,
        });
    }
    Ok(CompressedPayload { size, index: builder.finish(size)?, data_size, used_blocks })
}

/// What a worker keeps from unit to unit.
struct Worker {
    encoder: Option<FrameEncoder>,
    buffer: Vec<u8>,
}

impl Worker {
    fn unit(
        &mut self,
        source: &(impl PayloadSource + ?Sized),
        level: CompressionLevel,
        number: u64,
        mut stored: Vec<u8>,
    ) -> Result<Unit> {
        let start = number * level.unit() as u64;
        let end = source.size().min(start + level.unit() as u64);
        // A unit is at most 64 MiB.
        let length = (end - start) as usize;
        let blocks = length.div_ceil(BLOCK_SIZE);
        let mut hashes: Vec<Option<BlockHash>> = Vec::with_capacity(blocks);
        let mut content = Sha256::new();
        if length > 0 && source.data(start)?.is_none_or(|data| data.start >= end) {
            frames::zeros(length as u32, &mut stored);
            hashes.resize(blocks, None);
        } else {
            self.read(source, start..end)?;
            for block in self.buffer.chunks(BLOCK_SIZE) {
                hashes.push(if index::is_zero(block) {
                    None
                } else {
                    let hash = index::sha256(block);
                    content.update(hash);
                    Some(index::truncate_hash(&hash))
                });
            }
            if length > 0 && hashes.iter().all(Option::is_none) {
                frames::zeros(length as u32, &mut stored);
            } else {
                let encoder = match &mut self.encoder {
                    Some(encoder) => encoder,
                    empty => empty.insert(FrameEncoder::new(level)?),
                };
                encoder.encode(&self.buffer, &mut stored)?;
            }
        }
        let entry = FrameEntry {
            blocks: blocks as u32,
            stored: stored.len() as u32,
            pieces: stored.chunks(PIECE).map(index::sha256).collect(),
            content: Sha256Hash::from(content.finalize()),
        };
        Ok(Unit { entry, hashes, stored })
    }

    /// Fills the buffer with a range of the payload; holes are zeroed, not read.
    fn read(&mut self, source: &(impl PayloadSource + ?Sized), range: Range<u64>) -> Result<()> {
        let length = (range.end - range.start) as usize;
        self.buffer.resize(length, 0);
        let mut rest = self.buffer.as_mut_slice();
        let mut at = range.start;
        while at < range.end {
            let data = match source.data(at)? {
                Some(data) => data.start.clamp(at, range.end)..data.end.clamp(at, range.end),
                None => range.end..range.end,
            };
            let (hole, after) = split(rest, (data.start - at) as usize)?;
            hole.fill(0);
            let (filled, after) = split(after, (data.end - data.start) as usize)?;
            source.read_at(filled, data.start)?;
            rest = after;
            if data.end == at {
                return Err(Error::Misuse { reason: "a source's data range is empty".to_owned() });
            }
            at = data.end;
        }
        Ok(())
    }
}

fn split(bytes: &mut [u8], at: usize) -> Result<(&mut [u8], &mut [u8])> {
    bytes.split_at_mut_checked(at).ok_or_else(|| Error::Misuse {
        reason: "a source's data range ends after the payload".to_owned(),
    })
}

/// A finished signature over the manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignatureFile {
    /// The key's id: sixteen upper-case hexadecimal digits.
    pub key: String,
    /// The file's content, as minisign writes it.
    pub text: String,
}

/// Writes an archive. `payloads` has index and frames of each payload of the manifest, in order.
///
/// # Errors
/// When the manifest breaks a rule, the parts do not fit it, or reading or writing fails.
pub fn write_archive(
    out: &mut dyn Write,
    manifest: &BundleManifest,
    sign: &mut dyn FnMut(&[u8]) -> Result<Vec<SignatureFile>>,
    payloads: &mut [(&[u8], &mut dyn Read)],
) -> Result<()> {
    let json = manifest.to_json()?;
    let mut signatures = sign(&json)?;
    if signatures.is_empty() || signatures.len() > MAX_SIGNATURES {
        return Err(Error::Misuse {
            reason: format!(
                "a bundle has 1 to {MAX_SIGNATURES} signatures, not {}",
                signatures.len()
            ),
        });
    }
    write_member(out, MANIFEST, &json)?;
    let further = signatures.split_off(1);
    for signature in &signatures {
        write_signature(out, SIGNATURE, signature)?;
    }
    let mut named: Vec<(String, SignatureFile)> = further
        .into_iter()
        .map(|signature| (format!("{MANIFEST}.{}.minisig", signature.key), signature))
        .collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, signature) in &named {
        write_signature(out, name, signature)?;
    }
    let described = manifest
        .components
        .iter()
        .flat_map(|component| component.payloads.iter().map(move |p| (&component.name, p)));
    let mut given = payloads.iter_mut();
    for (component, payload) in described {
        let Some((index, data)) = given.next() else {
            return Err(Error::Misuse {
                reason: format!("{component}/{} has no data", payload.role),
            });
        };
        if index::to_hex(&index::sha256(index)) != payload.index.sha256 {
            return Err(Error::Misuse {
                reason: format!(
                    "the index of {component}/{} does not match its hash in the manifest",
                    payload.role
                ),
            });
        }
        write_member(out, &format!("{component}/{}.index", payload.role), index)?;
        let name = format!("{component}/{}.zst", payload.role);
        out.write_all(&ustar::encode_header(&name, payload.data.size)?)?;
        copy_exactly(data, out, payload.data.size, &name)?;
        write_zeros(out, ustar::padding(payload.data.size))?;
    }
    if given.next().is_some() {
        return Err(Error::Misuse {
            reason: "there is more data than the payloads describe".to_owned(),
        });
    }
    write_zeros(out, ustar::TRAILER)
}

/// Copies exactly `size` bytes.
fn copy_exactly(data: &mut dyn Read, out: &mut dyn Write, size: u64, name: &str) -> Result<()> {
    // Small enough that a copy (for hashing) is allocated from the heap, not from new pages.
    let mut buffer = vec![0_u8; 1 << 16];
    let mut left = size;
    while left > 0 {
        let want = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let part = buffer.get_mut(..want).unwrap_or_default();
        data.read_exact(part).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                Error::Misuse { reason: format!("there is less data for {name} than described") }
            }
            _ => Error::Io(error),
        })?;
        out.write_all(part)?;
        left -= want as u64;
    }
    Ok(())
}

fn write_signature(out: &mut dyn Write, name: &str, signature: &SignatureFile) -> Result<()> {
    if signature.text.len() as u64 > MAX_SIGNATURE {
        return Err(Error::BadLength {
            what: format!("the signature by {}", signature.key),
            found: signature.text.len() as u64,
            allowed: MAX_SIGNATURE,
        });
    }
    write_member(out, name, signature.text.as_bytes())
}

fn write_member(out: &mut dyn Write, name: &str, content: &[u8]) -> Result<()> {
    out.write_all(&ustar::encode_header(name, content.len() as u64)?)?;
    out.write_all(content)?;
    write_zeros(out, ustar::padding(content.len() as u64))
}

/// Less than 1025 zeros: padding, or the trailer.
fn write_zeros(out: &mut dyn Write, n: usize) -> Result<()> {
    static ZEROS: [u8; ustar::TRAILER] = [0; ustar::TRAILER];
    Ok(out.write_all(ZEROS.get(..n).unwrap_or(&ZEROS))?)
}
