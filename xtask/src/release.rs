//! Releases: what was built, as a static tree of signed files that any web server, object store or USB
//! stick can hold. The format is in `docs/reference/release-store.md`.

pub mod check;
pub mod collect;
pub mod create;
pub mod gc;
pub mod notes;
pub mod summary;

/// Where releases are made, below the workspace: a store like any other.
pub const LOCAL: &str = "dist/releases";
