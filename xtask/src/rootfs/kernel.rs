//! Kernel modules by rule: the modules that a board keeps, their dependencies, and their load
//! order. Based on `modules.dep` and `modules.builtin` only, never on names alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use super::glob;
use crate::exec::{self, Tool};

/// Which modules to keep.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ModuleRules {
    /// Patterns of modules or of directories below `lib/modules/<release>/kernel` (`fs/ext4`,
    /// `drivers/net/{phy,usb}`), without the compression suffix. Empty keeps all.
    pub keep: Vec<String>,
    /// Exceptions from `keep`; a module that a kept one needs is still kept.
    pub drop: Vec<String>,
}

/// The dependencies among a kernel's modules.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModuleIndex {
    /// Module path to the paths of its dependencies, as `modules.dep` lists them.
    needs: BTreeMap<String, Vec<String>>,
    /// The built-in modules, as `modules.builtin` lists them.
    builtin: BTreeSet<String>,
}

/// The module of that name, or all modules below the directory of that name.
fn module_patterns(pattern: &str) -> [String; 2] {
    [format!("kernel/{pattern}"), format!("kernel/{pattern}/**")]
}

impl ModuleIndex {
    /// Parses `modules.dep` and `modules.builtin`.
    pub fn new(dep: &str, builtin: &str) -> Self {
        let needs = dep.lines().filter_map(|line| line.split_once(':')).map(|(path, needs)| {
            (path.to_owned(), needs.split_whitespace().map(str::to_owned).collect())
        });
        let builtin = builtin.lines().map(|line| line.trim().to_owned());
        Self { needs: needs.collect(), builtin: builtin.collect() }
    }

    /// The patterns that match neither a module nor a built-in one.
    ///
    /// # Errors
    /// An invalid pattern.
    pub fn unmatched_patterns<'a>(&self, patterns: &'a [String]) -> Result<Vec<&'a str>> {
        let mut unmatched = Vec::new();
        for pattern in patterns {
            // A directory of modules or a single one: `fs/ext4` and `fs/fat/vfat.ko` are both fine.
            let one = glob::compile_globs(&module_patterns(pattern))?;
            let mut paths = self.needs.keys().chain(&self.builtin);
            if !paths.any(|path| one.is_match(without_suffix(path))) {
                unmatched.push(pattern.as_str());
            }
        }
        Ok(unmatched)
    }

    /// The kept modules with all their dependencies.
    ///
    /// # Errors
    /// When a pattern of `keep` matches neither a module nor a built-in one: it is misspelt, or the
    /// kernel changed.
    pub fn modules_to_keep(&self, rules: &ModuleRules) -> Result<BTreeSet<String>> {
        let unmatched = self.unmatched_patterns(&rules.keep)?;
        if !unmatched.is_empty() {
            bail!(
                "no module of this kernel matches '{}'\n\
                 help: correct `kernel.modules-keep` in the board's board.toml",
                unmatched.join("', '")
            );
        }
        let patterns: Vec<String> = rules.keep.iter().flat_map(|p| module_patterns(p)).collect();
        let (keep, drop) = (glob::compile_globs(&patterns)?, glob::compile_globs(&rules.drop)?);
        let asked = self.needs.keys().filter(|path| {
            let path = without_suffix(path);
            (rules.keep.is_empty() || keep.is_match(path)) && !drop.is_match(path)
        });
        let mut kept = BTreeSet::new();
        for path in asked {
            kept.extend(self.needs[path].iter().cloned());
            kept.insert(path.clone());
        }
        Ok(kept)
    }

    /// The named modules and their dependencies, each after its own dependencies.
    ///
    /// # Errors
    /// When this kernel has no such module, neither loadable nor built-in.
    pub fn load_order(&self, names: &[String]) -> Result<Vec<String>> {
        let by_name: BTreeMap<String, &String> =
            self.needs.keys().map(|path| (module_name(path), path)).collect();
        let mut order: Vec<String> = Vec::new();
        for name in names {
            let plain = module_name(name);
            let Some(path) = by_name.get(&plain) else {
                if self.builtin.iter().any(|path| module_name(path) == plain) {
                    continue;
                }
                bail!(
                    "module {name} is neither among the kept modules nor built into the kernel\n\
                     help: add it to the board's `kernel.modules-keep`, or remove it from the \
                     initrd's list"
                );
            };
            // depmod lists the dependencies with the last to load first.
            for needed in self.needs[*path].iter().rev().chain([*path]) {
                if !order.contains(needed) {
                    order.push(needed.clone());
                }
            }
        }
        Ok(order)
    }
}

/// `kernel/drivers/mmc/host/sdhci-iproc.ko` and `sdhci-iproc` are `sdhci_iproc` for the kernel.
fn module_name(path: &str) -> String {
    let file = path.trim().rsplit('/').next().unwrap_or_default();
    let stem = file.split(".ko").next().unwrap_or_default();
    stem.replace('-', "_")
}

/// The suffixes of modules that were compressed when the kernel was built (Linux,
/// `kernel/module/Kconfig`).
const COMPRESSED: [&str; 3] = [".gz", ".xz", ".zst"];

