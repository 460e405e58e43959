//! The boot selection of the Raspberry Pi's own firmware (Pi 4 and Pi 5), over the bytes of a disk. No
//! emulator has this firmware, so each rule names where Raspberry Pi says it:
//!
//! - A: "`autoboot.txt`", documentation of `config.txt` (autoboot.adoc);
//! - F: "Conditional Filters", documentation of `config.txt` (conditional.adoc);
//! - B: "EEPROM boot flow", with "Fail-safe OS updates (`tryboot`)" (bootflow-eeprom.adoc);
//! - W: `PARTITION_WALK`, "Raspberry Pi bootloader configuration" (eeprom-bootloader.adoc, added with pull
//!   request 4037), and its release notes (raspberrypi/rpi-eeprom, pull requests 659, 663, 736, 737);
//! - N: release notes of the EEPROM (raspberrypi/rpi-eeprom, firmware-2711/release-notes.md).

use std::cell::Cell;
use std::io::{self, Read, Seek, SeekFrom, Write};

use crate::chain;
use crate::chain::config::{ConfigFilters, last_value, read_settings};

/// A disk that is only read.
pub trait ReadOnlyDisk {
    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// When the disk ends too early.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

impl<D: ReadOnlyDisk + ?Sized> ReadOnlyDisk for &D {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        (**self).read_at(offset, buffer)
    }
}

impl ReadOnlyDisk for [u8] {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.checked_add(buffer.len()).filter(|end| *end <= self.len());
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(&self[start..end]);
        Ok(())
    }
}

/// Which table a release of the firmware reads when a disk has both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreferredTable {
    /// The records of the MBR.
    Mbr,
    /// The entries of the GPT.
    Gpt,
}

/// Which board, and what its release of the firmware can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Firmware {
    /// 4 or 5: what makes a partition bootable (A, W), and which filter passes (F).
    pub generation: u32,
    /// The table that the firmware reads on a disk with a hybrid MBR.
    pub table: PreferredTable,
    /// `PARTITION_WALK`: on by default since 13 August 2025, absent before 2025 (W).
    pub walks: bool,
    /// The EEPROM knows `tryboot_a_b` since 18 October 2022 (N); an older `start4.elf` still reads
    /// `tryboot.txt` in a trial.
    pub knows_a_b: bool,
}

/// What a restart passes to the firmware: nothing after a power cut or a reset by the watchdog.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RestartFlags {
    /// The partition of `reboot N`; 0 is the default (A).
    pub partition: u32,
    /// The one-shot flag of `reboot "0 tryboot"`. It is cleared before anything is started (B).
    pub tryboot: bool,
}

/// What is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirmwareStart {
    /// The number of the boot partition; the system reads it in its device tree.
    pub partition: u32,
    /// Whether the flag was set; the system reads it in its device tree.
    pub tryboot: bool,
    /// The configuration that was read.
    pub config: &'static str,
    /// The kernel's file.
    pub kernel: String,
    /// The initrd's file.
    pub initramfs: Option<String>,
    /// The kernel's command line, without what the firmware adds.
    pub cmdline: String,
    /// Other settings that the firmware applies.
    pub settings: Vec<(String, String)>,
}

/// What the firmware would start.
///
/// # Errors
/// Why it would start nothing, human-readable.
pub fn select<D: ReadOnlyDisk + ?Sized>(
    disk: &D,
    firmware: Firmware,
    restart: RestartFlags,
) -> Result<FirmwareStart, String> {
    let disk: &dyn ReadOnlyDisk = &disk;
    let partitions = read_partitions(disk, firmware.table)?;
    let mut wanted = restart.partition;
    let mut a_b = false;
    // A: the file is in the first FAT partition, and has at most 512 bytes.
    let first = partitions.iter().find_map(|p| Some((p, Volume::open(disk, p)?)));
    if let Some((_, volume)) = &first
        && let Some(text) = volume.read("autoboot.txt")
    {
        let text = text.get(..512).unwrap_or(&text);
        let filters =
            ConfigFilters { models: None, tryboot: Some(restart.tryboot), sections: true };
        let settings = read_settings(text, filters);
        let value = |key: &str| last_value(&settings, key).map(|setting| setting.value.clone());
        a_b = value("tryboot_a_b").as_deref() == Some("1") && firmware.knows_a_b;
        // A: unless the restart has already named a partition.
        if let (0, Some(number)) = (wanted, value("boot_partition")) {
            wanted = number.parse().unwrap_or(0);
        }
    }
    let bootable = |number: u32| {
        let partition = partitions.iter().find(|p| p.number == number)?;
        let volume = Volume::open(disk, partition)?;
        volume.is_bootable(firmware.generation).then_some((number, volume))
    };
    // A: partition 0 means the first bootable FAT partition.
    let named = match wanted {
        0 => partitions.iter().find_map(|p| bootable(p.number)),
        number => bootable(number),
    };
    // W: tries the partitions in order from the wanted one to 8, then from 1; does not read autoboot.txt again.
    let walk = || {
        let order = (wanted..=8).chain(1..wanted);
        order.filter(|_| firmware.walks).find_map(bootable)
    };
    let (partition, volume) = named.or_else(walk).ok_or_else(|| {
        format!("partition {wanted} is not bootable, and the firmware tries no other")
    })?;
    // B: the flag chooses tryboot.txt, unless tryboot_a_b leaves the choice to the partition.
    let config = if restart.tryboot && !a_b { "tryboot.txt" } else { "config.txt" };
    let text =
        volume.read(config).ok_or_else(|| format!("partition {partition} has no {config}"))?;
    let models = [format!("pi{}", firmware.generation)];
    let filters =
        ConfigFilters { models: Some(&models), tryboot: Some(restart.tryboot), sections: true };
    let settings = read_settings(&text, filters);
    let value = |key: &str| last_value(&settings, key).map(|setting| setting.value.clone());
    let kernel = value("kernel").unwrap_or_else(|| "kernel8.img".to_owned());
    let initramfs = value("initramfs");
    for file in [Some(&kernel), initramfs.as_ref()].into_iter().flatten() {
        if volume.read(file).is_none_or(|bytes| bytes.is_empty()) {
            return Err(format!("partition {partition} has no {file}, but its {config} names it"));
        }
    }
    let cmdline = value("cmdline").unwrap_or_else(|| "cmdline.txt".to_owned());
    let cmdline = volume.read(&cmdline).unwrap_or_default();
    let cmdline = String::from_utf8_lossy(&cmdline).lines().next().unwrap_or_default().to_owned();
    let others = settings.into_iter().map(|setting| (setting.key, setting.value));
    let taken = ["kernel", "initramfs", "cmdline"];
    let settings = others.filter(|(key, _)| !taken.contains(&key.as_str())).collect();
    let tryboot = restart.tryboot;
    Ok(FirmwareStart { partition, tryboot, config, kernel, initramfs, cmdline, settings })
}

