//! The target that wheels must match: the base's Python, processor and C library, and the tags (PEP
//! 425, PEP 600, PEP 656), file names and environment markers (PEP 508) that follow from them.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, bail, ensure};
use pep508_rs::{MarkerEnvironment, MarkerEnvironmentBuilder};
use serde::{Deserialize, Serialize};

/// A Python version, `major.minor` with the patch level where it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PythonVersion {
    /// 3
    pub major: u32,
    /// 11 in 3.11.2
    pub minor: u32,
    /// 2 in 3.11.2; markers such as `python_full_version` read it as 0 where it is unknown.
    pub patch: Option<u32>,
}

impl PythonVersion {
    /// `3.11`, without the patch level.
    pub fn short(self) -> String {
        format!("{}.{}", self.major, self.minor)
    }

    /// `3.11.2`, with 0 for an unknown patch level.
    pub fn full(self) -> String {
        format!("{}.{}.{}", self.major, self.minor, self.patch.unwrap_or(0))
    }
}

impl fmt::Display for PythonVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        self.patch.map_or(Ok(()), |patch| write!(f, ".{patch}"))
    }
}

impl FromStr for PythonVersion {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || anyhow!("'{text}' is not a Python version: expected 3.11 or 3.11.2");
        let numbers = text
            .split('.')
            .map(str::parse)
            .collect::<Result<Vec<u32>, _>>()
            .map_err(|_| wrong())?;
        match numbers[..] {
            [major, minor] => Ok(Self { major, minor, patch: None }),
            [major, minor, patch] => Ok(Self { major, minor, patch: Some(patch) }),
            _ => Err(wrong()),
        }
    }
}

impl TryFrom<String> for PythonVersion {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<PythonVersion> for String {
    fn from(version: PythonVersion) -> Self {
        version.to_string()
    }
}

/// The base's C library, which decides how new a compiled wheel may be. In text `glibc 2.36` or
/// `musl 1.2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Libc {
    /// The GNU C library, `(major, minor)`; wheels are tagged `manylinux`.
    Glibc(u32, u32),
    /// musl, `(major, minor)`; wheels are tagged `musllinux`.
    Musl(u32, u32),
}

impl fmt::Display for Libc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Glibc(major, minor) => write!(f, "glibc {major}.{minor}"),
            Self::Musl(major, minor) => write!(f, "musl {major}.{minor}"),
        }
    }
}

impl FromStr for Libc {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let parsed = text.split_once(' ').and_then(|(name, version)| {
            let (major, minor) = version.split_once('.')?;
            let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
            match name {
                "glibc" => Some(Self::Glibc(major, minor)),
                "musl" => Some(Self::Musl(major, minor)),
                _ => None,
            }
        });
        parsed.with_context(|| {
            format!("'{text}' is not a C library: expected 'glibc 2.36' or 'musl 1.2'")
        })
    }
}

impl TryFrom<String> for Libc {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Libc> for String {
    fn from(libc: Libc) -> Self {
        libc.to_string()
    }
}

/// The Python that the wheels will run on. Linux and CPython are implied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WheelTarget {
    /// Python's version in the base.
    pub python: PythonVersion,
    /// The implementation as in tags. Only `cp` (CPython) is supported.
    pub implementation: String,
    /// The processor as reported by the kernel (`uname -m`): `aarch64`.
    pub arch: String,
    /// The base's C library.
    pub libc: Libc,
}

impl fmt::Display for WheelTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CPython {} on {} with {}", self.python, self.arch, self.libc)
    }
}

/// One compatibility tag: interpreter, ABI, platform.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WheelTag {
    /// `cp311`, `py3`
    pub python: String,
    /// `cp311`, `abi3`, `none`
    pub abi: String,
    /// `manylinux_2_17_aarch64`, `any`
    pub platform: String,
}

impl fmt::Display for WheelTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}", self.python, self.abi, self.platform)
    }
}

impl WheelTarget {
    /// Rejects targets that this tool does not support.
    ///
    /// # Errors
    /// For an implementation other than CPython, or a Python older than 3.9, whose bytecode this tool cannot
    /// make reproducible.
    pub fn validate(&self) -> Result<()> {
        ensure!(
            self.implementation == "cp",
            "the Python implementation is '{}', only 'cp' (CPython) is supported",
            self.implementation
        );
        ensure!(
            self.python.major == 3 && self.python.minor >= 9,
            "Python {} is too old: 3.9 or later is needed",
            self.python
        );
        Ok(())
    }

    /// The platforms that fit, best first: the newest C library down to the oldest one for which
    /// the tag exists on this processor (PEP 600 and its legacy aliases; PEP 656), then plain Linux.
    pub fn platforms(&self) -> Vec<String> {
        let arch = &self.arch;
        let mut platforms = Vec::new();
        match self.libc {
            Libc::Glibc(major, minor) => {
                // x86 has manylinux1 (glibc 2.5); every other processor began with manylinux2014.
                let oldest = if matches!(arch.as_str(), "x86_64" | "i686") { 5 } else { 17 };
                for minor in (oldest..=minor).rev() {
                    platforms.push(format!("manylinux_{major}_{minor}_{arch}"));
                    let legacy = match minor {
                        17 => "manylinux2014",
                        12 => "manylinux2010",
                        5 => "manylinux1",
                        _ => continue,
                    };
                    platforms.push(format!("{legacy}_{arch}"));
                }
            }
            Libc::Musl(major, minor) => {
                platforms.extend(
                    (0..=minor).rev().map(|minor| format!("musllinux_{major}_{minor}_{arch}")),
                );
            }
        }
        platforms.push(format!("linux_{arch}"));
        platforms
    }

