//! The component `api` of a bundle: each wheel installed into a separate tree, for the directory on
//! `data` in which a robot keeps an API, and the lock that lists them. A tree depends only on its
//! wheel and the base's Python, so that a robot recognises by the hash which trees it has already.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use anyhow::{Context, Result, anyhow, ensure};
use bundle::component::{
    BaseRequirement, ComponentLock, ComponentWheel, LOCK_FORMAT, LOCK_ROLE, PLACE, TREE_TIME,
    WheelScript,
};
use bundle::index::to_hex;
use bundle::tree::{TreeEntryKind, TreeRules};
use camino::{Utf8Path, Utf8PathBuf};
use pep508_rs::pep440_rs::{PrereleaseKind, Version};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::base::BasePython;
use super::fetch::DownloadedWheel;
use super::install::{
    InstallRequest, InstallTarget, InstalledFile, PlacedFile, lay_out, path_in_tree, write_tar,
};
use super::lock::WheelLock;
use super::target::normalise_name;
use crate::artifact::{Artifact, hash_bytes, write_atomically};

/// The inputs of a component.
#[derive(Debug)]
pub struct WheelComponentRequest<'a> {
    /// The lock.
    pub lock: &'a WheelLock,
    /// Its wheels, fetched.
    pub wheels: &'a [DownloadedWheel],
    /// The base's Python.
    pub base: &'a BasePython,
    /// The cache directory; bytecode is kept there by wheel and interpreter.
    pub cache: &'a Utf8Path,
    /// The directory for the payloads.
    pub out: &'a Utf8Path,
    /// The log for the interpreter's output.
    pub log: Option<&'a Utf8Path>,
}

/// A component, ready to be packed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct WheelComponent {
    /// The API's version in the format of bundles. Informational only: robots use the version in
    /// the lock.
    pub version: String,
    /// The content of the lock payload.
    pub lock: ComponentLock,
    /// The payloads with their roles, the lock first.
    pub payloads: Vec<(String, Artifact)>,
}

/// The help for a wheel that is only possible in an image.
const NOT_FOR_ROBOTS: &str = "help: build an image, which may contain this \
     wheel; for a bundle of the API alone the wheel's author must rename the file";

/// Makes the payloads of a component.
///
/// # Errors
/// As [`super::install_wheels()`]; when a wheel has files outside of the allowed directories, or the
/// package has no module of its name.
pub fn make_payloads(request: &WheelComponentRequest<'_>) -> Result<WheelComponent> {
    let target = InstallTarget::on_data();
    let laid = lay_out(&InstallRequest {
        lock: request.lock,
        wheels: request.wheels,
        base: request.base,
        target: &target,
        cache: request.cache,
        epoch: TREE_TIME,
        out: request.out,
        log: request.log,
    })?;
    let place = format!("{}/", path_in_tree(Utf8Path::new(PLACE)));
    let mut trees: Vec<Vec<(&str, &PlacedFile)>> =
        laid.distributions.iter().map(|_| vec![]).collect();
    for (path, placed) in &laid.tree.files {
        // All directories of the target are below this one.
        let path = path
            .strip_prefix(&place)
            .with_context(|| format!("/{path} is outside of the component"))?;
        placed.wheels.iter().for_each(|wheel| trees[*wheel].push((path, placed)));
    }
    let package = request.lock.top_level()?;
    let module = find_module(&package, request.lock, &trees)?;
    let mut requires: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (name, by) in &laid.closure.needed_by {
        by.iter().for_each(|by| requires.entry(by).or_default().push(name.clone()));
    }
    let mut payloads = Vec::new();
    let mut wheels = Vec::new();
    let mut roles = BTreeSet::new();
    let mut made = WheelTrees::default();
    for (index, files) in trees.iter().enumerate() {
        let (distribution, locked) = (&laid.distributions[index], &request.lock.wheels[index]);
        let role = payload_role(&locked.name);
        ensure!(roles.insert(role.clone()), "two wheels would be the payload `{role}`");
        let path = request.out.join(format!("{role}.tar"));
        write_atomically(&path, |out| write_tar(files, TREE_TIME, out))
            .with_context(|| format!("writing {path}"))?;
        let tar = Artifact::from_file(&path)?;
        let scripts = laid.entry_points[index]
            .iter()
            .map(|point| WheelScript { name: point.name.clone(), module: point.module.clone() });
        let wheel = ComponentWheel {
            role: role.clone(),
            name: locked.name.clone(),
            version: distribution.version.clone(),
            sha256: distribution.sha256.clone(),
            tree: tar.sha256.clone(),
            size: tar.size,
            files: distribution.files,
            bytes: distribution.installed_bytes,
            requires: requires.remove(locked.name.as_str()).unwrap_or_default(),
            scripts: scripts.collect(),
        };
        let file = std::fs::File::open(&path).with_context(|| format!("opening {path}"))?;
        made.read(&wheel, std::io::BufReader::new(file)).map_err(|error| {
            anyhow!("{}: robots would reject this wheel: {error}\n{NOT_FOR_ROBOTS}", locked.file)
        })?;
        wheels.push(wheel);
        payloads.push((role, tar));
    }
    let version = wheels.iter().find(|wheel| wheel.name == package).map(|w| w.version.clone());
    let version = version.with_context(|| format!("the lock has no wheel of {package}"))?;
    let base = laid.closure.from_base.iter();
    let lock = ComponentLock {
        format: LOCK_FORMAT,
        package,
        module,
        version: version.clone(),
        python: request.base.version.short(),
        arch: request.lock.target.arch.clone(),
        libc: request.lock.target.libc.to_string(),
        base: base
            .map(|(name, version)| BaseRequirement { name: name.clone(), version: version.clone() })
            .collect(),
        wheels,
    };
    let json = lock.to_json().context("describing the component")?;
    let path = request.out.join(LOCK_ROLE);
    write_atomically(&path, |out| Ok(out.write_all(&json)?))?;
    payloads.insert(0, (LOCK_ROLE.to_owned(), Artifact::from_file(&path)?));
    let parsed: Version = version.parse().map_err(|_| anyhow!("invalid version {version}"))?;
    Ok(WheelComponent { version: to_semantic_version(&parsed), lock, payloads })
}

