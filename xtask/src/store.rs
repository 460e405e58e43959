//! Stores: places for files that are each written once, and for the channels' files, which change by
//! compare-and-swap. Directories, hosts by SFTP, buckets, web servers.

pub mod client;
pub mod directory;
pub mod format;
pub mod http;
pub mod index;
pub mod s3;
pub mod ssh;
pub mod web;

use std::collections::BTreeSet;

use anyhow::{Result, bail, ensure};
use camino::Utf8Path;

use crate::store::directory::DirectoryStore;
use crate::store::http::HttpStore;
use crate::store::s3::S3Store;
use crate::store::ssh::SshStore;
use format::Channel;

/// The version of a channel's file when it was read; [`ReleaseStore::swap`] replaces only this version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChannelToken {
    /// The file did not exist.
    Absent,
    /// The store's own identifier of the version that was read.
    Version(String),
}

/// An error of one object in a working store.
#[derive(Debug)]
pub enum ObjectError {
    /// The object does not exist.
    Missing(String),
    /// Its content does not match its name.
    Damaged(String),
}

impl std::fmt::Display for ObjectError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (Self::Missing(what) | Self::Damaged(what)) = self;
        f.write_str(what)
    }
}

impl std::error::Error for ObjectError {}

/// Storage for files, each written once and never changed; a file gets its name when it is
/// complete.
pub trait FileStore {
    /// The human-readable name of the storage.
    fn name(&self) -> String;

    /// A small file; `None` when there is none.
    ///
    /// # Errors
    /// When the storage cannot be accessed, or the file is larger than 16 MiB.
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>>;

    /// Which of these objects (SHA-256 and size) exist and are complete.
    ///
    /// # Errors
    /// When the storage cannot be accessed.
    fn present(&self, objects: &[(String, u64)]) -> Result<BTreeSet<String>>;

    /// Stores an object, and verifies the stored bytes.
    ///
    /// # Errors
    /// When it cannot be stored, or the stored bytes differ.
    fn put(&self, sha256: &str, from: &Utf8Path) -> Result<()>;

    /// Fetches an object of at most `limit` bytes into a local file, and verifies it. `received` is
    /// called with the number of new bytes.
    ///
    /// # Errors
    /// [`ObjectError`] when it does not exist or has other content; other errors when it cannot be
    /// fetched.
    fn get(&self, sha256: &str, limit: u64, into: &Utf8Path, received: &dyn Fn(u64)) -> Result<()>;

    /// Writes a small file.
    ///
    /// # Errors
    /// When it cannot be written.
    fn write(&self, path: &str, content: &[u8]) -> Result<()>;
}

/// A place for releases. Paths are those of `docs/reference/release-store.md`. Only a channel's file ever changes.
pub trait ReleaseStore: FileStore {
    /// The addresses under which the store is remembered, each once.
    ///
    /// # Errors
    /// When they cannot be determined.
    fn identities(&self) -> Result<Vec<String>> {
        Ok(vec![self.name()])
    }

    /// Whether the store exists. A missing directory is a new store.
    fn exists(&self) -> bool {
        true
    }

    /// The channel's newest file, and the token to replace it with.
    ///
    /// # Errors
    /// When the store cannot be accessed.
    fn index(&self, channel: Channel) -> Result<(Option<Vec<u8>>, ChannelToken)>;

    /// Replaces the channel's file if its version is still that of the token. `false`: another
    /// publisher has changed it, and nothing was written.
    ///
    /// # Errors
    /// When it cannot be written.
    fn swap(
        &self,
        channel: Channel,
        token: &ChannelToken,
        serial: u64,
        content: &[u8],
    ) -> Result<bool>;

    /// Makes the newest file visible to readers, in case an interrupted publisher has not done so.
    ///
    /// # Errors
    /// When it cannot be written.
    fn make_visible(&self, channel: Channel) -> Result<()>;
}

