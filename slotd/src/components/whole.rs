//! Checks whether unpacked files are unchanged, by the stored hashes of each wheel's files: before a wheel is reused,
//! for `slotd verify --component api`, and to repair versions with links to files that the card has damaged.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bundle::component::{API, ComponentLock, ComponentWheel, LOCK_ROLE, TREE_TIME};
use serde::Serialize;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::{ApiDir, NEW, failed, retention, state, tree};
use crate::events::EventLog;
use crate::files::make_dirs;
use crate::refusal::{Refusal, Result};
use crate::root::RootDir;

/// The file at the top of a wheel's tree with the hashes of all others; no wheel may have a file with a dot there.
pub(super) const SUM: &str = ".sum";

/// Bytes per read.
const CHUNK: usize = 256 << 10;

/// Maximum bytes in [`SUM`] per file: hash, mode, two blanks, path, terminator.
const LINE: u64 = 64 + 4 + 2 + bundle::MAX_TREE_PATH as u64 + 1;

/// Maximum number of places that a refusal lists.
const LISTED: usize = 20;

/// The directories that Python adds to a version at run time; Python itself compares them with the sources.
const CACHE: &str = "__pycache__";

/// Each file's SHA-256 and mode, by its path in the tree.
type Sums = BTreeMap<PathBuf, String>;

/// The result of `verify --component api`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ApiVerifyOutcome {
    /// The component.
    pub component: &'static str,
    /// Number of installed versions, including the one that serves.
    pub versions: usize,
    /// Number of their wheels, each counted once.
    pub wheels: usize,
    /// Bytes of all files; a file with several names is counted once.
    pub size: u64,
}

/// All names below a directory that are not directories, except [`SUM`] at its top.
fn file_names_below(top: &Path) -> io::Result<BTreeSet<PathBuf>> {
    let (mut names, mut waiting) = (BTreeSet::new(), vec![PathBuf::new()]);
    while let Some(below) = waiting.pop() {
        for entry in fs::read_dir(top.join(&below))? {
            let entry = entry?;
            let name = below.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                waiting.push(name);
            } else if name != Path::new(SUM) {
                names.insert(name);
            }
        }
    }
    Ok(names)
}

/// A file's SHA-256 and mode, as in [`SUM`].
pub(super) fn hash_file(path: &Path) -> io::Result<String> {
    if !fs::symlink_metadata(path)?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut file = fs::File::open(path)?;
    let (mut hash, mut chunk) = (Sha256::new(), vec![0; CHUNK]);
    loop {
        match file.read(&mut chunk)? {
            0 => break,
            n => hash.update(chunk.get(..n).unwrap_or_default()),
        }
    }
    let mode = file.metadata()?.mode() & 0o7777;
    Ok(format!("{} {mode:o}", bundle::index::to_hex(&hash.finalize())))
}

/// The content of [`SUM`] for a tree: hash, mode and path of each file, terminated by a zero byte.
pub(super) fn hash_tree(top: &Path) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    for name in file_names_below(top)? {
        all.extend(hash_file(&top.join(&name))?.bytes());
        all.push(b' ');
        all.extend(name.as_os_str().as_bytes());
        all.push(0);
    }
    Ok(all)
}

/// The stored hashes of a wheel's tree; `None`: missing or damaged.
fn read_stored_sums(place: &ApiDir<'_>, wheel: &ComponentWheel) -> Option<Sums> {
    let most = wheel.files.saturating_mul(LINE);
    let mut bytes = Vec::new();
    let file = fs::File::open(place.wheels().join(&wheel.tree).join(SUM)).ok()?;
    file.take(most.saturating_add(1)).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8(bytes).ok()?;
    let mut sums = Sums::new();
    for line in text.strip_suffix('\0')?.split('\0') {
        let mut parts = line.splitn(3, ' ');
        let (hash, mode, path) = (parts.next()?, parts.next()?, parts.next()?);
        sums.insert(path.into(), format!("{hash} {mode}"));
    }
    (sums.len() as u64 == wheel.files).then_some(sums)
}

