//! `api.toml`: the API that is built into an image, written from what was installed.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Its path in the root file system; a product without an API has no such file.
pub const PATH: &str = "usr/lib/slipway/api.toml";

/// The file's first line.
const HEAD: &str = "# The API that this image has. Written from what was installed.\n";

/// `api.toml`. Unknown keys are ignored: a later image may have more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ApiFile {
    /// The distribution's name.
    pub package: String,
    /// The module that it is imported as: one name.
    pub module: String,
    /// Its version.
    pub version: String,
    /// The directory of the image's modules, absolute.
    pub site_packages: PathBuf,
    /// The interpreter's version: `3.11`.
    pub python: String,
    /// The C library: `glibc 2.36`; `None`: the image does not name it and accepts any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub libc: Option<String>,
    /// The lowest version of an API on `data`; `None`: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minimum_version: Option<String>,
    /// What was installed, sorted by name.
    #[serde(default)]
    pub wheels: Vec<ApiWheel>,
}

/// One wheel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ApiWheel {
    /// The distribution's name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The wheel file's SHA-256, lower-case hexadecimal.
    pub sha256: String,
}

impl ApiFile {
    /// Reads the text of `api.toml`. The reader checks its values.
    ///
    /// # Errors
    /// What is wrong and where, without the file's name.
    pub fn parse(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }

    /// The text of `api.toml`.
    ///
    /// # Errors
    /// A path that is not UTF-8.
    pub fn to_text(&self) -> Result<String, toml::ser::Error> {
        Ok(format!("{HEAD}{}", toml::to_string(self)?))
    }
}
