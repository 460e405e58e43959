//! The boot selection of the Raspberry Pi's own firmware (Pi 4 and Pi 5), over the bytes of a disk. No
//! emulator has this firmware, so each rule names where Raspberry Pi says it:
//!
//! - A: "`autoboot.txt`", documentation of `config.txt` (autoboot.adoc);
//! - F: "Conditional Filters", documentation of `config.txt` (conditional.adoc);
//! - B: "EEPROM boot flow", with "Fail-safe OS updates (`tryboot`)" (bootflow-eeprom.adoc);
//! - W: `PARTITION_WALK`, "Raspberry Pi bootloader configuration" (eeprom-bootloader.adoc, added with pull
//!   request 4037), and its release notes (raspberrypi/rpi-eeprom, pull requests 659, 663, 736, 737);
//! - N: release notes of the EEPROM (raspberrypi/rpi-eeprom, firmware-2711/release-notes.md).

use std::io::{self, Read, Seek, SeekFrom, Write};

/// Bytes of a sector.
const SECTOR: u64 = 512;

/// A disk that is only looked at.
pub trait Disk {
    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// When the disk ends before.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

impl Disk for std::fs::File {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, buffer, offset)
    }
}

impl Disk for [u8] {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.checked_add(buffer.len()).filter(|end| *end <= self.len());
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(&self[start..end]);
        Ok(())
    }
}

/// Which table a release reads where a disk has both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
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
    /// What it reads of a disk with a hybrid MBR.
    pub table: Table,
    /// `PARTITION_WALK`: on by default since 13 August 2025, absent before 2025 (W).
    pub walks: bool,
    /// `tryboot_a_b` is known to the EEPROM since 18 October 2022 (N); a `start4.elf` that is older
    /// reads `tryboot.txt` in a trial all the same.
    pub knows_a_b: bool,
}

/// What a restart leaves for the firmware: nothing after a power cut or a reset by the watchdog.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Restart {
    /// The partition of `reboot N`; 0 is the default (A).
    pub partition: u32,
    /// The one-shot flag of `reboot "0 tryboot"`. It is cleared before anything is started (B).
    pub tryboot: bool,
}

/// What is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
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
    /// Other settings that the firmware has taken.
    pub settings: Vec<(String, String)>,
}