/// Reads wheels' trees as robots do, and rejects what they reject.
#[derive(Debug, Default)]
pub struct WheelTrees {
    /// SHA-256 and mode of each file, and the wheel that it is from.
    files: BTreeMap<String, (String, String)>,
    count: usize,
}

impl WheelTrees {
    /// How many were read.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Reads the tree of one more wheel to its end.
    ///
    /// # Errors
    /// With the robot's codes: `bad-tree`, `wrong-hash`, `io`.
    pub fn read(&mut self, wheel: &ComponentWheel, tar: impl Read) -> bundle::Result<()> {
        let bad = |reason: String| bundle::Error::BadTree {
            wheel: format!("{} {}", wheel.name, wheel.version),
            reason,
        };
        let mut rules = TreeRules::new(wheel);
        let mut archive = tar::Archive::new(Hashing { inner: tar, hash: Sha256::new() });
        for entry in archive.entries()? {
            let mut entry = entry.map_err(|error| bad(format!("the tar is damaged: {error}")))?;
            let path = String::from_utf8(entry.path_bytes().into_owned())
                .map_err(|error| bad(format!("a path is not UTF-8: {error}")))?;
            let kind = match entry.header().entry_type() {
                tar::EntryType::Directory => TreeEntryKind::Folder,
                tar::EntryType::Regular => TreeEntryKind::File(entry.size()),
                _ => TreeEntryKind::Other,
            };
            rules.entry(&path, kind)?;
            if kind == TreeEntryKind::Folder {
                continue;
            }
            let executable = entry.header().mode()? & 0o100 != 0;
            let mut content = Hashing { inner: &mut entry, hash: Sha256::new() };
            std::io::copy(&mut content, &mut std::io::sink())?;
            let sum = format!("{} {executable}", to_hex(&content.hash.finalize()));
            let (there, by) =
                self.files.entry(path.clone()).or_insert_with(|| (sum.clone(), wheel.name.clone()));
            if *there != sum {
                return Err(bad(format!("{by} installs another `{}`", path.escape_debug())));
            }
        }
        // The bytes after the last entry are part of the hash.
        let mut rest = archive.into_inner();
        std::io::copy(&mut rest, &mut std::io::sink())?;
        self.count += 1;
        rules.end(&to_hex(&rest.hash.finalize()))
    }
}

