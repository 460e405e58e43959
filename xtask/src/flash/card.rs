//! The target: a card as bytes at offsets, bypassing the page cache. A block device or a plain
//! file; tests implement the same trait for faulty cards.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{Advice, FallocateFlags, FlockOperation, OFlags, fadvise, fallocate, flock};
use rustix::io::Errno;

use super::device::{self, FlashDevice};
use super::identity::{CardIdentity, KERNEL};
use crate::exec::Tool;

/// Alignment in memory that is sufficient for direct access to any device.
pub const ALIGNMENT: usize = 4096;

/// Bytes at offsets. Calls come from several threads at once.
pub trait CardIo: Sync {
    /// The size of the card in bytes.
    fn size(&self) -> u64;

    /// Fills an aligned buffer from the medium itself, never from the page cache.
    ///
    /// # Errors
    /// When the medium fails.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// Writes all of an aligned buffer. The data is durable only after [`CardIo::flush`].
    ///
    /// # Errors
    /// When the medium fails.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Returns when everything that was written would survive a power cut.
    ///
    /// # Errors
    /// When the medium fails.
    fn flush(&self) -> io::Result<()>;

    /// Discards these bytes. Returns `false` when the medium does not support it; the bytes are
    /// unchanged then.
    ///
    /// # Errors
    /// When the medium supports it, and fails.
    fn discard(&self, offset: u64, size: u64) -> Result<bool>;
}

/// Memory for direct access.
#[derive(Debug)]
pub struct AlignedMemory {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedMemory {
    /// A buffer of this many bytes, zeroed.
    pub fn new(length: usize) -> Self {
        let bytes = vec![0; length + ALIGNMENT];
        let start = bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { bytes, start, length }
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }

    /// The first `length` bytes.
    pub fn part(&mut self, length: usize) -> &mut [u8] {
        let length = length.min(self.length);
        &mut self.bytes[self.start..self.start + length]
    }
}

/// A block device or a plain file, opened so that no other process can write to it.
#[derive(Debug)]
pub struct CardDevice {
    file: File,
    path: Utf8PathBuf,
    size: u64,
    block: bool,
    /// Whether reads bypass the page cache.
    direct: bool,
    can_discard: bool,
}

impl CardDevice {
    /// Opens the device that was examined: the kernel refuses a device that is mounted or in use
    /// (`O_EXCL`), and a plain file is locked.
    ///
    /// # Errors
    /// When it cannot be opened, is in use, or is no longer the device that was examined.
    pub fn open(device: &FlashDevice) -> Result<Self> {
        let path = &device.path;
        let context = || format!("opening {path}");
        let block = device.numbers.is_some();
        let exclusive = if block { OFlags::EXCL } else { OFlags::empty() };
        let open = |direct: OFlags| {
            let flags = exclusive | direct | OFlags::NOFOLLOW;
            let flags = i32::try_from(flags.bits()).unwrap_or_default();
            OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)
        };
        let (file, direct) = match open(OFlags::DIRECT) {
            Ok(file) => (file, true),
            // A filesystem without direct access, such as an older tmpfs.
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                (open(OFlags::empty()).with_context(context)?, false)
            }
            Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => bail!(
                "{}: the device is in use\n\
                 help: unmount its filesystems, and stop the programs that use it (lsblk shows both)",
                context()
            ),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => bail!(
                "{}: {error}\nhelp: run it as root: sudo {} flash …",
                context(),
                std::env::current_exe().unwrap_or_default().display()
            ),
            Err(error) => return Err(error).with_context(context),
        };
        let metadata = file.metadata().with_context(context)?;
        let numbers = metadata.file_type().is_block_device().then(|| {
            let device = metadata.rdev();
            format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device))
        });
        ensure!(
            numbers == device.numbers,
            "{}: the device has changed since it was examined\nhelp: check it again with --list",
            context()
        );
        // Compare only now: the opened device can no longer change.
        let identity = match &numbers {
            Some(numbers) => CardIdentity::of_device(Utf8Path::new(KERNEL), numbers),
            None => CardIdentity::of_file(&metadata),
        };
        if let Some(difference) = device.identity.difference(&identity) {
            bail!(
                "{}: the medium has changed since it was examined: {difference}\n\
                 help: check it again with --list",
                context()
            );
        }
        if !block && !lock_soon(&file) {
            bail!(
                "{}: another program is writing to the file\nhelp: wait for that program",
                context()
            );
        }
        let end = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).with_context(context)?;
        let size = device::whole_blocks(end);
        ensure!(
            size == device.size,
            "{}: the size is now {size} bytes, it was {}",
            context(),
            device.size
        );
        let can_discard = !block || device.discard > 0;
        Ok(Self { file, path: path.clone(), size, block, direct, can_discard })
    }

    /// Its path.
    pub fn path(&self) -> &Utf8Path {
        &self.path
    }
}

/// Takes the lock, retrying for two seconds: a program that this process starts inherits a released
/// lock until it executes.
fn lock_soon(file: &File) -> bool {
    (0..20).any(|tries| {
        if tries > 0 {
            std::thread::sleep(Duration::from_millis(100));
        }
        flock(file, FlockOperation::NonBlockingLockExclusive).is_ok()
    })
}

impl CardIo for CardDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if !self.direct {
            let length = std::num::NonZeroU64::new(buffer.len() as u64);
            fadvise(&self.file, offset, length, Advice::DontNeed)?;
        }
        self.file.read_exact_at(buffer, offset)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, size: u64) -> Result<bool> {
        if !self.can_discard || size == 0 {
            return Ok(false);
        }
        if !self.block {
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            return match fallocate(&self.file, how, offset, size) {
                Ok(()) => Ok(true),
                Err(Errno::OPNOTSUPP) => Ok(false),
                Err(error) => Err(error).with_context(|| format!("discarding {}", self.path)),
            };
        }
        // `--force`: we have the device open already, and no other device can get its name in the
        // meantime.
        let discard = Tool::new("blkdiscard").args(["--force", "--offset", &offset.to_string()]);
        discard.args(["--length", &size.to_string(), self.path.as_str()]).run()?;
        Ok(true)
    }
}
