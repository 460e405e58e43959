//! `manifest.json`: what is signed. Reading checks every rule of the format, so that a `BundleManifest`
//! value has bounded lengths, safe names and a consistent list of payloads.

use std::cmp::Ordering;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};
use crate::limits::{
    BLOCK_SIZE, FORMAT, MAX_COMPONENTS, MAX_DATA, MAX_INDEX, MAX_MANIFEST, MAX_NAME, MAX_NAMES,
    MAX_PAYLOAD, MAX_PAYLOADS,
};

/// The features that this reader knows. Version 1 has none.
pub const FEATURES: &[&str] = &[];

/// Whether something is meant for development or for release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BuildKind {
    /// Signed with a key that everyone on the team has; no robot in the field accepts it.
    Development,
    /// Made to ship.
    Release,
}

impl fmt::Display for BuildKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Development => "development",
            Self::Release => "release",
        })
    }
}

/// A semantic version: three numbers and optionally a pre-release part (`1.2.0-rc.1`). No build part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    text: String,
    numbers: [u64; 3],
    pre: Vec<Pre>,
}

/// Numbers sort below words (Semantic Versioning 2.0.0, item 11).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Pre {
    Number(u64),
    Word(String),
}

impl Version {
    /// Reads a version.
    ///
    /// # Errors
    /// When the text is not a semantic version of at most [`MAX_NAME`] characters.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = || Error::BadManifest {
            reason: format!(
                "`{}` is not a version such as 1.2.0 or 1.2.0-rc.1",
                text.escape_debug()
            ),
        };
        if text.len() > MAX_NAME {
            return Err(bad());
        }
        let (core, pre) = match text.split_once('-') {
            Some((core, pre)) => (core, Some(pre)),
            None => (text, None),
        };
        let mut parts = core.split('.').map(parse_number);
        let mut next = || parts.next().flatten().ok_or_else(bad);
        let numbers = [next()?, next()?, next()?];
        if parts.next().is_some() {
            return Err(bad());
        }
        let word = |part: &str| {
            let ok =
                !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
            let digits = part.bytes().all(|b| b.is_ascii_digit());
            match (ok, digits) {
                (true, true) => parse_number(part).map(Pre::Number),
                (true, false) => Some(Pre::Word(part.to_owned())),
                (false, _) => None,
            }
        };
        let pre = match pre {
            Some(pre) => pre.split('.').map(|part| word(part).ok_or_else(bad)).collect(),
            None => Ok(Vec::new()),
        }?;
        Ok(Self { text: text.to_owned(), numbers, pre })
    }

    /// The version as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// Digits without a leading zero.
fn parse_number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits || (text.len() > 1 && text.starts_with('0')) {
        return None;
    }
    text.parse().ok()
}

impl PartialOrd for Version {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Version {
    fn cmp(&self, other: &Self) -> Ordering {
        let released = |v: &Self| v.pre.is_empty();
        self.numbers
            .cmp(&other.numbers)
            .then_with(|| released(self).cmp(&released(other)))
            .then_with(|| self.pre.cmp(&other.pre))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for Version {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Version {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// The signed manifest. Unknown fields are skipped: a new field that must not be skipped is named in
/// `required`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BundleManifest {
    /// The format's version; [`FORMAT`].
    pub format: u32,
    /// Features without which this bundle must not be installed; unknown ones are refused by name.
    #[serde(default)]
    pub required: Vec<String>,
    /// The product.
    pub product: String,
    /// The version of the whole bundle.
    pub version: Version,
    /// Development or release.
    pub kind: BuildKind,
    /// The boards that this bundle runs on.
    pub boards: Vec<String>,
    /// Once a device has committed this bundle, it refuses every bundle with a version below this one.
    pub minimum_version: Version,
    /// Only signatures by keys of this epoch or a later one are accepted. Once a device has committed
    /// this bundle, the same applies to every later bundle.
    pub key_epoch: u32,
    /// The sources' time in seconds since 1970. No decision ever depends on it.
    pub epoch: u64,
    /// What is in the bundle, in the order of the archive.
    pub components: Vec<BundleComponent>,
}

/// Something that is versioned and installed as a whole: `system`, `api`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BundleComponent {
    /// Its name, unique in the bundle.
    pub name: String,
    /// Its version.
    pub version: Version,
    /// Its payloads, in the order of the archive.
    pub payloads: Vec<Payload>,
}

/// The content of one partition or file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Payload {
    /// What it is for, unique in its component: `root`, `boot`.
    pub role: String,
    /// Its size in bytes, holes included.
    pub size: u64,
    /// Bytes of one block of the index; [`BLOCK_SIZE`].
    pub block_size: u64,
    /// The block index.
    pub index: IndexRecord,
    /// The zstd frames.
    pub data: DataRecord,
}

/// The member `<component>/<role>.index`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct IndexRecord {
    /// Its length in bytes.
    pub size: u64,
    /// Its SHA-256, lower-case hexadecimal. This covers the frames too, because the index has their hashes.
    pub sha256: String,
}

/// The member `<component>/<role>.zst`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DataRecord {
    /// Its length in bytes: the sum of the stored frames.
    pub size: u64,
}

