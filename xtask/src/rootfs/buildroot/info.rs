//! Buildroot's information about its packages (`make show-info`): versions, sources, hashes,
//! licences, dependencies. Used for mirrors, for progress, and for the bill of materials.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;

use anyhow::{Context, Result};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use super::make::{BuildrootSetup, BuildrootSite};
use crate::plan::OverridePlan;
use crate::rootfs::{BasePackage, PackageRole};

/// One entry: a package for the target or the host, or a filesystem image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InfoEntry {
    /// `target`, `host` or `rootfs`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Name without the prefix `host-`.
    #[serde(default)]
    pub name: String,
    /// A virtual package that this one provides.
    #[serde(default, rename = "virtual")]
    pub is_virtual: bool,
    /// Version; empty for what has no source.
    #[serde(default)]
    pub version: String,
    /// Licences, separated by commas, as SPDX identifiers where possible.
    #[serde(default)]
    pub licenses: String,
    /// Whether its sources may be redistributed.
    #[serde(default)]
    pub redistributable: bool,
    /// Directory of its downloads below the download directory.
    #[serde(default)]
    pub dl_dir: String,
    /// What it downloads.
    #[serde(default)]
    pub downloads: Vec<InfoDownload>,
    /// Hash files, relative to the tree or absolute.
    #[serde(default)]
    pub hashes: Vec<Utf8PathBuf>,
    /// The directory of its recipe, relative to the tree; empty for a filesystem image.
    #[serde(default)]
    pub package_dir: Utf8PathBuf,
    /// The directory of its stamp files, relative to the output directory.
    #[serde(default)]
    pub stamp_dir: String,
    /// It installs files into the root filesystem.
    #[serde(default)]
    pub install_target: bool,
    /// It installs files outside of the root filesystem, such as a boot loader.
    #[serde(default)]
    pub install_images: bool,
    /// Its dependencies, by the names of this list.
    #[serde(default)]
    pub dependencies: BTreeSet<String>,
    /// Name in the CVE dictionary.
    #[serde(default, rename = "cpe-id")]
    pub cpe: Option<String>,
    /// Its version as results show it, where it is built from a source directory.
    #[serde(default)]
    pub custom: Option<String>,
}

/// One download.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InfoDownload {
    /// File name.
    pub source: String,
    /// The URIs, each with Buildroot's method as a prefix (`https+https://…`).
    pub uris: Vec<String>,
}

/// Everything that a configuration builds, by name; host packages begin with `host-`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BuildrootInfo(pub BTreeMap<String, InfoEntry>);

impl BuildrootInfo {
    /// Asks Buildroot, with its check of dependencies that are used but not selected: five seconds.
    ///
    /// # Errors
    /// When the configuration or a package is broken.
    pub fn read(setup: &BuildrootSetup, site: &BuildrootSite) -> Result<Self> {
        let text = setup
            .fetching(site)
            .env("BR_FORCE_CHECK_DEPENDENCIES", "YES")
            .args(["-s", "show-info"])
            .read()
            .context("asking Buildroot for its packages")?;
        let mut info = Self::parse(&text)?;
        for plan in &setup.overrides {
            info.mark_custom(plan);
        }
        Ok(info)
    }

    /// A package with a source directory downloads nothing. Its version is not that of a release,
    /// except where others depend on it: the wheels on Python's.
    pub fn mark_custom(&mut self, plan: &OverridePlan) {
        for name in [plan.package.clone(), format!("host-{}", plan.package)] {
            let Some(entry) = self.0.get_mut(&name) else { continue };
            entry.custom = Some(plan.version());
            entry.downloads.clear();
            entry.cpe = None;
            if plan.package == "python3"
                && let Some(version) = python_version(&plan.directory)
            {
                entry.version = version;
            }
        }
    }

    /// Reads the answer.
    ///
    /// # Errors
    /// When the answer is not such a list.
    pub fn parse(text: &str) -> Result<Self> {
        // Warnings of make may precede it.
        let start = text.find('{').unwrap_or(0);
        let json = text.get(start..).unwrap_or_default();
        serde_json::from_str(json).context("reading Buildroot's list of packages")
    }

    /// Packages, without filesystem images.
    pub fn packages(&self) -> impl Iterator<Item = (&str, &InfoEntry)> {
        self.0.iter().filter(|(_, e)| !e.stamp_dir.is_empty()).map(|(n, e)| (n.as_str(), e))
    }

    /// How many packages are finished in an output directory.
    pub fn finished(&self, output: &Utf8Path) -> usize {
        self.packages()
            .filter(|(_, e)| output.join(&e.stamp_dir).join(".stamp_installed").is_file())
            .count()
    }

    /// Downloads for which no hash file has a line: package, file, and its hash files.
    ///
    /// # Errors
    /// When a hash file cannot be read.
    pub fn without_hash(&self, tree: &Utf8Path) -> Result<Vec<(String, String, Vec<Utf8PathBuf>)>> {
        let mut found = Vec::new();
        for (name, entry) in self.packages() {
            let sums = read_hashes(tree, entry)?;
            for download in entry.downloads.iter().filter(|d| !sums.contains_key(&d.source)) {
                found.push((name.to_owned(), download.source.clone(), entry.hashes.clone()));
            }
        }
        Ok(found)
    }

    /// Sources that are not in the directory of downloads: package and source.
    pub fn missing(&self, downloads: &Utf8Path) -> Vec<(&str, &InfoEntry, &InfoDownload)> {
        self.packages()
            .flat_map(|(name, e)| e.downloads.iter().map(move |d| (name, e, d)))
            .filter(|(_, e, d)| !downloads.join(&e.dl_dir).join(&d.source).is_file())
            .collect()
    }

