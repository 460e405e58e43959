//! Additional archives besides Debian's own. A separate apt with its own key reads each of them;
//! the packages that a product lists are passed to the resolving apt as a local archive. So a
//! package that is not listed does not exist for that apt, and the archive of a selected file is
//! known by its hash, not guessed from an address.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use super::DebianSpec;
use super::apt::{AptArchive, AptMirrors, PrivateApt};
use super::lock::{ArchiveName, LockedPackage, split_stanzas};
use crate::plan::keyring::{KeyringError, decode_keyring};
use crate::rootfs::{PackageRole, glob};
use crate::variable;

/// Prefix of the variable that overrides a source's address, followed by the source's name in
/// capitals with `_` for `-`.
const MIRROR_VARIABLES: &str = "SLIPWAY_MIRROR_";

/// The fields that apt needs for resolving. Others are omitted, so that a field in another spelling
/// (`package:`) cannot have a meaning for apt that it does not have here.
const FIELDS: [&str; 17] = [
    "Package",
    "Version",
    "Architecture",
    "Source",
    "Multi-Arch",
    "Essential",
    "Priority",
    "Section",
    "Maintainer",
    "Installed-Size",
    "Pre-Depends",
    "Depends",
    "Conflicts",
    "Breaks",
    "Replaces",
    "Provides",
    "Description",
];

/// An additional archive in a product and a lock: without an address, which depends on the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct AptSourceSpec {
    /// Its name in the lock.
    pub name: String,
    /// Its suite.
    pub suite: String,
    /// Its components.
    pub components: Vec<String>,
    /// Packages that may come from it: names, and patterns with `*`.
    pub packages: Vec<String>,
}

/// The address of an additional archive for this machine, and the key that must have signed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AptSourceMirror {
    /// Its name, as in the lock.
    pub name: String,
    /// Its address. No trailing slash.
    pub address: String,
    /// The file of its public key.
    pub key: Utf8PathBuf,
}

impl AptSourceMirror {
    /// A source with the address from the environment, else from the product.
    ///
    /// # Errors
    /// When the variable is not UTF-8.
    pub fn new(name: &str, address: &str, key: Utf8PathBuf) -> Result<Self> {
        let set = variable::find(&address_variable(name))?;
        let address = set.as_deref().unwrap_or(address).trim_end_matches('/').to_owned();
        Ok(Self { name: name.to_owned(), address, key })
    }
}

/// The variable that overrides a source's address.
fn address_variable(name: &str) -> String {
    MIRROR_VARIABLES.to_owned() + &name.to_uppercase().replace('-', "_")
}

/// The allowed packages of additional archives.
#[derive(Debug, Default)]
pub(super) struct AllowedPackages {
    /// The local archive that lists them; `None` where a product has no sources.
    local: Option<Utf8PathBuf>,
    packages: Vec<LockedPackage>,
}

impl AllowedPackages {
    /// Reads all sources of a request. Only indexes are downloaded.
    ///
    /// # Errors
    /// When one is unreachable, is signed by another key, or lacks a listed package.
    pub fn read(spec: &DebianSpec, mirrors: &AptMirrors, cache: &Utf8Path) -> Result<Self> {
        let mut offers = Self::default();
        if spec.sources.is_empty() {
            return Ok(offers);
        }
        let mut index = String::new();
        let mut seen = BTreeSet::new();
        for source in &spec.sources {
            let mirror = mirrors.source(&source.name)?;
            let text = read_index(spec, source, mirror, cache)?;
            for (package, stanza) in list_allowed_packages(source, &text)? {
                // The same version in two sources: prefer the one that the product lists first.
                let id = (package.name.clone(), package.version.clone(), package.arch.clone());
                if seen.insert(id) {
                    offers.packages.push(package);
                    index.push_str(&stanza);
                }
            }
        }
        let local = cache.join(format!("apt/{}-{}-sources", spec.suite, spec.arch));
        fs::create_dir_all(&local).with_context(|| format!("creating {local}"))?;
        let local = local.canonicalize_utf8().with_context(|| format!("resolving {local}"))?;
        let path = local.join("Packages");
        fs::write(&path, index).with_context(|| format!("writing {path}"))?;
        offers.local = Some(local);
        Ok(offers)
    }

