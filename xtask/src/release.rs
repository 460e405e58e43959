//! Releases: build results as a static tree of signed files for any web server, object store or USB
//! stick. The format is in `docs/releases.md`.

pub mod check;
pub mod collect;
pub mod create;
pub mod format;
pub mod gc;
pub mod index;
pub mod notes;
pub mod pins;
pub mod summary;

pub use format::{Channel, Index, Manifest};

/// The directory for releases below the workspace: a store like any other.
pub const LOCAL: &str = "dist/releases";
