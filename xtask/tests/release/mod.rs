//! Releases and their stores: publishers that are killed or meet, readers in between; directories,
//! a real `sshd`, a real S3 protocol, a real web server; the cache that a team shares.

mod builds;
mod get;
mod https;
mod lint;
mod programs;
mod remote;
mod shared;
mod stores;
mod support;
mod trust;