/// No module is larger than this when unpacked: 64 MiB; the largest of Debian's 6.12 have 7 MiB.
const LARGEST_MODULE: u64 = 64 << 20;

/// A module's path without its compression suffix: rules are the same for all kernels.
fn without_suffix(path: &str) -> &str {
    let stem = COMPRESSED.into_iter().find_map(|suffix| path.strip_suffix(suffix));
    stem.filter(|stem| stem.ends_with(".ko")).unwrap_or(path)
}

/// An uncompressed module: its path without the suffix, and its bytes.
///
/// # Errors
/// When it is damaged, or larger than any module.
pub fn unpack_module(path: &str, bytes: Vec<u8>) -> Result<(&str, Vec<u8>)> {
    let name = without_suffix(path);
    let packed = bytes.as_slice();
    let source: Box<dyn Read + '_> = match path.strip_prefix(name) {
        Some(".gz") => Box::new(flate2::read::MultiGzDecoder::new(packed)),
        Some(".xz") => Box::new(lzma_rust2::XzReader::new(packed, true)),
        Some(".zst") => {
            Box::new(zstd::Decoder::new(packed).with_context(|| format!("unpacking {path}"))?)
        }
        _ => return Ok((path, bytes)),
    };
    let mut module = Vec::new();
    let read = source.take(LARGEST_MODULE + 1).read_to_end(&mut module);
    read.with_context(|| format!("unpacking {path}"))?;
    ensure!(module.len() as u64 <= LARGEST_MODULE, "{path} unpacks to more than 64 MiB");
    Ok((name, module))
}

/// Removes the modules that the rules do not keep from `base/lib/modules/<release>`, and indexes
/// the others, with this `depmod` or the machine's. Returns how many were kept.
///
/// # Errors
/// When `depmod` is missing or fails, or a rule matches nothing.
pub fn prune_modules(
    base: &Utf8Path,
    release: &str,
    rules: &ModuleRules,
    depmod: Option<&Utf8Path>,
) -> Result<usize> {
    let dir = base.join("lib/modules").join(release);
    run_depmod(depmod, base, release)?;
    let read = |name: &str| {
        let path = dir.join(name);
        fs::read_to_string(&path).with_context(|| format!("reading {path}"))
    };
    let index = ModuleIndex::new(&read("modules.dep")?, &read("modules.builtin")?);
    let kept = index.modules_to_keep(rules)?;
    for path in index.needs.keys().filter(|path| !kept.contains(*path)) {
        let path = dir.join(path);
        fs::remove_file(&path).with_context(|| format!("removing {path}"))?;
    }
    remove_empty_dirs(&dir)?;
    run_depmod(depmod, base, release)?;
    Ok(kept.len())
}

fn run_depmod(depmod: Option<&Utf8Path>, base: &Utf8Path, release: &str) -> Result<()> {
    let program = depmod.map(Utf8Path::to_owned).or_else(|| exec::find_program("depmod"));
    let Some(program) = program else {
        bail!("depmod is missing\nhelp: sudo apt-get install kmod");
    };
    Tool::new(program).arg("-b").arg(base).arg(release).env("LC_ALL", "C").run()
}

fn remove_empty_dirs(dir: &Utf8Path) -> Result<bool> {
    let mut empty = true;
    for entry in dir.read_dir_utf8().with_context(|| format!("listing {dir}"))? {
        let entry = entry.with_context(|| format!("listing {dir}"))?;
        let is_dir =
            entry.file_type().with_context(|| format!("reading the type of {dir}"))?.is_dir();
        if !(is_dir && remove_empty_dirs(entry.path())?) {
            empty = false;
        }
    }
    if empty {
        fs::remove_dir(dir).with_context(|| format!("removing {dir}"))?;
    }
    Ok(empty)
}

/// The kernel files of an unpacked package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelFiles {
    /// `boot/vmlinuz-<release>`.
    pub image: Utf8PathBuf,
    /// `boot/config-<release>`.
    pub config: Utf8PathBuf,
    /// The release itself.
    pub release: String,
}

