//! The host tool: one product description in, a card image and its signed bundle out.
//!
//! `docs/architecture.md` is the map of this crate.

pub mod artifact;
pub mod bench;
pub mod disk;
pub mod exec;
pub mod ext4;
pub mod progress;
