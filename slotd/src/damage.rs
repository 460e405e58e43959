//! Files on `data` that the agent does not depend on. A damaged one is reported, and removed at the next
//! commit. [`crate::trust`] handles what must not be forgotten.

use std::io;
use std::path::PathBuf;

use bundle::bootstate::Slot;
use serde::de::DeserializeOwned;

use crate::boot;
use crate::components;
use crate::durable;
use crate::provision;
use crate::record::{InstallJournal, InstalledSlot};
use crate::root::RootDir;

/// A damaged file.
#[derive(Debug)]
pub struct DamagedFile {
    path: PathBuf,
    /// Which file and why, human-readable.
    pub what: String,
}

impl DamagedFile {
    /// Removes the file: the code that needs it creates it again.
    ///
    /// # Errors
    /// When `data` fails.
    pub fn remove(&self) -> io::Result<()> {
        durable::remove(&self.path)
    }
}

/// Every file that is damaged.
pub fn find_damaged(root: &RootDir) -> Vec<DamagedFile> {
    let state = root.state();
    let mut found = Vec::new();
    let mut look = |path: PathBuf, read: fn(&std::path::Path) -> io::Result<()>| {
        if let Err(error) = read(&path) {
            let what = format!(
                "{} is damaged ({error}): the file is ignored, and removed at the next commit",
                path.display()
            );
            found.push(DamagedFile { path, what });
        }
    };
    look(state.join("journal.json"), check_readable::<InstallJournal>);
    for slot in [Slot::A, Slot::B] {
        look(state.join(format!("slot-{slot}.json")), check_readable::<InstalledSlot>);
    }
    look(state.join("tryboot.json"), check_readable::<boot::ArmedTrial>);
    look(state.join("provisioned.json"), check_readable::<provision::ProvisionRecord>);
    look(root.data().join("apps/api/.state.json"), check_readable::<components::ApiState>);
    found
}

fn check_readable<T: DeserializeOwned>(path: &std::path::Path) -> io::Result<()> {
    durable::read_json::<T>(path).map(drop)
}
