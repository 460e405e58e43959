//! From a finished Buildroot output directory to a `BaseSystem`: the same value that every engine
//! returns, so that later stages do not depend on the engine.

use std::fs;

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};

use super::expr::KconfigValues;
use super::info::BuildrootInfo;
use super::make::BuildrootSetup;
use crate::artifact::{Artifact, write_atomically};
use crate::plan::fragment;
use crate::progress::warn;
use crate::rootfs::debian::prune::{self, PruneRules};
use crate::rootfs::kernel::{self, ModuleIndex, ModuleRules};
use crate::rootfs::parts::{compress_kernel, copy_file, copy_matches, files_below};
use crate::rootfs::tree::{EntryOrigin, FileData, RootEntry, RootEntryKind, RootTree};
use crate::rootfs::{BasePackage, BaseSystem, InitrdParts, PythonDistribution, RootPython};
use crate::scratch::create_scratch_dir;

/// What to collect.
#[derive(Debug)]
pub struct CollectRequest<'a> {
    /// Globs of device trees below `images`; each must match.
    pub device_trees: &'a [String],
    /// Globs of firmware below `images`; each must match.
    pub firmware: &'a [String],
    /// The boot loader below `images`.
    pub bootloader: Option<&'a str>,
    /// Which kernel modules stay (`kernel.modules-keep`); empty keeps all.
    pub modules: &'a [String],
    /// What to remove from the root.
    pub prune: &'a PruneRules,
    /// Debian's name for the architecture.
    pub arch: &'a str,
    /// The latest modification time of a file (seconds since 1970).
    pub epoch: u64,
}

/// Creates the base from the build's output, in `out`.
///
/// # Errors
/// When something that a board needs was not built; when the configuration of the kernel, the boot
/// loader or busybox lost a line of its fragment.
pub fn collect_base(
    setup: &BuildrootSetup,
    info: &BuildrootInfo,
    wants: &CollectRequest<'_>,
    out: &Utf8Path,
) -> Result<BaseSystem> {
    fs::create_dir_all(out).with_context(|| format!("creating {out}"))?;
    require_fragments(setup, info)?;
    let images = setup.output.join("images");
    let linux = build_dir(setup, info, "linux")?;
    let release_file = linux.join("include/config/kernel.release");
    let release = fs::read_to_string(&release_file)
        .with_context(|| format!("reading {release_file}"))?
        .trim()
        .to_owned();
    let mut tree = RootTree::from_tar(&images.join("rootfs.tar"))?;
    let modules = out.join("modules.tar");
    keep_modules(setup, &mut tree, &release, wants.modules)?;
    let module_tree = modules_of(&tree, &release)?;
    write_atomically(&modules, |w| module_tree.write(wants.epoch, w))?;
    let busybox = out.join("busybox");
    let bytes = tree
        .read("usr/bin/busybox")
        .context("the initrd needs a busybox\nhelp: do not remove BR2_PACKAGE_BUSYBOX=y")?;
    ensure!(
        is_static(&bytes),
        "busybox is linked dynamically, so the initrd cannot run it\n\
         help: CONFIG_STATIC=y must stay in external/busybox/busybox.fragment"
    );
    write_atomically(&busybox, |w| Ok(w.write_all(&bytes)?))?;
    let python = find_python(&tree, info)?;
    let glibc = read_glibc_version(&tree)?;
    prune::prune_tree(&mut tree, wants.prune)?;
    prune::normalise_dates(&mut tree, wants.epoch)?;
    let rootfs = out.join("rootfs.tar");
    write_atomically(&rootfs, |w| tree.write(wants.epoch, w))?;

    let image = ["Image.gz", "Image"].map(|n| images.join(n)).into_iter().find(|p| p.is_file());
    let image = image.with_context(|| format!("{images} has neither Image.gz nor Image"))?;
    let (kernel, unpacked) = compress_kernel(&image, &out.join("kernel.gz"))?;
    let help = "the board's fragment decides what is built there";
    let trees = wants.device_trees;
    Ok(BaseSystem {
        engine: "buildroot".to_owned(),
        rootfs: Artifact::from_file(rootfs)?,
        rootfs_bytes: tree.file_bytes(),
        kernel,
        kernel_unpacked_bytes: unpacked,
        kernel_config: copy_file(&linux.join(".config"), &out.join("kernel.config"))?,
        packages: list_packages(setup, info, wants.arch, &release)?,
        kernel_release: release,
        dtbs: copy_matches(&images, trees, &out.join("dtbs"), "device tree", help)?,
        initrd_parts: InitrdParts {
            busybox: Artifact::from_file(busybox)?,
            modules: Artifact::from_file(modules)?,
        },
        firmware: copy_matches(&images, wants.firmware, &out.join("firmware"), "firmware", help)?,
        bootloader: wants
            .bootloader
            .map(|path| copy_file(&images.join(path), &out.join("u-boot.bin")))
            .transpose()
            .context("copying the boot loader")?,
        python,
        glibc,
    })
}

