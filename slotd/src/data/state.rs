//! In which condition `data` is, and its growth in a robot's first start.

use std::fs;
use std::io;
use std::ops::Deref;
use std::process::Command;

pub use contract::answer::Condition;
use contract::answer::DataStatus;
use rustix::fs::StatVfsMountFlags;

use super::grow::{self, Grown};
use crate::device::Device;
use crate::refusal::{Refusal, Result};
use crate::root::Root;

/// The condition of `data`, as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State(DataStatus);

impl Deref for State {
    type Target = DataStatus;

    fn deref(&self) -> &DataStatus {
        &self.0
    }
}

impl From<State> for DataStatus {
    fn from(state: State) -> Self {
        state.0
    }
}

impl State {
    /// Looks.
    ///
    /// # Errors
    /// `io`.
    pub fn read(root: &Root) -> Result<Self> {
        let data = root.data();
        let about = rustix::fs::statvfs(&data).map_err(|error| {
            Refusal::io(format!("looking at {}", data.display()), &error.into())
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
        Ok(Self(DataStatus {
            condition,
            why: value("why").filter(|why| !why.is_empty()).map(str::to_owned),
            size: about.f_blocks.saturating_mul(about.f_frsize),
            free: about.f_bavail.saturating_mul(about.f_frsize),
        }))
    }

    /// Refuses where `data` takes no writes: for what would change it, before anything is begun.
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
            "restart the robot to have data checked, or replace the card; nothing was changed",
        ))
    }

    /// What a person must know, loudly; `None` when all is well.
    pub fn alarm(&self) -> Option<String> {
        let why = self.why.as_deref().unwrap_or("see the journal");
        match self.condition {
            Condition::Clean | Condition::Unknown => None,
            Condition::Repaired => Some(format!(
                "data was damaged and has been repaired ({why}): compare it with a backup; the card may be failing"
            )),
            Condition::Memory => Some(format!(
                "DATA IS SET ASIDE ({why}): the robot runs from memory and forgets everything at the next restart; nothing on the card was changed"
            )),
            Condition::ReadOnly => Some(format!(
                "DATA REFUSES WRITES ({why}): its file system has failed; restart to have it checked, and replace the card"
            )),
        }
    }
}

/// Extends the partition `data` to the end of the card and tells the kernel; the file system is the
/// caller's, once it is mounted.
///
/// # Errors
/// `wrong-layout`, `bad-device`, `io`; the partition is then as it was, or is seen at its new size from the
/// next start on.
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
        // Other partitions of the disk are in use: the kernel takes the change of one, not a new table. Not
        // `partx --update`: it removes a partition that is not in use and adds it again, and what is mounted from
        // it by then goes away when systemd hears of the removal.
        let status = Command::new("resizepart")
            .arg(device.disk_path())
            .args([known.number.to_string(), grown.to.to_string()])
            .status();
        let told = status.map_err(|error| Refusal::io("running resizepart", &error))?;
        if !told.success() {
            return Err(Refusal::new(
                "io",
                format!("telling the kernel of the larger partition: resizepart: {told}"),
                "the next restart does it",
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
