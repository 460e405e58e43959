//! Which devices there are, and why one may not be written: from `lsblk`, never from a guess.

use std::collections::BTreeMap;
use std::os::unix::fs::FileTypeExt;

use anyhow::{Context, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use super::identity::{Identity, KERNEL};
use crate::disk::layout::BLOCK;
use crate::disk::{TableKind, read};
use crate::exec::Tool;
use crate::progress::{bytes, names};

/// The columns that are asked for. All are known to util-linux 2.37 (2021) and later.
const COLUMNS: &str = "NAME,KNAME,PATH,MAJ:MIN,TYPE,SIZE,RO,RM,HOTPLUG,TRAN,SUBSYSTEMS,VENDOR,\
                       MODEL,LOG-SEC,DISC-MAX,PTTYPE,FSTYPE,LABEL,PARTLABEL,MOUNTPOINTS";

/// Where a running system keeps itself. A disk with one of these is a system disk.
const SYSTEM: [&str; 12] = [
    "/", "/boot", "/usr", "/var", "/etc", "/home", "/root", "/opt", "/srv", "/tmp", "/nix", "/data",
];
/// So is one that is mounted anywhere below these, such as `/boot/efi`.
const BELOW: [&str; 3] = ["/boot/", "/usr/", "/var/"];

/// A block device as `lsblk` lists it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Listed {
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
    children: Vec<Listed>,
}

#[derive(Debug, Deserialize)]
struct Answer {
    blockdevices: Vec<Listed>,
}

/// Something that can be written, or looks like it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Device {
    /// What to type: the kernel's name, such as `sdb`; for a file, its file name.
    pub name: String,
    /// Where it lies.
    pub path: Utf8PathBuf,
    /// As `lsblk` says: `disk`, `part`, `loop`, `rom`, `crypt`, `lvm`, `raid1`, …; or `file`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Major and minor number; none for a file.
    #[serde(skip)]
    pub numbers: Option<String>,
    /// Which medium it is.
    #[serde(skip)]
    pub identity: Identity,
    /// Bytes.
    pub size: u64,
    /// Maker and model, as far as the device tells.
    pub model: String,
    /// How it is attached: `usb`, `mmc`, `nvme`, `sata`, …
    pub bus: String,
    /// Whether it is made to be taken out: a card or a stick.
    pub removable: bool,
    /// Whether it can only be read.
    pub read_only: bool,
    /// Bytes of a sector.
    pub sector: u64,
    /// The most bytes that it discards at once; 0 where it cannot.
    pub discard: u64,
    /// What is mounted, or used for swap (`[SWAP]`): device, place.
    pub mounted: Vec<(String, String)>,
    /// What lies on top of it and is no partition: volumes, arrays, loop devices.
    pub held_by: Vec<String>,
    /// What is on it, for people.
    pub content: String,
}

/// Why a device is not written. The order is that of importance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The running system is on it.
    System,
    /// Something of it is mounted.
    Mounted,
    /// It is part of an array or a volume, or a file that is used as a disk.
    Held,
    /// It is a part of a disk.
    Partition,
    /// It is neither disk nor file.
    NotADisk,
    /// It can only be read.
    ReadOnly,
    /// It is smaller than the image.
    TooSmall,
    /// The image's table counts other sectors.
    Sectors,
    /// It is not made to be taken out.
    NotRemovable,
}

/// A reason with what is found and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Objection {
    /// Which.
    pub reason: Reason,
    /// What is found.
    pub message: String,
    /// What to do.
    pub help: String,
}