/// What the firmware would start; or why it would start nothing.
///
/// # Errors
/// The reason, for people.
pub fn select<D: Disk + ?Sized>(
    disk: &D,
    firmware: Firmware,
    restart: Restart,
) -> Result<Start, String> {
    let partitions = partitions(disk, firmware.table)?;
    let mut wanted = restart.partition;
    let mut a_b = false;
    // A: the file lies in the first FAT partition, and has at most 512 bytes.
    let first = partitions.iter().find_map(|p| Some((p, Volume::open(disk, p)?)));
    if let Some((_, volume)) = &first
        && let Some(text) = volume.read("autoboot.txt")
    {
        let text = text.get(..512).unwrap_or(&text);
        let settings = settings(text, &[Filter::Tryboot(restart.tryboot)]);
        a_b = last(&settings, "tryboot_a_b") == Some("1") && firmware.knows_a_b;
        // A: unless the restart has named a partition already.
        if let (0, Some(number)) = (wanted, last(&settings, "boot_partition")) {
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
    // W: each in turn from the wanted one on, up to 8 and round; autoboot.txt is not read again.
    let walk = || {
        let order = (wanted..=8).chain(1..wanted);
        order.filter(|_| firmware.walks).find_map(bootable)
    };
    let (partition, volume) = named
        .or_else(walk)
        .ok_or_else(|| format!("partition {wanted} is not bootable, and nothing else is tried"))?;
    // B: the flag chooses tryboot.txt, unless tryboot_a_b leaves the choice to the partition.
    let config = if restart.tryboot && !a_b { "tryboot.txt" } else { "config.txt" };
    let text =
        volume.read(config).ok_or_else(|| format!("partition {partition} has no {config}"))?;
    let filters = [Filter::Tryboot(restart.tryboot), Filter::Generation(firmware.generation)];
    let mut settings = settings(&text, &filters);
    let kernel = last(&settings, "kernel").unwrap_or("kernel8.img").to_owned();
    let initramfs = last(&settings, "initramfs").map(str::to_owned);
    for file in [Some(&kernel), initramfs.as_ref()].into_iter().flatten() {
        if volume.read(file).is_none_or(|bytes| bytes.is_empty()) {
            return Err(format!("partition {partition} has no {file}, which its {config} names"));
        }
    }
    let cmdline = last(&settings, "cmdline").unwrap_or("cmdline.txt").to_owned();
    let cmdline = volume.read(&cmdline).unwrap_or_default();
    let cmdline = String::from_utf8_lossy(&cmdline).lines().next().unwrap_or_default().to_owned();
    settings.retain(|(key, _)| !["kernel", "initramfs", "cmdline"].contains(&key.as_str()));
    let tryboot = restart.tryboot;
    Ok(Start { partition, tryboot, config, kernel, initramfs, cmdline, settings })
}

#[derive(Debug, Clone, Copy)]
struct Partition {
    number: u32,
    offset: u64,
    size: u64,
}

/// UEFI specification 2.10, 5.2 and 5.3.
fn partitions<D: Disk + ?Sized>(disk: &D, table: Table) -> Result<Vec<Partition>, String> {
    let mut mbr = [0; 512];
    disk.read_at(0, &mut mbr).map_err(|error| format!("the MBR cannot be read: {error}"))?;
    if mbr[510..] != [0x55, 0xaa] {
        return Err("the disk has no MBR".to_owned());
    }
    let u32_at = |bytes: &[u8], at: usize| {
        u64::from(u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]))
    };
    let records: Vec<&[u8]> = mbr[446..510].chunks(16).collect();
    let has_gpt = records.iter().any(|record| record[4] == 0xee);
    let mut found = Vec::new();
    if table == Table::Mbr || !has_gpt {
        for (number, record) in (1..).zip(records) {
            // FAT12, FAT16 and FAT32 in all their spellings.
            if [0x01, 0x04, 0x06, 0x0b, 0x0c, 0x0e].contains(&record[4]) {
                let (first, count) = (u32_at(record, 8), u32_at(record, 12));
                found.push(Partition { number, offset: first * SECTOR, size: count * SECTOR });
            }
        }
        return Ok(found);
    }
    let mut header = [0; 512];
    disk.read_at(SECTOR, &mut header).map_err(|error| format!("reading the GPT: {error}"))?;
    if !header.starts_with(b"EFI PART") {
        return Err("the MBR announces a GPT that is not there".to_owned());
    }
    let u64_at = |bytes: &[u8], at: usize| u32_at(bytes, at) | u32_at(bytes, at + 4) << 32;
    let (start, count, size) = (u64_at(&header, 72), u32_at(&header, 80), u32_at(&header, 84));
    for index in 0..count.min(128) {
        let mut entry = [0; 128];
        disk.read_at(start * SECTOR + index * size, &mut entry)
            .map_err(|error| format!("reading the GPT: {error}"))?;
        let (first, end) = (u64_at(&entry, 32), u64_at(&entry, 40));
        if entry[..16] != [0; 16] && end >= first {
            let (offset, size) = (first * SECTOR, (end + 1 - first) * SECTOR);
            found.push(Partition { number: index as u32 + 1, offset, size });
        }
    }
    Ok(found)
}

/// A FAT volume.
struct Volume<'a, D: Disk + ?Sized> {
    files: fatfs::FileSystem<Window<'a, D>>,
}