impl BundleManifest {
    /// Reads a manifest and checks every rule.
    ///
    /// # Errors
    /// Names the broken rule, or the unknown format version or feature.
    pub fn parse(json: &[u8]) -> Result<Self> {
        /// Read first and separately, so that a later format is refused by its number.
        #[derive(Deserialize)]
        struct Head {
            format: u64,
            #[serde(default)]
            required: Vec<String>,
        }
        if json.len() as u64 > MAX_MANIFEST {
            return Err(Error::BadLength {
                what: "manifest.json".to_owned(),
                found: json.len() as u64,
                allowed: MAX_MANIFEST,
            });
        }
        let bad = |error: serde_json::Error| Error::BadManifest { reason: error.to_string() };
        let head: Head = serde_json::from_slice(json).map_err(bad)?;
        if head.format != u64::from(FORMAT) {
            return Err(Error::UnknownFormat { found: head.format });
        }
        if let Some(name) = head.required.iter().find(|name| !FEATURES.contains(&name.as_str())) {
            return Err(Error::UnknownFeature { name: name.escape_debug().to_string() });
        }
        let manifest: Self = serde_json::from_slice(json).map_err(bad)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// The manifest as the archive has it: indented JSON with a final newline.
    ///
    /// # Errors
    /// When a rule is broken, or the manifest is longer than [`MAX_MANIFEST`].
    pub fn to_json(&self) -> Result<Vec<u8>> {
        self.check()?;
        let mut json = serde_json::to_vec_pretty(self)
            .map_err(|error| Error::BadManifest { reason: error.to_string() })?;
        json.push(b'\n');
        check_limit("manifest.json", json.len() as u64, MAX_MANIFEST)?;
        Ok(json)
    }

    /// Every rule that JSON's shape does not express.
    fn check(&self) -> Result<()> {
        if self.format != FORMAT {
            return Err(Error::UnknownFormat { found: u64::from(self.format) });
        }
        check_names("required", &self.required)?;
        check_name("product", &self.product)?;
        if self.boards.is_empty() {
            return Err(Error::BadManifest { reason: "`boards` is empty".to_owned() });
        }
        check_names("boards", &self.boards)?;
        if self.minimum_version > self.version {
            return Err(Error::BadManifest {
                reason: format!(
                    "`minimum-version` {} is above the bundle's own version {}",
                    self.minimum_version, self.version
                ),
            });
        }
        if self.components.is_empty() {
            return Err(Error::BadManifest { reason: "`components` is empty".to_owned() });
        }
        check_limit("components", self.components.len() as u64, MAX_COMPONENTS as u64)?;
        check_unique("components", self.components.iter().map(|c| c.name.as_str()))?;
        self.components.iter().try_for_each(BundleComponent::check)
    }
}

impl BundleComponent {
    fn check(&self) -> Result<()> {
        check_name("component", &self.name)?;
        if self.payloads.is_empty() {
            return Err(Error::BadManifest {
                reason: format!("the component `{}` has no payloads", self.name),
            });
        }
        check_limit("payloads", self.payloads.len() as u64, MAX_PAYLOADS as u64)?;
        check_unique("payloads", self.payloads.iter().map(|p| p.role.as_str()))?;
        self.payloads.iter().try_for_each(|payload| payload.check(&self.name))
    }
}

impl Payload {
    fn check(&self, component: &str) -> Result<()> {
        check_name("role", &self.role)?;
        let what = |part: &str| format!("{component}/{}{part}", self.role);
        if self.block_size != BLOCK_SIZE as u64 {
            return Err(Error::BadManifest {
                reason: format!(
                    "{} has `block-size` {}, expected {BLOCK_SIZE}",
                    what(""),
                    self.block_size
                ),
            });
        }
        check_limit(&what(""), self.size, MAX_PAYLOAD)?;
        check_limit(&what(".index"), self.index.size, MAX_INDEX)?;
        check_limit(&what(".zst"), self.data.size, MAX_DATA)?;
        let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if self.index.sha256.len() != 64 || !self.index.sha256.bytes().all(digit) {
            return Err(Error::BadManifest {
                reason: format!("{}: `sha256` is not 64 hexadecimal digits", what(".index")),
            });
        }
        Ok(())
    }

    /// How many blocks it has; the last one may be shorter.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(BLOCK_SIZE as u64)
    }
}

fn check_limit(what: &str, found: u64, allowed: u64) -> Result<()> {
    if found > allowed {
        return Err(Error::BadLength { what: what.to_owned(), found, allowed });
    }
    Ok(())
}

/// Lower-case letters, digits, `.`, `_` and `-`, starting with a letter or digit: safe as a file name.
fn check_name(what: &str, value: &str) -> Result<()> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let ok = value.len() <= MAX_NAME
        && value.bytes().next().is_some_and(plain)
        && value.bytes().all(|b| plain(b) || b"._-".contains(&b));
    if ok {
        return Ok(());
    }
    Err(Error::BadManifest {
        reason: format!(
            "invalid name `{}` in `{what}`: expected at most {MAX_NAME} lower-case letters, digits, `.`, `_` or `-`",
            value.escape_debug()
        ),
    })
}

fn check_names(what: &str, values: &[String]) -> Result<()> {
    check_limit(what, values.len() as u64, MAX_NAMES as u64)?;
    check_unique(what, values.iter().map(String::as_str))?;
    values.iter().try_for_each(|value| check_name(what, value))
}

fn check_unique<'a>(what: &str, values: impl Iterator<Item = &'a str>) -> Result<()> {
    let mut seen: Vec<&str> = Vec::new();
    for value in values {
        if seen.contains(&value) {
            return Err(Error::BadManifest {
                reason: format!("`{what}` has `{}` twice", value.escape_debug()),
            });
        }
        seen.push(value);
    }
    Ok(())
}