/// A partition, as a table has it.
#[derive(Debug, Clone)]
pub(crate) struct TablePartition {
    pub(crate) number: u32,
    /// Its name, in a GPT.
    pub(crate) name: String,
    pub(crate) offset: u64,
    pub(crate) size: u64,
}

/// The partitions that this release sees.
fn read_partitions(
    disk: &dyn ReadOnlyDisk,
    table: PreferredTable,
) -> Result<Vec<TablePartition>, String> {
    let (records, gpt, partitions) = chain::table::read_partitions(disk)?;
    if gpt.is_some() && table == PreferredTable::Gpt {
        return Ok(partitions);
    }
    let fat = records.into_iter().filter(|record| chain::table::is_fat(record.kind));
    Ok(fat
        .map(|r| TablePartition {
            number: r.number,
            name: String::new(),
            offset: r.offset,
            size: r.size,
        })
        .collect())
}

/// A FAT volume.
struct Volume<'a> {
    files: fatfs::FileSystem<PartitionStream<'a>>,
}

impl<'a> Volume<'a> {
    fn open(disk: &'a dyn ReadOnlyDisk, partition: &TablePartition) -> Option<Self> {
        let window = PartitionStream::new(disk, partition);
        let files = fatfs::FileSystem::new(window, fatfs::FsOptions::new()).ok()?;
        Some(Self { files })
    }

    fn read(&self, name: &str) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        self.files.root_dir().open_file(name).ok()?.read_to_end(&mut bytes).ok()?;
        Some(bytes)
    }

    /// A: a FAT with `start4.elf`; W: on a Pi 5 with `config.txt` and a device tree.
    fn is_bootable(&self, generation: u32) -> bool {
        let names: Vec<String> =
            self.files.root_dir().iter().flatten().map(|entry| entry.file_name()).collect();
        let has = |name: &str| names.iter().any(|known| known == name);
        match generation {
            4 => has("start4.elf"),
            _ => has("config.txt") && names.iter().any(|name| name.ends_with(".dtb")),
        }
    }
}

/// A partition as a read-only stream.
pub(crate) struct PartitionStream<'a> {
    disk: &'a dyn ReadOnlyDisk,
    offset: u64,
    size: u64,
    position: u64,
    /// How many bytes may still be read: this ends a circular chain of clusters.
    budget: Option<&'a Cell<u64>>,
}

impl<'a> PartitionStream<'a> {
    pub(crate) fn new(disk: &'a dyn ReadOnlyDisk, partition: &TablePartition) -> Self {
        let TablePartition { offset, size, .. } = *partition;
        Self { disk, offset, size, position: 0, budget: None }
    }

    /// A stream with a limit on the bytes read from it.
    pub(crate) fn bounded(
        disk: &'a dyn ReadOnlyDisk,
        partition: &TablePartition,
        budget: &'a Cell<u64>,
    ) -> Self {
        Self { budget: Some(budget), ..Self::new(disk, partition) }
    }
}

impl Read for PartitionStream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.size - self.position).unwrap_or(usize::MAX);
        let count = buffer.len().min(left);
        if let Some(budget) = self.budget {
            let left = budget.get().checked_sub(count as u64);
            budget.set(left.ok_or_else(|| io::Error::other("a chain of clusters is circular"))?);
        }
        let at = self.offset.saturating_add(self.position);
        self.disk.read_at(at, &mut buffer[..count])?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Write for PartitionStream<'_> {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for PartitionStream<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::End(offset) => self.size.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        let position = position.filter(|position| *position <= self.size);
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}