/// The newest file of a channel in a store that keeps each serial, and its token: the visible file with
/// its serial, or the one with the serial `newest`, which `read` reads.
fn newest_index(
    (visible, seen): (Option<Vec<u8>>, Option<u64>),
    newest: Option<u64>,
    read: impl FnOnce(u64) -> Result<Vec<u8>>,
) -> Result<(Option<Vec<u8>>, ChannelToken)> {
    let token = |serial: u64| ChannelToken::Version(serial.to_string());
    match (newest, seen) {
        // A copy of a store may lack the directory of serials.
        (newest, Some(seen)) if newest.is_none_or(|n| n <= seen) => Ok((visible, token(seen))),
        (Some(newest), _) => Ok((Some(read(newest)?), token(newest))),
        (None, _) => Ok((None, ChannelToken::Absent)),
    }
}

/// Options of a store's address.
#[derive(Debug, Clone, Default)]
pub struct StoreOptions {
    /// The S3 service, such as `https://s3.example.org`.
    pub endpoint: Option<String>,
    /// The S3 region.
    pub region: Option<String>,
    /// Options of ssh_config(5), `KEY=VALUE`.
    pub ssh: Vec<String>,
    /// The timeouts for a server.
    pub timeouts: client::ServerTimeouts,
    /// The value of the header `Authorization`, for other HTTP servers.
    pub authorization: Option<SecretText>,
}

/// A secret text that is never printed.
#[derive(Clone)]
pub struct SecretText(String);

impl SecretText {
    /// Wraps the text.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself, for the request that needs it.
    fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for SecretText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

/// Opens the storage of a shared cache by its address: a directory, `http[s]://…` or `s3://…`. This
/// writes nothing.
///
/// # Errors
/// When the address is not valid.
pub fn open_files(
    address: &str,
    options: &StoreOptions,
) -> Result<Box<dyn FileStore + Send + Sync>> {
    if let Some(rest) = address.strip_prefix("s3://") {
        return Ok(Box::new(S3Store::new(rest, options)?));
    }
    if address.starts_with("https://") || address.starts_with("http://") {
        return Ok(Box::new(HttpStore::new(address, options)?));
    }
    ensure!(
        Utf8Path::new(address).is_absolute(),
        "invalid address of a shared cache: `{address}`\n\
         help: https://HOST[/PATH], s3://BUCKET[/PREFIX], or the full path of a directory"
    );
    Ok(Box::new(DirectoryStore::new(Utf8Path::new(address))))
}

/// Opens a store by its address: a directory, `ssh://…`, `s3://…`, or `http[s]://…`, which can only be read. This writes nothing.
///
/// # Errors
/// When the address is not valid.
pub fn open_store(address: &str, options: &StoreOptions) -> Result<Box<dyn ReleaseStore>> {
    if let Some(rest) = address.strip_prefix("s3://") {
        return Ok(Box::new(S3Store::new(rest, options)?));
    }
    if let Some(rest) = address.strip_prefix("ssh://") {
        return Ok(Box::new(SshStore::new(rest, &options.ssh)?));
    }
    if address.starts_with("https://") || address.starts_with("http://") {
        return Ok(Box::new(web::Web::new(address, options)?));
    }
    ensure!(
        !address.contains("://"),
        "invalid address of a store: `{address}`\n\
         help: a directory, ssh://[USER@]HOST[:PORT]/PATH, s3://BUCKET[/PREFIX], or https://HOST[/PATH] to read"
    );
    // The syntax of scp: it would create a local directory of that name by mistake.
    if let Some((host, path)) = address.split_once(':').filter(|(host, _)| !host.contains('/')) {
        bail!(
            "`{address}` is not a directory\n\
             help: for a host: ssh://{host}/{}, or ./{address} for a directory of that name",
            path.trim_start_matches('/')
        );
    }
    Ok(Box::new(DirectoryStore::new(Utf8Path::new(address))))
}
