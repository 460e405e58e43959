//! Stores: places for files that are each written once, and for the channels' files, which change by
//! compare-and-swap. Folders, hosts by SFTP, buckets, web servers.

pub mod client;
pub mod directory;
pub mod format;
pub mod http;
pub mod index;
pub mod s3;
pub mod ssh;

use std::collections::BTreeSet;

use anyhow::{Result, bail, ensure};
use camino::Utf8Path;

use format::Channel;

/// What a channel's file was when it was read; [`Store::swap`] replaces no other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Token {
    /// There was none.
    Absent,
    /// The store's own word for the version that was read.
    Version(String),
}

/// What is wrong with an object, in a store that works.
#[derive(Debug)]
pub enum BadObject {
    /// It is not there.
    Missing(String),
    /// It is not what its name says.
    Damaged(String),
}

impl std::fmt::Display for BadObject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (Self::Missing(what) | Self::Damaged(what)) = self;
        f.write_str(what)
    }
}

impl std::error::Error for BadObject {}

/// A place for files, each written once and never changed; it has its name only when it is complete.
pub trait Files {
    /// The place for people.
    fn name(&self) -> String;

    /// A small file; `None` when there is none.
    ///
    /// # Errors
    /// When the place cannot be asked, or the file is larger than 16 MiB.
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>>;

    /// Which of these objects (SHA-256 and size) lie there complete.
    ///
    /// # Errors
    /// When the place cannot be asked.
    fn present(&self, objects: &[(String, u64)]) -> Result<BTreeSet<String>>;

    /// Stores an object, and checks what has arrived.
    ///
    /// # Errors
    /// When it cannot be stored, or something else arrived.
    fn put(&self, sha256: &str, from: &Utf8Path) -> Result<()>;

    /// Fetches an object of at most `limit` bytes into a local file, and checks it. `received` is told
    /// how many bytes more have come.
    ///
    /// # Errors
    /// [`BadObject`] when it is not there or is another one; others when it cannot be had.
    fn get(&self, sha256: &str, limit: u64, into: &Utf8Path, received: &dyn Fn(u64)) -> Result<()>;

    /// Writes a small file.
    ///
    /// # Errors
    /// When it cannot be written.
    fn write(&self, path: &str, content: &[u8]) -> Result<()>;
}

/// A place for releases. Paths are those of `docs/reference/release-store.md`. Only a channel's file ever changes.
pub trait Store: Files {
    /// The store's address in its one spelling: what it is remembered by.
    ///
    /// # Errors
    /// When it cannot be found out.
    fn identity(&self) -> Result<String> {
        Ok(self.name())
    }

    /// Whether there is a place at all. A folder that is not there is a store that begins.
    fn exists(&self) -> bool {
        true
    }

    /// The channel's newest file, and the token to replace it with.
    ///
    /// # Errors
    /// When the store cannot be asked.
    fn index(&self, channel: Channel) -> Result<(Option<Vec<u8>>, Token)>;

    /// Replaces the channel's file if it still is what the token stands for. `false`: somebody else was
    /// quicker, and nothing has changed.
    ///
    /// # Errors
    /// When it cannot be written.
    fn swap(&self, channel: Channel, token: &Token, serial: u64, content: &[u8]) -> Result<bool>;

    /// Makes readers see the newest file, should an interrupted publisher not have got to it.
    ///
    /// # Errors
    /// When it cannot be written.
    fn settle(&self, channel: Channel) -> Result<()>;
}

/// Options of a store's address.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The S3 service, such as `https://s3.example.org`.
    pub endpoint: Option<String>,
    /// The S3 region.
    pub region: Option<String>,
    /// Options of ssh_config(5), `KEY=VALUE`.
    pub ssh: Vec<String>,
    /// How long a server is waited for.
    pub patience: client::Patience,
    /// The value of the header `Authorization`, for servers that are neither.
    pub authorization: Option<Secret>,
}

/// A text that is never printed.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// Takes the text.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself, for the request that needs it.
    fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

/// Opens a place for files that several machines use at once, by its address: a folder, `http[s]://…` or
/// `s3://…`. Nothing is written yet.
///
/// # Errors
/// When the address is none.
pub fn open_files(address: &str, options: &Options) -> Result<Box<dyn Files + Send + Sync>> {
    if let Some(rest) = address.strip_prefix("s3://") {
        return Ok(Box::new(s3::Bucket::new(rest, options)?));
    }
    if address.starts_with("https://") || address.starts_with("http://") {
        return Ok(Box::new(http::Server::new(address, options)?));
    }
    ensure!(
        Utf8Path::new(address).is_absolute(),
        "`{address}` is no address of a shared cache\n\
         help: https://HOST[/PATH], s3://BUCKET[/PREFIX], or the full path of a folder"
    );
    Ok(Box::new(directory::Directory::new(Utf8Path::new(address))))
}

/// Opens a store by its address: a folder, `ssh://…` or `s3://…`. Nothing is written yet.
///
/// # Errors
/// When the address is none.
pub fn open(address: &str, options: &Options) -> Result<Box<dyn Store>> {
    if let Some(rest) = address.strip_prefix("s3://") {
        return Ok(Box::new(s3::Bucket::new(rest, options)?));
    }
    if let Some(rest) = address.strip_prefix("ssh://") {
        return Ok(Box::new(ssh::Host::new(rest, &options.ssh)?));
    }
    ensure!(
        !address.contains("://"),
        "`{address}` is no address of a store\n\
         help: a folder, ssh://[USER@]HOST[:PORT]/PATH, or s3://BUCKET[/PREFIX]"
    );
    // As scp spells it: a folder of that name would be made here, and nobody would look for it.
    if let Some((host, path)) = address.split_once(':').filter(|(host, _)| !host.contains('/')) {
        bail!(
            "`{address}` is no folder\nhelp: ssh://{host}/{}, or ./{address} for a folder of that name",
            path.trim_start_matches('/')
        );
    }
    Ok(Box::new(directory::Directory::new(Utf8Path::new(address))))
}
