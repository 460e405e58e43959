//! Releases: what was built, as a static tree of signed files that any web server, object store or USB
//! stick can hold. The format is in `docs/reference/release-store.md`.

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

/// Where releases are made, below the workspace: a store like any other.
pub const LOCAL: &str = "dist/releases";
