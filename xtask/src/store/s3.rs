//! A store in a bucket of an S3 service. An upload is complete or does not exist, and the index is
//! replaced by a conditional write, which the service must support.

use std::collections::BTreeSet;
use std::fs::File;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bundle::keys::encode_base64;
use camino::Utf8Path;
use rusty_s3::actions::{GetObject, HeadObject, PutObject};
use rusty_s3::{Credentials, S3Action, UrlStyle};

use super::client::{HttpClient, HttpResponse, RequestBody};
use super::format::{Channel, object_path};
use super::{ChannelToken, FileStore, ObjectError, ReleaseStore, StoreOptions};
use crate::artifact::{hash_bytes, hash_file};
use crate::scratch::create_scratch_dir;
use crate::variable;

/// How long a signed request is valid: as long as its upload may take.
const VALID: Duration = Duration::from_secs(3600);
/// The largest object of one request (Amazon S3 User Guide, "Uploading objects").
const LARGEST: u64 = 5 << 30;
/// This key is written twice to test whether the service supports conditional writes.
const PROBE: &str = "channels/.conditional";

/// A bucket, and the prefix of all keys.
#[derive(Debug)]
pub struct S3Store {
    bucket: rusty_s3::Bucket,
    /// Never printed: contains the secret key.
    credentials: Secret,
    prefix: String,
    client: HttpClient,
}

struct Secret(Credentials);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

