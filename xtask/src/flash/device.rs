//! Lists devices, and the reasons why each one may not be written: from `lsblk`, never by guessing.

use std::collections::BTreeMap;
use std::os::unix::fs::FileTypeExt;

use anyhow::{Context, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use super::identity::{CardIdentity, KERNEL};
use crate::disk::layout::BLOCK;
use crate::disk::{TableKind, read};
use crate::exec::Tool;
use crate::program;
use crate::progress::{format_bytes, list_names};

/// The columns to request. util-linux 2.37 (2021) and later supports all of them.
const COLUMNS: &str = "NAME,KNAME,PATH,MAJ:MIN,TYPE,SIZE,RO,RM,HOTPLUG,TRAN,SUBSYSTEMS,VENDOR,\
                       MODEL,LOG-SEC,DISC-MAX,PTTYPE,FSTYPE,LABEL,PARTLABEL,MOUNTPOINTS";

/// Mount points of a running system. A disk with one of these is a system disk.
const SYSTEM: [&str; 12] = [
    "/", "/boot", "/usr", "/var", "/etc", "/home", "/root", "/opt", "/srv", "/tmp", "/nix", "/data",
];
/// A disk is also a system disk when it is mounted anywhere below these, such as at `/boot/efi`.
const BELOW: [&str; 3] = ["/boot/", "/usr/", "/var/"];

/// A block device as `lsblk` lists it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct LsblkDevice {
    name: String,
    #[serde(default)]
    kname: Option<String>,
    path: Utf8PathBuf,
    #[serde(rename = "maj:min")]
    numbers: String,
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    size: Option<u64>,
    #[serde(default)]
    ro: bool,
    #[serde(default)]
    rm: bool,
    #[serde(default)]
    hotplug: bool,
    #[serde(default)]
    tran: Option<String>,
    #[serde(default)]
    subsystems: Option<String>,
    #[serde(default)]
    vendor: Option<String>,
    #[serde(default)]
    model: Option<String>,
    #[serde(default)]
    log_sec: Option<u64>,
    #[serde(default)]
    disc_max: Option<u64>,
    #[serde(default)]
    pttype: Option<String>,
    #[serde(default)]
    fstype: Option<String>,
    #[serde(default)]
    label: Option<String>,
    #[serde(default)]
    partlabel: Option<String>,
    #[serde(default)]
    mountpoints: Vec<Option<String>>,
    #[serde(default)]
    children: Vec<LsblkDevice>,
}

#[derive(Debug, Deserialize)]
struct LsblkOutput {
    blockdevices: Vec<LsblkDevice>,
}

/// A possible target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FlashDevice {
    /// The name to type: the kernel's name, such as `sdb`; for a file, its file name.
    pub name: String,
    /// Its path.
    pub path: Utf8PathBuf,
    /// As `lsblk` says: `disk`, `part`, `loop`, `rom`, `crypt`, `lvm`, `raid1`, …; or `file`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Major and minor number; `None` for a file.
    #[serde(skip)]
    pub numbers: Option<String>,
    /// Which medium it is.
    #[serde(skip)]
    pub identity: CardIdentity,
    /// Bytes.
    pub size: u64,
    /// Vendor and model, as far as the device reports them.
    pub model: String,
    /// How it is attached: `usb`, `mmc`, `nvme`, `sata`, …
    pub bus: String,
    /// Whether it is removable: a card or a stick.
    pub removable: bool,
    /// Whether it is read-only.
    pub read_only: bool,
    /// The sector size in bytes.
    pub sector: u64,
    /// The maximum number of bytes of one discard; 0 when unsupported.
    pub discard: u64,
    /// What is mounted, or used for swap (`[SWAP]`): device, mount point.
    pub mounted: Vec<(String, String)>,
    /// What uses it other than partitions: volumes, arrays, loop devices.
    pub held_by: Vec<String>,
    /// A human-readable summary of its contents.
    pub content: String,
}

/// Why a device may not be written, in order of importance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ObjectionKind {
    /// The running system is on it.
    System,
    /// A filesystem on it is mounted.
    Mounted,
    /// It is part of an array or a volume, or a file that is used as a disk.
    Held,
    /// It is a partition of a disk.
    Partition,
    /// It is neither disk nor file.
    NotADisk,
    /// It is read-only.
    ReadOnly,
    /// It is smaller than the image.
    TooSmall,
    /// The image's partition table uses another sector size.
    Sectors,
    /// It is not removable.
    NotRemovable,
}

/// A reason, with what was found and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceObjection {
    /// Which reason.
    pub reason: ObjectionKind,
    /// What was found.
    pub message: String,
    /// What to do.
    pub help: String,
}

