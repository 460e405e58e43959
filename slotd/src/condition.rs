//! The condition of `data`, and its growth in a robot's first start.

use std::fs;
use std::io;
use std::ops::Deref;
use std::path::PathBuf;

pub use contract::answer::DataCondition;
use contract::answer::DataStatus;
use rustix::fs::StatVfsMountFlags;

use crate::durable;
use crate::refusal::{Refusal, Result, failed};
use crate::root::RootDir;

/// The condition of `data`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataState(DataStatus);

impl Deref for DataState {
    type Target = DataStatus;

    fn deref(&self) -> &DataStatus {
        &self.0
    }
}

impl From<DataState> for DataStatus {
    fn from(state: DataState) -> Self {
        state.0
    }
}

impl DataState {
    /// Reads the condition of `data`.
    ///
    /// # Errors
    /// `io`.
    pub fn read(root: &RootDir) -> Result<Self> {
        let data = root.data();
        let about = rustix::fs::statvfs(&data)
            .map_err(|error| failed("reading the size of", &data)(error.into()))?;
        let text = match fs::read_to_string(root.path("run/slipway/data-state")) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(Refusal::io("reading the state of data", &error)),
        };
        let value = |key: &str| text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('='));
        let mut condition = match value("condition") {
            Some("clean") => DataCondition::Clean,
            Some("repaired") => DataCondition::Repaired,
            Some("memory") => DataCondition::Memory,
            _ => DataCondition::Unknown,
        };
        if about.f_flag.contains(StatVfsMountFlags::RDONLY) {
            condition = DataCondition::ReadOnly;
        }
        Ok(Self(DataStatus {
            condition,
            why: value("why").filter(|why| !why.is_empty()).map(str::to_owned),
            size: about.f_blocks.saturating_mul(about.f_frsize),
            free: about.f_bavail.saturating_mul(about.f_frsize),
        }))
    }

    /// Refuses if `data` is not writable: called before any change of `data` begins.
    ///
    /// # Errors
    /// `no-data`; `io`.
    pub fn require_writable(root: &RootDir) -> Result<()> {
        if !root.data().exists() {
            return Ok(());
        }
        let state = Self::read(root)?;
        if state.condition != DataCondition::ReadOnly {
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
            DataCondition::Clean | DataCondition::Unknown => None,
            DataCondition::Repaired => Some(format!(
                "data was damaged and has been repaired ({why}): compare data with a backup; the card may be failing"
            )),
            DataCondition::Memory => Some(format!(
                "DATA IS SET ASIDE ({why}): the robot keeps data in memory and loses it at the next restart; nothing on the card was changed"
            )),
            DataCondition::ReadOnly => Some(format!(
                "DATA IS READ-ONLY ({why}): the file system has failed; restart the robot to check it, and replace the card"
            )),
        }
    }
}

/// Where a start records what it has done with `data`.
pub(crate) fn report_path(root: &RootDir) -> PathBuf {
    root.path("run/slotd/data.json")
}

/// Why this system cannot use `data`, as recorded by [`crate::startup::prepare`]; for the health check.
pub(crate) fn unfit_reason(root: &RootDir) -> Option<String> {
    let note: Option<serde_json::Value> = durable::read_json(&report_path(root)).ok().flatten();
    let message = note?.get("refused")?.get("message")?.as_str()?.to_owned();
    Some(message)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn what_the_start_has_found_is_told_loudly() {
        let dir = tempfile::tempdir().unwrap();
        let root = RootDir::new(dir.path());
        for folder in ["data", "run/slipway"] {
            fs::create_dir_all(root.path(folder)).unwrap();
        }
        assert_eq!(DataState::read(&root).unwrap().condition, DataCondition::Unknown);
        let tell = |text: &str| {
            fs::write(root.path("run/slipway/data-state"), text).unwrap();
            DataState::read(&root).unwrap()
        };
        let clean = tell("condition=clean\nwhy=\n");
        assert_eq!((clean.condition, clean.alarm()), (DataCondition::Clean, None));
        assert!(clean.size >= clean.free && clean.free > 0);
        let repaired = tell("condition=repaired\nwhy=e2fsck -p said 4\n").alarm().unwrap();
        assert!(repaired.contains("repaired (e2fsck -p said 4)"), "{repaired}");
        let memory = tell("condition=memory\nwhy=/dev/x cannot be mounted\n").alarm().unwrap();
        assert!(memory.contains("SET ASIDE (/dev/x cannot be mounted)"), "{memory}");
    }
}
