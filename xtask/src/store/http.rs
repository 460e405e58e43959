//! Files on any HTTP server that supports PUT: sufficient for a team's shared cache. Without
//! conditional writes, releases cannot be published to it.

use std::collections::BTreeSet;
use std::fs::File;

use anyhow::{Context, Result, bail, ensure};
use camino::Utf8Path;
use ureq::http::Uri;

use super::client::{HttpClient, HttpResponse, RequestBody};
use super::format::object_path;
use super::{FileStore, ObjectError, SecretText, StoreOptions};
use crate::artifact::hash_file;

/// A directory of a server.
#[derive(Debug)]
pub struct HttpStore {
    /// Without a trailing `/`.
    base: String,
    authorization: Option<SecretText>,
    /// The server only serves files.
    read_only: bool,
    client: HttpClient,
}

impl HttpStore {
    /// Parses `http[s]://HOST[:PORT][/PATH]`. Does not connect.
    ///
    /// # Errors
    /// When the address is invalid, contains a password, or credentials would be sent unencrypted.
    pub fn new(address: &str, options: &StoreOptions) -> Result<Self> {
        let help = "help: https://HOST[:PORT][/PATH]";
        // A password in the address is not shown.
        let shown = address.rsplit_once('@').map_or(address, |(_, rest)| rest);
        let uri: Uri = address.parse().ok().with_context(|| format!("`{shown}`\n{help}"))?;
        let host = uri.host().unwrap_or_default();
        ensure!(
            !address.contains('@'),
            "the address of {shown} contains a user or a password\n\
             help: set SLIPWAY_SHARED_CACHE_AUTHORIZATION instead, which is never shown"
        );
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-/~".contains(c);
        let good = uri.path().chars().all(plain) && !uri.path().split('/').any(|part| part == "..");
        ensure!(
            !host.is_empty() && good && uri.query().is_none() && !address.contains('#'),
            "`{shown}`: expected a host, and a path of letters, digits and ._~- only\n{help}"
        );
        let near = ["localhost", "127.0.0.1", "[::1]"].contains(&host);
        ensure!(
            options.authorization.is_none() || uri.scheme_str() == Some("https") || near,
            "{shown}: credentials would be sent unencrypted\nhelp: use https"
        );
        let base = address.trim_end_matches('/').to_owned();
        let client =
            HttpClient::new(base.clone(), uri.scheme_str() == Some("https"), options.timeouts)?;
        Ok(Self { base, authorization: options.authorization.clone(), read_only: false, client })
    }

    /// The same as a server that only serves files, without credentials.
    pub fn read_only(self) -> Self {
        Self { authorization: None, read_only: true, ..self }
    }

    fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.base)
    }

    /// Adds the credentials to a request.
    fn signed<T>(&self, request: ureq::RequestBuilder<T>) -> ureq::RequestBuilder<T> {
        match &self.authorization {
            Some(secret) => request.header("Authorization", secret.expose()),
            None => request,
        }
    }

    fn refused<T>(&self, what: &str, status: u16) -> Result<T> {
        let help = match status {
            _ if self.read_only => "check the address; no password or token is sent",
            401 | 403 => {
                "set SLIPWAY_SHARED_CACHE_AUTHORIZATION to the header value that the server \
                 requires"
            }
            _ => "the server must accept PUT, and create the directories of a new file",
        };
        bail!("{what}: {} answered {status}\nhelp: {help}", self.base)
    }

    fn length(&self, path: &str) -> Result<Option<u64>> {
        let answer = self.client.request(path, || {
            let request = self.signed(self.client.agent.head(self.url(path)));
            Ok(HttpResponse::head(&request.call()?))
        })?;
        match answer.status {
            200 => Ok(answer.length),
            404 | 410 => Ok(None),
            status => self.refused(&format!("querying {path}"), status),
        }
    }

    fn upload(&self, path: &str, size: u64, body: impl Fn() -> Result<RequestBody>) -> Result<()> {
        let answer = self.client.request(path, || {
            let request = self.signed(self.client.agent.put(self.url(path)));
            let body = body().map_err(|error| ureq::Error::Io(std::io::Error::other(error)))?;
            self.client.send(request.content_type("application/octet-stream"), body, size)
        })?;
        match answer.status {
            200 | 201 | 204 => Ok(()),
            status => self.refused(&format!("writing {path}"), status),
        }
    }
}

impl FileStore for HttpStore {
    fn name(&self) -> String {
        self.base.clone()
    }

    fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        let answer = self.client.request(path, || {
            let request = self.signed(self.client.agent.get(self.url(path)));
            self.client.read(&mut request.call()?)
        })?;
        match answer.status {
            200 => Ok(Some(answer.body)),
            404 | 410 => Ok(None),
            status => self.refused(&format!("reading {path}"), status),
        }
    }

    fn present(&self, objects: &[(String, u64)]) -> Result<BTreeSet<String>> {
        let mut present = BTreeSet::new();
        for (sha256, size) in objects {
            // An interrupted upload may have left a shorter file.
            if self.length(&object_path(sha256))? == Some(*size) {
                present.insert(sha256.clone());
            }
        }
        Ok(present)
    }

    fn put(&self, sha256: &str, from: &Utf8Path) -> Result<()> {
        let path = object_path(sha256);
        let (size, found) = hash_file(from)?;
        ensure!(found == sha256, "{from} has the SHA-256 {found}, expected {sha256}");
        let open =
            || Ok(RequestBody::File(File::open(from).with_context(|| format!("opening {from}"))?));
        self.upload(&path, size, open)?;
        let there = self.length(&path)?;
        ensure!(there == Some(size), "{path} has {there:?} bytes on the server, expected {size}");
        Ok(())
    }

    fn get(&self, sha256: &str, limit: u64, into: &Utf8Path, received: &dyn Fn(u64)) -> Result<()> {
        let path = object_path(sha256);
        let request = self.signed(self.client.agent.get(self.url(&path)));
        let mut response = self.client.get(request, limit)?;
        match response.status().as_u16() {
            200 => self.client.receive(&mut response, (&path, sha256), limit, into, received),
            404 | 410 => Err(ObjectError::Missing(format!("{} lacks {path}", self.base)).into()),
            status => self.refused(&format!("fetching {path}"), status),
        }
    }

    fn write(&self, path: &str, content: &[u8]) -> Result<()> {
        if self.read(path)?.as_deref() == Some(content) {
            return Ok(());
        }
        self.upload(path, content.len() as u64, || Ok(RequestBody::Bytes(content.to_vec())))
    }
}
