//! `component.json`: what the component `api` of a bundle consists of, and what it needs from the system
//! below it. The builder writes it and the robot checks it; a [`ComponentLock`] value has passed every rule.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::limits::{MAX_LOCK, MAX_NAME, MAX_NAMES, MAX_PAYLOADS, MAX_TREE, MAX_TREE_FILES};
use crate::manifest::BundleComponent;

/// The component's name.
pub const API: &str = "api";

/// The role of the first payload, which is the lock. No wheel can have this role, because the normalised
/// name of a distribution has no dot (PEP 503).
pub const LOCK_ROLE: &str = "component.json";

/// The lock's format.
pub const LOCK_FORMAT: u32 = 1;

/// The path of an installed API on a robot, the same for every version: bytecode and programs contain it.
pub const PLACE: &str = "/data/apps/api/current";

/// Directory of the modules, below [`PLACE`] and in each wheel's tree.
pub const SITE: &str = "site";

/// Directory of the programs, below [`PLACE`] and in each wheel's tree.
pub const BIN: &str = "bin";

/// The modification time of every file in a wheel's tree, in seconds since 1970: 1980-01-01, the earliest
/// that a wheel can hold. All files have the same time, so that a tree depends on its wheel alone and a file
/// that was changed on a robot can be recognised.
pub const TREE_TIME: u64 = 315_532_800;

/// Maximum length, in characters, of texts that are not names of the bundle: modules, programs, versions of wheels.
const MAX_TEXT: usize = 200;

/// The lock of a component.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ComponentLock {
    /// [`LOCK_FORMAT`].
    pub format: u32,
    /// The normalised name of the distribution that the product asks for.
    pub package: String,
    /// The module that this distribution installs under its own name.
    pub module: String,
    /// Its version, as its metadata spells it (PEP 440).
    pub version: String,
    /// The Python version that all wheels were built for: `3.11`.
    pub python: String,
    /// The processor architecture as Linux names it: `aarch64`.
    pub arch: String,
    /// The oldest C library that the base may have: `glibc 2.36`.
    pub libc: String,
    /// Distributions that the base must provide.
    #[serde(default)]
    pub base: Vec<BaseRequirement>,
    /// The wheels, in the order of the payloads after the lock's own.
    pub wheels: Vec<ComponentWheel>,
}

/// A distribution that the base provides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BaseRequirement {
    /// Its normalised name.
    pub name: String,
    /// The version that met the requirement when this was built.
    pub version: String,
}

/// One wheel, installed into a tree of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ComponentWheel {
    /// The role of its payload.
    pub role: String,
    /// The distribution's normalised name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// SHA-256 of the wheel file.
    pub sha256: String,
    /// SHA-256 of the payload: the tree as a tar archive.
    pub tree: String,
    /// Bytes of the payload.
    pub size: u64,
    /// Files in the tree.
    pub files: u64,
    /// Bytes of these files.
    pub bytes: u64,
    /// Normalised names of the wheels of this component that it requires on this platform.
    #[serde(default)]
    pub requires: Vec<String>,
    /// The programs that its installer creates.
    #[serde(default)]
    pub scripts: Vec<WheelScript>,
}

/// A program of a wheel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct WheelScript {
    /// Its file name in [`BIN`].
    pub name: String,
    /// The module that it imports.
    pub module: String,
}

impl ComponentLock {
    /// Reads a lock and checks every rule.
    ///
    /// # Errors
    /// `bad-component`, naming the broken rule.
    pub fn parse(json: &[u8]) -> Result<Self> {
        /// Read first and separately, so that a later format is refused by its number.
        #[derive(Deserialize)]
        struct Head {
            format: u64,
        }
        let shape = |error: serde_json::Error| bad(error.to_string());
        if json.len() as u64 > MAX_LOCK {
            return Err(bad(format!(
                "the lock has {} bytes, the maximum is {MAX_LOCK}",
                json.len()
            )));
        }
        let head: Head = serde_json::from_slice(json).map_err(shape)?;
        if head.format != u64::from(LOCK_FORMAT) {
            return Err(bad(format!("unknown format {} (supported: {LOCK_FORMAT})", head.format)));
        }
        let lock: Self = serde_json::from_slice(json).map_err(shape)?;
        lock.check()?;
        Ok(lock)
    }

    /// The lock as its payload has it: indented JSON with a final newline.
    ///
    /// # Errors
    /// `bad-component`: a rule is broken, or the lock is longer than [`MAX_LOCK`].
    pub fn to_json(&self) -> Result<Vec<u8>> {
        self.check()?;
        let mut json = serde_json::to_vec_pretty(self).map_err(|error| bad(error.to_string()))?;
        json.push(b'\n');
        if json.len() as u64 > MAX_LOCK {
            return Err(bad(format!(
                "the lock has {} bytes, the maximum is {MAX_LOCK}",
                json.len()
            )));
        }
        Ok(json)
    }

