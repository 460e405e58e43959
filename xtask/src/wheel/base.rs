//! What the base contains: its Python (version, identity, files to run it here) and the Python
//! distributions in it. Reads a root directory or its tar, and runs no program.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, Read};

use anyhow::{Context, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};
use sha2::{Digest, Sha256};

use super::check::BaseDistribution;
use super::metadata::MailHeaders;
use super::target::PythonVersion;
use crate::artifact::{hash_bytes, hex};
use crate::exec::Tool;

/// Where a base is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BaseSource {
    /// An unpacked root.
    Root(Utf8PathBuf),
    /// An uncompressed tar of a root.
    Tar(Utf8PathBuf),
}

/// The Python of a base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BasePython {
    /// Its version; the patch level as far as the package database says it.
    pub version: PythonVersion,
    /// The version of Debian's package, when it is one: `3.11.2-6+deb12u9`.
    pub package: Option<String>,
    /// The interpreter's path in the base without the leading slash: `usr/bin/python3.11`.
    pub interpreter: Utf8PathBuf,
    /// A hash of the interpreter and its library: what bytecode depends on.
    pub identity: String,
    /// The distributions outside the standard library, sorted.
    pub distributions: Vec<BaseDistribution>,
    /// Where it was read from.
    pub source: BaseSource,
}

/// What one walk over a base collects.
#[derive(Debug, Default)]
struct Findings {
    /// `usr/bin/python3` points here.
    link: Option<String>,
    /// Interpreters and Python libraries: path and hash.
    binaries: BTreeMap<String, String>,
    distributions: BTreeSet<BaseDistribution>,
    dpkg: Option<String>,
}

impl BasePython {
    /// Reads a base. A tar of 250 MB takes about a tenth of a second.
    ///
    /// # Errors
    /// When it cannot be read or has no Python 3.
    pub fn read(source: BaseSource) -> Result<Self> {
        let mut findings = Findings::default();
        match &source {
            BaseSource::Root(root) => findings.walk_root(root)?,
            BaseSource::Tar(tar) => {
                findings.walk_tar(tar).with_context(|| format!("reading the base {tar}"))?;
            }
        }
        findings.finish(source)
    }

    /// This machine's own interpreter, if it was built from the same source: Debian's package,
    /// except for fixes of its security team. Bytecode depends on the compiler's source, not on the
    /// processor that it runs on; a test compares both.
    pub fn own(&self) -> Option<Utf8PathBuf> {
        let PythonVersion { major, minor, .. } = self.version;
        let program = Utf8Path::new("/").join(&self.interpreter);
        let package = format!("python{major}.{minor}-minimal");
        let query = ["--show", "--showformat=${db:Status-Status} ${Version}", &package];
        let found = Tool::new("dpkg-query").args(query).read().ok()?;
        let source = |version: &str| version.split('+').next().map(str::to_owned);
        let same =
            source(found.trim().strip_prefix("installed ")?) == source(self.package.as_ref()?);
        (same && program.is_file()).then_some(program)
    }

    /// A directory in which the interpreter and its libraries have the same paths as in the base:
    /// the root itself, or `scratch` after unpacking what Python needs from the tar.
    ///
    /// # Errors
    /// When unpacking fails.
    pub fn runnable(&self, scratch: &Utf8Path) -> Result<Utf8PathBuf> {
        match &self.source {
            BaseSource::Root(root) => Ok(root.clone()),
            BaseSource::Tar(tar) => {
                unpack_base(tar, scratch)
                    .with_context(|| format!("unpacking the base's Python from {tar}"))?;
                Ok(scratch.to_owned())
            }
        }
    }
}

/// Whether a path is one of those that a base's Python needs to run.
fn runs_python(path: &str) -> bool {
    let library = path.strip_prefix("usr/").unwrap_or(path);
    matches!(path, "usr" | "usr/bin" | "bin")
        || path.starts_with("usr/bin/python3")
        || library.split('/').next().is_some_and(|top| top.starts_with("lib"))
            && !library.starts_with("lib/modules")
            && !library.starts_with("lib/firmware")
            && !library.starts_with("lib/python3/")
}