/// Finds the kernel in the directory of its unpacked package.
///
/// # Errors
/// When there is none, or more than one.
pub fn find_kernel(unpacked: &Utf8Path) -> Result<KernelFiles> {
    let boot = unpacked.join("boot");
    let mut releases = Vec::new();
    if boot.is_dir() {
        for entry in boot.read_dir_utf8().with_context(|| format!("listing {boot}"))? {
            let entry = entry.with_context(|| format!("listing {boot}"))?;
            releases.extend(entry.file_name().strip_prefix("vmlinuz-").map(str::to_owned));
        }
    }
    let [release] = releases.as_slice() else {
        bail!(
            "expected one kernel among the unpacked packages, found {}\n\
             help: list exactly one linux-image package in `unpacked` of [rootfs]",
            releases.len()
        );
    };
    Ok(KernelFiles {
        image: boot.join(format!("vmlinuz-{release}")),
        config: boot.join(format!("config-{release}")),
        release: release.clone(),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::{ModuleIndex, ModuleRules, unpack_module};

    const DEP: &str = "kernel/a/ext4.ko: kernel/a/jbd2.ko kernel/a/crc.ko\nkernel/a/jbd2.ko: kernel/a/crc.ko\n\
         kernel/a/crc.ko:\nkernel/b/sdhci-iproc.ko: kernel/b/sdhci.ko\nkernel/b/sdhci.ko:\n";

    fn index() -> ModuleIndex {
        // Built-in modules have no suffix in a kernel with compressed modules either.
        ModuleIndex::new(DEP, "kernel/c/loop.ko\n")
    }

    #[test]
    fn what_a_module_needs_is_loaded_before_it() {
        let names = ["ext4", "loop", "sdhci_iproc"].map(str::to_owned);
        let order = index().load_order(&names).expect("all are there");
        let expected = ["a/crc", "a/jbd2", "a/ext4", "b/sdhci", "b/sdhci-iproc"];
        assert_eq!(order, expected.map(|name| format!("kernel/{name}.ko")));
    }

    #[test]
    fn an_unknown_module_and_a_rule_without_match_are_errors() {
        let error = index().load_order(&["nonesuch".to_owned()]).unwrap_err().to_string();
        assert!(error.starts_with("module nonesuch is neither"), "{error}");
        let rules = ModuleRules { keep: vec!["x".into()], drop: vec![] };
        let error = index().modules_to_keep(&rules).unwrap_err().to_string();
        assert!(error.starts_with("no module of this kernel matches 'x'"), "{error}");
    }

    #[test]
    fn a_rule_for_what_is_built_in_is_fine_and_keeps_nothing() {
        let rules = ModuleRules { keep: vec!["c/loop.ko".into(), "c".into()], drop: vec![] };
        assert_eq!(index().modules_to_keep(&rules).expect("built in").len(), 0);
    }

    #[test]
    fn dependencies_of_kept_modules_stay() {
        let rules =
            ModuleRules { keep: vec!["a/ext4.ko".into()], drop: vec!["kernel/a/crc.ko".into()] };
        assert_eq!(index().modules_to_keep(&rules).expect("matches").len(), 3);
    }

    #[test]
    fn rules_and_names_are_the_same_for_compressed_modules() {
        for suffix in ["", ".gz", ".xz", ".zst"] {
            let compressed = |path: &str| path.replace(".ko", &format!(".ko{suffix}"));
            let index = ModuleIndex::new(&compressed(DEP), "kernel/c/loop.ko\n");
            let rules = |keep: &str, drop: &str| {
                let one = |text: &str| if text.is_empty() { vec![] } else { vec![text.to_owned()] };
                ModuleRules { keep: one(keep), drop: one(drop) }
            };
            let paths = |list: &[&str]| list.iter().map(|path| compressed(path)).collect();
            let all = ["kernel/a/crc.ko", "kernel/a/ext4.ko", "kernel/a/jbd2.ko"];
            assert_eq!(index.modules_to_keep(&rules("a/ext4.ko", "")).expect("one"), paths(&all));
            let rest = ["kernel/a/crc.ko", "kernel/a/jbd2.ko"];
            assert_eq!(
                index.modules_to_keep(&rules("a", "kernel/a/ext4.ko")).expect("two"),
                paths(&rest)
            );
            assert_eq!(
                index.modules_to_keep(&rules("c/loop.ko", "")).expect("built in"),
                paths(&[])
            );
            let order = index.load_order(&["sdhci_iproc".to_owned()]).expect("there");
            let expected = ["kernel/b/sdhci.ko", "kernel/b/sdhci-iproc.ko"];
            assert_eq!(order, expected.map(compressed));
        }
    }

    #[test]
    fn a_compressed_module_becomes_a_plain_one() {
        let module = b"\x7fELF and what follows".repeat(1000);
        let gzip = |bytes: &[u8]| {
            let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
            out.write_all(bytes).expect("a vector takes all");
            out.finish().expect("a vector takes all")
        };
        let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 3).expect("a vector takes all");
        // xtask/tests/debian.rs has one of `xz`.
        let forms = [("", module.clone()), (".gz", gzip(&module)), (".zst", zstd(&module))];
        for (suffix, bytes) in forms {
            let path = format!("kernel/a/ext4.ko{suffix}");
            let (name, plain) = unpack_module(&path, bytes.clone()).expect("whole");
            assert_eq!(name, "kernel/a/ext4.ko");
            assert!(plain == module, "{path}");
            if !suffix.is_empty() {
                let cut = bytes[..bytes.len() - 9].to_vec();
                let error = unpack_module(&path, cut).expect_err("cut short").to_string();
                assert_eq!(error, format!("unpacking {path}"));
            }
        }
        // Nothing else is unpacked, whatever it is called.
        assert_eq!(
            unpack_module("modules.gz", vec![1]).expect("as it is"),
            ("modules.gz", vec![1])
        );
        for (suffix, bytes) in [(".zst", zstd(&vec![0; (64 << 20) + 1])), (".gz", vec![7; 20])] {
            unpack_module(&format!("kernel/x.ko{suffix}"), bytes).expect_err("too large, damaged");
        }
    }
}
