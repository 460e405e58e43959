//! The source files that a product's boards are built from: each once, with its hashes, addresses,
//! licences, and the place where it is available.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use serde::Serialize;
use ureq::tls::TlsConfig;

use super::failure::plain_uri;
use super::info::{BuildrootInfo, FileHashes, InfoDownload, read_hashes};
use super::make::MIRROR;
use crate::fetch::url_without_login;
use crate::parallel;
use crate::progress::warn;
use crate::tls::load_authorities;

/// Number of parallel requests to a mirror.
const CONNECTIONS: usize = 4;
/// A mirror must answer within this time.
const ANSWER: Duration = Duration::from_secs(20);
/// A file that no mirror has.
const NO_FILE: &str = "slipway-asks-for-a-file-that-does-not-exist";

/// One source file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SourceFile {
    /// Its directory in `dl` and on a mirror.
    pub directory: String,
    /// Its name.
    pub file: String,
    /// The packages that use it.
    pub packages: BTreeSet<String>,
    /// Their versions.
    pub versions: BTreeSet<String>,
    /// The boards whose system needs it.
    pub boards: BTreeSet<String>,
    /// Their licences, as SPDX identifiers where possible.
    pub licences: BTreeSet<String>,
    /// Whether it may be redistributed.
    pub redistributable: bool,
    /// The hashes in Buildroot's hash files.
    #[serde(flatten)]
    pub hashes: FileHashes,
    /// Where Buildroot downloads it from; without the mirror.
    pub addresses: Vec<String>,
    /// Length in bytes; `None` where the file is not available.
    pub size: Option<u64>,
    /// Where it is available; `None`: neither in `dl` nor on the mirror.
    pub place: Option<SourcePlace>,
}

/// Where a source file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourcePlace {
    /// In the directory of downloads.
    Downloads,
    /// On the machine's mirror.
    Mirror,
}

impl SourceFile {
    /// Its path in `dl` and on a mirror.
    pub fn path(&self) -> Utf8PathBuf {
        Utf8Path::new(&self.directory).join(&self.file)
    }

    /// Its path below a mirror: Buildroot also looks in the mirror's own directory.
    pub fn locate_in(&self, mirror: &Utf8Path) -> Option<Utf8PathBuf> {
        [mirror.join(self.path()), mirror.join(&self.file)].into_iter().find(|path| path.is_file())
    }

    /// Its packages with their versions, and its licences, in one line.
    pub fn describe(&self) -> String {
        let join = |words: &BTreeSet<String>| words.iter().cloned().collect::<Vec<_>>().join(", ");
        format!("{} {} ({})", join(&self.packages), join(&self.versions), join(&self.licences))
    }
}

/// The sources of several boards, each once, sorted by path.
///
/// # Errors
/// When a hash file cannot be read, or two of them disagree about a file.
pub fn list_sources(
    boards: &[(String, BuildrootInfo)],
    tree: &Utf8Path,
) -> Result<Vec<SourceFile>> {
    let mut found: BTreeMap<Utf8PathBuf, SourceFile> = BTreeMap::new();
    for (board, info) in boards {
        for (name, entry) in info.packages().filter(|(_, entry)| !entry.downloads.is_empty()) {
            let sums = read_hashes(tree, entry)?;
            for download in &entry.downloads {
                let path = Utf8Path::new(&entry.dl_dir).join(&download.source);
                let source = found.entry(path.clone()).or_insert_with(|| SourceFile {
                    directory: entry.dl_dir.clone(),
                    file: download.source.clone(),
                    redistributable: true,
                    ..SourceFile::default()
                });
                source.packages.insert(name.to_owned());
                source.versions.insert(entry.version.clone());
                source.boards.insert(board.clone());
                source.licences.insert(entry.licenses.clone());
                source.redistributable &= entry.redistributable;
                for address in addresses(download) {
                    if !source.addresses.contains(&address) {
                        source.addresses.push(address);
                    }
                }
                let Some(sums) = sums.get(&download.source) else { continue };
                if let (Some(known), Some(other)) = (&source.hashes.sha256, &sums.sha256)
                    && known != other
                {
                    bail!(
                        "two hash files disagree about {path} of {name}: {known} and {other}\n\
                         help: correct the wrong one; ours are in external/patches/<package>/<package>.hash"
                    );
                }
                source.hashes.sha256 = source.hashes.sha256.take().or_else(|| sums.sha256.clone());
                source.hashes.sha512 = source.hashes.sha512.take().or_else(|| sums.sha512.clone());
            }
        }
    }
    Ok(found.into_values().collect())
}

/// The addresses of a download. Repositories keep Buildroot's method as a prefix: the file is made
/// from a commit of them.
fn addresses(download: &InfoDownload) -> Vec<String> {
    let address = |uri: &String| {
        let plain = plain_uri(uri);
        let file = ["http://", "https://", "ftp://", "ftps://", "file://", "sftp://"];
        match file.iter().any(|scheme| plain.starts_with(scheme)) && !uri.starts_with("git") {
            true => format!("{plain}/{}", download.source),
            false => uri.clone(),
        }
    };
    download.uris.iter().map(address).collect()
}

