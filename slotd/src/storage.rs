//! A disk or a partition as bytes at offsets. All code whose writes must survive a power cut uses this trait,
//! so that a test can record every write and simulate a power cut between any two.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{Advice, OFlags, SeekFrom};

/// Bytes at offsets, with a flush that orders writes before it against writes after it.
pub trait Storage: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Fills `buffer` from `offset`, possibly from a cache of the device.
    ///
    /// # Errors
    /// When the device fails or ends before the buffer is full.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// Fills `buffer` from the device itself: what a restart would find there. All writes must have been
    /// flushed.
    ///
    /// # Errors
    /// As [`Storage::read_at`].
    fn read_back(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// Writes all of `bytes` at `offset`. Only [`Storage::flush`] guarantees that they survive a power cut.
    ///
    /// # Errors
    /// When the device fails or ends before everything is written.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Returns when everything written so far would survive a power cut.
    ///
    /// # Errors
    /// When the device fails.
    fn flush(&self) -> io::Result<()>;
}

impl<S: Storage + ?Sized> Storage for &S {
    fn size(&self) -> u64 {
        (**self).size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        (**self).read_at(offset, buffer)
    }

    fn read_back(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        (**self).read_back(offset, buffer)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        (**self).write_at(offset, bytes)
    }

    fn flush(&self) -> io::Result<()> {
        (**self).flush()
    }
}

/// Alignment that is sufficient for direct access to any disk.
pub const ALIGNMENT: usize = 4096;

/// A block device, or a regular file instead.
#[derive(Debug)]
pub struct BlockDevice {
    file: File,
    /// The same device without the kernel's page cache (`O_DIRECT`), if its file system supports this.
    direct: Option<File>,
    size: u64,
}

impl BlockDevice {
    /// Opens a device.
    ///
    /// # Errors
    /// When it cannot be opened or sought.
    pub fn open(path: &Path, writable: bool) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(writable);
        let file = options.open(path)?;
        // The size by seeking, because a device's metadata does not have it.
        let size = rustix::fs::seek(&file, SeekFrom::End(0))?;
        let direct = options.custom_flags(OFlags::DIRECT.bits().cast_signed()).open(path).ok();
        Ok(Self { file, direct, size })
    }

    /// The direct file, if it can be used for this transfer.
    fn direct(&self, offset: u64, bytes: &[u8]) -> Option<&File> {
        let fits = offset.is_multiple_of(ALIGNMENT as u64)
            && bytes.len().is_multiple_of(ALIGNMENT)
            && bytes.as_ptr().addr().is_multiple_of(ALIGNMENT);
        self.direct.as_ref().filter(|_| fits)
    }
}

impl Storage for BlockDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn read_back(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if let Some(direct) = self.direct(offset, buffer) {
            return direct.read_exact_at(buffer, offset);
        }
        // Clean pages of the range are dropped and then read from the device again. posix_fadvise(2) keeps
        // partially covered pages.
        let page = ALIGNMENT as u64;
        let start = offset - offset % page;
        let length = (offset + buffer.len() as u64).next_multiple_of(page) - start;
        let length = std::num::NonZeroU64::new(length);
        rustix::fs::fadvise(&self.file, start, length, Advice::DontNeed)?;
        self.file.read_exact_at(buffer, offset)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.direct(offset, bytes).unwrap_or(&self.file).write_all_at(bytes, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}