    /// Checks that this lock describes these payloads: their roles, order and sizes.
    ///
    /// # Errors
    /// `bad-component`.
    pub fn matches(&self, component: &BundleComponent) -> Result<()> {
        let (first, rest) = component.payloads.split_first().ok_or_else(|| bad("no payload"))?;
        if first.role != LOCK_ROLE || rest.len() != self.wheels.len() {
            return Err(bad(format!(
                "the component has the lock {} and {} more payloads, but the lock lists {} wheels",
                first.role,
                rest.len(),
                self.wheels.len()
            )));
        }
        for (payload, wheel) in rest.iter().zip(&self.wheels) {
            if payload.role != wheel.role || payload.size != wheel.size {
                return Err(bad(format!(
                    "payload {} has {} bytes, but the lock lists {} with {} bytes in this position",
                    payload.role, payload.size, wheel.role, wheel.size
                )));
            }
        }
        Ok(())
    }

    /// The wheel of the package itself.
    pub fn top(&self) -> Option<&ComponentWheel> {
        self.wheels.iter().find(|wheel| wheel.name == self.package)
    }

    /// Every rule that JSON's shape does not express.
    fn check(&self) -> Result<()> {
        for (what, text) in [("python", &self.python), ("version", &self.version)] {
            check_version(what, text)?;
        }
        check_text("arch", &self.arch)?;
        check_text("libc", &self.libc)?;
        check_module_path("module", &self.module)?;
        if self.wheels.len() >= MAX_PAYLOADS || self.base.len() > MAX_NAMES {
            return Err(bad(format!("the lock lists {} wheels", self.wheels.len())));
        }
        for need in &self.base {
            check_distribution(&need.name)?;
            check_version("version", &need.version)?;
        }
        let (mut names, mut roles) = (BTreeSet::new(), BTreeSet::from([LOCK_ROLE]));
        for wheel in &self.wheels {
            wheel.check()?;
            if !names.insert(wheel.name.as_str()) || !roles.insert(wheel.role.as_str()) {
                return Err(bad(format!("`{}` is listed twice", wheel.name.escape_debug())));
            }
        }
        for wheel in &self.wheels {
            if let Some(name) = wheel.requires.iter().find(|name| !names.contains(name.as_str())) {
                return Err(bad(format!(
                    "{} requires {}, which is not listed",
                    wheel.name,
                    name.escape_debug()
                )));
            }
        }
        match self.top() {
            Some(top) if top.version == self.version => Ok(()),
            _ => Err(bad(format!("{} {} is not among the wheels", self.package, self.version))),
        }
    }
}

impl ComponentWheel {
    fn check(&self) -> Result<()> {
        check_distribution(&self.name)?;
        check_version("version", &self.version)?;
        for (what, hash) in [("sha256", &self.sha256), ("tree", &self.tree)] {
            let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
            if hash.len() != 64 || !hash.bytes().all(digit) {
                return Err(bad(format!("`{what}` of {} is not a SHA-256", self.name)));
            }
        }
        if self.role.is_empty() || self.role.len() > MAX_NAME {
            return Err(bad(format!("`role` of {} is empty or too long", self.name)));
        }
        if self.size > MAX_TREE || self.bytes > self.size || self.files > MAX_TREE_FILES {
            return Err(bad(format!(
                "{} has {} bytes in {} files, the maximum is {MAX_TREE} bytes in {MAX_TREE_FILES} files",
                self.name, self.size, self.files
            )));
        }
        for script in &self.scripts {
            let plain = |b: u8| b.is_ascii_graphic() && b != b'/' && b != b'\\';
            let long = script.name.is_empty() || script.name.len() > MAX_TEXT;
            if long || script.name.starts_with('.') || !script.name.bytes().all(plain) {
                return Err(bad(format!("invalid program name `{}`", script.name.escape_debug())));
            }
            check_module_path("module", &script.module)?;
        }
        Ok(())
    }
}

fn bad(reason: impl Into<String>) -> Error {
    Error::BadComponent { reason: reason.into() }
}

/// Checks that a name is normalised as in PEP 503.
fn check_distribution(name: &str) -> Result<()> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let ends = |b: Option<u8>| b.is_some_and(plain);
    let ok = name.len() <= MAX_TEXT
        && ends(name.bytes().next())
        && ends(name.bytes().last())
        && name.bytes().all(|b| plain(b) || b == b'-');
    if ok {
        Ok(())
    } else {
        Err(bad(format!("invalid distribution name `{}`", name.escape_debug())))
    }
}

