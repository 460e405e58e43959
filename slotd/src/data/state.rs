//! The condition of `data`, and its growth in a robot's first start.

use std::fs;
use std::io;
use std::process::Command;

use rustix::fs::StatVfsMountFlags;
use serde::{Deserialize, Serialize};

use super::grow::{self, Grown};
use crate::device::Device;
use crate::refusal::{Refusal, Result};
use crate::root::Root;

/// The condition of `data` after the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Condition {
    /// Undamaged.
    Clean,
    /// It was damaged and has been repaired; files may be in its `lost+found`.
    Repaired,
    /// It cannot be repaired or is missing, and was set aside unchanged; memory is used instead.
    Memory,
    /// Its file system has failed since the start and is read-only.
    ReadOnly,
    /// The start has not recorded it.
    Unknown,
}

/// The condition of `data`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct State {
    /// The condition.
    pub condition: Condition,
    /// Why, human-readable.
    pub why: Option<String>,
    /// Bytes of the file system.
    pub size: u64,
    /// Bytes that are free for ordinary users.
    pub free: u64,
}

impl State {
    /// Reads the condition of `data`.
    ///
    /// # Errors
    /// `io`.
    pub fn read(root: &Root) -> Result<Self> {
        let data = root.data();
        let about = rustix::fs::statvfs(&data).map_err(|error| {
            Refusal::io(format!("reading the size of {}", data.display()), &error.into())
        })?;
        let text = match fs::read_to_string(root.path("run/slipway/data-state")) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(Refusal::io("reading the state of data", &error)),
        };
        let value = |key: &str| text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('='));
        let mut condition = match value("condition") {
            Some("clean") => Condition::Clean,
            Some("repaired") => Condition::Repaired,
            Some("memory") => Condition::Memory,
            _ => Condition::Unknown,
        };
        if about.f_flag.contains(StatVfsMountFlags::RDONLY) {
            condition = Condition::ReadOnly;
        }
        Ok(Self {
            condition,
            why: value("why").filter(|why| !why.is_empty()).map(str::to_owned),
            size: about.f_blocks.saturating_mul(about.f_frsize),
            free: about.f_bavail.saturating_mul(about.f_frsize),
        })
    }

    /// Refuses if `data` is not writable: called before any change of `data` begins.
    ///
    /// # Errors
    /// `no-data`; `io`.
    pub fn writable(root: &Root) -> Result<()> {
        if !root.data().exists() {
            return Ok(());
        }
        let state = Self::read(root)?;
        if state.condition != Condition::ReadOnly {
            return Ok(());
        }
        Err(Refusal::new(
            "no-data",
            state.alarm().unwrap_or_default(),
            "restart the robot to check data, or replace the card; nothing was changed",
        ))
    }

    /// The warning to show to the user; `None` when there is no problem.
    pub fn alarm(&self) -> Option<String> {
        let why = self.why.as_deref().unwrap_or("see the journal");
        match self.condition {
            Condition::Clean | Condition::Unknown => None,
            Condition::Repaired => Some(format!(
                "data was damaged and has been repaired ({why}): compare data with a backup; the card may be failing"
            )),
            Condition::Memory => Some(format!(
                "DATA IS SET ASIDE ({why}): the robot keeps data in memory and loses it at the next restart; nothing on the card was changed"
            )),
            Condition::ReadOnly => Some(format!(
                "DATA IS READ-ONLY ({why}): the file system has failed; restart the robot to check it, and replace the card"
            )),
        }
    }
}

/// Extends the partition `data` to the end of the card and tells the kernel. The caller grows the file system once it
/// is mounted.
///
/// # Errors
/// `wrong-layout`, `bad-device`, `io`. The partition is then unchanged, or the kernel sees its new size from the next
/// start on.
pub fn grow_partition(root: &Root) -> Result<Grown> {
    let device = Device::read(root)?;
    let known = device.about.partitions.get("data").copied();
    let known = known.ok_or_else(|| {
        let help = "build the image again with a current `cargo xtask`";
        Refusal::new("bad-device", "device.toml lists no partition `data`", help)
    })?;
    let disk = device.open_disk(true)?;
    let grown = grow::grow(&disk, known.number, known.start_sector)
        .map_err(|error| Refusal::io("growing the partition `data`", &error))?;
    if grown.to != grown.from {
        // Other partitions of the disk are in use: the kernel accepts a change of one partition, not a new table. Not
        // `partx --update`: it removes an unused partition and adds it again, and systemd then unmounts what was mounted
        // from it meanwhile.
        let status = Command::new("resizepart")
            .arg(device.disk_path())
            .args([known.number.to_string(), grown.to.to_string()])
            .status();
        let told = status.map_err(|error| Refusal::io("running resizepart", &error))?;
        if !told.success() {
            return Err(Refusal::new(
                "io",
                format!("telling the kernel the new size of the partition: resizepart: {told}"),
                "restart the robot: the kernel then reads the new size",
            ));
        }
    }
    Ok(grown)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn what_the_start_has_found_is_told_loudly() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        for folder in ["data", "run/slipway"] {
            fs::create_dir_all(root.path(folder)).unwrap();
        }
        assert_eq!(State::read(&root).unwrap().condition, Condition::Unknown);
        let tell = |text: &str| {
            fs::write(root.path("run/slipway/data-state"), text).unwrap();
            State::read(&root).unwrap()
        };
        let clean = tell("condition=clean\nwhy=\n");
        assert_eq!((clean.condition, clean.alarm()), (Condition::Clean, None));
        assert!(clean.size >= clean.free && clean.free > 0);
        let repaired = tell("condition=repaired\nwhy=e2fsck -p said 4\n").alarm().unwrap();
        assert!(repaired.contains("repaired (e2fsck -p said 4)"), "{repaired}");
        let memory = tell("condition=memory\nwhy=/dev/x cannot be mounted\n").alarm().unwrap();
        assert!(memory.contains("SET ASIDE (/dev/x cannot be mounted)"), "{memory}");
    }
}