    /// Adds them to an apt.
    pub fn bring_in(&self, apt: &PrivateApt) -> Result<()> {
        self.local.iter().try_for_each(|local| apt.add_local(local))
    }

    /// The pin that makes apt prefer a listed package to Debian's, whatever the version; empty
    /// without sources.
    pub fn pins(&self) -> &'static str {
        match self.local {
            // An empty origin means local archives. Debian's have priority 500; packages kept from
            // an old lock have a higher one.
            Some(_) => "Package: *\nPin: origin \"\"\nPin-Priority: 990\n\n",
            None => "",
        }
    }

    /// The offered file with this hash.
    pub fn with_hash(&self, sha256: &str) -> Option<&LockedPackage> {
        self.packages.iter().find(|p| p.sha256 == sha256)
    }

    /// The offered package that apt treats as identical to this one of Debian: it compares
    /// versions, not files.
    pub fn instead_of(&self, other: &LockedPackage) -> Option<&LockedPackage> {
        let id = |p: &LockedPackage| (p.name.clone(), p.version.clone(), p.arch.clone());
        self.packages.iter().find(|p| id(p) == id(other))
    }
}

/// The verified index of a source.
fn read_index(
    spec: &DebianSpec,
    source: &AptSourceSpec,
    mirror: &AptSourceMirror,
    cache: &Utf8Path,
) -> Result<String> {
    let AptSourceMirror { name, address, key } = mirror;
    let file = fs::read(key).with_context(|| {
        format!(
            "reading {key}, the key of the source {name}\n\
             help: create the file with the archive's OpenPGP public key"
        )
    })?;
    let keyring = match decode_keyring(&file) {
        Ok(keyring) => keyring,
        Err(KeyringError::Secret) => bail!("{key}, the key of the source {name}, is a secret key"),
        Err(KeyringError::NoKey(why)) => {
            bail!("{key}, the key of the source {name}, is not a public key: {why}")
        }
    };
    let suite = source.suite.replace('/', "_");
    let dir = cache.join(format!("apt/source-{name}-{suite}-{}", spec.arch));
    fs::create_dir_all(&dir).with_context(|| format!("creating {dir}"))?;
    let dir = dir.canonicalize_utf8().with_context(|| format!("resolving {dir}"))?;
    // Always in binary form: apt detects the form by the file's name.
    let path = dir.join("key.gpg");
    fs::write(&path, keyring).with_context(|| format!("writing {path}"))?;
    let archive = [AptArchive { uri: address.clone(), suite: source.suite.clone() }];
    let apt = PrivateApt::new(&dir, &spec.arch, &archive, &source.components, &path)?;
    apt.update().with_context(|| {
        format!(
            "reading the source {name}\n\
             help: {} selects a mirror; the archive must be signed by the key {key}",
            address_variable(name)
        )
    })?;
    let mut text = String::new();
    let files = apt.get(["indextargets", "--format", "$(FILENAME)", "Created-By: Packages"])?;
    for path in files.lines() {
        text += &fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
        text.push_str("\n\n");
    }
    Ok(text)
}

