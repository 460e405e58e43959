//! What is written to: a card as bytes at offsets, past the kernel's memory. A block device or a
//! plain file; tests put faulty ones of their own behind the same trait.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{Advice, FallocateFlags, FlockOperation, OFlags, fadvise, fallocate, flock};
use rustix::io::Errno;

use super::device::{self, Device};
use super::identity::{Identity, KERNEL};
use crate::exec::Tool;

/// Alignment in memory that direct access to any device is content with.
pub const ALIGNMENT: usize = 4096;

/// Bytes at offsets. Calls come from several threads at once.
pub trait Card: Sync {
    /// Bytes of the card.
    fn size(&self) -> u64;

    /// Fills an aligned buffer from the medium itself, never from memory that mirrors it.
    ///
    /// # Errors
    /// When the medium fails.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// Writes all of an aligned buffer. Nothing is promised to survive before [`Card::flush`].
    ///
    /// # Errors
    /// When the medium fails.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Returns when all that was written would survive a power cut.
    ///
    /// # Errors
    /// When the medium fails.
    fn flush(&self) -> io::Result<()>;

    /// Tells the medium that nobody needs these bytes any more. Answers `false` where it cannot be
    /// told; the bytes are then what they were.
    ///
    /// # Errors
    /// When the medium says that it can, and fails.
    fn discard(&self, offset: u64, size: u64) -> Result<bool>;
}

/// Memory for direct access.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Buffer {
    /// Room for this many bytes, zero.
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

/// A block device or a plain file, held so that nobody else writes to it.
#[derive(Debug)]
pub struct Disk {
    file: File,
    path: Utf8PathBuf,
    size: u64,
    block: bool,
    /// Whether reads come past the kernel's memory.
    direct: bool,
    can_discard: bool,
}

impl Disk {
    /// Opens what was judged: the kernel refuses a device that is mounted or held (`O_EXCL`), and a
    /// plain file is locked.
    ///
    /// # Errors
    /// When it cannot be opened, is in use, or is no longer what was judged.
    pub fn open(device: &Device) -> Result<Self> {
        let path = &device.path;
        let doing = || format!("opening {path}");
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
                (open(OFlags::empty()).with_context(doing)?, false)
            }
            Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => bail!(
                "{}: the kernel says that it is in use\n\
                 help: unmount what is on it, and stop what holds it (lsblk shows both)",
                doing()
            ),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => bail!(
                "{}: {error}\nhelp: run it as root: sudo {} flash …",
                doing(),
                std::env::current_exe().unwrap_or_default().display()
            ),
            Err(error) => return Err(error).with_context(doing),
        };
        let metadata = file.metadata().with_context(doing)?;
        let numbers = metadata.file_type().is_block_device().then(|| {
            let device = metadata.rdev();
            format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device))
        });
        ensure!(
            numbers == device.numbers,
            "{}: it is another device than a moment ago\nhelp: look again with --list",
            doing()
        );
        // Only now: what was opened is held, so that it is compared with what was shown.
        let identity = match &numbers {
            Some(numbers) => Identity::of_device(Utf8Path::new(KERNEL), numbers),
            None => Identity::of_file(&metadata),
        };
        if let Some(difference) = device.identity.difference(&identity) {
            bail!(
                "{}: another medium is there than a moment ago: {difference}\nhelp: look again with --list",
                doing()
            );
        }
        if !block && !lock_soon(&file) {
            bail!("{}: another program writes to it\nhelp: wait for that program", doing());
        }
        let end = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).with_context(doing)?;
        let size = device::whole(end);
        ensure!(
            size == device.size,
            "{}: it has {size} bytes, {} a moment ago",
            doing(),
            device.size
        );
        let can_discard = !block || device.discard > 0;
        Ok(Self { file, path: path.clone(), size, block, direct, can_discard })
    }

    /// Where it lies.
    pub fn path(&self) -> &Utf8Path {
        &self.path
    }
}

/// Takes the lock, for two seconds: a program that this process starts meanwhile shares a lock that was just given back
/// until it runs.
fn lock_soon(file: &File) -> bool {
    (0..20).any(|tries| {
        if tries > 0 {
            std::thread::sleep(Duration::from_millis(100));
        }
        flock(file, FlockOperation::NonBlockingLockExclusive).is_ok()
    })
}

impl Card for Disk {
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
                Err(error) => Err(error).with_context(|| format!("emptying {}", self.path)),
            };
        }
        // `--force`: we hold the device already, and no other device can take its name meanwhile.
        let discard = Tool::new("blkdiscard").args(["--force", "--offset", &offset.to_string()]);
        discard.args(["--length", &size.to_string(), self.path.as_str()]).run()?;
        Ok(true)
    }
}
