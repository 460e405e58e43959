//! The host tool: builds a card image and its signed bundle from a product description.
//!
//! `docs/architecture.md` is the map of this crate.

pub mod affected;
pub mod artifact;
pub mod bench;
pub mod build;
pub mod cache;
pub mod cli;
pub mod cmd;
pub mod compose;
pub mod config;
pub mod diff;
pub mod disk;
pub mod exec;
pub mod ext4;
pub mod facts;
pub mod fetch;
pub mod flash;
pub mod fuzz;
pub mod git;
pub mod keys;
pub mod local;
pub mod mutants;
pub mod plan;
pub mod progress;
pub mod publish;
pub mod push;
pub mod qemu;
pub mod release;
pub mod render;
pub mod report;
pub mod rootfs;
pub mod sbom;
pub mod secret;
pub mod shared;
pub mod ssh_keys;
pub mod start;
pub mod text;
pub mod tools;
pub mod update;
pub mod wheel;
