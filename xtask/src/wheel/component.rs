//! The component `api` of a bundle: each wheel installed into a tree of its own, for the place on `data`
//! where a robot keeps an API, and the lock that lists them. A tree depends on its wheel, the base's Python
//! and nothing else, so that a robot recognises by its hash what it has already.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use bundle::component::{BaseNeed, LOCK_FORMAT, LOCK_ROLE, Lock, PLACE, Script, TREE_TIME, Wheel};
use camino::{Utf8Path, Utf8PathBuf};
use pep508_rs::pep440_rs::{PrereleaseKind, Version};
use serde::{Deserialize, Serialize};

use super::base::BasePython;
use super::fetch::FetchedWheel;
use super::install::{InstallRequest, InstallTarget, Placed, inside, lay_out, write_tar};
use super::lock::WheelLock;
use super::target::normalise;
use crate::artifact::{Artifact, hash_bytes, write_atomically};

/// What to make a component of.
#[derive(Debug)]
pub struct ComponentRequest<'a> {
    /// The lock.
    pub lock: &'a WheelLock,
    /// Its wheels, fetched.
    pub wheels: &'a [FetchedWheel],
    /// The base's Python.
    pub base: &'a BasePython,
    /// The cache folder; bytecode is kept there by wheel and interpreter.
    pub cache: &'a Utf8Path,
    /// Where the payloads go.
    pub out: &'a Utf8Path,
    /// Where the interpreter's output goes.
    pub log: Option<&'a Utf8Path>,
}

/// A component, ready to be packed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Component {
    /// The API's version as a bundle writes versions. For people: robots go by the lock's.
    pub version: String,
    /// What the lock payload says.
    pub lock: Lock,
    /// The payloads with their roles, the lock first.
    pub payloads: Vec<(String, Artifact)>,
}

/// Makes the payloads of a component.
///
/// # Errors
/// As [`super::install()`]; when a wheel has files beyond what it may, or the package no module of its name.
pub fn component(request: &ComponentRequest<'_>) -> Result<Component> {
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
    let place = format!("{}/", inside(Utf8Path::new(PLACE)));
    let mut trees: Vec<Vec<(&str, &Placed)>> = laid.distributions.iter().map(|_| vec![]).collect();
    for (path, placed) in &laid.tree.files {
        // Every folder of the target lies there.
        let path = path.strip_prefix(&place).with_context(|| format!("/{path} lies elsewhere"))?;
        trees[placed.wheel].push((path, placed));
    }
    let package = request.lock.top_level()?;
    let module = module(&package, request.lock, &trees)?;
    let mut requires: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (name, by) in &laid.closure.needed_by {
        by.iter().for_each(|by| requires.entry(by).or_default().push(name.clone()));
    }
    let mut payloads = Vec::new();
    let mut wheels = Vec::new();
    let mut roles = BTreeSet::new();
    for (index, files) in trees.iter().enumerate() {
        let (distribution, locked) = (&laid.distributions[index], &request.lock.wheels[index]);
        let role = role(&locked.name);
        ensure!(roles.insert(role.clone()), "two wheels would be the payload `{role}`");
        let path = request.out.join(format!("{role}.tar"));
        write_atomically(&path, |out| write_tar(files, TREE_TIME, out))
            .with_context(|| format!("writing {path}"))?;
        let tar = Artifact::of(&path)?;
        let scripts = laid.entry_points[index]
            .iter()
            .map(|point| Script { name: point.name.clone(), module: point.module.clone() });
        wheels.push(Wheel {
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
        });
        payloads.push((role, tar));
    }
    let version = wheels.iter().find(|wheel| wheel.name == package).map(|w| w.version.clone());
    let version = version.with_context(|| format!("the lock has no wheel of {package}"))?;
    let base = laid.closure.from_base.iter();
    let lock = Lock {
        format: LOCK_FORMAT,
        package,
        module,
        version: version.clone(),
        python: request.base.version.short(),
        arch: request.lock.target.arch.clone(),
        libc: request.lock.target.libc.to_string(),
        base: base
            .map(|(name, version)| BaseNeed { name: name.clone(), version: version.clone() })
            .collect(),
        wheels,
    };
    let json = lock.to_json().context("describing the component")?;
    let path = request.out.join(LOCK_ROLE);
    write_atomically(&path, |out| Ok(out.write_all(&json)?))?;
    payloads.insert(0, (LOCK_ROLE.to_owned(), Artifact::of(&path)?));
    let parsed: Version = version.parse().map_err(|_| anyhow::anyhow!("{version}: no version"))?;
    Ok(Component { version: semantic(&parsed), lock, payloads })
}

/// The module that the package installs under its own name.
fn module(package: &str, lock: &WheelLock, trees: &[Vec<(&str, &Placed)>]) -> Result<String> {
    let index = lock.wheels.iter().position(|wheel| wheel.name == package);
    let files = index.and_then(|index| trees.get(index)).context("the lock has no top level")?;
    let name = normalise(package).replace('-', "_");
    let (folder, file) = (format!("site/{name}/"), format!("site/{name}.py"));
    ensure!(
        files.iter().any(|(path, _)| path.starts_with(&folder) || *path == file),
        "{package} installs no module {name}: a robot could not start it\n\
         help: name the API's own package as `api.package`"
    );
    Ok(name)
}

/// A payload's role: the distribution's name, which may be too long for one.
fn role(name: &str) -> String {
    if name.len() <= bundle::MAX_NAME {
        return name.to_owned();
    }
    // Eight digits and a dash.
    let (start, digest) = (&name[..bundle::MAX_NAME - 9], hash_bytes(name.as_bytes()));
    format!("{start}-{}", &digest[..8])
}

/// A version of PEP 440 as Semantic Versioning writes it, as near as it can be: `8.3.0a2` is `8.3.0-a.2`.
fn semantic(version: &Version) -> String {
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
    // A local part of digits with a leading zero would be none of Semantic Versioning.
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
pub fn files(component: &Component) -> Vec<Utf8PathBuf> {
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
            let text = semantic(&from.parse().unwrap());
            assert_eq!(text, expected);
            bundle::Version::parse(&text).unwrap();
        }
    }

    #[test]
    fn a_role_is_a_name_that_bundles_may_have() {
        assert_eq!(role("numpy"), "numpy");
        let (one, two) = (
            role("opentelemetry-instrumentation-fastapi"),
            role("opentelemetry-instrumentation-f"),
        );
        assert_eq!(one.len(), 32);
        assert_ne!(one, two);
    }
}
