//! Paths on a robot. Every path starts at one prefix: `/` on a robot, a directory in a test.

use std::io;
use std::path::{Path, PathBuf};

/// The prefix of all paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootDir(PathBuf);

impl RootDir {
    /// All paths below `prefix`.
    pub fn new(prefix: impl Into<PathBuf>) -> Self {
        Self(prefix.into())
    }

    /// Whether this is the running system itself, which may be restarted.
    pub fn is_system(&self) -> bool {
        self.0 == Path::new("/")
    }

    /// A path below the prefix; `path` may begin with a slash.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.0.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The kernel's id of this start: it changes with every restart.
    ///
    /// # Errors
    /// When the kernel's file cannot be read.
    pub fn boot_id(&self) -> io::Result<String> {
        let text = std::fs::read_to_string(self.path("proc/sys/kernel/random/boot_id"))?;
        Ok(text.trim().to_owned())
    }

    /// The system's description: `device.toml`, the same bytes in either slot.
    pub fn device_file(&self) -> PathBuf {
        self.path("usr/lib/slipway/device.toml")
    }

    /// The keys that the image trusts.
    pub fn key_set(&self) -> PathBuf {
        self.path("usr/lib/slipway/keyset.json")
    }

    /// The description of the image's API; missing in a product without an API.
    pub fn api_file(&self) -> PathBuf {
        self.path("usr/lib/slipway/api.toml")
    }

    /// The partition `data`: all state of a robot.
    pub fn data(&self) -> PathBuf {
        self.path("data")
    }

    /// The `resources` of the API's package; only provisioning writes it.
    pub fn system(&self) -> PathBuf {
        self.path("data/system")
    }

    /// The agent's state of this start, and its locks. Only root may enter it.
    pub fn run(&self) -> PathBuf {
        self.path("run/slotd")
    }

    /// The agent's permanent state; only root may enter it.
    pub fn state(&self) -> PathBuf {
        self.path("data/slotd")
    }
}

impl Default for RootDir {
    fn default() -> Self {
        Self::new("/")
    }
}