/// The packages; a kernel from a tarball has the meaningless version `custom`.
fn list_packages(
    setup: &BuildrootSetup,
    info: &BuildrootInfo,
    arch: &str,
    release: &str,
) -> Result<Vec<BasePackage>> {
    let mut packages = info.contents(setup, arch)?;
    for package in packages.iter_mut().filter(|p| p.name == "linux") {
        package.version = release.to_owned();
    }
    Ok(packages)
}

/// A package's build directory.
fn build_dir(setup: &BuildrootSetup, info: &BuildrootInfo, package: &str) -> Result<Utf8PathBuf> {
    let entry = info.0.get(package);
    let entry = entry.with_context(|| format!("the configuration does not build {package}"))?;
    Ok(setup.output.join(&entry.stamp_dir))
}

/// Removes the modules that the board does not keep, and indexes the others with the `depmod` that
/// Buildroot built. A board's list is for the kernels of both engines: an entry that this kernel does
/// not have is a warning.
fn keep_modules(
    setup: &BuildrootSetup,
    tree: &mut RootTree,
    release: &str,
    keep: &[String],
) -> Result<()> {
    if keep.is_empty() {
        return Ok(());
    }
    let below = format!("usr/lib/modules/{release}");
    let all = modules_of(tree, release)?;
    let text = |name: &str| Ok::<_, anyhow::Error>(String::from_utf8(all.read(name)?)?);
    let index = ModuleIndex::new(&text("modules.dep")?, &text("modules.builtin")?);
    let unmatched = index.unmatched_patterns(keep)?;
    let matched: Vec<String> =
        keep.iter().filter(|entry| !unmatched.contains(&entry.as_str())).cloned().collect();
    ensure!(
        !matched.is_empty(),
        "no module of this kernel matches an entry of `kernel.modules-keep`\n\
         help: correct the list in the board's board.toml, or the kernel's fragment"
    );
    if !unmatched.is_empty() {
        warn(format!(
            "this kernel has no module for these entries of `kernel.modules-keep`, neither loadable \
             nor built-in: {}",
            unmatched.join(", ")
        ));
    }
    let (_guard, scratch) = create_scratch_dir()?;
    let dir = scratch.join("lib/modules").join(release);
    for (path, _) in all.iter().filter(|(_, e)| matches!(e.kind, RootEntryKind::File(_))) {
        let file = dir.join(path);
        let parent = file.parent().context("a module has a directory")?;
        fs::create_dir_all(parent).with_context(|| format!("creating {parent}"))?;
        fs::write(&file, all.read(path)?).with_context(|| format!("writing {file}"))?;
    }
    let depmod = setup.output.join("host/sbin/depmod");
    let rules = ModuleRules { keep: matched, drop: Vec::new() };
    let built = depmod.is_file().then_some(depmod.as_path());
    kernel::prune_modules(&scratch, release, &rules, built)?;
    tree.remove(&below);
    for file in files_below(&dir)? {
        let inside = file.strip_prefix(&dir).with_context(|| format!("placing {file}"))?;
        let bytes = fs::read(&file).with_context(|| format!("reading {file}"))?;
        let kind = RootEntryKind::File(FileData::Bytes(bytes));
        let entry = RootEntry::new(0o644, kind, EntryOrigin::Base);
        tree.insert(&format!("{below}/{inside}"), entry)?;
    }
    Ok(())
}

/// The kernel's modules as a separate tree, paths relative to `lib/modules/<release>`.
fn modules_of(tree: &RootTree, release: &str) -> Result<RootTree> {
    let mut alone = RootTree::with_root(EntryOrigin::Base);
    let prefix = format!("usr/lib/modules/{release}/");
    for (path, entry) in tree.iter() {
        let Some(inside) = path.strip_prefix(&prefix) else { continue };
        if matches!(entry.kind, RootEntryKind::File(_)) {
            let bytes = tree.read(path)?;
            alone.file(inside, 0o644, bytes)?;
        }
    }
    ensure!(
        alone.get("modules.dep").is_some() && alone.get("modules.builtin").is_some(),
        "the root has no /{prefix}modules.dep\n\
         help: the kernel needs CONFIG_MODULES=y, and the root BR2_PACKAGE_KMOD=y"
    );
    Ok(alone)
}

