//! Releases: build results as a static tree of signed files for any web server, object store or USB
//! stick. The format is in `docs/reference/release-store.md`.

pub mod check;
pub mod collect;
pub mod create;
pub mod gc;
pub mod get;
pub mod notes;
pub mod summary;

/// The directory for releases below the workspace: a store like any other.
pub const LOCAL: &str = "dist/releases";
