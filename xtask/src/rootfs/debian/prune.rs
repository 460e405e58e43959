//! Prune rules, which are data, and the few files whose content must not depend on the date.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::rootfs::glob;
use crate::rootfs::tree::{FileData, RootEntry, RootEntryKind, RootPath, RootTree};

/// Seconds of a day, the unit of /etc/shadow.
const DAY: u64 = 86_400;

/// What to remove from a root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct PruneRules {
    /// Patterns of paths to remove (see [`glob::compile_globs`]).
    pub drop: Vec<String>,
    /// Patterns of paths to keep although `drop` matches.
    pub keep: Vec<String>,
}

impl PruneRules {
    /// The rules for every Debian root: documentation, translations, and files that differ between
    /// runs.
    ///
    /// # Errors
    /// When the built-in table is malformed; a test checks it.
    pub fn standard() -> Result<Self> {
        toml::from_str(include_str!("prune.toml")).context("reading the standard prune rules")
    }
}

/// Applies the rules; a hard link to a removed file becomes the file, directories of kept files are
/// kept.
pub(in crate::rootfs) fn prune_tree(tree: &mut RootTree, rules: &PruneRules) -> Result<()> {
    let (drop, keep) = (glob::compile_globs(&rules.drop)?, glob::compile_globs(&rules.keep)?);
    let drops = |path: &str| drop.is_match(path) && !keep.is_match(path);
    let doomed: Vec<RootPath> =
        tree.entries.keys().filter(|name| drops(name.path())).cloned().collect();
    let parents: std::collections::BTreeSet<String> = tree
        .entries
        .keys()
        .filter(|name| !drops(name.path()))
        .flat_map(|name| name.parents().map(str::to_owned))
        .collect();
    let mut removed = std::collections::BTreeMap::new();
    for name in doomed {
        if parents.contains(name.path()) {
            continue;
        }
        if let Some(entry) = tree.entries.remove(&name) {
            removed.insert(name, entry);
        }
    }
    // The first remaining link to a removed file gets its content, the others link to that.
    let mut heirs: std::collections::BTreeMap<RootPath, RootPath> =
        std::collections::BTreeMap::new();
    for (name, entry) in &mut tree.entries {
        let RootEntryKind::Hardlink(target) = &entry.kind else { continue };
        let Some(file) = removed.get(target) else { continue };
        match heirs.get(target) {
            Some(heir) => entry.kind = RootEntryKind::Hardlink(heir.clone()),
            None => {
                heirs.insert(target.clone(), name.clone());
                *entry = file.clone();
            }
        }
    }
    Ok(())
}

/// Replaces the build's date in files by the epoch.
pub(in crate::rootfs) fn normalise_dates(tree: &mut RootTree, epoch: u64) -> Result<()> {
    if let Some(shadow) = tree.bytes("etc/shadow")? {
        let text = String::from_utf8(shadow).context("/etc/shadow is not UTF-8")?;
        set_bytes(tree, "etc/shadow", shadow_of_day(&text, epoch / DAY).into_bytes());
    }
    // A timestamp from the future would be clamped in the tar, but not in caches that contain it.
    for entry in tree.entries.values_mut() {
        entry.mtime = Some(entry.mtime.map_or(epoch, |time| time.min(epoch)));
    }
    rewrite_bytecode(tree)
}

/// `name:password:day of last change:…`: an existing day is replaced by ours.
fn shadow_of_day(text: &str, day: u64) -> String {
    text.lines().fold(String::with_capacity(text.len()), |mut out, line| {
        let mut fields: Vec<String> = line.split(':').map(str::to_owned).collect();
        if let Some(changed) = fields.get_mut(2).filter(|field| !field.is_empty()) {
            *changed = day.to_string();
        }
        out.push_str(&fields.join(":"));
        out.push('\n');
        out
    })
}

/// Python recompiles at every start when the time in a `.pyc` on a read-only root differs from its
/// source's time. The tar's times are clamped, so the times in `.pyc` files are set to those of the
/// tar. With SOURCE_DATE_EPOCH Debian's scripts create `.pyc` files with the source's hash instead,
/// which Python verifies by reading the source; this check is switched off, since the root cannot
/// change.
fn rewrite_bytecode(tree: &mut RootTree) -> Result<()> {
    let compiled: Vec<String> = tree
        .entries
        .keys()
        .map(RootPath::path)
        .filter(|path| path.ends_with(".pyc") && path.contains("/__pycache__/"))
        .map(str::to_owned)
        .collect();
    for path in compiled {
        let Some(source) = source_of(&path) else { continue };
        let Some(RootEntry { mtime: Some(mtime), kind: RootEntryKind::File(data), .. }) =
            tree.get(&source)
        else {
            continue;
        };
        let (mtime, size) = (*mtime, data.size());
        let Some(mut bytes) = tree.bytes(&path)? else { continue };
        // PEP 552: magic, flags (0: checked by time and size), time, size; little-endian.
        let Some(header) = bytes.get_mut(..16) else { bail!("{path} is too short") };
        match header[4..8] {
            [0, 0, 0, 0] => {}
            // Bit 0: by hash. Bit 1: check the hash.
            [3, 0, 0, 0] => {
                header[4] = 1;
                set_bytes(tree, &path, bytes);
                continue;
            }
            _ => continue,
        }
        let quoted = u32::from_le_bytes([header[12], header[13], header[14], header[15]]);
        if u64::from(quoted) != size & 0xffff_ffff {
            bail!("{path} was compiled from another {source}: of {quoted} bytes, found {size}");
        }
        let time = u32::try_from(mtime & 0xffff_ffff).unwrap_or(0).to_le_bytes();
        if header[8..12] != time {
            header[8..12].copy_from_slice(&time);
            set_bytes(tree, &path, bytes);
        }
    }
    Ok(())
}

/// `a/__pycache__/b.cpython-311.pyc` was compiled from `a/b.py`.
fn source_of(compiled: &str) -> Option<String> {
    let (dir, file) = compiled.rsplit_once("/__pycache__/")?;
    Some(format!("{dir}/{}.py", file.split(".cpython-").next()?))
}

fn set_bytes(tree: &mut RootTree, path: &str, bytes: Vec<u8>) {
    if let Some(entry) = tree.entries.get_mut(&RootPath::new(path)) {
        entry.kind = RootEntryKind::File(FileData::Bytes(bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::{PruneRules, shadow_of_day, source_of};

    #[test]
    fn the_standard_rules_read_and_keep_copyright() {
        let rules = PruneRules::standard().expect("the table is well-formed");
        let drop = crate::rootfs::glob::compile_globs(&rules.drop).expect("well-formed");
        let keep = crate::rootfs::glob::compile_globs(&rules.keep).expect("well-formed");
        let drops = |path: &str| drop.is_match(path) && !keep.is_match(path);
        assert!(drops("usr/share/doc/bash/README") && drops("etc/ssh/ssh_host_rsa_key"));
        assert!(!drops("usr/share/doc/bash/copyright") && !drops("usr/bin/bash"));
    }

    #[test]
    fn shadow_and_bytecode_are_tied_to_the_epoch() {
        assert_eq!(
            shadow_of_day("root:*:20000:0:99999:7:::\nx:!::::::\n", 5),
            "root:*:5:0:99999:7:::\nx:!::::::\n"
        );
        assert_eq!(source_of("a/__pycache__/b.cpython-311.pyc").as_deref(), Some("a/b.py"));
    }
}
