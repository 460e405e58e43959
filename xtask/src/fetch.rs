//! Downloads by hash into a store that all builds share: resumed, retried, and verified before they
//! get their name. Files in the store are never downloaded again, and a team's shared cache is
//! tried before the mirrors; offline, missing files are listed in the error.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{FlockOperation, flock};
use ureq::tls::TlsConfig;

use crate::artifact::{Artifact, hash_file, partial_path};
use crate::cache::{Cache, RemoteDownloads};
use crate::parallel;
use crate::progress::{ProgressStep, ProgressUnit};
use crate::tls::load_authorities;

/// Parallel connections; more would burden mirrors and are not faster on a home connection.
const CONNECTIONS: usize = 4;
/// How many attempts without a new byte are made before a download fails.
const ATTEMPTS: u32 = 4;
/// The wait before the second attempt; doubles each time.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// The connection must be established within this time.
const CONNECT: Duration = Duration::from_secs(20);
/// The server must start to answer within this time.
const ANSWER: Duration = Duration::from_secs(60);
/// The time limit of one attempt; the next attempt resumes a slow download.
const BODY: Duration = Duration::from_secs(300);
/// The largest file that is fetched without a known size.
const UNKNOWN_LIMIT: u64 = 4 << 30;
/// A file to download.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Download {
    /// Its name in messages.
    pub name: String,
    /// Its address; may be empty when only the store can contain it.
    pub url: String,
    /// Length in bytes, if known.
    pub size: Option<u64>,
    /// SHA-256, lower-case hexadecimal.
    pub sha256: String,
}

/// The result of a download.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DownloadOutcome {
    /// The file is in the store.
    Ready(Artifact),
    /// The server does not have the file (404 or 410).
    Gone,
}

/// The store and its downloader.
#[derive(Debug, Clone)]
pub struct Downloader {
    store: Utf8PathBuf,
    offline: bool,
    agent: ureq::Agent,
    shared: Option<Arc<dyn RemoteDownloads>>,
}