impl FlashDevice {
    /// All reasons why an image of `size` bytes may not be written to it. `allowed` is the name of
    /// a fixed disk that the user has confirmed.
    pub fn objections(&self, size: u64, allowed: Option<&str>) -> Vec<DeviceObjection> {
        let mut found = Vec::new();
        let mut object = |reason, message: String, help: String| {
            found.push(DeviceObjection { reason, message, help });
        };
        let is_system = |place: &str| {
            place == "[SWAP]"
                || SYSTEM.contains(&place)
                || BELOW.iter().any(|dir| place.starts_with(dir))
        };
        let show = |all: &[&(String, String)]| {
            list_names(&all.iter().map(|(d, at)| format!("{d} at {at}")).collect::<Vec<_>>())
        };
        let (system, other): (Vec<_>, Vec<_>) =
            self.mounted.iter().partition(|(_, place)| is_system(place));
        let choose = format!("choose another device: {} flash --list", program::name());
        if !system.is_empty() {
            object(
                ObjectionKind::System,
                format!("the running system is on it: {}", show(&system)),
                choose.clone(),
            );
        }
        if !other.is_empty() {
            let devices: Vec<&str> = other.iter().map(|(device, _)| device.as_str()).collect();
            object(
                ObjectionKind::Mounted,
                format!("the device is mounted: {}", show(&other)),
                format!("umount {}", devices.join(" ")),
            );
        }
        if !self.held_by.is_empty() {
            object(
                ObjectionKind::Held,
                format!("the device is in use by {}", list_names(&self.held_by)),
                "stop that first (lsblk shows what uses the device)".to_owned(),
            );
        }
        match self.kind.as_str() {
            "disk" | "loop" | "file" => {}
            "part" => object(
                ObjectionKind::Partition,
                "the device is a partition, but an image needs a whole disk".to_owned(),
                format!(
                    "use its disk{}",
                    disk_of(&self.name).map_or(String::new(), |d| format!(": /dev/{d}"))
                ),
            ),
            kind => object(
                ObjectionKind::NotADisk,
                format!("expected a disk or a file, found a device of type `{kind}`"),
                choose.clone(),
            ),
        }
        if self.read_only {
            object(
                ObjectionKind::ReadOnly,
                "the device is read-only".to_owned(),
                "move the card's lock switch, or use another reader".to_owned(),
            );
        }
        if self.size < size {
            object(
                ObjectionKind::TooSmall,
                format!(
                    "the device has {} ({} bytes), the image needs {} ({size} bytes)",
                    format_bytes(self.size),
                    self.size,
                    format_bytes(size)
                ),
                "use a larger device".to_owned(),
            );
        }
        if self.sector != 512 {
            object(
                ObjectionKind::Sectors,
                format!(
                    "the device has sectors of {} bytes, the image's partition table needs 512",
                    self.sector
                ),
                choose.clone(),
            );
        }
        let spelt_out = allowed.is_some_and(|name| name == self.name || name == self.path.as_str());
        if self.kind == "disk" && !self.removable && !spelt_out {
            object(
                ObjectionKind::NotRemovable,
                format!("the device is not removable (bus {})", self.bus),
                format!("if this is the right device: --non-removable {}", self.name),
            );
        }
        found.sort_by_key(|objection| objection.reason);
        found
    }
}

/// The part of a size that is accessible by direct I/O on every device.
pub fn whole_blocks(size: u64) -> u64 {
    size / BLOCK * BLOCK
}

/// `sdb` of `sdb1`, `mmcblk0` of `mmcblk0p2`.
fn disk_of(partition: &str) -> Option<&str> {
    let stem = partition.trim_end_matches(|c: char| c.is_ascii_digit());
    match stem.strip_suffix('p') {
        Some(disk) if disk.ends_with(|c: char| c.is_ascii_digit()) => Some(disk),
        _ if stem != partition && !stem.ends_with('/') => Some(stem),
        _ => None,
    }
}

/// All devices and everything that uses them, each once, disks first as `lsblk` orders them.
/// `soldered` tells whether an MMC device is soldered to the board.
///
/// # Errors
/// When the text is not the output of `lsblk --json --bytes`.
pub fn parse_lsblk(json: &str, soldered: impl Fn(&str) -> bool) -> Result<Vec<FlashDevice>> {
    let answer: LsblkOutput = serde_json::from_str(json).context("parsing the output of lsblk")?;
    let mut devices = Vec::new();
    let mut left: Vec<&LsblkDevice> = answer.blockdevices.iter().rev().collect();
    while let Some(listed) = left.pop() {
        left.extend(listed.children.iter().rev());
        // An array is listed below each of its disks.
        if devices.iter().all(|d: &FlashDevice| d.path != listed.path) {
            devices.push(describe_device(listed, &soldered));
        }
    }
    Ok(devices)
}