/// Checks that a version is safe in a file name and begins with a letter or digit.
fn check_version(what: &str, text: &str) -> Result<()> {
    let ok = text.len() <= 64
        && text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-+!".contains(&b));
    if ok { Ok(()) } else { Err(bad(format!("`{what}`: invalid value `{}`", text.escape_debug()))) }
}

fn check_text(what: &str, text: &str) -> Result<()> {
    let ok = !text.is_empty()
        && text.len() <= MAX_TEXT
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._- ".contains(&b));
    if ok { Ok(()) } else { Err(bad(format!("`{what}`: invalid value `{}`", text.escape_debug()))) }
}

/// A module's path: identifiers with dots between them.
fn check_module_path(what: &str, text: &str) -> Result<()> {
    let identifier = |part: &str| {
        part.chars().next().is_some_and(|c| c == '_' || c.is_alphabetic())
            && part.chars().all(|c| c == '_' || c.is_alphanumeric())
    };
    if text.len() <= MAX_TEXT && text.split('.').all(identifier) {
        return Ok(());
    }
    Err(bad(format!("`{what}`: invalid value `{}`", text.escape_debug())))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may fail by panicking")]
mod tests {
    use super::*;

    fn wheel(name: &str) -> ComponentWheel {
        ComponentWheel {
            role: name.to_owned(),
            name: name.to_owned(),
            version: "1.0".to_owned(),
            sha256: "0".repeat(64),
            tree: "1".repeat(64),
            size: 2048,
            files: 1,
            bytes: 5,
            requires: Vec::new(),
            scripts: vec![WheelScript { name: "go".to_owned(), module: "foo.cli".to_owned() }],
        }
    }

    fn lock() -> ComponentLock {
        ComponentLock {
            format: LOCK_FORMAT,
            package: "foo".to_owned(),
            module: "foo".to_owned(),
            version: "1.0".to_owned(),
            python: "3.11".to_owned(),
            arch: "aarch64".to_owned(),
            libc: "glibc 2.36".to_owned(),
            base: vec![BaseRequirement { name: "base".to_owned(), version: "2".to_owned() }],
            wheels: vec![
                wheel("bar"),
                ComponentWheel { requires: vec!["bar".to_owned()], ..wheel("foo") },
            ],
        }
    }

    #[test]
    fn a_lock_is_read_as_it_was_written() {
        assert_eq!(ComponentLock::parse(&lock().to_json().unwrap()).unwrap(), lock());
    }

    #[test]
    fn each_rule_has_its_refusal() {
        type Change = fn(&mut ComponentLock);
        let cases: [(&str, Change); 16] = [
            ("format 2", |l| l.format = 2),
            ("`version`: invalid value `../x`", |l| l.version = "../x".into()),
            ("foo 2.0 is not among", |l| l.version = "2.0".into()),
            ("x 1.0 is not among", |l| l.package = "x".into()),
            ("`module`: invalid value `a..b`", |l| l.module = "a..b".into()),
            ("`module`: invalid value `a/b`", |l| l.module = "a/b".into()),
            ("`bar` is listed twice", |l| l.wheels.push(wheel("bar"))),
            ("`baz` is listed twice", |l| {
                l.wheels.push(ComponentWheel { role: LOCK_ROLE.into(), ..wheel("baz") });
            }),
            ("which is not listed", |l| l.wheels.retain(|w| w.name == "foo")),
            ("invalid distribution name `Foo_x`", |l| l.wheels.push(wheel("Foo_x"))),
            ("not a SHA-256", |l| {
                l.wheels.push(ComponentWheel { tree: "/".repeat(64), ..wheel("x") })
            }),
            ("not a SHA-256", |l| {
                l.wheels.push(ComponentWheel { sha256: "A".repeat(64), ..wheel("x") })
            }),
            ("bytes in", |l| l.wheels.push(ComponentWheel { size: MAX_TREE + 1, ..wheel("x") })),
            ("bytes in", |l| {
                l.wheels.push(ComponentWheel { files: MAX_TREE_FILES + 1, ..wheel("x") })
            }),
            ("invalid program name", |l| {
                let script = WheelScript { name: "../go".into(), module: "foo".into() };
                l.wheels.push(ComponentWheel { scripts: vec![script], ..wheel("x") });
            }),
            ("the lock lists", |l| l.wheels = vec![wheel("foo"); MAX_PAYLOADS]),
        ];
        for (expected, change) in cases {
            let mut lock = lock();
            change(&mut lock);
            let json = serde_json::to_vec(&lock).unwrap();
            let error = ComponentLock::parse(&json).unwrap_err();
            assert_eq!(error.code(), "bad-component");
            assert!(error.to_string().contains(expected), "{expected}: {error}");
        }
    }
}
