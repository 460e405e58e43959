//! The Debian engine: packages from the machine's own mirror, locked by version and SHA-256,
//! installed by `mmdebstrap` into a root that is then pruned by rule and made reproducible.
//!
//! `apt` resolves, `dpkg` installs; this module controls their inputs and records their results.

mod access;
mod apt;
mod binfmt;
pub mod build;
pub mod compiler;
pub mod download;
mod host;
mod inventory;
pub mod lock;
pub mod prune;
mod repo;
mod scratch;
mod sources;
mod unpack;

use serde::{Deserialize, Serialize};

pub use apt::AptMirrors;
pub use binfmt::ensure_runs as can_run;
pub use build::{BoardFilePatterns, DebianRequest, build_base_system, install_packages};
pub use download::{DownloadedPackages, LockPolicy, LockedDeb, ReplacedPackage, fetch_lock};
pub use host::{host_e2fs, unpack_locked};
pub use lock::{ArchiveName, LockedPackage, PackagesLock, lock_packages};
pub use prune::PruneRules;
pub use sources::{AptSourceMirror, AptSourceSpec};

/// What to install, from the product and the board.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DebianSpec {
    /// Release, as in `bookworm`. Its `-updates` and `-security` suites are always used too.
    pub suite: String,
    /// Archive components, as in `main`, `non-free-firmware`.
    pub components: Vec<String>,
    /// Debian's name for the target architecture, as in `arm64`.
    pub arch: String,
    /// Packages to install besides the essential ones; apt adds their dependencies, never their
    /// recommendations. The package manager's own front end (`apt`) is excluded unless listed.
    pub packages: Vec<String>,
    /// Packages that are unpacked and never installed: kernel image (its metapackage is followed),
    /// static busybox, firmware, boot loaders. Their dependencies are not included.
    pub extra: Vec<String>,
    /// Additional archives, and what may come from them. A lock without any has the same text as
    /// before sources existed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<AptSourceSpec>,
}
