//! The files of a release store, as `docs/reference/release-store.md` specifies them: reading checks every rule,
//! so that all names and paths in a value are safe.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};
use bundle::keys::SignaturePurpose;
use bundle::{BuildKind, KeySet, SignedBy, Version};
use serde::{Deserialize, Serialize};

use crate::artifact::hash_bytes;
use crate::keys::{SigningKey, explain_bundle_error};

/// The version of all of the store's files. It is raised when an old reader would misread a new
/// file.
pub const FORMAT: u32 = 1;

/// The format of a manifest with programs. A reader of format 1 skips them: it would publish the release without them, and remove
/// them from a store.
const WITH_PROGRAMS: u32 = 2;

/// The largest index, manifest or signature that is read: 16 MiB, thousands of releases.
pub const LARGEST_TEXT: u64 = 16 << 20;

/// The channels, from the least to the most stable.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Channel {
    /// Nightly builds.
    Nightly,
    /// Releases for testing.
    Beta,
    /// Releases for all robots.
    Stable,
}

impl Channel {
    /// All channels.
    pub const ALL: [Self; 3] = [Self::Nightly, Self::Beta, Self::Stable];

    /// The name, as in file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nightly => "nightly",
            Self::Beta => "beta",
            Self::Stable => "stable",
        }
    }

    /// The path of its index in a store.
    pub fn path(self) -> String {
        format!("channels/{}.json", self.name())
    }
}

impl std::fmt::Display for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A channel's file: the index and its signature in one, so that one atomic step replaces both.
#[derive(Debug, Serialize, Deserialize)]
struct Envelope {
    /// The exact text of the index that is signed.
    index: String,
    /// Its minisign signature file.
    signature: String,
}

/// The content of a channel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ChannelIndex {
    /// [`FORMAT`].
    pub format: u32,
    /// The channel.
    pub channel: Channel,
    /// Counts the changes of this channel. A reader rejects a lower serial than it has seen.
    pub serial: u64,
    /// The releases, sorted by product, then by version.
    pub releases: Vec<ChannelEntry>,
    /// Releases that retention has removed, as long as a publisher may still rely on their objects.
    #[serde(default)]
    pub retired: Vec<RetiredRelease>,
}

/// A release in a channel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ChannelEntry {
    /// The product.
    pub product: String,
    /// The release's version.
    pub version: Version,
    /// Development or release.
    pub kind: BuildKind,
    /// The commit that was built.
    pub commit: Option<String>,
    /// When it was added to the channel: seconds since 1970.
    pub added: u64,
    /// Its manifest.
    pub manifest: StoreFile,
    /// Set when it must not be used any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub yanked: Option<YankNotice>,
}

/// Why a release must not be used any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct YankNotice {
    /// The reason, as readable text.
    pub reason: String,
    /// The time: seconds since 1970.
    pub at: u64,
}

/// A release that a channel no longer offers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetiredRelease {
    /// The product.
    pub product: String,
    /// The release's version.
    pub version: Version,
    /// Its manifest, which is still a reference to its objects.
    pub manifest: StoreFile,
    /// The time: seconds since 1970.
    pub at: u64,
}

/// A file of the store.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct StoreFile {
    /// Its path in the store.
    pub path: String,
    /// Its length in bytes.
    pub size: u64,
    /// SHA-256 of its content, lower-case hexadecimal.
    pub sha256: String,
}

/// A release: the one signed file that ties its parts together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ReleaseManifest {
    /// [`ReleaseManifest::format_of`].
    pub format: u32,
    /// The product.
    pub product: String,
    /// The product's human-readable name.
    pub title: String,
    /// The release's version, which is that of all its parts.
    pub version: Version,
    /// Development or release.
    pub kind: BuildKind,
    /// The commit that was built; `None` outside of a repository.
    pub commit: Option<String>,
    /// The time in all outputs: seconds since 1970.
    pub epoch: u64,
    /// The earlier release in the notes.
    pub previous: Option<Version>,
    /// What changed, as Markdown.
    pub notes: ReleaseObject,
    /// The parts for each board, sorted by name.
    pub boards: Vec<ReleaseBoard>,
    /// `slipway` for machines without a checkout, one for each platform.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub programs: Vec<ReleaseObject>,
}

/// A release's part for one board.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseBoard {
    /// The board.
    pub board: String,
    /// The engine that built the base.
    pub engine: String,
    /// Its files.
    pub objects: Vec<ReleaseObject>,
    /// The components of the system.
    pub components: Vec<ReleaseComponent>,
}

/// A file of a release, stored under its hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseObject {
    /// Its role: `image`, `block-map`, `bundle`, `sbom`, `report`, `notes`, `program`.
    pub role: String,
    /// The name to save it under.
    pub name: String,
    /// Its length in bytes.
    pub size: u64,
    /// SHA-256 of its content, lower-case hexadecimal; its path follows from it.
    pub sha256: String,
    /// The decompressed file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unpacked: Option<UnpackedObject>,
}

/// A decompressed object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnpackedObject {
    /// The name to save it under.
    pub name: String,
    /// Its length in bytes.
    pub size: u64,
    /// SHA-256 of its content, lower-case hexadecimal.
    pub sha256: String,
}

