//! A store on any web server, for readers: plain GETs.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use camino::Utf8Path;

use super::format::Channel;
use super::http::HttpStore;
use super::{ChannelToken, FileStore, ReleaseStore, StoreOptions};

/// The store.
#[derive(Debug)]
pub struct Web(HttpStore);

impl Web {
    /// Parses `http[s]://HOST[:PORT][/PATH]`. Does not connect.
    ///
    /// # Errors
    /// When the address is invalid or contains a password.
    pub fn new(address: &str, options: &StoreOptions) -> Result<Self> {
        Ok(Self(HttpStore::new(address, options)?.read_only()))
    }

    fn refused<T>(&self) -> Result<T> {
        bail!(
            "{}: a store on a web server can only be read\n\
             help: name the directory, the host (ssh://…) or the bucket (s3://…) that it serves",
            self.name()
        )
    }
}

impl FileStore for Web {
    fn name(&self) -> String {
        self.0.name()
    }

    fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        self.0.read(path)
    }

    fn present(&self, objects: &[(String, u64)]) -> Result<BTreeSet<String>> {
        self.0.present(objects)
    }

    fn put(&self, _: &str, _: &Utf8Path) -> Result<()> {
        self.refused()
    }

    fn get(&self, sha256: &str, limit: u64, into: &Utf8Path, received: &dyn Fn(u64)) -> Result<()> {
        self.0.get(sha256, limit, into, received)
    }

    fn write(&self, _: &str, _: &[u8]) -> Result<()> {
        self.refused()
    }
}

impl ReleaseStore for Web {
    fn index(&self, channel: Channel) -> Result<(Option<Vec<u8>>, ChannelToken)> {
        // Nothing is swapped by this token.
        Ok((self.read(&channel.path())?, ChannelToken::Absent))
    }

    fn swap(&self, _: Channel, _: &ChannelToken, _: u64, _: &[u8]) -> Result<bool> {
        self.refused()
    }

    fn make_visible(&self, _: Channel) -> Result<()> {
        Ok(())
    }
}