fn describe_device(listed: &LsblkDevice, soldered: &impl Fn(&str) -> bool) -> FlashDevice {
    let trimmed = |text: &Option<String>| text.as_deref().unwrap_or("").trim().to_owned();
    let name = listed.kname.clone().unwrap_or_else(|| listed.name.clone());
    let mmc = listed.subsystems.as_deref().is_some_and(|s| s.split(':').any(|part| part == "mmc"));
    let bus = match &listed.tran {
        Some(tran) => tran.clone(),
        None if mmc || name.starts_with("mmcblk") => "mmc".to_owned(),
        None => listed.kind.clone(),
    };
    // A card slot is removable, although its reader does not report it.
    let removable = listed.rm || (bus == "mmc" && listed.hotplug && !soldered(&name));
    let mut mounted = Vec::new();
    let mut held_by = Vec::new();
    let mut left = vec![listed];
    while let Some(one) = left.pop() {
        left.extend(one.children.iter().rev());
        let places = one.mountpoints.iter().flatten().filter(|p| !p.is_empty());
        mounted.extend(places.map(|place| (one.path.to_string(), place.clone())));
        if !std::ptr::eq(one, listed) && one.kind != "part" {
            held_by.push(format!("{} ({})", one.path, one.kind));
        }
    }
    let model = format!("{} {}", trimmed(&listed.vendor), trimmed(&listed.model));
    FlashDevice {
        name,
        path: listed.path.clone(),
        kind: listed.kind.clone(),
        numbers: Some(listed.numbers.trim().to_owned()),
        identity: CardIdentity::default(),
        size: whole_blocks(listed.size.unwrap_or(0)),
        model: model.trim().to_owned(),
        bus,
        removable,
        read_only: listed.ro,
        sector: listed.log_sec.unwrap_or(512),
        discard: listed.disc_max.unwrap_or(0),
        mounted,
        held_by,
        content: describe_content(listed),
    }
}

fn describe_content(listed: &LsblkDevice) -> String {
    let describe = |one: &LsblkDevice| {
        let words = [&one.fstype, &one.partlabel, &one.label];
        let mut words: Vec<&str> =
            words.into_iter().flatten().map(|w| w.trim()).filter(|w| !w.is_empty()).collect();
        words.dedup();
        words.join(" ")
    };
    let parts: Vec<String> = listed
        .children
        .iter()
        .filter(|c| c.kind == "part")
        .map(|c| format!("{} {}", format_bytes(c.size.unwrap_or(0)), describe(c)).trim().to_owned())
        .collect();
    let own = describe(listed);
    match (&listed.pttype, parts.is_empty(), own.is_empty()) {
        (_, false, _) => {
            let table = listed.pttype.as_deref().map_or(String::new(), |t| format!("{t}: "));
            format!("{table}{}", list_names(&parts))
        }
        (_, true, false) => own,
        (Some(table), ..) => format!("{table}, no partitions"),
        (None, ..) => String::new(),
    }
}

/// All block devices of this machine.
///
/// # Errors
/// When `lsblk` is missing, fails, or is too old.
pub fn list_all_devices() -> Result<Vec<FlashDevice>> {
    // The identities of the media are read before everything else, so that the data of a new medium
    // is never shown with the identity of the old one. A new card may only be detected when it is
    // first opened, hence the second attempt.
    const LOOKS: u32 = 3;
    let mut before = kernel_identities();
    let mut devices = run_lsblk()?;
    for _ in 1..LOOKS {
        let after = kernel_identities();
        if before == after {
            break;
        }
        before = after;
        devices = run_lsblk()?;
    }
    for device in &mut devices {
        let numbers = device.numbers.as_deref().unwrap_or_default();
        device.identity = before.get(numbers).cloned().unwrap_or_default();
    }
    Ok(devices)
}

/// The media that the kernel knows, by their devices' numbers.
fn kernel_identities() -> BTreeMap<String, CardIdentity> {
    let kernel = Utf8Path::new(KERNEL);
    let entries = kernel.read_dir_utf8().into_iter().flatten().flatten();
    let of = |numbers: &str| (numbers.to_owned(), CardIdentity::of_device(kernel, numbers));
    entries.map(|entry| of(entry.file_name())).collect()
}

