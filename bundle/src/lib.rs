//! The update bundle, version 1: what the builder writes and the device reads.
//!
//! This crate starts no process and opens no file: all I/O goes through `Read`, `Write` and `Seek`.
//! `docs/reference/bundle-format.md` describes the format; the code and that page must agree.

pub mod area;
pub mod bootstate;
pub mod component;
mod error;
mod frames;
pub mod index;
pub mod keys;
mod limits;
pub mod manifest;
pub mod reader;
pub mod tree;
mod ustar;
pub mod writer;

pub use error::{Error, Result};
pub use frames::CompressionLevel;
pub use index::{BlockIndex, Frame};
pub use keys::{KeySet, SignedBy, TrustedKey};
pub use limits::*;
pub use manifest::{BuildKind, BundleComponent, BundleManifest, Payload, Version};
pub use reader::{
    BundleInput, BundlePolicy, BundleReader, PayloadReader, SeekableInput, StreamInput,
};
pub use writer::{CompressedPayload, PayloadSource, SignatureFile, compress, write_archive};