/// A part of the system, with the digest of its content: equal digests are equal parts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ReleaseComponent {
    /// `base`, `api`, `agent`, `boot` or `system`.
    pub name: String,
    /// Its version, informational.
    pub version: String,
    /// SHA-256 over its content, lower-case hexadecimal.
    pub digest: String,
}

impl ReleaseObject {
    /// Its path in a store.
    pub fn path(&self) -> String {
        object_path(&self.sha256)
    }
}

impl StoreFile {
    /// A manifest's path and hash. The hash is part of the name, so that no manifest replaces
    /// another.
    pub fn manifest(product: &str, version: &Version, text: &[u8]) -> Self {
        let sha256 = hash_bytes(text);
        let short = sha256.get(..12).unwrap_or(&sha256);
        let path = format!("releases/{product}/{version}-{short}.json");
        Self { path, size: text.len() as u64, sha256 }
    }

    /// The path of a manifest's signature.
    pub fn signature(&self) -> String {
        format!("{}.minisig", self.path)
    }
}

/// The path of an object with this hash in a store.
pub fn object_path(sha256: &str) -> String {
    format!("objects/{}/{sha256}", sha256.get(..2).unwrap_or_default())
}

impl ChannelIndex {
    /// A channel before its first release.
    pub fn empty(channel: Channel) -> Self {
        Self { format: FORMAT, channel, serial: 0, releases: Vec::new(), retired: Vec::new() }
    }

    /// Opens a channel's file: verifies the signature first, then checks every rule. The kind of
    /// the signing key is pinned, so that an empty index, or one with false entries, needs the same
    /// key.
    ///
    /// # Errors
    /// When no trusted key of that kind has signed it, it is another channel's, or a name or path in it is not a
    /// safe one.
    pub fn open(channel: Channel, file: &[u8], keys: &KeySet, kind: BuildKind) -> Result<Self> {
        let read = || -> Result<Self> {
            let envelope: Envelope = serde_json::from_slice(file).context("not a channel file")?;
            let text = envelope.index.as_bytes();
            let signer = verify_signature(
                keys,
                SignaturePurpose::Channel,
                "reading its signature",
                envelope.signature.as_bytes(),
                text,
            )?;
            ensure!(
                kind == BuildKind::Development || signer.kind == BuildKind::Release,
                "the channel {channel} must be signed by a release key, but is signed by the \
                 development key {}\n\
                 help: releases.toml defines which keys sign a channel; after a change of the \
                 kind, the channel must \
                 start again: remove {} from this store and from every copy of it",
                signer.id,
                channel.path()
            );
            let index: Self = serde_json::from_slice(text).context("reading its index")?;
            index.check(channel)?;
            Ok(index)
        };
        read().with_context(|| format!("reading {}", channel.path()))
    }

    /// The serial in a channel's file, unverified: to find the newer of two.
    ///
    /// # Errors
    /// When it is not a channel file.
    pub fn serial_of(file: &[u8]) -> Result<u64> {
        #[derive(Deserialize)]
        struct Serial {
            serial: u64,
        }
        let envelope: Envelope = serde_json::from_slice(file).context("not a channel file")?;
        let serial: Serial =
            serde_json::from_str(&envelope.index).context("the index has no serial")?;
        Ok(serial.serial)
    }

    fn check(&self, channel: Channel) -> Result<()> {
        check_format(self.format, FORMAT)?;
        ensure!(self.channel == channel, "the index belongs to the channel {}", self.channel);
        let entries = self.releases.iter().map(|e| (&e.product, &e.manifest));
        for (product, manifest) in
            entries.chain(self.retired.iter().map(|r| (&r.product, &r.manifest)))
        {
            check_name(product)?;
            check_hash(&manifest.sha256)?;
            let inner = manifest.path.strip_prefix(&format!("releases/{product}/"));
            let Some(inner) = inner else { bail!("invalid manifest path `{}`", manifest.path) };
            check_name(inner)?;
        }
        Ok(())
    }

    /// Signs the index: the bytes of the channel's file.
    ///
    /// # Errors
    /// When it has no JSON form.
    pub fn sign(&self, signer: &SigningKey) -> Result<Vec<u8>> {
        let index = to_pretty_json(self)?;
        let comment = format!("slipway channel {} {}", self.channel, self.serial);
        let signature = signer.sign(index.as_bytes(), &comment).text;
        Ok(to_pretty_json(&Envelope { index, signature })?.into_bytes())
    }

    /// The releases of a product, oldest first.
    pub fn releases_of<'a>(
        &'a self,
        product: &'a str,
    ) -> impl DoubleEndedIterator<Item = &'a ChannelEntry> {
        self.releases.iter().filter(move |entry| entry.product == product)
    }

    /// A release.
    pub fn find(&self, product: &str, version: &Version) -> Option<&ChannelEntry> {
        self.releases.iter().find(|e| e.product == product && e.version == *version)
    }
}

impl ReleaseManifest {
    /// The manifest's text, which is signed.
    ///
    /// # Errors
    /// When it has no JSON form.
    pub fn to_text(&self) -> Result<Vec<u8>> {
        Ok(to_pretty_json(self)?.into_bytes())
    }