fn run_lsblk() -> Result<Vec<FlashDevice>> {
    let json = Tool::new("lsblk")
        .env("LC_ALL", "C")
        .args(["--json", "--bytes", "--all", "--output", COLUMNS])
        .read()
        .context("listing block devices\nhelp: install util-linux 2.37 or newer")?;
    let mut devices = parse_lsblk(&json, is_soldered)?;
    for device in &mut devices {
        if device.content.is_empty() && matches!(device.kind.as_str(), "disk" | "loop") {
            device.content = describe_tables(&device.path);
        }
    }
    Ok(devices)
}

/// eMMC reports `MMC`, a card reports `SD`.
fn is_soldered(name: &str) -> bool {
    let kind = std::fs::read_to_string(format!("/sys/class/block/{name}/device/type"));
    kind.is_ok_and(|kind| kind.trim() == "MMC")
}

/// What our own reader finds where `lsblk` reports nothing: lsblk asks udev, which not every
/// machine has.
fn describe_tables(path: &Utf8Path) -> String {
    let Ok(found) = read::read_tables(path) else { return String::new() };
    let table = match found.table {
        TableKind::Mbr if found.partitions.is_empty() => return String::new(),
        kind => kind.name(),
    };
    let parts: Vec<String> = found
        .partitions
        .iter()
        .map(|p| format!("{} {}", format_bytes(p.size), p.name.as_deref().unwrap_or(&p.kind)))
        .collect();
    format!("{table}: {}", list_names(&parts))
}

/// Possible targets: disks, and loop devices that are attached to a file.
pub fn select_candidates(devices: Vec<FlashDevice>) -> Vec<FlashDevice> {
    let wanted = |d: &FlashDevice| d.size > 0 && matches!(d.kind.as_str(), "disk" | "loop");
    devices.into_iter().filter(wanted).collect()
}

/// The device or plain file at this path; a bare name is a device in `/dev`.
///
/// # Errors
/// When there is none, or it is neither a device nor a plain file.
pub fn find_device(typed: &Utf8Path) -> Result<FlashDevice> {
    let in_dev = Utf8Path::new("/dev").join(typed);
    let path = if !typed.as_str().contains('/') && !typed.exists() && in_dev.exists() {
        in_dev
    } else {
        typed.to_owned()
    };
    // Follows links such as those in /dev/disk/by-id.
    let path = path.canonicalize_utf8().with_context(|| {
        format!(
            "looking for {typed}\nhelp: {} flash --list shows devices; a plain file is made by: truncate --size 8G FILE",
            program::name()
        )
    })?;
    let metadata =
        std::fs::metadata(&path).with_context(|| format!("reading the properties of {path}"))?;
    if metadata.file_type().is_block_device() {
        return list_all_devices()?
            .into_iter()
            .find(|device| device.path == path)
            .with_context(|| format!("lsblk does not list {path}"));
    }
    if !metadata.is_file() {
        bail!(
            "{path} is neither a block device nor a plain file\n\
             help: {} flash --list shows devices",
            program::name()
        );
    }
    let held_by = attached_loop_devices(&path)?;
    Ok(FlashDevice {
        name: path.file_name().unwrap_or_default().to_owned(),
        kind: "file".to_owned(),
        numbers: None,
        identity: CardIdentity::of_file(&metadata),
        size: whole_blocks(metadata.len()),
        model: "plain file".to_owned(),
        bus: "file".to_owned(),
        removable: true,
        read_only: metadata.permissions().readonly(),
        sector: 512,
        discard: 0,
        mounted: Vec::new(),
        held_by,
        content: describe_tables(&path),
        path,
    })
}

/// The loop devices that are attached to a file.
fn attached_loop_devices(path: &Utf8Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let Ok(devices) = Utf8Path::new("/sys/class/block").read_dir_utf8() else { return Ok(found) };
    for entry in devices {
        let entry = entry.context("listing /sys/class/block")?;
        // Only attached loop devices have this file.
        let Ok(backing) = std::fs::read_to_string(entry.path().join("loop/backing_file")) else {
            continue;
        };
        if backing.trim_end_matches('\n') == path.as_str() {
            found.push(format!("/dev/{} (loop)", entry.file_name()));
        }
    }
    Ok(found)
}

/// Whether this machine can attach loop devices, for tests and benchmarks.
///
/// # Errors
/// The reason why it cannot.
pub fn can_loop() -> Result<()> {
    if !rustix::process::getuid().is_root() {
        bail!("only root can attach them");
    }
    let free = Tool::new("losetup").arg("--find").read()?;
    let free = Utf8Path::new(free.trim());
    if !free.exists() {
        bail!("{free} does not exist");
    }
    Ok(())
}
