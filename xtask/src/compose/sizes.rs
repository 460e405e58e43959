//! Reports the space used by package, by directory and by file of the composed tree, and checks the
//! budget of the slot.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Result, bail};

use crate::progress::format_bytes;
use crate::rootfs::tree::{EntryOrigin, RootEntryKind, RootTree};

/// A name and its bytes.
pub type NamedSize = (String, u64);

/// How the space of a root filesystem is used.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
pub struct SpaceUsage {
    /// Bytes by Debian package, as installed after pruning; largest first.
    pub packages: Vec<NamedSize>,
    /// Bytes by directory down to three levels, largest first.
    pub directories: Vec<NamedSize>,
    /// The largest files, largest first.
    pub files: Vec<NamedSize>,
}

/// The number of the largest files to list.
const LARGEST: usize = 30;

/// Measures a tree.
///
/// # Errors
/// When a package's file list cannot be read.
pub fn measure_tree(tree: &RootTree) -> Result<SpaceUsage> {
    let mut owner: HashMap<String, String> = HashMap::new();
    for (path, _) in tree.iter() {
        let Some(list) =
            path.strip_prefix("var/lib/dpkg/info/").and_then(|p| p.strip_suffix(".list"))
        else {
            continue;
        };
        let package = list.split(':').next().unwrap_or(list);
        for line in String::from_utf8_lossy(&tree.read(path)?).lines() {
            owner.insert(line.trim_start_matches('/').to_owned(), package.to_owned());
        }
    }
    let mut packages: BTreeMap<String, u64> = BTreeMap::new();
    let mut directories: BTreeMap<String, u64> = BTreeMap::new();
    let mut files = Vec::new();
    for (path, entry) in tree.iter() {
        if !matches!(entry.kind, RootEntryKind::File(_)) {
            continue;
        }
        let size = entry.size();
        files.push((format!("/{path}"), size));
        for (depth, (at, _)) in path.match_indices('/').enumerate() {
            if depth < 3 {
                *directories.entry(format!("/{}", &path[..at])).or_default() += size;
            }
        }
        if entry.origin == EntryOrigin::Base {
            // Packages list their files with the path before the merge of /usr.
            let name = owner.get(path).or_else(|| owner.get(path.strip_prefix("usr/")?));
            let name = match name {
                Some(name) => name.clone(),
                None if path.starts_with("usr/lib/modules/") => "linux modules".to_owned(),
                None => continue,
            };
            *packages.entry(name).or_default() += size;
        }
    }
    let mut largest = files;
    sort_by_size(&mut largest);
    largest.truncate(LARGEST);
    let mut packages: Vec<_> = packages.into_iter().collect();
    let mut directories: Vec<_> = directories.into_iter().collect();
    sort_by_size(&mut packages);
    sort_by_size(&mut directories);
    Ok(SpaceUsage { packages, directories, files: largest })
}

fn sort_by_size(list: &mut [NamedSize]) {
    list.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
}

/// Compares the used share of the slot with the product's limits; returns a warning as text.
///
/// # Errors
/// When the limit is exceeded.
pub fn check_budget(
    used: u64,
    capacity: u64,
    limit: u32,
    warning: u32,
    sizes: &SpaceUsage,
    product_file: &str,
) -> Result<Option<String>> {
    let share = |percent: u32| capacity / 100 * u64::from(percent);
    let largest: Vec<String> =
        sizes.packages.iter().take(5).map(|(n, s)| format!("{n} {}", format_bytes(*s))).collect();
    let facts = format!(
        "the root filesystem uses {} of {} ({} %)",
        format_bytes(used),
        format_bytes(capacity),
        used * 100 / capacity.max(1)
    );
    let largest = largest.join(", ");
    if used > share(limit) {
        bail!(
            "{facts}, more than `fill-limit` ({limit} %) allows; the largest packages: {largest}\n\
             help: remove packages, or raise the size of root-a and root-b in board.toml, or \
             `rootfs.fill-limit` in {product_file}"
        );
    }
    Ok((used > share(warning)).then(|| {
        format!("{facts}, above `fill-warning` ({warning} %); the largest packages: {largest}")
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_slot_fails_and_a_nearly_full_one_warns() {
        let sizes =
            SpaceUsage { packages: vec![("libc6".into(), 5 << 20)], ..SpaceUsage::default() };
        let try_with =
            |used: u64| check_budget(used << 20, 100 << 20, 95, 85, &sizes, "configs/x.toml");
        assert!(try_with(80).expect("fits").is_none());
        assert!(try_with(90).expect("fits").is_some_and(|w| w.contains("libc6 5.0 MiB")));
        let error = try_with(96).expect_err("too full").to_string();
        assert!(error.contains("uses 96 MiB of 100 MiB (96 %)"), "{error}");
        assert!(error.contains("rootfs.fill-limit"), "{error}");
    }
}