impl Downloader {
    /// A store below `cache`; `offline` never opens a connection.
    ///
    /// # Errors
    /// When the directory cannot be created, or SSL_CERT_FILE names no file with certificates.
    pub fn new(cache: &Utf8Path, offline: bool) -> Result<Self> {
        let store = cache.join("downloads/sha256");
        fs::create_dir_all(&store).with_context(|| format!("creating {store}"))?;
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("slipway/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(ANSWER))
            .timeout_recv_body(Some(BODY))
            .tls_config(TlsConfig::builder().root_certs(load_authorities()?).build())
            .build();
        Ok(Self { store, offline, agent: config.into(), shared: None })
    }

    /// The store of a cache, and the shared cache of a team.
    ///
    /// # Errors
    /// As [`Downloader::new`].
    pub fn for_cache(cache: &Cache, offline: bool) -> Result<Self> {
        Ok(Self { shared: cache.remote(), ..Self::new(&cache.root, offline)? })
    }

    /// The path of a file with this hash in the store.
    pub fn path_of(&self, sha256: &str) -> Utf8PathBuf {
        self.store.join(sha256)
    }

    /// Whether this downloader never opens a connection.
    pub fn is_offline(&self) -> bool {
        self.offline
    }

    /// Fetches all files; results are in the order of `wanted`. Progress is shown for `stage`.
    ///
    /// # Errors
    /// When files are missing offline (all are listed), a server is unreachable, answers with an
    /// error, or sends other bytes than requested.
    pub fn fetch(
        &self,
        stage: &str,
        what: &str,
        wanted: &[Download],
    ) -> Result<Vec<DownloadOutcome>> {
        let mut outcomes: Vec<Option<DownloadOutcome>> = Vec::with_capacity(wanted.len());
        for download in wanted {
            outcomes.push(self.stored(download)?.map(DownloadOutcome::Ready));
        }
        let missing: Vec<usize> =
            outcomes.iter().enumerate().filter(|(_, o)| o.is_none()).map(|(i, _)| i).collect();
        if self.offline && !missing.is_empty() {
            let names: Vec<&str> = missing.iter().map(|&i| wanted[i].name.as_str()).collect();
            bail!(
                "offline, but {} of {} downloads are not in {}: {}\n\
                 help: run once without --offline",
                names.len(),
                wanted.len(),
                self.store,
                crate::progress::list_names(&names)
            );
        }
        if !missing.is_empty() {
            self.fetch_missing(stage, what, wanted, &missing, &mut outcomes)?;
        }
        let outcomes: Vec<DownloadOutcome> = outcomes
            .into_iter()
            .map(|outcome| outcome.context("a download has no result"))
            .collect::<Result<_>>()?;
        if let (Some(shared), false) = (&self.shared, self.offline) {
            let ready = |outcome: &DownloadOutcome| match outcome {
                DownloadOutcome::Ready(artifact) => Some(artifact.clone()),
                DownloadOutcome::Gone => None,
            };
            shared.offer(what, &outcomes.iter().filter_map(ready).collect::<Vec<_>>());
        }
        Ok(outcomes)
    }

    fn fetch_missing(
        &self,
        stage: &str,
        what: &str,
        wanted: &[Download],
        missing: &[usize],
        outcomes: &mut [Option<DownloadOutcome>],
    ) -> Result<()> {
        let total = missing.iter().map(|&i| wanted[i].size.unwrap_or(0)).sum();
        let step = ProgressStep::new(stage, what, total, ProgressUnit::Bytes);
        let done = parallel::map(missing, CONNECTIONS, |&i| {
            self.download_one(&wanted[i], &step)
                .with_context(|| format!("fetching {}", wanted[i].name))
        })?;
        for (&i, outcome) in missing.iter().zip(done) {
            outcomes[i] = Some(outcome);
        }
        Ok(())
    }

    /// The file in the store, if it exists and is intact.
    fn stored(&self, download: &Download) -> Result<Option<Artifact>> {
        let path = self.path_of(&download.sha256);
        if !path.is_file() {
            return Ok(None);
        }
        let (size, sha256) = hash_file(&path)?;
        if sha256 == download.sha256 {
            return Ok(Some(Artifact { path, size, sha256 }));
        }
        crate::progress::warn(format!("{path} is damaged; downloading it again"));
        fs::remove_file(&path).with_context(|| format!("removing {path}"))?;
        Ok(None)
    }

    fn download_one(&self, download: &Download, step: &ProgressStep) -> Result<DownloadOutcome> {
        let path = self.path_of(&download.sha256);
        let temporary = partial_path(&path);
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&temporary)
            .with_context(|| format!("opening {temporary}"))?;
        // Another build may be fetching the same file; the second one waits and finds it.
        flock(&file, FlockOperation::LockExclusive)
            .with_context(|| format!("locking {temporary}"))?;
        if let Some(artifact) = self.stored(download)? {
            return Ok(DownloadOutcome::Ready(artifact));
        }
        if let Some(artifact) = self.take_shared(download, step)? {
            // A build that waited checks the store first.
            drop(fs::remove_file(&temporary));
            return Ok(DownloadOutcome::Ready(artifact));
        }
        let mut pause = FIRST_PAUSE;
        let mut attempt = 1;
        loop {
            let before = file_length(&file)?;
            match self.attempt(download, &mut file, step) {
                Ok(Attempt::Complete) => break,
                Ok(Attempt::Gone) => {
                    drop(fs::remove_file(&temporary));
                    return Ok(DownloadOutcome::Gone);
                }
                Err(AttemptFailure::Final(error)) => return Err(error),
                Err(AttemptFailure::Again(error)) => {
                    if file_length(&file)? > before {
                        attempt = 1;
                        pause = FIRST_PAUSE;
                        continue;
                    }
                    if attempt == ATTEMPTS {
                        return Err(error.context(format!("giving up after {ATTEMPTS} attempts")));
                    }
                    attempt += 1;
                    std::thread::sleep(pause);
                    pause *= 2;
                }
            }
        }
        let (size, sha256) = hash_file(&temporary)?;
        if download.size.is_some_and(|expected| expected != size) || sha256 != download.sha256 {
            drop(fs::remove_file(&temporary));
            let expected = download.size.map_or("?".to_owned(), |n| n.to_string());
            bail!(
                "{} sent other bytes than the lock requires: expected {expected} bytes with \
                 SHA-256 \
                 {}, found {size} bytes with SHA-256 {sha256}\n\
                 help: the file was discarded; try again, or use another mirror",
                url_without_login(&download.url),
                download.sha256
            );
        }
        file.sync_all().with_context(|| format!("writing {temporary}"))?;
        fs::rename(&temporary, &path).with_context(|| format!("renaming {temporary}"))?;
        Ok(DownloadOutcome::Ready(Artifact { path, size, sha256 }))
    }