/// Looks up where each source is: in the directory of downloads, else on the mirror.
///
/// # Errors
/// A mirror that does not answer.
pub fn locate_sources(
    sources: &mut [SourceFile],
    downloads: &Utf8Path,
    mirror: Option<&str>,
) -> Result<()> {
    for source in sources.iter_mut() {
        let file = fs::metadata(downloads.join(source.path())).ok().filter(fs::Metadata::is_file);
        source.size = file.as_ref().map(fs::Metadata::len);
        source.place = file.map(|_| SourcePlace::Downloads);
    }
    let Some(mirror) = mirror.map(Mirror::new).transpose()?.flatten() else { return Ok(()) };
    let answers = parallel::map(sources, CONNECTIONS, |source| {
        if source.place.is_some() { Ok(None) } else { mirror.find(source) }
    })?;
    for (source, answer) in sources.iter_mut().zip(answers) {
        if let Some(size) = answer {
            source.place = Some(SourcePlace::Mirror);
            source.size = size;
        }
    }
    Ok(())
}

/// A mirror that can be asked which files it has.
enum Mirror {
    Directory(Utf8PathBuf),
    Web { agent: ureq::Agent, address: String },
}

impl Mirror {
    /// `None` for a mirror that only Buildroot's own programs can reach.
    fn new(address: &str) -> Result<Option<Self>> {
        let address = address.trim_end_matches('/');
        if let Some(path) = address.strip_prefix("file://") {
            ensure!(
                Utf8Path::new(path).is_dir(),
                "the mirror {path} is not a directory\nhelp: correct or unset {MIRROR}"
            );
            return Ok(Some(Self::Directory(path.into())));
        }
        if !address.starts_with("http://") && !address.starts_with("https://") {
            let address = url_without_login(address);
            warn(format!(
                "{MIRROR}={address}: only http, https and file can be asked which files they have; \
                 what is only on this mirror is listed as missing"
            ));
            return Ok(None);
        }
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("slipway/", env!("CARGO_PKG_VERSION")))
            .timeout_global(Some(ANSWER))
            .tls_config(TlsConfig::builder().root_certs(load_authorities()?).build())
            .build();
        let agent: ureq::Agent = config.into();
        let url = format!("{address}/{NO_FILE}");
        if ask_length(&agent, &url)?.is_some() {
            bail!(
                "the mirror has {}, which does not exist: it answers every question alike, like a \
                 login page\nhelp: correct or unset {MIRROR}",
                url_without_login(&url)
            );
        }
        Ok(Some(Self::Web { agent, address: address.to_owned() }))
    }

    /// Whether it has a file; with its length, if the mirror tells.
    fn find(&self, source: &SourceFile) -> Result<Option<Option<u64>>> {
        let (agent, address) = match self {
            Self::Directory(dir) => {
                let path = source.locate_in(dir);
                return Ok(path.and_then(|path| Some(Some(fs::metadata(path).ok()?.len()))));
            }
            Self::Web { agent, address } => (agent, address),
        };
        // As Buildroot: in the package's directory, else in the mirror's own.
        for path in [source.path(), Utf8PathBuf::from(&source.file)] {
            let url = format!("{address}/{}", encode_path(path.as_str()));
            if let Some(length) = ask_length(agent, &url)? {
                return Ok(Some(length));
            }
        }
        Ok(None)
    }
}

/// Whether a web server has a file; with its length, if it tells.
fn ask_length(agent: &ureq::Agent, url: &str) -> Result<Option<Option<u64>>> {
    let shown = url_without_login(url);
    let answer = agent.head(url).call().with_context(|| {
        format!("asking the mirror for {shown}\nhelp: correct or unset {MIRROR}")
    })?;
    match answer.status().as_u16() {
        200 => {
            let length = answer.headers().get("content-length");
            Ok(Some(length.and_then(|v| v.to_str().ok()?.parse().ok())))
        }
        403 | 404 | 410 => Ok(None),
        status => bail!("the mirror answers {status} for {shown}\nhelp: correct or unset {MIRROR}"),
    }
}

/// A path as part of a URL (RFC 3986, unreserved characters and `/`).
fn encode_path(path: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~/".contains(&b);
    let encode = |b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") };
    path.bytes().map(encode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_that_a_browser_understands() {
        let download = InfoDownload {
            source: "a-1.tar.gz".to_owned(),
            uris: vec![
                "https+https://host.example/dir".to_owned(),
                "http|urlencode+http://backup.example/a".to_owned(),
                "git+https://host.example/a.git".to_owned(),
            ],
        };
        let shown = addresses(&download);
        assert_eq!(
            shown,
            [
                "https://host.example/dir/a-1.tar.gz",
                "http://backup.example/a/a-1.tar.gz",
                "git+https://host.example/a.git"
            ]
        );
        assert_eq!(encode_path("g/libstdc++-1.0~rc.tar"), "g/libstdc%2B%2B-1.0~rc.tar");
    }
}