fn unpack_base(tar: &Utf8Path, to: &Utf8Path) -> Result<()> {
    let file = File::open(tar).with_context(|| format!("opening {tar}"))?;
    let mut archive = tar::Archive::new(BufReader::new(file));
    archive.set_preserve_mtime(false);
    std::fs::create_dir_all(to).with_context(|| format!("creating {to}"))?;
    for entry in archive.entries_with_seek()? {
        let mut entry = entry?;
        let kind = entry.header().entry_type();
        let path = name_of(&entry)?;
        let wanted = kind.is_file() || kind.is_dir() || kind.is_symlink() || kind.is_hard_link();
        if wanted && runs_python(&path) {
            entry.unpack_in(to).with_context(|| format!("unpacking {path}"))?;
        }
    }
    Ok(())
}

/// A member's path without leading `./` or `/` and trailing `/`.
fn name_of<R: Read>(entry: &tar::Entry<'_, R>) -> Result<String> {
    let bytes = entry.path_bytes();
    let path = String::from_utf8_lossy(&bytes);
    Ok(path.trim_start_matches("./").trim_matches('/').to_owned())
}

/// A directory for distributions: Debian's, or that of a plain CPython.
fn distribution_of(path: &str) -> Option<&str> {
    let rest = path.strip_prefix("usr/lib/")?;
    let (python, rest) = rest.split_once('/')?;
    let rest = python.starts_with("python3").then_some(rest)?;
    let rest =
        rest.strip_prefix("dist-packages/").or_else(|| rest.strip_prefix("site-packages/"))?;
    let known = rest.ends_with(".dist-info/METADATA")
        || rest.ends_with(".egg-info/PKG-INFO")
        || rest.ends_with(".egg-info");
    (known && rest.matches('/').count() <= 1).then_some(rest)
}

fn is_binary(path: &str) -> bool {
    let plain = |version: &str| version.split('.').all(|n| n.parse::<u32>().is_ok());
    let file = path.rsplit('/').next().unwrap_or(path);
    path.strip_prefix("usr/bin/python").is_some_and(|v| v.contains('.') && plain(v))
        || path.starts_with("usr/lib/") && file.starts_with("libpython3.") && file.contains(".so")
}

impl Findings {
    fn walk_tar(&mut self, tar: &Utf8Path) -> Result<()> {
        let file = File::open(tar).with_context(|| format!("opening {tar}"))?;
        let mut archive = tar::Archive::new(BufReader::new(file));
        for entry in archive.entries_with_seek()? {
            let mut entry = entry?;
            let path = name_of(&entry)?;
            if path == "usr/bin/python3" {
                self.link =
                    entry.link_name_bytes().map(|name| String::from_utf8_lossy(&name).into_owned());
            } else if entry.header().entry_type().is_file() {
                self.record(&path, &mut entry)?;
            }
        }
        Ok(())
    }