/// Which of these files robots reject in a component although an image may contain them: one
/// sentence for each wheel.
pub fn find_unfit_files(files: &BTreeMap<String, InstalledFile>) -> Vec<String> {
    let place = format!("{}/", path_in_tree(Utf8Path::new(PLACE)));
    let mut known: BTreeMap<&str, BTreeMap<String, &str>> = BTreeMap::new();
    let mut wrong: BTreeMap<&str, String> = BTreeMap::new();
    for (path, file) in files {
        let path = path.strip_prefix(&place).unwrap_or(path);
        for wheel in &file.wheels {
            let twin = known.entry(wheel).or_default().insert(path.to_lowercase(), path);
            let why = bundle::tree::wrong_path(path).or_else(|| {
                twin.map(|twin| format!("the name differs from {twin} in capital letters only"))
            });
            if let Some(why) = why {
                wrong.entry(wheel).or_insert_with(|| format!("{wheel}: {path}: {why}"));
            }
        }
    }
    wrong.into_values().collect()
}

/// Hashes what is read through it.
struct Hashing<R> {
    inner: R,
    hash: Sha256,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hash.update(&buffer[..n]);
        Ok(n)
    }
}

/// The module that the package installs under its own name.
fn find_module(
    package: &str,
    lock: &WheelLock,
    trees: &[Vec<(&str, &PlacedFile)>],
) -> Result<String> {
    let index = lock.wheels.iter().position(|wheel| wheel.name == package);
    let files = index.and_then(|index| trees.get(index)).context("the lock has no top level")?;
    let name = normalise_name(package).replace('-', "_");
    let (dir, file) = (format!("site/{name}/"), format!("site/{name}.py"));
    ensure!(
        files.iter().any(|(path, _)| path.starts_with(&dir) || *path == file),
        "{package} installs no module {name}, so a robot could not start the API\n\
         help: name the API's own package as `api.package`"
    );
    Ok(name)
}

/// A payload's role: the distribution's name, which may be too long for one.
fn payload_role(name: &str) -> String {
    if name.len() <= bundle::MAX_NAME {
        return name.to_owned();
    }
    // Eight digits and a dash.
    let (start, digest) = (&name[..bundle::MAX_NAME - 9], hash_bytes(name.as_bytes()));
    format!("{start}-{}", &digest[..8])
}

/// A version of PEP 440 as Semantic Versioning writes it, as near as it can be: `8.3.0a2` is `8.3.0-a.2`.
fn to_semantic_version(version: &Version) -> String {
    let release = version.release();
    let number = |at: usize| release.get(at).copied().unwrap_or(0);
    let mut rest: Vec<String> = release.iter().skip(3).map(u64::to_string).collect();
    if let Some(pre) = version.pre() {
        let kind = match pre.kind {
            PrereleaseKind::Alpha => "a",
            PrereleaseKind::Beta => "b",
            PrereleaseKind::Rc => "rc",
        };
        rest.extend([kind.to_owned(), pre.number.to_string()]);
    }
    for (kind, number) in [("post", version.post()), ("dev", version.dev())] {
        rest.extend(number.into_iter().flat_map(|n| [kind.to_owned(), n.to_string()]));
    }
    // A local part of digits with a leading zero is invalid in Semantic Versioning.
    let local = version.local().iter().map(|part| format!("local-{part}"));
    rest.extend(local);
    let mut text = format!("{}.{}.{}", number(0), number(1), number(2));
    for (at, part) in rest.iter().enumerate() {
        let separator = if at == 0 { '-' } else { '.' };
        if text.len() + 1 + part.len() > bundle::MAX_NAME {
            break;
        }
        text.push(separator);
        text.push_str(part);
    }
    text
}

/// Every file that a component consists of.
pub fn component_files(component: &WheelComponent) -> Vec<Utf8PathBuf> {
    component.payloads.iter().map(|(_, artifact)| artifact.path.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_spelt_as_bundles_do() {
        for (from, expected) in [
            ("10.1.0", "10.1.0"),
            ("10.1", "10.1.0"),
            ("8.3.0a2", "8.3.0-a.2"),
            ("8.3.0rc1.dev4", "8.3.0-rc.1.dev.4"),
            ("1.2.3.4.post1", "1.2.3-4.post.1"),
            ("10.2.0a0+g1234abc.dirty", "10.2.0-a.0.local-g1234abc"),
        ] {
            let text = to_semantic_version(&from.parse().unwrap());
            assert_eq!(text, expected);
            bundle::Version::parse(&text).unwrap();
        }
    }

    #[test]
    fn a_role_is_a_name_that_bundles_may_have() {
        assert_eq!(payload_role("numpy"), "numpy");
        let (one, two) = (
            payload_role("opentelemetry-instrumentation-fastapi"),
            payload_role("opentelemetry-instrumentation-f"),
        );
        assert_eq!(one.len(), 32);
        assert_ne!(one, two);
    }
}
