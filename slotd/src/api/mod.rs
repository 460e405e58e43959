//! The component `api`: installed beside the one that serves, switched to by one rename, kept only when it
//! is healthy, and switched back otherwise. No restart of the robot, and nothing of the base is touched.
//!
//! All of it lies in `/data/apps/api`, so that a reset or a restored backup takes it along:
//!
//! | | |
//! |---|---|
//! | `<version>-<id>/` | an installed API: `site`, `bin`, `component.json`; complete, or not there |
//! | `current` | a link to the one that serves; without it the base's own does |
//! | `.wheels/<sha256>/` | each wheel's tree once; versions have hard links to its files |
//! | `.state.json` | what was decided, and a change that is not confirmed yet |

mod fit;
mod install;
mod keep;
mod service;
mod settle;
mod state;
mod status;
mod switch;
mod tree;
mod version;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

pub(crate) use install::install;
pub use install::{Installed, Outcome};
pub use service::Patience;
pub use settle::{Settled, settle};
pub use state::{Good, State};
pub use status::{Serves, Status, status};
pub use switch::{Back, back};

use crate::refusal::{Refusal, Result};
use crate::root::Root;

/// What follows the name of something that is not complete yet.
const NEW: &str = ".new";

/// Where the API lies on a robot.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    folder: PathBuf,
}

impl Place {
    pub fn new(root: &Root) -> Self {
        Self { folder: root.data().join("apps/api") }
    }

    /// All of it.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The link to the one that serves.
    pub fn current(&self) -> PathBuf {
        self.folder.join("current")
    }

    /// The trees of wheels.
    pub fn wheels(&self) -> PathBuf {
        self.folder.join(".wheels")
    }

    /// One installed API; `name` is one of ours.
    pub fn version(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The name of the API that the link leads to; `None` when there is no link, or none of ours.
    pub fn serving(&self) -> Option<String> {
        let to = std::fs::read_link(self.current()).ok()?;
        to.to_str().filter(|name| is_version(name)).map(str::to_owned)
    }
}

/// Whether a name in the folder is that of an installed API: `<version>-<8 hexadecimal digits>`.
fn is_version(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-+!".contains(&b);
    let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    name.rsplit_once('-').is_some_and(|(version, id)| {
        version.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
            && version.bytes().all(plain)
            && id.len() == 8
            && id.bytes().all(digit)
    })
}

/// An `io` refusal that says what was being done with a path.
fn failed(doing: &str, path: &Path) -> impl Fn(io::Error) -> Refusal {
    let doing = format!("{doing} {}", path.display());
    move |error| Refusal::io(&doing, &error)
}

/// Makes the entries of a folder durable.
fn flush(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("flushing", folder))
}

/// Makes everything durable that was written to the folder's file system: one wait instead of one for each
/// of thousands of files.
fn flush_all(folder: &Path) -> Result<()> {
    let synced = File::open(folder).and_then(|folder| Ok(rustix::fs::syncfs(folder)?));
    synced.map_err(failed("flushing", folder))
}

/// Removes a tree, if it is there.
fn clear(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(failed("removing", folder)(error))
        }
        _ => Ok(()),
    }
}