/// An ELF file without a program interpreter: no libraries are loaded for it (ELF gABI, "Program
/// Header": type 3 is PT_INTERP).
fn is_static(bytes: &[u8]) -> bool {
    let word = |at: usize, len: usize| -> Option<u64> {
        let field = bytes.get(at..at.checked_add(len)?)?;
        Some(field.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
    };
    // 64-bit little-endian: e_phoff at 32, e_phentsize at 54, e_phnum at 56, p_type first.
    if !bytes.starts_with(b"\x7fELF\x02\x01") {
        return false;
    }
    let (Some(start), Some(size), Some(count)) = (word(32, 8), word(54, 2), word(56, 2)) else {
        return false;
    };
    (0..count).all(|index| {
        let at = usize::try_from(start.saturating_add(index * size)).unwrap_or(usize::MAX);
        word(at, 4).is_some_and(|kind| kind != 3)
    })
}

fn find_python(tree: &RootTree, info: &BuildrootInfo) -> Result<RootPython> {
    let entry = info.0.get("python3").context("the configuration builds no Python 3")?;
    let version = entry.version.clone();
    let short = version.split('.').take(2).collect::<Vec<_>>().join(".");
    let site = format!("usr/lib/python{short}/site-packages");
    ensure!(
        tree.get(&format!("usr/bin/python{short}")).is_some(),
        "the root has no /usr/bin/python{short}"
    );
    let mut distributions = Vec::new();
    for (path, _) in tree.iter() {
        let inside = path.strip_prefix(&site);
        if !inside.is_some_and(|p| p.ends_with("-info/METADATA") || p.ends_with("-info/PKG-INFO")) {
            continue;
        }
        let text = String::from_utf8_lossy(&tree.read(path)?).into_owned();
        let field = |name: &str| {
            let head = text.lines().take_while(|line| !line.is_empty());
            head.filter_map(|l| l.split_once(": ")).find(|(n, _)| *n == name).map(|(_, v)| v)
        };
        if let (Some(name), Some(version)) = (field("Name"), field("Version")) {
            distributions.push(PythonDistribution { name: name.into(), version: version.into() });
        }
    }
    distributions.sort();
    let site_packages = format!("/{site}");
    Ok(RootPython { version, short, site_packages, scripts: "/usr/bin".to_owned(), distributions })
}

/// The C library's version, from the text that it prints when it is executed: this works for a
/// library that Buildroot built and for that of a prebuilt toolchain.
fn read_glibc_version(tree: &RootTree) -> Result<String> {
    let bytes = tree.read("usr/lib/libc.so.6").context("the root has no glibc")?;
    version_in(&bytes).context("/usr/lib/libc.so.6 does not contain its version")
}

fn version_in(bytes: &[u8]) -> Option<String> {
    let marks: [&[u8]; 2] = [b"stable release version ", b"development release version "];
    let at = marks
        .iter()
        .find_map(|mark| Some(bytes.windows(mark.len()).position(|w| w == *mark)? + mark.len()))?;
    let digits = |b: &&u8| b.is_ascii_digit() || **b == b'.';
    let text: Vec<u8> = bytes.get(at..)?.iter().take_while(digits).copied().collect();
    let text = String::from_utf8(text).ok()?;
    Some(text.trim_end_matches('.').to_owned()).filter(|t| t.contains('.'))
}

/// Symbols of Buildroot that name fragments for another Kconfig, and the package with its result.
const FRAGMENTS: [(&str, &str); 3] = [
    ("BR2_LINUX_KERNEL_CONFIG_FRAGMENT_FILES", "linux"),
    ("BR2_TARGET_UBOOT_CONFIG_FRAGMENT_FILES", "uboot"),
    ("BR2_PACKAGE_BUSYBOX_CONFIG_FRAGMENT_FILES", "busybox"),
];

/// Checks the fragments of the kernel, U-Boot and busybox, whose Kconfig drops requests as silently
/// as Buildroot's.
///
/// # Errors
/// Every line of a fragment that its Kconfig dropped.
pub fn require_fragments(setup: &BuildrootSetup, info: &BuildrootInfo) -> Result<()> {
    let path = setup.output.join(".config");
    let config = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let config = KconfigValues::parse(&config);
    let mut lost = Vec::new();
    for (symbol, package) in FRAGMENTS {
        if !info.0.contains_key(package) {
            continue;
        }
        let result = build_dir(setup, info, package)?.join(".config");
        let result = fs::read_to_string(&result).with_context(|| format!("reading {result}"))?;
        let files = config.get(symbol);
        let files = files.replace("$(BR2_EXTERNAL_SLIPWAY_PATH)", setup.external.as_str());
        for file in files.split_whitespace().filter(|f| f.contains('/')) {
            let path = setup.tree.join(file);
            let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
            let shown = path.strip_prefix(setup.external.parent().unwrap_or(&path));
            let shown = shown.unwrap_or(&path);
            lost.extend(unmet_lines(&text, &result).into_iter().map(|(number, line, found)| {
                format!("\n  {shown}:{number}: {line}\n    {package} has: {found}")
            }));
        }
    }
    if lost.is_empty() {
        return Ok(());
    }
    bail!(
        "Kconfig dropped {} lines of fragments:{}\n\
         help: find the dependencies of such an option with `cargo xtask buildroot \
         linux-menuconfig` or \
         `uboot-menuconfig` (`/` searches)",
        lost.len(),
        lost.concat()
    )
}

/// Lines of a fragment that are missing in a `.config`: number, line, and what is there instead.
pub fn unmet_lines(wanted: &str, config: &str) -> Vec<(usize, String, String)> {
    let mut unmet = Vec::new();
    let lines: std::collections::HashSet<&str> = config.lines().collect();
    for (index, line) in wanted.lines().enumerate() {
        let line = line.trim();
        let negative = line.strip_prefix("# ").and_then(|l| l.strip_suffix(" is not set"));
        let name = match (negative, line.split_once('=')) {
            (Some(name), _) => name,
            (None, Some((name, _))) if name.starts_with("CONFIG_") => name,
            _ => continue,
        };
        let has = config.lines().find(|l| {
            l.strip_prefix(name).is_some_and(|rest| rest.starts_with('='))
                || **l == format!("# {name} is not set")
        });
        let met = lines.contains(line)
            || (negative.is_some() && has.is_none())
            || line.strip_suffix("=n").is_some() && has.is_none_or(|h| h.ends_with("not set"))
            || same_text(line, has);
        if !met {
            let found = has.map_or_else(|| "no symbol of that name".to_owned(), str::to_owned);
            unmet.push((index + 1, line.to_owned(), found));
        }
    }
    unmet
}

/// Whether two lines differ only in escapes.
fn same_text(wanted: &str, found: Option<&str>) -> bool {
    let inner = |line: &str| {
        let (_, value) = line.split_once("=\"")?;
        fragment::unquote(value).map(|(text, _)| text)
    };
    inner(wanted).is_some() && found.and_then(inner) == inner(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_static_program_has_no_interpreter() {
        // The test itself is linked dynamically.
        let own = std::fs::read(std::env::current_exe().expect("a path")).expect("read");
        assert!(!is_static(&own));
        assert!(!is_static(b"#!/bin/sh\n"));
        let mut elf = vec![0; 64 + 56];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (elf[32], elf[54], elf[56], elf[64]) = (64, 56, 1, 1);
        assert!(is_static(&elf));
        elf[64] = 3;
        assert!(!is_static(&elf));
    }

    #[test]
    fn the_c_library_says_its_version() {
        let words = b"\0GNU C Library (Buildroot) stable release version 2.41.\nCopyright";
        assert_eq!(version_in(words).as_deref(), Some("2.41"));
        assert_eq!(version_in(b"musl"), None);
    }

    #[test]
    fn lines_that_another_kconfig_lost_are_found() {
        let config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_T=\"x \\\"y\\\"\"\nCONFIG_M=m\n";
        let wanted = "# why\nCONFIG_A=y\n# CONFIG_B is not set\n# CONFIG_GONE is not set\n\
                      CONFIG_B=n\nCONFIG_T=\"x \\\"y\\\"\"\n";
        assert!(unmet_lines(wanted, config).is_empty());
        let lost =
            unmet_lines("CONFIG_A=m\nCONFIG_X=y\n# CONFIG_M is not set\nCONFIG_T=\"z\"\n", config);
        let found: Vec<&str> = lost.iter().map(|(.., found)| found.as_str()).collect();
        assert_eq!(
            found,
            ["CONFIG_A=y", "no symbol of that name", "CONFIG_M=m", "CONFIG_T=\"x \\\"y\\\"\""]
        );
    }
}
