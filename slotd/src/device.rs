//! Which product, board and disk this is, and which slot runs: from `device.toml` in the image and from the
//! kernel's information about its root file system, never from environment variables or the command line.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bundle::bootstate::Slot;
pub use contract::device_file::{BootFlow, DeviceFile, EarlierLayout, PartitionExtent, SECTOR};

use crate::refusal::{Refusal, Result, failed};
use crate::root::RootDir;
use crate::storage::BlockDevice;

/// The robot: its image's description, the running slot, and the disk.
#[derive(Debug, Clone)]
pub struct RobotDevice {
    /// The image's description.
    pub about: DeviceFile,
    /// The slot whose root file system the kernel has mounted at `/`.
    pub running: Slot,
    root: RootDir,
    /// The disk's directory in sysfs; its last part is the kernel's name for the disk.
    disk: PathBuf,
}

/// The help for an image that contradicts itself or its disk.
const NOT_OUR_DISK: &str = "the card was not made from an image of this system: flash it again with `slipway flash` or `cargo xtask flash`";

/// Reads `device.toml`. Functions that need only this work on any root file system.
///
/// # Errors
/// `bad-device`: the file is missing or malformed.
pub fn read_device_file(root: &RootDir) -> Result<DeviceFile> {
    let path = root.device_file();
    let bad = |why: String| {
        let message = format!("reading {}: {why}", path.display());
        Refusal::new("bad-device", message, "run this command on a robot built with Slipway")
    };
    let text = fs::read_to_string(&path).map_err(|error| bad(error.to_string()))?;
    DeviceFile::parse(&text).map_err(|error| bad(error.message().to_owned()))
}

impl RobotDevice {
    /// Reads `device.toml` and finds the running slot.
    ///
    /// # Errors
    /// `bad-device`: `device.toml` is missing or malformed. `unknown-slot`: the root file system is not on a
    /// partition that `device.toml` lists as a slot.
    pub fn read(root: &RootDir) -> Result<Self> {
        let path = root.device_file();
        let mut about = read_device_file(root)?;
        let partition = root_partition(root)?;
        let (number, start) =
            (read_number(&partition, "partition")?, read_number(&partition, "start")?);
        let running_on = |partitions: &BTreeMap<String, PartitionExtent>| {
            let is = |slot: &Slot| {
                partitions.get(&slot_role("root", *slot)).is_some_and(|known| {
                    u64::from(known.number) == number && known.start_sector == start
                })
            };
            [Slot::A, Slot::B].into_iter().find(is)
        };
        let mut running = running_on(&about.partitions);
        if running.is_none() {
            // No two layouts have a slot with the same number at the same position: the build checks this.
            let fits = |card: &EarlierLayout| Some((running_on(&card.partitions)?, card.clone()));
            if let Some((slot, card)) = about.earlier_cards.iter().find_map(fits) {
                running = Some(slot);
                about.boot_state = card.boot_state;
                about.trust = card.trust;
                about.partitions = card.partitions;
            }
        }
        let Some(running) = running else {
            return Err(Refusal::new(
                "unknown-slot",
                format!(
                    "finding the running slot: `/` is on partition {number}, which starts at sector {start}, but {} lists no such slot",
                    path.display()
                ),
                NOT_OUR_DISK,
            ));
        };
        let disk = partition.parent().unwrap_or(&partition).to_owned();
        Ok(Self { about, running, root: root.clone(), disk })
    }

    /// The slot that is not running: the only one that is ever written.
    pub fn idle(&self) -> Slot {
        other_slot(self.running)
    }

    /// The root of all paths.
    pub fn root(&self) -> &RootDir {
        &self.root
    }

    /// Opens the whole disk, for data outside of all partitions.
    ///
    /// # Errors
    /// When the device cannot be opened.
    pub fn open_disk(&self, writable: bool) -> Result<BlockDevice> {
        self.open(&self.disk, writable)
    }

    /// The device file of the whole disk.
    pub fn disk_path(&self) -> PathBuf {
        self.node(&self.disk)
    }

    /// Opens the partition of a role, if the kernel has it at the position in `device.toml`.
    ///
    /// # Errors
    /// `wrong-layout`: the disk has another partition there, or none.
    pub fn open_partition(&self, role: &str, writable: bool) -> Result<BlockDevice> {
        let folder = self.partition(role)?;
        self.open(&folder, writable)
    }

