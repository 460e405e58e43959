//! Checks whether an API fits the running system, as described in `api.toml`.

use std::cmp::Ordering;
use std::fs;
use std::path::PathBuf;

use bundle::component::{BaseRequirement, ComponentLock};

use super::version::compare;
use crate::builtin::BuiltInApi;
use crate::root::RootDir;

impl BuiltInApi {
    /// Why an API does not fit this system; `None` when it does.
    pub(super) fn misfit(&self, root: &RootDir, lock: &ComponentLock) -> Option<String> {
        let (version, arch) = (&lock.version, std::env::consts::ARCH);
        if (&lock.package, &lock.module) != (&normalize_name(&self.package), &self.module) {
            return Some(format!(
                "the package is {} (module {}), but this system's API is {} (module {})",
                lock.package, lock.module, self.package, self.module
            ));
        }
        if lock.python != self.python {
            return Some(format!(
                "the API needs Python {}, but this system has {}",
                lock.python, self.python
            ));
        }
        if lock.arch != arch {
            return Some(format!("the API is for {}, but this machine is {arch}", lock.arch));
        }
        if let Some(libc) = self.libc.as_ref().filter(|libc| !at_least(libc, &lock.libc)) {
            return Some(format!("the API needs {}, but this system has {libc}", lock.libc));
        }
        // A version that cannot be compared is not accepted.
        let below = |minimum: &&String| {
            !matches!(compare(version, minimum), Some(Ordering::Equal | Ordering::Greater))
        };
        if let Some(minimum) = self.minimum_version.as_ref().filter(below) {
            return Some(format!(
                "the API has version {version}, but this system requires {minimum} or later"
            ));
        }
        let missing = lock.base.iter().find(|need| !self.brings(root, need))?;
        Some(format!(
            "the API needs {} {}, but this system does not provide it",
            missing.name, missing.version
        ))
    }

    /// Whether the system provides a distribution, in the directories of Debian's Python or of a plain one.
    fn brings(&self, root: &RootDir, need: &BaseRequirement) -> bool {
        let short = &self.python;
        let folders = [
            self.site_packages.clone(),
            PathBuf::from("/usr/lib/python3/dist-packages"),
            PathBuf::from(format!("/usr/lib/python{short}/site-packages")),
        ];
        folders.iter().any(|folder| {
            let Ok(entries) = fs::read_dir(root.path(folder)) else { return false };
            entries.flatten().any(|entry| {
                let name = entry.file_name();
                name.to_str().is_some_and(|name| is_of(name, need))
            })
        })
    }
}

/// Whether `numpy-1.26.4.dist-info` (or `.egg-info`) belongs to a distribution.
fn is_of(entry: &str, need: &BaseRequirement) -> bool {
    let known = entry.strip_suffix(".dist-info").or_else(|| entry.strip_suffix(".egg-info"));
    let Some((name, rest)) = known.and_then(|known| known.split_once('-')) else { return false };
    let version = rest.split("-py").next().unwrap_or(rest);
    normalize_name(name) == need.name && compare(version, &need.version) == Some(Ordering::Equal)
}

/// A distribution's name, normalised for comparison (PEP 503).
fn normalize_name(name: &str) -> String {
    let parts: Vec<&str> = name.split(['-', '_', '.']).filter(|part| !part.is_empty()).collect();
    parts.join("-").to_ascii_lowercase()
}

/// Whether one C library is of the same family as another, and not older.
fn at_least(have: &str, need: &str) -> bool {
    let (Some((family, have)), Some((other, need))) = (have.split_once(' '), need.split_once(' '))
    else {
        return false;
    };
    family == other && matches!(compare(have, need), Some(Ordering::Equal | Ordering::Greater))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c_libraries_and_distributions_are_compared() {
        assert!(at_least("glibc 2.36", "glibc 2.36") && at_least("glibc 2.41", "glibc 2.36"));
        assert!(!at_least("glibc 2.31", "glibc 2.36") && !at_least("musl 2.41", "glibc 2.36"));
        let need = BaseRequirement { name: "six-seven".to_owned(), version: "1.16".to_owned() };
        assert!(is_of("Six_Seven-1.16.0.dist-info", &need));
        assert!(is_of("six_seven-1.16-py3.11.egg-info", &need));
        assert!(!is_of("six_seven-1.17.dist-info", &need) && !is_of("six-1.16.dist-info", &need));
    }
}