/// The packages of an index that may come from the source, each with its stanza for the local archive.
fn list_allowed_packages(
    source: &AptSourceSpec,
    index: &str,
) -> Result<Vec<(LockedPackage, String)>> {
    let AptSourceSpec { name, packages: patterns, .. } = source;
    let wanted = glob::compile_globs(patterns)?;
    let mut found = Vec::new();
    for mut stanza in split_stanzas(index) {
        let Some(package) = stanza.get("Package").filter(|p| wanted.is_match(p)).cloned() else {
            continue;
        };
        let mut take = |field: &str| {
            stanza.remove(field).with_context(|| {
                format!("the index of the source {name} has no {field} for {package}")
            })
        };
        let (filename, size, sha256) = (take("Filename")?, take("Size")?, take("SHA256")?);
        let filename = filename.strip_prefix("./").unwrap_or(&filename).to_owned();
        let get = |field: &str| stanza.get(field).cloned().unwrap_or_default();
        let package = LockedPackage {
            role: PackageRole::Extra,
            name: package,
            arch: get("Architecture"),
            version: get("Version"),
            archive: ArchiveName::Source(name.clone()),
            filename,
            size: size.parse().with_context(|| format!("'{size}' is not a size"))?,
            sha256,
        };
        package.check().with_context(|| format!("parsing the index of the source {name}"))?;
        let mut text = String::new();
        for field in FIELDS {
            if let Some(value) = stanza.get(field) {
                text += &format!("{field}: {}\n", value.replace('\n', "\n "));
            }
        }
        let LockedPackage { sha256, size, .. } = &package;
        text += &format!("Filename: ./{sha256}.deb\nSize: {size}\nSHA256: {sha256}\n\n");
        found.push((package, text));
    }
    let mut missing = Vec::new();
    for pattern in patterns {
        let one = glob::compile_globs(std::slice::from_ref(pattern))?;
        if !found.iter().any(|(package, _)| one.is_match(&package.name)) {
            missing.push(pattern.as_str());
        }
    }
    ensure!(
        missing.is_empty(),
        "the source {name} ({} {}) has no package {}\n\
         help: correct `packages` of that source in the product's [[rootfs.sources]]",
        source.suite,
        source.components.join(" "),
        missing.join(", ")
    );
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(packages: &[&str]) -> AptSourceSpec {
        AptSourceSpec {
            name: "acme-one".into(),
            suite: "stable".into(),
            components: vec!["main".into()],
            packages: packages.iter().map(|p| (*p).to_owned()).collect(),
        }
    }

    fn stanza(name: &str, more: &str) -> String {
        let hash = "a".repeat(64);
        format!(
            "Package: {name}\nVersion: 1\nArchitecture: all\n{more}Filename: pool/{name}.deb\n\
             Size: 5\nSHA256: {hash}\n\n"
        )
    }

    #[test]
    fn only_what_is_listed_is_offered_and_only_with_known_fields() {
        let index = stanza("kernel-1", "Depends: a,\n b\npackage: libc6\nTag: x\n")
            + &stanza("libc6", "")
            + &stanza("kernel", "");
        let found = list_allowed_packages(&source(&["kernel-*"]), &index).expect("found");
        let [(package, text)] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!((package.name.as_str(), package.size), ("kernel-1", 5));
        assert!(text.contains("Depends: a,\n b\n") && !text.contains("libc6"), "{text}");
    }

    #[test]
    fn what_the_source_lacks_is_named_at_once() {
        let error =
            list_allowed_packages(&source(&["kernel", "none", "not-*"]), &stanza("kernel", ""));
        let error = error.expect_err("two are missing").to_string();
        assert!(error.contains("acme-one (stable main) has no package none, not-*"), "{error}");
    }

    #[test]
    fn a_file_outside_the_archive_is_refused() {
        for path in ["../x.deb", "/etc/x.deb", "http://other/x.deb", "pool//x.deb", "pool/a b.deb"]
        {
            let index = stanza("kernel", "").replace("pool/kernel.deb", path);
            let error = format!(
                "{:#}",
                list_allowed_packages(&source(&["kernel"]), &index).expect_err(path)
            );
            assert!(error.contains("is not a path in an archive"), "{error}");
        }
    }

    #[test]
    fn each_source_has_a_variable_of_its_own() {
        assert_eq!(address_variable("acme-one"), [MIRROR_VARIABLES, "ACME_ONE"].concat());
    }
}
