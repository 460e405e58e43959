//! Releases and their stores: publishers that are killed or meet, readers in between; folders, a real
//! `sshd`, a real S3 protocol, a real web server.

mod builds;
mod lint;
mod remote;
mod stores;
mod support;