/// Whether a wheel's tree is present and unchanged, by the hash of each file: bit rot on a card changes neither lengths
/// nor times. A tree without stored hashes, from an older agent, is treated as absent and is unpacked again.
pub(super) fn is_unchanged(place: &ApiDir<'_>, wheel: &ComponentWheel) -> bool {
    let top = place.wheels().join(&wheel.tree);
    let Some(kept) = read_stored_sums(place, wheel) else { return false };
    let same = |(name, expected): (&PathBuf, &String)| {
        let path = top.join(name);
        // Python compares a cache with its source by the source's time.
        fs::metadata(&path).is_ok_and(|about| about.mtime() == TREE_TIME as i64)
            && hash_file(&path).is_ok_and(|found| found == *expected)
    };
    file_names_below(&top).is_ok_and(|names| names.len() == kept.len()) && kept.iter().all(same)
}

/// In versions other than `folder`, replaces damaged files and copies from a backup by links to the wheels of a lock,
/// which are all present and intact. A version that cannot be rebuilt is not changed and does not fail the install;
/// the event `api-not-healed` says why.
pub(super) fn repair_versions(
    place: &ApiDir<'_>,
    lock: &ComponentLock,
    folder: &str,
    events: &EventLog,
) {
    let versions = retention::installed_versions(place).unwrap_or_default();
    for name in versions.into_iter().filter(|name| name != folder) {
        let Ok(theirs) = state::read_lock(place, &name) else { continue };
        let here = |wheel: &&ComponentWheel| lock.wheels.iter().any(|ours| ours.tree == wheel.tree);
        let shared: Vec<&ComponentWheel> = theirs.wheels.iter().filter(here).collect();
        let trees: Vec<PathBuf> = shared.iter().map(|w| place.wheels().join(&w.tree)).collect();
        if is_linked_to(&trees, &place.version(&name)) {
            continue;
        }
        if let Err(refusal) = rebuild_version(place, &shared, &name) {
            events.add("api-not-healed", json!({ "folder": name, "error": refusal }));
        }
    }
}

/// Whether a version's files are links to these trees, not other files with the same names. A file that several wheels
/// have may be a link to any of them.
fn is_linked_to(trees: &[PathBuf], version: &Path) -> bool {
    let inode = |path: PathBuf| fs::symlink_metadata(path).ok().map(|about| about.ino());
    let theirs = |name: &PathBuf| {
        let own = inode(version.join(name));
        own.is_some() && trees.iter().any(|tree| inode(tree.join(name)) == own)
    };
    trees.iter().all(|tree| file_names_below(tree).is_ok_and(|names| names.iter().all(theirs)))
}

/// Rebuilds a version next to itself, from these wheels and its other files, and exchanges the two.
fn rebuild_version(place: &ApiDir<'_>, wheels: &[&ComponentWheel], name: &str) -> Result<()> {
    let (path, new) = (place.version(name), place.version(&format!("{name}{NEW}")));
    place.clear(&new)?;
    for wheel in wheels {
        tree::link_wheel(place, wheel, &new)?;
    }
    for file in file_names_below(&path).map_err(failed("reading", &path))? {
        let (from, to) = (path.join(&file), new.join(&file));
        if to.exists() {
            continue;
        }
        let folder = to.parent().unwrap_or(&new);
        make_dirs(place.files, folder)
            .and_then(|_| place.files.link(&from, &to))
            .map_err(failed("linking", &from))?;
    }
    place.exchange(&new, &path)
}