impl<'a, D: Disk + ?Sized> Volume<'a, D> {
    fn open(disk: &'a D, partition: &Partition) -> Option<Self> {
        let window = Window { disk, offset: partition.offset, size: partition.size, position: 0 };
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

/// A partition as something to read; writing fails.
struct Window<'a, D: ?Sized> {
    disk: &'a D,
    offset: u64,
    size: u64,
    position: u64,
}

impl<D: Disk + ?Sized> Read for Window<'_, D> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.size - self.position).unwrap_or(usize::MAX);
        let count = buffer.len().min(left);
        self.disk.read_at(self.offset + self.position, &mut buffer[..count])?;
        self.position += count as u64;
        Ok(count)
    }
}

impl<D: ?Sized> Write for Window<'_, D> {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<D: ?Sized> Seek for Window<'_, D> {
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

/// What a filter of this kind would pass.
#[derive(Clone, Copy)]
enum Filter {
    Tryboot(bool),
    Generation(u32),
}

/// The settings that pass: `key=value`, or `key value` for `initramfs`. F: `[all]` resets all filters,
/// those of one kind replace each other, those of different kinds must all pass; one that is not known
/// here (a serial number, a GPIO, a screen) does not pass.
fn settings(text: &[u8], filters: &[Filter]) -> Vec<(String, String)> {
    let text = String::from_utf8_lossy(text);
    let (mut model, mut tryboot, mut other) = (true, true, true);
    let mut found = Vec::new();
    for line in text.lines().map(str::trim) {
        let passes = |wanted: fn(&Filter) -> Option<bool>| filters.iter().find_map(wanted);
        match line {
            "" => {}
            _ if line.starts_with('#') => {}
            "[all]" => (model, tryboot, other) = (true, true, true),
            "[none]" => other = false,
            "[tryboot]" => {
                tryboot = passes(|f| match f {
                    Filter::Tryboot(set) => Some(*set),
                    Filter::Generation(_) => None,
                })
                .unwrap_or(false);
            }
            _ if line.starts_with('[') => {
                let generation = filters.iter().find_map(|f| match f {
                    Filter::Generation(number) => Some(*number),
                    Filter::Tryboot(_) => None,
                });
                let name = line.trim_matches(['[', ']']);
                match name.strip_prefix("pi").and_then(|number| number.parse::<u32>().ok()) {
                    Some(number) => model = generation == Some(number),
                    None => other = false,
                }
            }
            _ if model && tryboot && other => {
                let pair = line.split_once('=').or_else(|| line.split_once(' '));
                if let Some((key, value)) = pair {
                    // `initramfs FILE followkernel`
                    let value =
                        if key == "initramfs" { value.split(' ').next() } else { Some(value) };
                    found.push((key.to_owned(), value.unwrap_or_default().trim().to_owned()));
                }
            }
            _ => {}
        }
    }
    found
}

fn last<'a>(settings: &'a [(String, String)], key: &str) -> Option<&'a str> {
    settings.iter().rev().find(|(known, _)| known == key).map(|(_, value)| value.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(text: &str, tryboot: bool, generation: u32) -> Vec<String> {
        let filters = [Filter::Tryboot(tryboot), Filter::Generation(generation)];
        settings(text.as_bytes(), &filters).into_iter().map(|(k, v)| format!("{k}={v}")).collect()
    }

    #[test]
    fn filters_replace_combine_and_reset_as_documented() {
        let text = "a=1\n[pi4]\nb=1\n[pi5]\nc=1\n[tryboot]\nd=1\n[all]\ne=1\n[none]\nf=1\n[all]\n# g=1\nh=1";
        assert_eq!(taken(text, false, 4), ["a=1", "b=1", "e=1", "h=1"]);
        assert_eq!(taken(text, false, 5), ["a=1", "c=1", "e=1", "h=1"]);
        assert_eq!(taken(text, true, 5), ["a=1", "c=1", "d=1", "e=1", "h=1"]);
        assert_eq!(taken("[gpio4=1]\na=1\n[all]\nb=1", true, 4), ["b=1"]);
        assert_eq!(taken("initramfs initrd.img followkernel", false, 4), ["initramfs=initrd.img"]);
    }
}