impl Device {
    /// Everything against writing an image of `size` bytes to it. `allowed` is the name of a fixed
    /// disk that the user has spelt out.
    pub fn objections(&self, size: u64, allowed: Option<&str>) -> Vec<Objection> {
        let mut found = Vec::new();
        let mut object = |reason, message: String, help: String| {
            found.push(Objection { reason, message, help });
        };
        let is_system = |place: &str| {
            place == "[SWAP]"
                || SYSTEM.contains(&place)
                || BELOW.iter().any(|folder| place.starts_with(folder))
        };
        let show = |all: &[&(String, String)]| {
            names(&all.iter().map(|(d, at)| format!("{d} at {at}")).collect::<Vec<_>>())
        };
        let (system, other): (Vec<_>, Vec<_>) =
            self.mounted.iter().partition(|(_, place)| is_system(place));
        let choose = "choose another device: cargo xtask flash --list";
        if !system.is_empty() {
            object(
                Reason::System,
                format!("the running system is on it: {}", show(&system)),
                choose.to_owned(),
            );
        }
        if !other.is_empty() {
            let devices: Vec<&str> = other.iter().map(|(device, _)| device.as_str()).collect();
            object(
                Reason::Mounted,
                format!("it is mounted: {}", show(&other)),
                format!("umount {}", devices.join(" ")),
            );
        }
        if !self.held_by.is_empty() {
            object(
                Reason::Held,
                format!("it is in use by {}", names(&self.held_by)),
                "close that first (lsblk shows what lies on what)".to_owned(),
            );
        }
        match self.kind.as_str() {
            "disk" | "loop" | "file" => {}
            "part" => object(
                Reason::Partition,
                "it is a partition, and an image is of a whole disk".to_owned(),
                format!(
                    "name its disk{}",
                    disk_of(&self.name).map_or(String::new(), |d| format!(": /dev/{d}"))
                ),
            ),
            kind => object(
                Reason::NotADisk,
                format!("it is neither a disk nor a file, but of the kind `{kind}`"),
                choose.to_owned(),
            ),
        }
        if self.read_only {
            object(
                Reason::ReadOnly,
                "it can only be read".to_owned(),
                "move the card's lock switch, or use another reader".to_owned(),
            );
        }
        if self.size < size {
            object(
                Reason::TooSmall,
                format!(
                    "it has {} ({} bytes), the image {} ({size} bytes)",
                    bytes(self.size),
                    self.size,
                    bytes(size)
                ),
                "use a larger one".to_owned(),
            );
        }
        if self.sector != 512 {
            object(
                Reason::Sectors,
                format!("its sectors have {} bytes, those of the image's table 512", self.sector),
                choose.to_owned(),
            );
        }
        let spelt_out = allowed.is_some_and(|name| name == self.name || name == self.path.as_str());
        if self.kind == "disk" && !self.removable && !spelt_out {
            object(
                Reason::NotRemovable,
                format!("it is not removable (bus {})", self.bus),
                format!("if it really is the one: --non-removable {}", self.name),
            );
        }
        found.sort_by_key(|objection| objection.reason);
        found
    }
}

