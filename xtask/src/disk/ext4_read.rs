//! Opens an ext4 filesystem inside an image for reading, without mounting it, and reads small files
//! of it. The sizes in the superblock are compared with the image's length first, since the reader
//! allocates memory according to them.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use camino::Utf8Path;
use ext4_view::{Ext4, Ext4Read};

/// The read-ahead window: the reader requests one block at a time, mostly in order.
const WINDOW: usize = 256 * 1024;
/// The smallest group in blocks: mke2fs(8) makes no smaller ones (its option `-g`), and the reader
/// keeps a descriptor of each group.
const FEWEST_BLOCKS: u32 = 256;

/// A filesystem at an offset of a file, read through a window.
struct Slice {
    file: File,
    offset: u64,
    window: Vec<u8>,
    window_start: u64,
}

impl Ext4Read for Slice {
    fn read(
        &mut self,
        start: u64,
        into: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let at = self.offset.checked_add(start).ok_or("an offset beyond 64 bits")?;
        if into.len() > WINDOW {
            return Ok(self.file.read_exact_at(into, at)?);
        }
        let in_window = |slice: &Self| {
            let from = usize::try_from(at.checked_sub(slice.window_start)?).ok()?;
            slice.window.get(from..from.checked_add(into.len())?).map(|_| from)
        };
        let from = match in_window(self) {
            Some(from) => from,
            None => {
                self.window.resize(WINDOW, 0);
                self.window_start = at;
                let mut filled = 0;
                while filled < into.len() {
                    match self.file.read_at(&mut self.window[filled..], at + filled as u64)? {
                        0 => return Err("the image ends within the filesystem".into()),
                        n => filled += n,
                    }
                }
                self.window.truncate(filled);
                0
            }
        };
        into.copy_from_slice(&self.window[from..from + into.len()]);
        Ok(())
    }
}

/// Bytes from an offset of an image to its end.
///
/// # Errors
/// When the image cannot be read.
pub(crate) fn remaining_length(image: &Utf8Path, offset: u64) -> Result<u64> {
    let context = || format!("reading {image}");
    let mut file = File::open(image).with_context(context)?;
    // The metadata of a block device do not contain its size.
    let end = file.seek(SeekFrom::End(0)).with_context(context)?;
    Ok(end.saturating_sub(offset))
}

/// The fields of a superblock that determine how much the reader allocates (Linux:
/// Documentation/filesystems/ext4/super.rst).
struct Superblock([u8; 1024]);

impl Superblock {
    fn read(image: &Utf8Path, offset: u64) -> Result<Self> {
        let mut bytes = [0; 1024];
        let at = offset.checked_add(1024).context("an offset beyond 64 bits")?;
        File::open(image)?.read_exact_at(&mut bytes, at)?;
        Ok(Self(bytes))
    }

    fn number(&self, at: usize) -> u32 {
        let bytes = self.0.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        u32::from_le_bytes(bytes.unwrap_or_default())
    }

    /// Whether the journal contains changes that are not in the filesystem yet
    /// (`INCOMPAT_RECOVER`).
    fn needs_replay(&self) -> bool {
        self.number(0x60) & 0x4 != 0
    }

    fn check(&self, length: u64) -> Result<()> {
        // `s_log_block_size` counts from 1 KiB; 64 KiB is ext4's largest.
        let log = self.number(0x18);
        ensure!(
            log <= 6,
            "its blocks have 2^{} bytes, expected at most 64 KiB",
            u64::from(log) + 10
        );
        // `INCOMPAT_64BIT`: the fields have upper halves.
        let upper = if self.number(0x60) & 0x80 != 0 { self.number(0x150) } else { 0 };
        let blocks = u64::from(upper) << 32 | u64::from(self.number(0x4));
        let bytes = blocks.checked_mul(1024 << log);
        ensure!(
            bytes.is_some_and(|bytes| bytes <= length),
            "the superblock counts {blocks} blocks of {} bytes, but the image has only {length} \
             bytes from there on",
            1024 << log
        );
        let group = self.number(0x20);
        ensure!(group >= FEWEST_BLOCKS, "invalid superblock: groups of {group} blocks");
        // The reader keeps all changes of a journal in memory, and a journal can contain any
        // number.
        ensure!(
            !self.needs_replay(),
            "the journal has not been replayed: the filesystem was in use when it was copied\n\
             help: run e2fsck -p on a copy of the image"
        );
        Ok(())
    }
}

/// Whether the filesystem there was in use when it was copied; such a filesystem is not read.
///
/// # Errors
/// When the image cannot be read.
pub(crate) fn needs_replay(image: &Utf8Path, offset: u64) -> Result<bool> {
    let read = Superblock::read(image, offset);
    Ok(read
        .with_context(|| format!("reading the superblock at byte {offset} of {image}"))?
        .needs_replay())
}

/// Opens the ext4 filesystem at a byte offset of an image, read-only.
///
/// # Errors
/// When there is none, or its superblock is invalid.
pub(crate) fn open_ext4(image: &Utf8Path, offset: u64) -> Result<Ext4> {
    let context = || format!("reading the ext4 filesystem at byte {offset} of {image}");
    let length = remaining_length(image, offset)?;
    Superblock::read(image, offset)
        .and_then(|superblock| superblock.check(length))
        .with_context(context)?;
    let file = File::open(image).with_context(|| format!("opening {image}"))?;
    let slice = Slice { file, offset, window: Vec::new(), window_start: 0 };
    Ext4::load(Box::new(slice)).with_context(context)
}

/// Reads a file of at most `most` bytes.
///
/// # Errors
/// When it is larger, or cannot be read.
pub(crate) fn read_small(filesystem: &Ext4, path: &str, most: u64) -> Result<Vec<u8>> {
    let size = filesystem.metadata(path).with_context(|| format!("reading {path}"))?.len();
    ensure!(size <= most, "reading {path}: the file has {size} bytes, expected at most {most}");
    filesystem.read(path).with_context(|| format!("reading {path}"))
}
