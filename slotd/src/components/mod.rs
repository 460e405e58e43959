//! The component `api`: installed beside the one that serves, switched to by one rename, kept only when it
//! is healthy, and switched back otherwise. No restart of the robot, and nothing of the base is touched.
//!
//! All of it lies in `/data/apps/api`, so that a reset or a restored backup takes it along:
//!
//! | | |
//! |---|---|
//! | `<version>-<id>/` | an installed API: `site`, `bin`, `component.json`; complete, or not there |
//! | `current` | a link to the one that serves; without it the base's own does |
//! | `.wheels/<sha256>/` | each wheel's tree once, with hashes in `.sum`; versions have hard links to its files |
//! | `.state.json` | what was decided, and a change that is not confirmed yet |

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

use std::io;
use std::path::{Path, PathBuf};

pub(crate) use install::install;
pub use install::{Installed, Outcome};
pub use service::Patience;
pub use settle::{Settled, settle};
pub use state::{Good, State};
pub use status::{Serves, Status, status};
pub use switch::{Back, back};
pub use whole::Checked;
pub(crate) use whole::verify;

use crate::files::{Files, RealFiles};
use crate::refusal::{Refusal, Result};
use crate::root::Root;

/// What follows the name of something that is not complete yet.
const NEW: &str = ".new";

/// Where the API lies on a robot, and what changes it.
#[derive(Clone)]
pub(crate) struct Place<'a> {
    folder: PathBuf,
    files: &'a dyn Files,
}

impl<'a> Place<'a> {
    /// Every change is made through `files`.
    pub fn new(root: &Root, files: &'a dyn Files) -> Self {
        Self { folder: root.data().join("apps/api"), files }
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

    /// Makes the entries of a folder durable.
    fn flush(&self, folder: &Path) -> Result<()> {
        self.files.sync(folder).map_err(failed("flushing", folder))
    }

    /// Makes everything durable that was written to the folder's file system.
    fn flush_all(&self, folder: &Path) -> Result<()> {
        self.files.sync_all(folder).map_err(failed("flushing", folder))
    }

    /// Removes a tree, a file or a link, if it is there.
    fn clear(&self, path: &Path) -> Result<()> {
        self.files.remove(path).map_err(failed("removing", path))
    }

    /// Gives a complete folder its name, which is free.
    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.files.rename(from, to).map_err(failed("renaming", from))
    }

    /// Exchanges a complete folder with the one that has its name, which may serve, and removes the latter.
    fn exchange(&self, new: &Path, path: &Path) -> Result<()> {
        self.flush_all(new)?;
        self.files.exchange(new, path).map_err(failed("exchanging", path))?;
        self.flush(&self.folder)?;
        self.clear(new)
    }
}

impl Place<'static> {
    /// For looking only.
    fn of(root: &Root) -> Self {
        Self::new(root, &RealFiles)
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