/// The part of a size that direct access reaches on every device.
pub fn whole(size: u64) -> u64 {
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

/// All devices and all that lies on them, each once, disks first as `lsblk` orders them. `soldered`
/// answers for an MMC device whether it is one that nobody can take out.
///
/// # Errors
/// When it is not what `lsblk --json --bytes` prints.
pub fn parse(json: &str, soldered: impl Fn(&str) -> bool) -> Result<Vec<Device>> {
    let answer: Answer = serde_json::from_str(json).context("understanding what lsblk says")?;
    let mut devices = Vec::new();
    let mut left: Vec<&Listed> = answer.blockdevices.iter().rev().collect();
    while let Some(listed) = left.pop() {
        left.extend(listed.children.iter().rev());
        // An array is listed below each of its disks.
        if devices.iter().all(|d: &Device| d.path != listed.path) {
            devices.push(device(listed, &soldered));
        }
    }
    Ok(devices)
}

fn device(listed: &Listed, soldered: &impl Fn(&str) -> bool) -> Device {
    let trimmed = |text: &Option<String>| text.as_deref().unwrap_or("").trim().to_owned();
    let name = listed.kname.clone().unwrap_or_else(|| listed.name.clone());
    let mmc = listed.subsystems.as_deref().is_some_and(|s| s.split(':').any(|part| part == "mmc"));
    let bus = match &listed.tran {
        Some(tran) => tran.clone(),
        None if mmc || name.starts_with("mmcblk") => "mmc".to_owned(),
        None => listed.kind.clone(),
    };
    // A slot for cards is one for plugging, though its reader does not say that the medium is removable.
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
    Device {
        name,
        path: listed.path.clone(),
        kind: listed.kind.clone(),
        numbers: Some(listed.numbers.trim().to_owned()),
        identity: Identity::default(),
        size: whole(listed.size.unwrap_or(0)),
        model: model.trim().to_owned(),
        bus,
        removable,
        read_only: listed.ro,
        sector: listed.log_sec.unwrap_or(512),
        discard: listed.disc_max.unwrap_or(0),
        mounted,
        held_by,
        content: content(listed),
    }
}

fn content(listed: &Listed) -> String {
    let describe = |one: &Listed| {
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
        .map(|c| format!("{} {}", bytes(c.size.unwrap_or(0)), describe(c)).trim().to_owned())
        .collect();
    let own = describe(listed);
    match (&listed.pttype, parts.is_empty(), own.is_empty()) {
        (_, false, _) => {
            let table = listed.pttype.as_deref().map_or(String::new(), |t| format!("{t}: "));
            format!("{table}{}", names(&parts))
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
pub fn all() -> Result<Vec<Device>> {
    // Which media there are is looked up before anything else about them, so that what is shown of a later one
    // never goes with its identity. A card that was just put in is noticed when it is first opened: once more.
    const LOOKS: u32 = 3;
    let mut before = identities();
    let mut devices = listed()?;
    for _ in 1..LOOKS {
        let after = identities();
        if before == after {
            break;
        }
        before = after;
        devices = listed()?;
    }
    for device in &mut devices {
        let numbers = device.numbers.as_deref().unwrap_or_default();
        device.identity = before.get(numbers).cloned().unwrap_or_default();
    }
    Ok(devices)
}

/// The media that the kernel knows, by their devices' numbers.
fn identities() -> BTreeMap<String, Identity> {
    let kernel = Utf8Path::new(KERNEL);
    let entries = kernel.read_dir_utf8().into_iter().flatten().flatten();
    let of = |numbers: &str| (numbers.to_owned(), Identity::of_device(kernel, numbers));
    entries.map(|entry| of(entry.file_name())).collect()
}

fn listed() -> Result<Vec<Device>> {
    let json = Tool::new("lsblk")
        .env("LC_ALL", "C")
        .args(["--json", "--bytes", "--all", "--output", COLUMNS])
        .read()
        .context("listing block devices\nhelp: util-linux 2.37 or newer brings a lsblk that can")?;
    let mut devices = parse(&json, soldered)?;
    for device in &mut devices {
        if device.content.is_empty() && matches!(device.kind.as_str(), "disk" | "loop") {
            device.content = tables(&device.path);
        }
    }
    Ok(devices)
}

/// eMMC says `MMC` where a card says `SD`.
fn soldered(name: &str) -> bool {
    let kind = std::fs::read_to_string(format!("/sys/class/block/{name}/device/type"));
    kind.is_ok_and(|kind| kind.trim() == "MMC")
}

/// What our own reader finds, where `lsblk` says nothing: it asks udev, which not every machine has.
fn tables(path: &Utf8Path) -> String {
    let Ok(found) = read::tables(path) else { return String::new() };
    let table = match found.table {
        TableKind::Mbr if found.partitions.is_empty() => return String::new(),
        kind => kind.name(),
    };
    let parts: Vec<String> = found
        .partitions
        .iter()
        .map(|p| format!("{} {}", bytes(p.size), p.name.as_deref().unwrap_or(&p.kind)))
        .collect();
    format!("{table}: {}", names(&parts))
}

/// Those that somebody may want to write to: disks, and loop devices with something behind them.
pub fn candidates(devices: Vec<Device>) -> Vec<Device> {
    let wanted = |d: &Device| d.size > 0 && matches!(d.kind.as_str(), "disk" | "loop");
    devices.into_iter().filter(wanted).collect()
}

/// The device or plain file at this path; a bare name is one in `/dev`.
///
/// # Errors
/// When there is none, or it is neither a device nor a plain file.
pub fn find(typed: &Utf8Path) -> Result<Device> {
    let in_dev = Utf8Path::new("/dev").join(typed);
    let path = if !typed.as_str().contains('/') && !typed.exists() && in_dev.exists() {
        in_dev
    } else {
        typed.to_owned()
    };
    // Follows links such as those in /dev/disk/by-id.
    let path = path.canonicalize_utf8().with_context(|| {
        format!(
            "looking for {typed}\nhelp: cargo xtask flash --list shows devices; a plain file is made by: truncate --size 8G FILE\nlooking"
        )
    })?;
    let metadata = std::fs::metadata(&path).with_context(|| format!("looking at {path}"))?;
    if metadata.file_type().is_block_device() {
        return all()?
            .into_iter()
            .find(|device| device.path == path)
            .with_context(|| format!("lsblk does not list {path}"));
    }
    if !metadata.is_file() {
        bail!(
            "{path} is neither a block device nor a plain file\n\
             help: cargo xtask flash --list shows devices"
        );
    }
    let held_by = attached(&path)?;
    Ok(Device {
        name: path.file_name().unwrap_or_default().to_owned(),
        kind: "file".to_owned(),
        numbers: None,
        identity: Identity::of_file(&metadata),
        size: whole(metadata.len()),
        model: "plain file".to_owned(),
        bus: "file".to_owned(),
        removable: true,
        read_only: metadata.permissions().readonly(),
        sector: 512,
        discard: 0,
        mounted: Vec::new(),
        held_by,
        content: tables(&path),
        path,
    })
}

/// The loop devices that a file is behind.
fn attached(path: &Utf8Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let Ok(devices) = Utf8Path::new("/sys/class/block").read_dir_utf8() else { return Ok(found) };
    for entry in devices {
        let entry = entry.context("listing /sys/class/block")?;
        // Only attached loop devices have the file.
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
/// When it cannot: why.
pub fn can_loop() -> Result<()> {
    if !rustix::process::getuid().is_root() {
        bail!("only root attaches them");
    }
    let free = Tool::new("losetup").arg("--find").read()?;
    let free = Utf8Path::new(free.trim());
    if !free.exists() {
        bail!("there is no {free}");
    }
    Ok(())
}