    /// The file from the shared cache, if it exists there.
    fn take_shared(&self, download: &Download, step: &ProgressStep) -> Result<Option<Artifact>> {
        let Some(shared) = &self.shared else { return Ok(None) };
        let path = self.path_of(&download.sha256);
        // A separate file: the partial download from a mirror is kept, and resumes if this fails.
        let temporary = Utf8PathBuf::from(format!("{path}.shared.partial"));
        let advance = |n| step.advance(n);
        if !shared.download(&download.sha256, download.size, &temporary, &advance) {
            drop(fs::remove_file(&temporary));
            return Ok(None);
        }
        File::open(&temporary)
            .and_then(|file| file.sync_all())
            .and_then(|()| fs::rename(&temporary, &path))
            .with_context(|| format!("renaming {temporary}"))?;
        let size =
            fs::metadata(&path).with_context(|| format!("reading the metadata of {path}"))?.len();
        Ok(Some(Artifact { path, size, sha256: download.sha256.clone() }))
    }

    fn attempt(
        &self,
        download: &Download,
        file: &mut File,
        step: &ProgressStep,
    ) -> Result<Attempt, AttemptFailure> {
        let have = file_length(file).map_err(AttemptFailure::Final)?;
        let mut request = self.agent.get(&download.url).header("Accept-Encoding", "identity");
        if have > 0 {
            if download.size == Some(have) {
                return Ok(Attempt::Complete);
            }
            request = request.header("Range", format!("bytes={have}-"));
        }
        let mut response = request
            .call()
            .map_err(|error| classify_error(error, &url_without_login(&download.url)))?;
        let status = response.status().as_u16();
        let start = match status {
            200 => 0,
            206 => have,
            404 | 410 => return Ok(Attempt::Gone),
            // The partial file is longer than the real one: start again.
            416 => {
                file.set_len(0).map_err(AttemptFailure::write)?;
                return Err(AttemptFailure::again(format!(
                    "{}: nothing to resume",
                    url_without_login(&download.url)
                )));
            }
            408 | 429 | 500..=599 => {
                return Err(AttemptFailure::again(format!(
                    "{} answered {status}",
                    url_without_login(&download.url)
                )));
            }
            _ => {
                let message = format!("{} answered {status}", url_without_login(&download.url));
                return Err(AttemptFailure::Final(anyhow::Error::msg(message)));
            }
        };
        file.set_len(start).map_err(AttemptFailure::write)?;
        file.seek(SeekFrom::Start(start)).map_err(AttemptFailure::write)?;
        let limit = download.size.unwrap_or(UNKNOWN_LIMIT);
        // One additional byte is enough to detect a wrong file.
        let body = response.body_mut().with_config().limit(u64::MAX).reader();
        let mut body = body.take(limit.saturating_sub(start).saturating_add(1));
        let mut buffer = vec![0; 1 << 16];
        let mut position = start;
        loop {
            let n = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) => {
                    return Err(AttemptFailure::again(format!(
                        "the connection to {} broke: {e}",
                        url_without_login(&download.url)
                    )));
                }
            };
            file.write_all(&buffer[..n]).map_err(AttemptFailure::write)?;
            position += n as u64;
            step.advance(n as u64);
        }
        match download.size {
            Some(size) if position < size => Err(AttemptFailure::again(format!(
                "the download of {} ended after {position} of {size} bytes",
                url_without_login(&download.url)
            ))),
            _ => Ok(Attempt::Complete),
        }
    }
}

enum Attempt {
    Complete,
    Gone,
}

enum AttemptFailure {
    Again(anyhow::Error),
    Final(anyhow::Error),
}

impl AttemptFailure {
    fn again(message: String) -> Self {
        Self::Again(anyhow::Error::msg(message))
    }

    fn write(error: std::io::Error) -> Self {
        Self::Final(anyhow::Error::new(error).context("writing the download"))
    }
}

/// An address for messages, without a login.
pub(crate) fn url_without_login(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
    format!("{scheme}://{host}{path}")
}

fn classify_error(error: ureq::Error, url: &str) -> AttemptFailure {
    let again = matches!(
        error,
        ureq::Error::Timeout(_)
            | ureq::Error::Io(_)
            | ureq::Error::ConnectionFailed
            | ureq::Error::HostNotFound
            | ureq::Error::Protocol(_)
    );
    let error = anyhow::Error::msg(format!(
        "{url}: {error}\nhelp: check the network and the proxy; --offline uses only files in the cache"
    ));
    if again { AttemptFailure::Again(error) } else { AttemptFailure::Final(error) }
}

fn file_length(file: &File) -> Result<u64> {
    Ok(file.metadata().context("reading a partial download")?.len())
}

#[cfg(test)]
mod tests {
    use super::url_without_login;

    #[test]
    fn no_message_has_a_password() {
        assert_eq!(
            url_without_login("https://me:a%40b@h.example:1/x@y"),
            "https://h.example:1/x@y"
        );
        assert_eq!(url_without_login("http://h.example"), "http://h.example");
        assert_eq!(url_without_login(""), "");
    }
}