    /// Every tag that fits, best first, in the order that PEP 425 installers use.
    pub fn tags(&self) -> Vec<WheelTag> {
        let PythonVersion { major, minor, .. } = self.python;
        let own = format!("{}{major}{minor}", self.implementation);
        let platforms = self.platforms();
        let tag = |python: &str, abi: &str, platform: &str| WheelTag {
            python: python.to_owned(),
            abi: abi.to_owned(),
            platform: platform.to_owned(),
        };
        let mut tags = Vec::new();
        for abi in [own.as_str(), "abi3", "none"] {
            tags.extend(platforms.iter().map(|platform| tag(&own, abi, platform)));
        }
        // The stable ABI began with 3.2.
        for older in (2..minor).rev() {
            let python = format!("{}{major}{older}", self.implementation);
            tags.extend(platforms.iter().map(|platform| tag(&python, "abi3", platform)));
        }
        let mut generic = vec![format!("py{major}{minor}"), format!("py{major}")];
        generic.extend((0..minor).rev().map(|older| format!("py{major}{older}")));
        for python in &generic {
            tags.extend(platforms.iter().map(|platform| tag(python, "none", platform)));
        }
        tags.push(tag(&own, "none", "any"));
        tags.extend(generic.iter().map(|python| tag(python, "none", "any")));
        tags
    }

    /// The values of environment markers (PEP 508) on the target.
    ///
    /// # Errors
    /// When the Python version is invalid in PEP 440.
    pub fn markers(&self) -> Result<MarkerEnvironment> {
        let full = self.python.full();
        let short = self.python.short();
        MarkerEnvironment::try_from(MarkerEnvironmentBuilder {
            implementation_name: "cpython",
            implementation_version: &full,
            os_name: "posix",
            platform_machine: &self.arch,
            platform_python_implementation: "CPython",
            // The kernel version is unknown here, and no wheel should depend on it.
            platform_release: "",
            platform_system: "Linux",
            platform_version: "",
            python_full_version: &full,
            python_version: &short,
            sys_platform: "linux",
        })
        .with_context(|| format!("evaluating environment markers for {self}"))
    }
}

/// A parsed wheel file name (PEP 427).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WheelName {
    /// The distribution, normalised (PEP 503).
    pub name: String,
    /// The version as the file name spells it.
    pub version: String,
    /// The tags, expanded, sorted.
    pub tags: Vec<WheelTag>,
}

impl WheelName {
    /// Reads a file name such as `numpy-1.26.4-cp311-cp311-manylinux_2_17_aarch64.manylinux2014_aarch64.whl`.
    ///
    /// # Errors
    /// When it is not a wheel's name.
    pub fn parse(file: &str) -> Result<Self> {
        let parts: Vec<&str> = file.strip_suffix(".whl").unwrap_or_default().split('-').collect();
        let (name, version, tags) = match parts[..] {
            [name, version, python, abi, platform] => (name, version, [python, abi, platform]),
            [name, version, build, python, abi, platform]
                if build.starts_with(|c: char| c.is_ascii_digit()) =>
            {
                (name, version, [python, abi, platform])
            }
            _ => bail!(
                "{file} is not a wheel's name: expected \
                 NAME-VERSION[-BUILD]-PYTHON-ABI-PLATFORM.whl"
            ),
        };
        let safe = |s: &str| {
            !s.is_empty() && s.chars().all(|c| c.is_ascii_alphanumeric() || "._+!".contains(c))
        };
        ensure!(
            safe(name) && safe(version) && tags.iter().all(|tag| safe(tag)),
            "{file} is not a wheel's name: it has an empty part or an unexpected character"
        );
        Ok(Self {
            name: normalise_name(name),
            version: version.to_owned(),
            tags: expand_tags(tags[0], tags[1], tags[2]),
        })
    }

    /// Whether one of the tags fits.
    pub fn matches_any(&self, accepted: &[WheelTag]) -> bool {
        self.tags.iter().any(|tag| accepted.contains(tag))
    }
}

/// A compressed tag set such as `py2.py3-none-any`, one tag for each combination, sorted.
pub fn expand_tags(pythons: &str, abis: &str, platforms: &str) -> Vec<WheelTag> {
    let mut tags = Vec::new();
    for python in pythons.split('.') {
        for abi in abis.split('.') {
            tags.extend(platforms.split('.').map(|platform| WheelTag {
                python: python.to_owned(),
                abi: abi.to_owned(),
                platform: platform.to_owned(),
            }));
        }
    }
    tags.sort();
    tags.dedup();
    tags
}

/// A distribution's name as comparisons need it (PEP 503): lower case, runs of `-`, `_` and `.` are
/// one `-`.
pub fn normalise_name(name: &str) -> String {
    let mut normal = String::with_capacity(name.len());
    for c in name.chars() {
        if !matches!(c, '-' | '_' | '.') {
            normal.push(c.to_ascii_lowercase());
        } else if !normal.ends_with('-') {
            normal.push('-');
        }
    }
    normal
}