    /// All packages that need one of these, directly or indirectly, including themselves.
    pub fn dependents<'a>(&'a self, of: impl IntoIterator<Item = &'a str>) -> BTreeSet<&'a str> {
        let mut found: BTreeSet<&str> =
            of.into_iter().filter_map(|n| Some(self.0.get_key_value(n)?.0.as_str())).collect();
        loop {
            let more: Vec<&str> = self
                .packages()
                .filter(|(name, _)| !found.contains(name))
                .filter(|(_, e)| e.dependencies.iter().any(|d| found.contains(d.as_str())))
                .map(|(name, _)| name)
                .collect();
            if more.is_empty() {
                return found;
            }
            found.extend(more);
        }
    }

    /// The packages of the image and its boot files, for the bill of materials. Excludes packages
    /// that are only used by the build (host packages), are virtual, or have no source.
    ///
    /// # Errors
    /// When a hash file or Buildroot's list of files cannot be read.
    pub fn contents(&self, setup: &BuildrootSetup, arch: &str) -> Result<Vec<BasePackage>> {
        let installed = installed_bytes(&setup.output)?;
        let counts = |e: &InfoEntry| {
            let has_source = !e.downloads.is_empty() || e.custom.is_some();
            e.kind == "target" && !e.is_virtual && has_source
        };
        let mut list = Vec::new();
        for (name, entry) in self.packages().filter(|(_, e)| counts(e)) {
            let sums = read_hashes(&setup.tree, entry)?;
            let main = entry.downloads.first();
            let sha256 = main.and_then(|d| sums.get(&d.source)?.sha256.clone()).unwrap_or_default();
            let size = |d: &InfoDownload| {
                let path = setup.downloads.join(&entry.dl_dir).join(&d.source);
                fs::metadata(path).map_or(0, |m| m.len())
            };
            let version = entry.custom.clone().unwrap_or_else(|| entry.version.clone());
            list.push(BasePackage {
                name: name.to_owned(),
                version: version.clone(),
                arch: arch.to_owned(),
                role: if entry.install_target { PackageRole::Root } else { PackageRole::Extra },
                source: name.to_owned(),
                source_version: version,
                archive: None,
                section: String::new(),
                installed_bytes: installed.get(name).copied().unwrap_or(0),
                download_bytes: entry.downloads.iter().map(size).sum(),
                sha256,
                homepage: None,
                licences: if entry.licenses.is_empty() || entry.licenses == "unknown" {
                    Vec::new()
                } else {
                    vec![entry.licenses.clone()]
                },
                essential: false,
                cpe: entry.cpe.clone(),
                needs: Vec::new(),
            });
        }
        let known: BTreeSet<String> = list.iter().map(|p| p.name.clone()).collect();
        for package in &mut list {
            package.needs = self.reached(&package.name, &known);
        }
        Ok(list)
    }

    /// The listed packages that a package needs, through virtual packages.
    fn reached(&self, name: &str, known: &BTreeSet<String>) -> Vec<String> {
        let mut found = BTreeSet::new();
        let mut seen = BTreeSet::new();
        let mut open = vec![name];
        while let Some(next) = open.pop() {
            for dependency in self.0.get(next).into_iter().flat_map(|e| &e.dependencies) {
                if !seen.insert(dependency) || dependency == name {
                    continue;
                }
                if known.contains(dependency) {
                    found.insert(dependency.clone());
                } else if self.0.get(dependency).is_some_and(|e| e.kind == "target") {
                    open.push(dependency);
                }
            }
        }
        found.into_iter().collect()
    }
}

/// The version of a Python source tree.
fn python_version(dir: &Utf8Path) -> Option<String> {
    let text = fs::read_to_string(dir.join("Include/patchlevel.h")).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix("#define PY_VERSION"))?;
    Some(value.trim().trim_matches('"').to_owned())
}

/// The hashes that hash files have for a file. Weaker ones are ignored.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FileHashes {
    /// SHA-256, lower-case hexadecimal.
    pub sha256: Option<String>,
    /// SHA-512, lower-case hexadecimal.
    pub sha512: Option<String>,
}

/// Hashes by file name, from an entry's hash files (`sha256  <hex>  <file>`).
///
/// # Errors
/// When a hash file cannot be read.
pub(super) fn read_hashes(
    tree: &Utf8Path,
    entry: &InfoEntry,
) -> Result<HashMap<String, FileHashes>> {
    let mut sums: HashMap<String, FileHashes> = HashMap::new();
    for file in &entry.hashes {
        let path = tree.join(file);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let ["sha256" | "sha512", sum, name] = words.as_slice() else { continue };
            let hashes = sums.entry((*name).to_owned()).or_default();
            let place = if words[0] == "sha256" { &mut hashes.sha256 } else { &mut hashes.sha512 };
            *place = Some(sum.to_ascii_lowercase());
        }
    }
    Ok(sums)
}

/// Bytes by package in the target directory, according to Buildroot's own list of files.
fn installed_bytes(output: &Utf8Path) -> Result<HashMap<String, u64>> {
    let path = output.join("build/packages-file-list.txt");
    if !path.is_file() {
        return Ok(HashMap::new());
    }
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let mut bytes = HashMap::new();
    for (package, file) in text.lines().filter_map(|line| line.split_once(',')) {
        // Files that a later package replaced or that were removed are not counted.
        let size = fs::symlink_metadata(output.join("target").join(file)).map_or(0, |m| m.len());
        *bytes.entry(package.to_owned()).or_insert(0) += size;
    }
    Ok(bytes)
}