    /// Opens a manifest: verifies hash and signature, then checks every rule.
    ///
    /// # Errors
    /// When it is not the file in the index, is not signed by a trusted key, or contains an unsafe
    /// name.
    pub fn open(file: &StoreFile, text: &[u8], signature: &[u8], keys: &KeySet) -> Result<Self> {
        let read = || -> Result<Self> {
            let (size, sha256) = (text.len() as u64, hash_bytes(text));
            ensure!(
                size == file.size && sha256 == file.sha256,
                "expected {} bytes with SHA-256 {}, found {size} with {sha256}",
                file.size,
                file.sha256
            );
            let signer = verify_signature(
                keys,
                SignaturePurpose::Release,
                &file.signature(),
                signature,
                text,
            )?;
            let manifest: Self = serde_json::from_slice(text).context("not a manifest")?;
            manifest.check()?;
            ensure!(
                manifest.kind == BuildKind::Development || signer.kind == BuildKind::Release,
                "the manifest of a release is signed by the development key {}",
                signer.id
            );
            Ok(manifest)
        };
        read().with_context(|| format!("reading {}", file.path))
    }

    /// The format of a manifest with these programs.
    pub fn format_of(programs: &[ReleaseObject]) -> u32 {
        if programs.is_empty() { FORMAT } else { WITH_PROGRAMS }
    }

    fn check(&self) -> Result<()> {
        check_format(self.format, Self::format_of(&self.programs))?;
        check_name(&self.product)?;
        for object in self.objects() {
            check_hash(&object.sha256)?;
            check_name(&object.name)?;
            if let Some(unpacked) = &object.unpacked {
                check_hash(&unpacked.sha256)?;
                check_name(&unpacked.name)?;
            }
        }
        self.boards.iter().try_for_each(|board| check_name(&board.board))?;
        self.check_file_names()?;
        let total = self.objects().try_fold(0u64, |sum, object| sum.checked_add(object.size));
        ensure!(total.is_some(), "the sizes of the files add up to 2^64 bytes or more");
        Ok(())
    }

    /// What may be saved in one directory, the files of a board with the notes and the programs, has different names.
    fn check_file_names(&self) -> Result<()> {
        let mut general = BTreeSet::new();
        for object in std::iter::once(&self.notes).chain(&self.programs) {
            add_file_names(&mut general, object)?;
        }
        for board in &self.boards {
            let mut names = general.clone();
            let mut objects = board.objects.iter();
            objects
                .try_for_each(|object| add_file_names(&mut names, object))
                .with_context(|| format!("reading the files for {}", board.board))?;
        }
        Ok(())
    }

    /// Signs the manifest's text.
    pub fn sign(&self, text: &[u8], signer: &SigningKey) -> Vec<u8> {
        let comment = format!("slipway release {} {}", self.product, self.version);
        signer.sign(text, &comment).text.into_bytes()
    }

    /// Every file of the release, the notes first.
    pub fn objects(&self) -> impl Iterator<Item = &ReleaseObject> {
        let of_boards = self.boards.iter().flat_map(|board| &board.objects);
        std::iter::once(&self.notes).chain(of_boards).chain(&self.programs)
    }
}

fn verify_signature(
    keys: &KeySet,
    purpose: SignaturePurpose,
    name: &str,
    signature: &[u8],
    text: &[u8],
) -> Result<SignedBy> {
    keys.verify(purpose, name, signature, text).map_err(explain_bundle_error)
}

pub(crate) fn to_pretty_json(value: &impl Serialize) -> Result<String> {
    Ok(serde_json::to_string_pretty(value).context("writing JSON")? + "\n")
}

fn check_format(format: u32, expected: u32) -> Result<()> {
    ensure!(
        format == expected,
        "expected format {expected}, found {format}\nhelp: use a newer version of this tool"
    );
    Ok(())
}

pub(crate) fn check_hash(sha256: &str) -> Result<()> {
    let good = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    ensure!(sha256.len() == 64 && sha256.bytes().all(good), "`{sha256}` is not a SHA-256");
    Ok(())
}

/// Adds the names to save an object under. They differ in more than case: the directory may be on a USB stick with FAT.
fn add_file_names(names: &mut BTreeSet<String>, object: &ReleaseObject) -> Result<()> {
    for name in std::iter::once(&object.name).chain(object.unpacked.as_ref().map(|u| &u.name)) {
        let lower = name.to_ascii_lowercase();
        ensure!(!lower.ends_with(".partial"), "`{name}` is the name of an unfinished file");
        ensure!(names.insert(lower), "two files have the name `{name}`");
    }
    Ok(())
}

/// A name that is one path component on every system: no separator, no hidden file, no character
/// that needs quoting.
fn check_name(name: &str) -> Result<()> {
    let good = |b: u8| b.is_ascii_alphanumeric() || b"._+-".contains(&b);
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    ensure!(
        first && name.len() <= 200 && name.bytes().all(good),
        "unsafe file name `{}`",
        name.escape_debug()
    );
    Ok(())
}
