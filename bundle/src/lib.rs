//! The update bundle, version 1: what the builder writes and the device reads.
//!
//! This crate starts no process and opens no file: all I/O goes through `Read`, `Write` and `Seek`.
