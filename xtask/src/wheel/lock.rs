//! The wheel lock: which wheels a product's API is made of, by SHA-256, for one target. It names no
//! index: where the files come from is the machine's own pip configuration.

use std::collections::BTreeSet;

use anyhow::{Context, Result, anyhow, ensure};
use camino::Utf8Path;
use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::target::{WheelName, WheelTarget, normalise_name};
use crate::artifact::{hash_bytes, write_atomically};
use crate::config::reader::{ConfigFindings, in_entry, written_lock};

/// The lock file's format; readers reject any other.
const FORMAT: u32 = 1;

/// The lines above a lock's first value.
const HEADER: &str = "\
# Written by `cargo xtask lock`; the wheels of this product's API for the base's Python.
# A build installs exactly these files and refuses any other. Review the difference, commit it.
";

/// A resolved set of wheels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct WheelLock {
    /// 1
    pub format: u32,
    /// The requirement: `opentrons==10.1.0`.
    pub requirement: String,
    /// For which Python it was resolved.
    pub target: WheelTarget,
    /// The wheels, sorted by normalised name.
    #[serde(rename = "wheel")]
    pub wheels: Vec<LockedWheel>,
}

/// A lock as it is written, with the places of what may contradict itself.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Written {
    format: u32,
    requirement: String,
    target: Spanned<WheelTarget>,
    #[serde(rename = "wheel")]
    wheels: Vec<Spanned<LockedWheel>>,
}

/// One wheel of a lock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct LockedWheel {
    /// The distribution's normalised name.
    pub name: String,
    /// Its version, as its metadata spells it.
    pub version: String,
    /// The wheel's file name.
    pub file: String,
    /// The wheel's length in bytes.
    pub size: u64,
    /// The wheel's SHA-256, lower-case hexadecimal.
    pub sha256: String,
    /// The Python versions that it says it runs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requires_python: Option<String>,
    /// The distributions of this lock that need it, sorted; empty for the requirement itself.
    #[serde(default)]
    pub needed_by: Vec<String>,
}

impl WheelLock {
    /// Makes a new lock, sorted.
    pub fn new(requirement: &str, target: WheelTarget, mut wheels: Vec<LockedWheel>) -> Self {
        wheels.sort_by(|a, b| a.name.cmp(&b.name));
        Self { format: FORMAT, requirement: requirement.to_owned(), target, wheels }
    }

    /// Reads a lock file.
    ///
    /// # Errors
    /// When it cannot be read or `parse` refuses it.
    pub fn load(path: &Utf8Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
        Self::parse(&text, path)
    }

    /// Reads a lock's text and checks that it is complete and sorted.
    ///
    /// # Errors
    /// When it is not TOML, has an unknown key or format, or contradicts itself: with its line.
    pub fn parse(text: &str, path: &Utf8Path) -> Result<Self> {
        let Written { format, requirement, target, wheels: entries } =
            written_lock(text, path, "cargo xtask lock --only wheels")?;
        ensure!(
            format == FORMAT,
            "reading {path}: the lock has format {format}, but this tool reads format {FORMAT}\n\
             help: write it again with `cargo xtask lock`"
        );
        let (mut seen, mut wrong) = (BTreeSet::new(), Vec::new());
        let at_top = |key: &str, message: String| in_entry(text, path, &(0..0), key, message);
        if let Err(error) = target.get_ref().validate() {
            wrong.push(in_entry(text, path, &target.span(), "", format!("{error:#}")));
        }
        let mut before: Option<&str> = None;
        for entry in &entries {
            let wheel = entry.get_ref();
            let name = wheel.name.as_str();
            let mut find = |key: &str, message: String| {
                wrong.push(in_entry(text, path, &entry.span(), key, message));
            };
            if let Err((key, error)) = wheel.validate() {
                find(key, format!("{error:#}"));
            }
            if !seen.insert(name) {
                find("name", format!("{name} is locked twice"));
            }
            if let Some(before) = before.filter(|before| *before > name) {
                find("name", format!("the wheels are not sorted: {before} is before {name}"));
            }
            before = Some(name);
        }
        match super::metadata::parse_requirement(&requirement) {
            Ok(top) if seen.contains(top.name.to_string().as_str()) => {}
            Ok(_) => wrong.push(at_top(
                "requirement",
                format!("the requirement {requirement} has no [[wheel]]"),
            )),
            Err(error) => wrong.push(at_top("requirement", format!("{error:#}"))),
        }
        ConfigFindings(wrong).check()?;
        let wheels = entries.into_iter().map(Spanned::into_inner).collect();
        Ok(Self { format, requirement, target: target.into_inner(), wheels })
    }

