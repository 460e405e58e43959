//! Reads from a finished root what the report, the SBOM and the wheel installer need.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::{Context, Result};

use super::download::LockedDeb;
use super::lock::{ArchiveName, split_stanzas};
use crate::exec::Tool;
use crate::rootfs::tree::{RootEntry, RootTree};
use crate::rootfs::{BasePackage, PackageRole, PythonDistribution, RootPython};

/// The directory in which Debian's `python3-*` packages install distributions.
const DISTRIBUTIONS: &str = "usr/lib/python3/dist-packages/";

/// All packages of the build, sorted by name.
pub(super) fn list_packages(tree: &RootTree, debs: &[LockedDeb]) -> Result<Vec<BasePackage>> {
    let owned = owned_bytes(tree)?;
    let mut all = Vec::with_capacity(debs.len());
    for LockedDeb { package, file } in debs {
        let control = Tool::new("dpkg-deb").arg("--field").arg(&file.path).read()?;
        let mut fields = split_stanzas(&control).pop().unwrap_or_default();
        let name = package.name.clone();
        let source = fields.remove("Source").unwrap_or_else(|| name.clone());
        // `linux-signed-arm64 (6.1.192+2)`: with an explicit source version.
        let (source, source_version) = match source.split_once(" (") {
            Some((source, version)) => {
                (source.to_owned(), version.trim_end_matches(')').to_owned())
            }
            None => (source, package.version.clone()),
        };
        let copyright = match package.role {
            PackageRole::Root => tree.bytes(&format!("usr/share/doc/{name}/copyright"))?,
            _ => None,
        };
        all.push(BasePackage {
            version: package.version.clone(),
            arch: package.arch.clone(),
            role: package.role,
            source,
            source_version,
            archive: match &package.archive {
                ArchiveName::Source(name) => Some(name.clone()),
                ArchiveName::Debian | ArchiveName::Security => None,
            },
            section: fields.remove("Section").unwrap_or_default(),
            installed_bytes: owned.get(&name).copied().unwrap_or(0),
            download_bytes: file.size,
            sha256: file.sha256.clone(),
            homepage: fields.remove("Homepage"),
            licences: parse_licences(&String::from_utf8_lossy(&copyright.unwrap_or_default())),
            essential: fields.remove("Essential").as_deref() == Some("yes"),
            cpe: None,
            needs: Vec::new(),
            name,
        });
    }
    all.sort_by(|a, b| (&a.name, &a.arch).cmp(&(&b.name, &b.arch)));
    Ok(all)
}

/// Bytes in the pruned root by package, according to dpkg's lists of files.
fn owned_bytes(tree: &RootTree) -> Result<HashMap<String, u64>> {
    let lists = tree
        .iter()
        .map(|(path, _)| path)
        .filter(|path| path.starts_with("var/lib/dpkg/info/") && path.ends_with(".list"));
    let mut owned = HashMap::new();
    for path in lists {
        let file = path.rsplit('/').next().unwrap_or_default();
        let stem = file.trim_end_matches(".list");
        let name = stem.split(':').next().unwrap_or(stem).to_owned();
        let text = String::from_utf8_lossy(&tree.bytes(path)?.unwrap_or_default()).into_owned();
        let mut sum = 0;
        for line in text.lines() {
            // dpkg lists `/lib/x`, the merged root contains `usr/lib/x`.
            let entry = tree.get(line).or_else(|| tree.get(&format!("usr{line}")));
            sum += entry.map_or(0, RootEntry::size);
        }
        owned.insert(name, sum);
    }
    Ok(owned)
}

/// The short names on the `License:` lines of a machine-readable copyright file.
fn parse_licences(copyright: &str) -> Vec<String> {
    if !copyright.lines().take(5).any(|l| l.starts_with("Format:")) {
        return Vec::new();
    }
    let names = copyright.lines().filter_map(|line| line.strip_prefix("License:"));
    let names: BTreeSet<String> =
        names.map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect();
    names.into_iter().collect()
}

/// The version that a locked package has, without epoch and Debian's revision.
fn upstream_version<'a>(debs: &'a [LockedDeb], name: &str) -> Option<&'a str> {
    let version = &debs.iter().find(|d| d.package.name == name)?.package.version;
    let version = version.split_once(':').map_or(version.as_str(), |(_, rest)| rest);
    Some(version.rsplit_once('-').map_or(version, |(upstream, _)| upstream))
}

/// The interpreter that `python3` in the root points to.
pub(super) fn find_python(tree: &RootTree, debs: &[LockedDeb]) -> Result<RootPython> {
    let help = "help: add python3 to the product's packages";
    let short = tree
        .iter()
        .filter_map(|(path, _)| path.strip_prefix("usr/bin/python3."))
        .find(|minor| minor.bytes().all(|b| b.is_ascii_digit()))
        .map(|minor| format!("3.{minor}"))
        .with_context(|| format!("the root has no Python\n{help}"))?;
    let version = upstream_version(debs, &format!("python{short}"))
        .or_else(|| upstream_version(debs, &format!("python{short}-minimal")))
        .with_context(|| format!("the lock has no package python{short}\n{help}"))?
        .to_owned();
    let metadata = tree.iter().map(|(path, _)| path).filter(|path| {
        path.strip_prefix(DISTRIBUTIONS).is_some_and(|rest| {
            rest.ends_with(".dist-info/METADATA")
                || rest.ends_with(".egg-info/PKG-INFO")
                || (rest.ends_with(".egg-info") && !rest.contains('/'))
        })
    });
    let mut distributions = Vec::new();
    for path in metadata {
        let Some(bytes) = tree.bytes(path)? else { continue };
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let head: BTreeMap<&str, &str> =
            text.lines().take_while(|l| !l.is_empty()).filter_map(|l| l.split_once(": ")).collect();
        if let (Some(name), Some(version)) = (head.get("Name"), head.get("Version")) {
            distributions
                .push(PythonDistribution { name: (*name).into(), version: (*version).into() });
        }
    }
    distributions.sort();
    Ok(RootPython {
        site_packages: format!("/usr/local/lib/python{short}/dist-packages"),
        scripts: "/usr/local/bin".to_owned(),
        version,
        short,
        distributions,
    })
}

/// Version of the C library.
pub(super) fn glibc_version(debs: &[LockedDeb]) -> Result<String> {
    upstream_version(debs, "libc6").map(str::to_owned).context("the lock has no libc6")
}