    /// The device file of a role's partition.
    ///
    /// # Errors
    /// As [`RobotDevice::open_partition`].
    pub fn partition_path(&self, role: &str) -> Result<PathBuf> {
        Ok(self.node(&self.partition(role)?))
    }

    fn partition(&self, role: &str) -> Result<PathBuf> {
        let wrong = |why: String| {
            let message = format!("finding the partition `{role}`: {why}");
            Refusal::new("wrong-layout", message, NOT_OUR_DISK)
        };
        let Some(known) = self.about.partitions.get(role) else {
            return Err(wrong("device.toml does not list it".to_owned()));
        };
        let listing = fs::read_dir(&self.disk).map_err(failed("reading", &self.disk))?;
        for entry in listing.flatten() {
            let folder = entry.path();
            if read_number(&folder, "partition").ok() != Some(u64::from(known.number)) {
                continue;
            }
            let (start, sectors) = (read_number(&folder, "start")?, read_number(&folder, "size")?);
            // `data` grows when a robot first starts.
            let fits = start == known.start_sector && (sectors == known.sectors || role == "data");
            return if fits {
                Ok(folder)
            } else {
                Err(wrong(format!(
                    "partition {} starts at sector {start} and has {sectors} sectors, expected {} and {}",
                    known.number, known.start_sector, known.sectors
                )))
            };
        }
        Err(wrong(format!("{} has no partition {}", self.disk.display(), known.number)))
    }

    fn node(&self, folder: &Path) -> PathBuf {
        let name = folder.file_name().unwrap_or_default();
        self.root.path("dev").join(name)
    }

    fn open(&self, folder: &Path, writable: bool) -> Result<BlockDevice> {
        let path = self.node(folder);
        BlockDevice::open(&path, writable).map_err(failed("opening", &path))
    }
}

/// The other slot.
pub fn other_slot(slot: Slot) -> Slot {
    match slot {
        Slot::A => Slot::B,
        Slot::B => Slot::A,
    }
}

/// The partition that holds a payload of this role in a slot: `root-a`.
pub fn slot_role(role: &str, slot: Slot) -> String {
    format!("{role}-{slot}")
}

/// The sysfs directory of the partition that is mounted at `/`.
fn root_partition(root: &RootDir) -> Result<PathBuf> {
    let path = root.path("proc/self/mountinfo");
    let failed = |error: io::Error| Refusal::io(format!("reading {}", path.display()), &error);
    let text = fs::read_to_string(&path).map_err(failed)?;
    let unknown = |why: &str| {
        Refusal::new("unknown-slot", format!("finding the running slot: {why}"), NOT_OUR_DISK)
    };
    // proc_pid_mountinfo(5): id, parent, major:minor, root, mount point. The last mount at `/` is on top.
    let device = text.lines().rev().find_map(|line| {
        let mut fields = line.split(' ').skip(2);
        let (device, _, point) = (fields.next()?, fields.next()?, fields.next()?);
        (point == "/").then_some(device)
    });
    let device = device.ok_or_else(|| unknown("nothing is mounted at `/`"))?;
    let numbers = |c: char| c.is_ascii_digit() || c == ':';
    if !device.chars().all(numbers) {
        return Err(unknown("the kernel's list of mounts is malformed"));
    }
    // /sys/dev/block/179:2 -> ../../devices/…/mmcblk0/mmcblk0p2
    let link = root.path("sys/dev/block").join(device);
    let folder = fs::canonicalize(&link)
        .map_err(|_| unknown(&format!("`/` is not on a disk (device {device})")))?;
    if !folder.join("partition").is_file() {
        return Err(unknown(&format!("`/` is not on a partition (device {device})")));
    }
    Ok(folder)
}

/// A number in sysfs.
fn read_number(folder: &Path, name: &str) -> Result<u64> {
    let path = folder.join(name);
    let failed = |error: io::Error| Refusal::io(format!("reading {}", path.display()), &error);
    let text = fs::read_to_string(&path).map_err(failed)?;
    text.trim().parse().map_err(|_| failed(io::Error::other(format!("`{text}` is not a number"))))
}
