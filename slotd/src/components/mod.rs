//! The component `api`. A new version is installed next to the one that serves, switched to by one rename, kept only
//! when it is healthy, and rolled back otherwise. The robot does not restart, and the base is not touched.
//!
//! Everything is in `/data/apps/api`, so that a reset or a restored backup includes it:
//!
//! | | |
//! |---|---|
//! | `<version>-<id>/` | an installed API: `site`, `bin`, `component.json`; complete or absent |
//! | `current` | a link to the version that serves; without it the built-in API serves |
//! | `.wheels/<sha256>/` | the tree of each wheel, with hashes in `.sum`; versions have hard links to its files |
//! | `.state.json` | the chosen version, and a change that is not confirmed yet |

mod fit;
mod install;
mod retention;
mod service;
mod settle;
mod state;
mod status;
mod switch;
mod tree;
mod version;
mod whole;

use std::path::{Path, PathBuf};

pub use install::InstalledApi;
pub(crate) use install::install;
pub use service::HealthTimes;
pub use settle::{SettledApi, settle};
pub use state::{ApiState, KnownGoodApi};
pub use status::{ApiStatus, ServingApi, status};
pub use switch::{ApiRollback, roll_back};
pub use whole::ApiVerifyOutcome;
pub(crate) use whole::verify;

use crate::files::{DirectFileChanges, FileChanges};
use crate::refusal::{Result, failed};
use crate::root::RootDir;

/// The suffix of names that are not complete yet.
const NEW: &str = ".new";

/// The API's directory on a robot, and the interface that changes files.
#[derive(Clone)]
pub(crate) struct ApiDir<'a> {
    folder: PathBuf,
    files: &'a dyn FileChanges,
}

impl<'a> ApiDir<'a> {
    /// Every change is made through `files`.
    pub fn new(root: &RootDir, files: &'a dyn FileChanges) -> Self {
        Self { folder: root.data().join("apps/api"), files }
    }

    /// The directory of everything.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The link to the version that serves.
    pub fn current(&self) -> PathBuf {
        self.folder.join("current")
    }

    /// The trees of wheels.
    pub fn wheels(&self) -> PathBuf {
        self.folder.join(".wheels")
    }

    /// The directory of an installed API; `name` must be valid.
    pub fn version(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The name of the API that the link points to; `None` when there is no link, or it points elsewhere.
    pub fn serving(&self) -> Option<String> {
        let to = std::fs::read_link(self.current()).ok()?;
        to.to_str().filter(|name| is_version(name)).map(str::to_owned)
    }

    /// Makes the entries of a directory durable.
    fn flush(&self, folder: &Path) -> Result<()> {
        self.files.sync(folder).map_err(failed("flushing", folder))
    }

    /// Makes everything durable that was written to the directory's file system.
    fn flush_all(&self, folder: &Path) -> Result<()> {
        self.files.sync_all(folder).map_err(failed("flushing", folder))
    }

    /// Removes a tree, a file or a link, if it exists.
    fn clear(&self, path: &Path) -> Result<()> {
        self.files.remove(path).map_err(failed("removing", path))
    }

    /// Renames a complete directory to its final name, which does not exist yet.
    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.files.rename(from, to).map_err(failed("renaming", from))
    }

    /// Exchanges a complete directory with the one that has its name, which may be serving, and removes the latter.
    fn exchange(&self, new: &Path, path: &Path) -> Result<()> {
        self.flush_all(new)?;
        self.files.exchange(new, path).map_err(failed("exchanging", path))?;
        self.flush(&self.folder)?;
        self.clear(new)
    }
}

impl ApiDir<'static> {
    /// For reading only.
    fn for_reading(root: &RootDir) -> Self {
        Self::new(root, &DirectFileChanges)
    }
}

/// Whether a name in the directory is that of an installed API: `<version>-<8 hexadecimal digits>`.
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