    /// The lock as text for review; the same lock always gives the same text.
    pub fn to_toml(&self) -> String {
        let quote = |value: &str| toml::Value::String(value.to_owned()).to_string();
        let target = &self.target;
        let mut text = format!(
            "{HEADER}format = {}\nrequirement = {}\n\n\
             [target]\npython = {}\nimplementation = {}\narch = {}\nlibc = {}\n",
            self.format,
            quote(&self.requirement),
            quote(&target.python.to_string()),
            quote(&target.implementation),
            quote(&target.arch),
            quote(&target.libc.to_string()),
        );
        for wheel in &self.wheels {
            text.push_str(&format!(
                "\n[[wheel]]\nname = {}\nversion = {}\nfile = {}\nsize = {}\nsha256 = {}\n",
                quote(&wheel.name),
                quote(&wheel.version),
                quote(&wheel.file),
                wheel.size,
                quote(&wheel.sha256),
            ));
            if let Some(python) = &wheel.requires_python {
                text.push_str(&format!("requires-python = {}\n", quote(python)));
            }
            let needed: Vec<String> = wheel.needed_by.iter().map(|name| quote(name)).collect();
            text.push_str(&format!("needed-by = [{}]\n", needed.join(", ")));
        }
        text
    }

    /// Writes the lock file; it gets its name when it is complete.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, path: &Utf8Path) -> Result<()> {
        write_atomically(path, |out| {
            out.write_all(self.to_toml().as_bytes()).with_context(|| format!("writing {path}"))
        })
    }

    /// The normalised name of the required distribution.
    ///
    /// # Errors
    /// When the requirement cannot be read.
    pub fn top_level(&self) -> Result<String> {
        Ok(super::metadata::parse_requirement(&self.requirement)?.name.to_string())
    }

    /// The sum of the wheels' sizes in bytes: what a first build downloads.
    pub fn download_bytes(&self) -> u64 {
        self.wheels.iter().map(|wheel| wheel.size).sum()
    }
}

impl LockedWheel {
    /// Refuses what contradicts itself: with the key.
    fn validate(&self) -> Result<(), (&'static str, anyhow::Error)> {
        let file = WheelName::parse(&self.file).map_err(|error| ("file", error))?;
        if self.name != normalise_name(&self.name) || file.name != self.name {
            let error = anyhow!(
                "the lock has '{}' for the file {}: expected the normalised name '{}'",
                self.name,
                self.file,
                file.name
            );
            return Err(("name", error));
        }
        let plain = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        if self.sha256.len() != 64 || !self.sha256.bytes().all(plain) {
            let error = anyhow!(
                "the sha256 of {} is '{}': expected 64 lower-case hexadecimal digits",
                self.file,
                self.sha256
            );
            return Err(("sha256", error));
        }
        Ok(())
    }
}

/// The changes of a new lock in human-readable form: `numpy 1.26.3 -> 1.26.4`, `+ idna 3.20`, `-
/// six 1.16.0`; empty when the locks are equal.
pub fn describe_difference(old: Option<&WheelLock>, new: &WheelLock) -> Vec<String> {
    let Some(old) = old else {
        return new.wheels.iter().map(|w| format!("+ {} {}", w.name, w.version)).collect();
    };
    let mut lines = Vec::new();
    if old.requirement != new.requirement {
        lines.push(format!("requirement {} -> {}", old.requirement, new.requirement));
    }
    if old.target != new.target {
        lines.push(format!("target {} -> {}", old.target, new.target));
    }
    let names: BTreeSet<&str> =
        old.wheels.iter().chain(&new.wheels).map(|wheel| wheel.name.as_str()).collect();
    for name in names {
        let find = |lock: &'_ WheelLock| lock.wheels.iter().find(|w| w.name == name).cloned();
        match (find(old), find(new)) {
            (Some(a), Some(b)) if a.version != b.version => {
                lines.push(format!("{name} {} -> {}", a.version, b.version));
            }
            (Some(a), Some(b)) if a.sha256 != b.sha256 => {
                lines.push(format!("{name} {}: {} -> {}", a.version, a.file, b.file));
            }
            (Some(a), Some(b)) if a != b => {
                lines.push(format!("{name} {}: needed-by or requires-python changed", a.version));
            }
            (Some(a), None) => lines.push(format!("- {name} {}", a.version)),
            (None, Some(b)) => lines.push(format!("+ {name} {}", b.version)),
            _ => {}
        }
    }
    lines
}

/// A hash of the lock's whole content; it is the cache key of a stage that depends on the wheels.
pub fn lock_identity(lock: &WheelLock) -> String {
    hash_bytes(lock.to_toml().as_bytes())
}