/// Compares each file of each wheel and of each version with the hashes stored when it was unpacked, and each version's
/// lock with its name. Nothing is written.
///
/// # Errors
/// `api-differs`, with the files. `io`: the directory of the versions cannot be read.
pub(crate) fn verify(root: &RootDir) -> Result<ApiVerifyOutcome> {
    let place = &ApiDir::for_reading(root);
    let mut check = Check { known: BTreeMap::new(), size: 0, places: Vec::new() };
    let mut wheels: BTreeMap<String, (String, Option<Sums>)> = BTreeMap::new();
    let versions = retention::installed_versions(place)?;
    for version in &versions {
        let lock = match state::read_lock(place, version) {
            Ok(lock) => lock,
            Err(why) => {
                check.places.push(format!("{version}: {why}"));
                continue;
            }
        };
        let mut expected = Sums::new();
        let mut all_known = true;
        for wheel in &lock.wheels {
            let top = place.wheels().join(&wheel.tree);
            let (_, sums) = wheels.entry(wheel.tree.clone()).or_insert_with(|| {
                let (label, sums) = (
                    format!("wheel {} {}", wheel.name, wheel.version),
                    read_stored_sums(place, wheel),
                );
                match &sums {
                    Some(sums) => check.folder(&label, &top, sums, false),
                    None => check.places.push(format!(
                        "{label}: the stored hashes of its files are missing or damaged"
                    )),
                }
                (label, sums)
            });
            all_known &= sums.is_some();
            expected.extend(sums.iter().flatten().map(|(name, sum)| (name.clone(), sum.clone())));
        }
        let own = place.version(version).join(LOCK_ROLE);
        let id = fs::read(&own).map(|json| bundle::index::to_hex(&bundle::index::sha256(&json)));
        if !id.is_ok_and(|id| version.ends_with(&format!("-{}", id.get(..8).unwrap_or("?")))) {
            check
                .places
                .push(format!("{version}: {LOCK_ROLE} does not match the directory's name"));
        }
        if let Ok(sum) = hash_file(&own) {
            expected.insert(LOCK_ROLE.into(), sum);
        }
        check.folder(version, &place.version(version), &expected, !all_known);
    }
    if check.places.is_empty() {
        let (versions, wheels) = (versions.len(), wheels.len());
        return Ok(ApiVerifyOutcome { component: API, versions, wheels, size: check.size });
    }
    let mut message = format!("the API on data differs in {} places", check.places.len());
    for place in check.places.iter().take(LISTED) {
        message.push_str("\n  ");
        message.push_str(place);
    }
    if check.places.len() > LISTED {
        message.push_str(&format!("\n  and {} more places", check.places.len() - LISTED));
    }
    Err(Refusal::new(
        "api-differs",
        message,
        "install the bundle of each named version again: this unpacks the files that differ again, for all versions \
         that use them; if it happens twice, replace the card",
    ))
}

/// The comparison's progress.
struct Check {
    /// The hash of each file, by device and inode: versions share files.
    known: BTreeMap<(u64, u64), String>,
    size: u64,
    places: Vec<String>,
}

impl Check {
    /// Compares a directory's files; `open`: it may have other files too.
    fn folder(&mut self, label: &str, top: &Path, expected: &Sums, open: bool) {
        for (name, expected) in expected {
            let why = match self.file(&top.join(name)) {
                Ok(found) if found == *expected => continue,
                Ok(_) => "the file has changed since it was unpacked".to_owned(),
                Err(error) => error.to_string(),
            };
            self.places.push(format!("{label}: {}: {why}", name.display()));
        }
        let found = match file_names_below(top) {
            Ok(found) => found,
            Err(error) => return self.places.push(format!("{label}: {error}")),
        };
        let more = |name: &&PathBuf| {
            !open && !expected.contains_key(*name) && !name.iter().any(|part| part == CACHE)
        };
        for name in found.iter().filter(more) {
            self.places.push(format!("{label}: {}: no wheel has this file", name.display()));
        }
    }

    fn file(&mut self, path: &Path) -> io::Result<String> {
        let about = fs::symlink_metadata(path)?;
        let key = (about.dev(), about.ino());
        if let Some(found) = self.known.get(&key) {
            return Ok(found.clone());
        }
        let found = hash_file(path)?;
        self.size += about.len();
        self.known.insert(key, found.clone());
        Ok(found)
    }
}