impl S3Store {
    /// Parses `BUCKET[/PREFIX]`. Endpoint, region and credentials come from the options, else from
    /// the usual variables of S3 tools. Does not connect.
    ///
    /// # Errors
    /// When the address is invalid, or there are no credentials.
    pub fn new(address: &str, options: &StoreOptions) -> Result<Self> {
        let first_of = |names: [&str; 2]| -> Result<Option<String>> {
            let values = names.map(variable::find).into_iter();
            Ok(values.collect::<Result<Vec<_>>>()?.into_iter().flatten().next())
        };
        let (name, prefix) = address.split_once('/').unwrap_or((address, ""));
        let prefix = prefix.trim_matches('/');
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
        let dots = prefix.split('/').any(|part| part == "." || part == "..");
        ensure!(
            !name.is_empty() && name.chars().all(plain) && prefix.chars().all(plain) && !dots,
            "s3://{address}: expected letters, digits and ._- only\nhelp: s3://BUCKET[/PREFIX]"
        );
        let region = match &options.region {
            Some(region) => Some(region.clone()),
            None => first_of(["AWS_REGION", "AWS_DEFAULT_REGION"])?,
        };
        let region = region.unwrap_or_else(|| "us-east-1".to_owned());
        let named = match &options.endpoint {
            Some(endpoint) => Some(endpoint.clone()),
            None => first_of(["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])?,
        };
        // Self-hosted services seldom have a host name for each bucket.
        let style = if named.is_some() { UrlStyle::Path } else { UrlStyle::VirtualHost };
        let endpoint = named.unwrap_or_else(|| format!("https://s3.{region}.amazonaws.com"));
        let encrypted = endpoint.to_ascii_lowercase().starts_with("https://");
        let url = endpoint.parse().with_context(|| format!("reading the endpoint `{endpoint}`"))?;
        let bucket = rusty_s3::Bucket::new(url, style, name.to_owned(), region)
            .with_context(|| format!("the bucket {name} at {endpoint}"))?;
        // The crate ignores values that are not UTF-8.
        first_of(["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])?;
        let credentials = Credentials::from_env().with_context(|| {
            format!(
                "s3://{address}: there are no credentials\n\
                 help: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        })?;
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        let client = HttpClient::new(format!("s3://{name}/{prefix}"), encrypted, options.timeouts)?;
        Ok(Self { bucket, credentials: Secret(credentials), prefix, client })
    }

    fn key(&self, path: &str) -> String {
        format!("{}{path}", self.prefix)
    }

    fn refused<T>(&self, what: &str, answer: &HttpResponse) -> Result<T> {
        let text = String::from_utf8_lossy(&answer.body);
        let part = |name: &str| {
            let (_, rest) = text.split_once(&format!("<{name}>"))?;
            rest.split_once('<').map(|(inner, _)| inner)
        };
        let code = part("Code").unwrap_or("no code");
        let message = part("Message").unwrap_or_default();
        bail!(
            "{what}: {} answered {} ({code}) {message}\n\
             help: check the bucket's name, the endpoint, the region and the credentials",
            self.name(),
            answer.status
        )
    }

    fn get_small(&self, path: &str) -> Result<Option<(Vec<u8>, Option<String>)>> {
        let key = self.key(path);
        let answer = self.client.request(path, || {
            let url = GetObject::new(&self.bucket, Some(&self.credentials.0), &key).sign(VALID);
            let mut response = self.client.agent.get(url.as_str()).call()?;
            self.client.read(&mut response)
        })?;
        match answer.status {
            200 => Ok(Some((answer.body, answer.etag))),
            404 => Ok(None),
            _ => self.refused(&format!("reading {path}"), &answer),
        }
    }

    /// Size and SHA-256 of an object, as far as the service reports them.
    fn head(&self, path: &str) -> Result<Option<(Option<u64>, Option<String>)>> {
        let key = self.key(path);
        let answer = self.client.request(path, || {
            let mut action = HeadObject::new(&self.bucket, Some(&self.credentials.0), &key);
            action.headers_mut().insert("x-amz-checksum-mode", "ENABLED");
            let url = action.sign(VALID);
            let request =
                self.client.agent.head(url.as_str()).header("x-amz-checksum-mode", "ENABLED");
            Ok(HttpResponse::head(&request.call()?))
        })?;
        match answer.status {
            200 => Ok(Some((answer.length, answer.checksum))),
            404 => Ok(None),
            _ => self.refused(&format!("querying {path}"), &answer),
        }
    }

    /// One PUT. `condition` is a header and its value.
    fn upload(
        &self,
        path: &str,
        (sha256, size): (&str, u64),
        condition: Option<(&'static str, &str)>,
        send: impl Fn() -> Result<RequestBody>,
    ) -> Result<HttpResponse> {
        let key = self.key(path);
        let checksum = encode_base64(&decode_hex(sha256)?);
        self.client.request(path, || {
            let mut action = PutObject::new(&self.bucket, Some(&self.credentials.0), &key);
            let mut headers = vec![("x-amz-checksum-sha256", checksum.as_str())];
            headers.extend(condition);
            // Files that readers poll must not come from a cache on the way.
            if path.starts_with("channels/") {
                headers.push(("cache-control", "no-cache"));
            }
            for (name, value) in &headers {
                action.headers_mut().insert(*name, *value);
            }
            let url = action.sign(VALID);
            let mut request =
                self.client.agent.put(url.as_str()).content_type("application/octet-stream");
            for (name, value) in &headers {
                request = request.header(*name, *value);
            }
            let body = send().map_err(|error| ureq::Error::Io(std::io::Error::other(error)))?;
            self.client.send(request, body, size)
        })
    }

    fn put_small(
        &self,
        path: &str,
        content: &[u8],
        condition: Option<(&'static str, &str)>,
    ) -> Result<bool> {
        let send = || Ok(RequestBody::Bytes(content.to_vec()));
        let sum = (&*hash_bytes(content), content.len() as u64);
        let answer = self.upload(path, sum, condition, send)?;
        match answer.status {
            200 => Ok(true),
            // 409: another conditional write was in progress (Amazon S3 API, "PutObject").
            409 | 412 if condition.is_some() => Ok(false),
            _ => self.refused(&format!("writing {path}"), &answer),
        }
    }

    /// A service that ignores conditions would let publishers silently overwrite each other.
    fn require_conditions(&self) -> Result<()> {
        let probe = || self.put_small(PROBE, b"", Some(("if-none-match", "*")));
        if probe()? {
            ensure!(
                !probe()?,
                "{} ignores `If-None-Match`\n\
                 help: publish to a service with conditional writes, or to a directory or a host \
                 by SFTP",
                self.name()
            );
        }
        Ok(())
    }
}

fn decode_hex(text: &str) -> Result<Vec<u8>> {
    let pair = |at: usize| text.get(at..at + 2).and_then(|p| u8::from_str_radix(p, 16).ok());
    let bytes: Option<Vec<u8>> = (0..text.len()).step_by(2).map(pair).collect();
    bytes.with_context(|| format!("`{text}` is not a SHA-256"))
}

impl FileStore for S3Store {
    fn name(&self) -> String {
        self.client.name.clone()
    }

    fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        Ok(self.get_small(path)?.map(|(body, _)| body))
    }

    fn present(&self, objects: &[(String, u64)]) -> Result<BTreeSet<String>> {
        let mut present = BTreeSet::new();
        for (sha256, size) in objects {
            // An interrupted upload leaves no object, so an object with the right size is complete.
            let sum = encode_base64(&decode_hex(sha256)?);
            let fits = |(length, checksum): (Option<u64>, Option<String>)| {
                length == Some(*size) && checksum.is_none_or(|found| found == sum)
            };
            if self.head(&object_path(sha256))?.is_some_and(fits) {
                present.insert(sha256.clone());
            }
        }
        Ok(present)
    }

    fn put(&self, sha256: &str, from: &Utf8Path) -> Result<()> {
        let path = object_path(sha256);
        let (size, found) = hash_file(from)?;
        ensure!(
            found == sha256,
            "{from} has the SHA-256 {found}, expected {sha256}\n\
             help: the file is damaged; create the release again"
        );
        ensure!(
            size <= LARGEST,
            "{from} has {size} bytes; the maximum for one upload to S3 is {LARGEST}\n\
             help: publish the release to another kind of store"
        );
        let send =
            || Ok(RequestBody::File(File::open(from).with_context(|| format!("opening {from}"))?));
        let answer = self.upload(&path, (sha256, size), None, send)?;
        if answer.status != 200 {
            return self.refused(&format!("writing {path}"), &answer);
        }
        let (length, checksum) =
            self.head(&path)?.context("the object does not exist after its upload")?;
        ensure!(length == Some(size), "{path} has {length:?} bytes on the server, expected {size}");
        match checksum {
            Some(sum) => ensure!(
                sum == encode_base64(&decode_hex(sha256)?),
                "{path} was stored with the SHA-256 {sum}"
            ),
            None => {
                let (_keep, dir) = create_scratch_dir()?;
                self.get(sha256, size, &dir.join("back"), &|_| ())?;
            }
        }
        Ok(())
    }

    fn get(&self, sha256: &str, limit: u64, into: &Utf8Path, received: &dyn Fn(u64)) -> Result<()> {
        let path = object_path(sha256);
        let key = self.key(&path);
        let url = GetObject::new(&self.bucket, Some(&self.credentials.0), &key).sign(VALID);
        let mut response = self.client.get(self.client.agent.get(url.as_str()), limit)?;
        match response.status().as_u16() {
            200 => self.client.receive(&mut response, (&path, sha256), limit, into, received),
            404 => Err(ObjectError::Missing(format!("{} lacks {path}", self.name())).into()),
            _ => {
                let answer = self.client.read(&mut response).context("fetching")?;
                self.refused(&format!("fetching {path}"), &answer)
            }
        }
    }

    fn write(&self, path: &str, content: &[u8]) -> Result<()> {
        if self.read(path)?.as_deref() != Some(content) {
            self.put_small(path, content, None)?;
        }
        Ok(())
    }
}

impl ReleaseStore for S3Store {
    fn identities(&self) -> Result<Vec<String>> {
        // Services may have buckets of the same name.
        Ok(vec![format!("{} at {}", self.client.name, self.bucket.base_url())])
    }

    fn index(&self, channel: Channel) -> Result<(Option<Vec<u8>>, ChannelToken)> {
        let path = channel.path();
        match self.get_small(&path)? {
            Some((content, Some(etag))) => Ok((Some(content), ChannelToken::Version(etag))),
            Some((_, None)) => bail!("{} returns no ETag for {path}", self.name()),
            None => Ok((None, ChannelToken::Absent)),
        }
    }

    fn swap(&self, channel: Channel, token: &ChannelToken, _: u64, content: &[u8]) -> Result<bool> {
        self.require_conditions()?;
        let condition = match token {
            ChannelToken::Absent => ("if-none-match", "*"),
            ChannelToken::Version(etag) => ("if-match", etag.as_str()),
        };
        self.put_small(&channel.path(), content, Some(condition))
    }

    fn make_visible(&self, _: Channel) -> Result<()> {
        // Readers use the swapped file itself.
        Ok(())
    }
}