    fn walk_root(&mut self, root: &Utf8Path) -> Result<()> {
        let link = std::fs::read_link(root.join("usr/bin/python3")).ok();
        self.link = link.and_then(|link| link.to_str().map(str::to_owned));
        let mut dirs = vec![root.join("usr/bin"), root.join("usr/lib"), root.join("var/lib/dpkg")];
        while let Some(dir) = dirs.pop() {
            if !dir.is_dir() {
                continue;
            }
            let list =
                dir.read_dir_utf8().with_context(|| format!("reading the directory {dir}"))?;
            for item in list {
                let item = item.with_context(|| format!("reading the directory {dir}"))?;
                let kind = item.file_type().with_context(|| format!("reading {}", item.path()))?;
                let inside = item.path().strip_prefix(root).unwrap_or(item.path()).as_str();
                if kind.is_dir() {
                    // Below this depth there are neither distributions nor libraries.
                    if inside.matches('/').count() <= 4 {
                        dirs.push(item.path().to_owned());
                    }
                } else if kind.is_file() {
                    let open = || File::open(item.path()).map(BufReader::new);
                    if self.is_wanted(inside) {
                        let mut file =
                            open().with_context(|| format!("opening {}", item.path()))?;
                        self.record(inside, &mut file)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn is_wanted(&self, path: &str) -> bool {
        path == "var/lib/dpkg/status" || is_binary(path) || distribution_of(path).is_some()
    }

    fn record(&mut self, path: &str, content: &mut dyn Read) -> Result<()> {
        if !self.is_wanted(path) {
            return Ok(());
        }
        let mut bytes = Vec::new();
        content.read_to_end(&mut bytes).with_context(|| format!("reading {path}"))?;
        if is_binary(path) {
            self.binaries.insert(path.to_owned(), hash_bytes(&bytes));
        } else if path == "var/lib/dpkg/status" {
            self.dpkg = Some(String::from_utf8_lossy(&bytes).into_owned());
        } else {
            let headers = MailHeaders::parse(&String::from_utf8_lossy(&bytes));
            if let (Some(name), Some(version)) = (headers.get("name"), headers.get("version")) {
                self.distributions.insert(BaseDistribution {
                    name: name.to_owned(),
                    version: version.to_owned(),
                });
            }
        }
        Ok(())
    }

    fn finish(self, source: BaseSource) -> Result<BasePython> {
        let linked = self.link.as_deref().and_then(|link| link.rsplit('/').next());
        let interpreters = || self.binaries.keys().filter(|path| path.starts_with("usr/bin/"));
        let interpreter = interpreters()
            .find(|path| path.rsplit('/').next() == linked)
            .or_else(|| interpreters().next_back());
        let Some(interpreter) = interpreter else {
            bail!(
                "the base has no /usr/bin/python3\n\
                 help: add python3 to the packages of the product's base"
            );
        };
        let short = interpreter.trim_start_matches("usr/bin/python");
        let mut version: PythonVersion =
            short.parse().with_context(|| format!("reading the version of {interpreter}"))?;
        let package = self.dpkg.as_deref().and_then(|status| package_version(status, short));
        version.patch = package.and_then(|package| patch_level(package, short));
        let mut hasher = Sha256::new();
        let library = format!("/libpython{short}");
        for (path, hash) in &self.binaries {
            if path == interpreter || path.contains(&library) {
                hasher.update(format!("{path} {hash}\n"));
            }
        }
        Ok(BasePython {
            version,
            package: package.map(str::to_owned),
            interpreter: Utf8PathBuf::from(interpreter.as_str()),
            identity: hex(&hasher.finalize()),
            distributions: self.distributions.into_iter().collect(),
            source,
        })
    }
}

/// The version of Python's package in dpkg's database.
fn package_version<'a>(status: &'a str, short: &str) -> Option<&'a str> {
    let package = format!("Package: python{short}-minimal");
    let paragraph = status.split("\n\n").find(|text| text.lines().any(|line| line == package))?;
    paragraph.lines().find_map(|line| line.strip_prefix("Version: "))
}

/// Python's patch level from its package's version: `3.11.2-6+deb12u8` gives 2.
fn patch_level(package: &str, short: &str) -> Option<u32> {
    let rest = package.strip_prefix(short)?.strip_prefix('.')?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_patch_level_is_dpkgs() {
        let status = "Package: python3\nVersion: 3.11.2-1+b1\n\n\
                      Package: python3.11-minimal\nStatus: install ok installed\n\
                      Version: 3.11.14-6+deb12u8\n\nPackage: x\nVersion: 1\n";
        let package = package_version(status, "3.11").unwrap();
        assert_eq!(package, "3.11.14-6+deb12u8");
        assert_eq!(patch_level(package, "3.11"), Some(14));
        assert_eq!(package_version(status, "3.12"), None);
    }

    #[test]
    fn what_is_read_of_a_base_is_told_by_path() {
        for path in [
            "usr/lib/python3/dist-packages/yaml-6.0.dist-info/METADATA",
            "usr/lib/python3/dist-packages/six-1.16.0.egg-info",
            "usr/lib/python3.12/site-packages/a-1.egg-info/PKG-INFO",
        ] {
            assert!(distribution_of(path).is_some(), "{path}");
        }
        for path in ["usr/lib/python3/dist-packages/a/b.dist-info/METADATA", "usr/lib/x/METADATA"] {
            assert!(distribution_of(path).is_none(), "{path}");
        }
        assert!(is_binary("usr/bin/python3.11") && is_binary("usr/lib/libpython3.12.so.1.0"));
        assert!(!is_binary("usr/bin/python3") && !is_binary("usr/bin/python3.11-config"));
    }
}
