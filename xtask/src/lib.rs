//! The host tool: one product description in, a card image and its signed bundle out.
//!
//! `docs/architecture.md` is the map of this crate.

pub mod artifact;
pub mod cache;
pub mod cli;
pub mod cmd;
pub mod compose;
pub mod config;
pub mod bench;
pub mod disk;
pub mod diff;
pub mod bootstate;
pub mod exec;
pub mod facts;
pub mod plan;
pub mod ext4;
pub mod progress;
pub mod render;
pub mod tools;
pub mod report;
pub mod sbom;
pub mod wheel;
pub mod qemu;
pub mod fetch;
pub mod progress;
pub mod rootfs;
