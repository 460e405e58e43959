//! From locked packages to a `BaseSystem`: `mmdebstrap` installs the root without network, kernel
//! and firmware are unpacked natively, then one pass prunes and normalises everything.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use super::download::LockedDeb;
use super::prune::{self, PruneRules};
use super::scratch::ScratchDirectory;
use super::{DebianSpec, binfmt, inventory, repo, unpack};
use crate::artifact::{Artifact, write_atomically};
use crate::exec::Tool;
use crate::parallel;
use crate::progress::{ProgressStep, ProgressUnit};
use crate::rootfs::kernel::{self, ModuleRules};
use crate::rootfs::parts::{compress_kernel, copy_file, copy_matches, files_below};
use crate::rootfs::tree::{EntryOrigin, FileData, RootEntry, RootEntryKind, RootTree};
use crate::rootfs::{BaseSystem, InitrdParts, PackageRole};

/// Options of dpkg: many small files that the rules remove anyway are not unpacked at all.
const DPKG_OPTIONS: [&str; 7] = [
    "force-unsafe-io",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
];

/// The program that [`UNPACK`] installs for mmdebstrap's next call of dpkg; it removes itself.
const STAND_IN: &str = "usr/local/sbin/dpkg";

/// A hook after the extraction: this machine's dpkg unpacks all packages, which takes ten times as
/// long under emulation; only their scripts and their configuration are emulated, in the order in
/// which mmdebstrap lists the packages. Path exclusions of this machine's own dpkg configuration
/// are reset first. mmdebstrap's next call, which would install (and so unpack) everything again,
/// finds our program first, which removes itself.
const UNPACK: &str = r#"set -euf
root=$1
debs= names=
for deb in $MMDEBSTRAP_ESSENTIAL; do
    debs="$debs $root$deb"
    names="$names $(dpkg-deb --field "$root$deb" Package)"
done
dpkg --root="$root" --force-depends --path-include='/*' $BASE_DPKG_OPTIONS --unpack $debs
mkdir -p "$root/usr/local/sbin"
printf '#!/bin/sh\nrm "$0"\nexec dpkg --force-depends --configure%s\n' "$names" >"$root/usr/local/sbin/dpkg"
chmod 755 "$root/usr/local/sbin/dpkg"
"#;

/// The boot files of a board, as patterns over the unpacked packages.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BoardFilePatterns {
    /// Patterns of device trees (`broadcom/bcm2837-*.dtb`); each must match.
    pub dtbs: Vec<String>,
    /// Patterns of firmware files in the unpacked packages; each must match. `lib` is `usr/lib`.
    pub firmware: Vec<String>,
    /// Which kernel modules to keep.
    pub modules: ModuleRules,
    /// The bootloader in the unpacked packages.
    pub bootloader: Option<String>,
}

/// One build.
#[derive(Debug)]
pub struct DebianRequest<'a> {
    /// The fetched packages, roles `root` and `extra`.
    pub debs: &'a [LockedDeb],
    /// The latest modification time of a file (seconds since 1970).
    pub epoch: u64,
    /// What to remove.
    pub prune: &'a PruneRules,
    /// What to keep for the board.
    pub board: &'a BoardFilePatterns,
    /// The installed root from [`install_packages`]; boards share it.
    pub root: &'a Utf8Path,
}

/// Builds the base in `out_dir`, which is created.
///
/// # Errors
/// When a package cannot be unpacked or a board's pattern matches nothing.
pub fn build_base_system(request: &DebianRequest<'_>, out_dir: &Utf8Path) -> Result<BaseSystem> {
    fs::create_dir_all(out_dir).with_context(|| format!("creating {out_dir}"))?;
    let scratch = ScratchDirectory::new()?;
    let work = scratch.path();
    let extras = work.join("extras");
    for deb in request.debs.iter().filter(|d| d.package.role == PackageRole::Extra) {
        unpack::unpack_deb(&deb.file.path, &extras)
            .with_context(|| format!("unpacking {}", deb.package.name_and_version()))?;
    }
    unpack::merge_usr(&extras)?;
    let kernel = kernel::find_kernel(&extras)?;
    kernel::prune_modules(&extras, &kernel.release, &request.board.modules, None)
        .context("selecting kernel modules")?;

    let mut tree = RootTree::from_tar(request.root)?;
    ensure!(
        tree.get(STAND_IN).is_none(),
        "mmdebstrap did not call dpkg through its PATH: /{STAND_IN} is still in the base\n\
         help: this version of mmdebstrap is not supported; report the problem with the version of \
         mmdebstrap"
    );
    let modules_dir = extras.join("usr/lib/modules").join(&kernel.release);
    let modules = out_dir.join("modules.tar");
    let module_tree = add_modules(&mut tree, &extras, &modules_dir)?;
    write_atomically(&modules, |out| module_tree.write(request.epoch, out))?;
    add_firmware(&mut tree, &extras)?;
    // The file lists of packages are only pruned if a rule says so.
    prune::prune_tree(&mut tree, request.prune)?;
    prune::normalise_dates(&mut tree, request.epoch)?;
    let rootfs = out_dir.join("rootfs.tar");
    write_atomically(&rootfs, |out| tree.write(request.epoch, out))?;

    let (image, unpacked) = compress_kernel(&kernel.image, &out_dir.join("kernel.gz"))?;
    let dtb_root = extras.join(format!("usr/lib/linux-image-{}", kernel.release));
    let board = request.board;
    let help = "add the package that contains them to `unpacked` of [rootfs], or to `packages` of \
                [debian] in board.toml";
    let dtbs = copy_matches(&dtb_root, &board.dtbs, &out_dir.join("dtbs"), "device tree", help)?;
    let firmware_dir = out_dir.join("firmware");
    let firmware = copy_matches(&extras, &board.firmware, &firmware_dir, "firmware", help)?;
    let bootloader = match &board.bootloader {
        Some(path) => Some(copy_file(&extras.join(path), &out_dir.join("u-boot.bin")).context(
            "copying the boot loader\n\
                 help: add its package to `packages` of [debian] in board.toml",
        )?),
        None => None,
    };
    Ok(BaseSystem {
        engine: "debian".to_owned(),
        rootfs: Artifact::from_file(rootfs)?,
        rootfs_bytes: tree.file_bytes(),
        kernel: image,
        kernel_unpacked_bytes: unpacked,
        kernel_config: copy_file(&kernel.config, &out_dir.join("kernel.config"))?,
        kernel_release: kernel.release,
        dtbs,
        initrd_parts: InitrdParts {
            busybox: copy_file(&find_busybox(&extras)?, &out_dir.join("busybox"))?,
            modules: Artifact::from_file(modules)?,
        },
        firmware,
        bootloader,
        python: inventory::find_python(&tree, request.debs)?,
        packages: inventory::list_packages(&tree, request.debs)?,
        glibc: inventory::glibc_version(request.debs)?,
    })
}

/// Installs the packages of role `root` with `mmdebstrap` from a local archive into a tar. The
/// result depends only on the packages and the epoch, so all boards of a product share it.
///
/// As root `mmdebstrap` works in mode `root`, for a user in mode `unshare` (user namespaces with
/// subordinate ids); both give the same bytes after [`build_base_system`].
///
/// # Errors
/// When programs of the architecture cannot run on this machine, or a package's script fails.
pub fn install_packages(
    spec: &DebianSpec,
    debs: &[LockedDeb],
    epoch: u64,
    log: &Utf8Path,
    out: &Utf8Path,
) -> Result<()> {
    let scratch = ScratchDirectory::new()?;
    let work = scratch.path();
    binfmt::ensure_runs(&spec.arch, work)?;
    let root: Vec<&LockedDeb> =
        debs.iter().filter(|d| d.package.role == PackageRole::Root).collect();
    let archive = work.join("archive");
    plain_archive(&root, &archive)?;
    let names: Vec<&str> = root.iter().map(|d| d.package.name.as_str()).collect();
    let is_root = rustix::process::geteuid().is_root();
    let may_mount = can_mount();
    let mut tool = match is_root && may_mount {
        // When it is killed, nothing stays mounted: its mounts are private.
        true => Tool::new("unshare").with_network().args(["--mount", "--", "mmdebstrap"]),
        false => Tool::new("mmdebstrap"),
    };
    tool = tool
        .arg(if is_root { "--mode=root" } else { "--mode=unshare" })
        .arg("--verbose")
        .arg(format!("--architectures={}", spec.arch))
        .args(["--variant=custom", "--format=tar"])
        // Our own check is better: it runs a program, see `binfmt`.
        .arg("--skip=check/qemu")
        .arg("--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr")
        // Generated host keys would be removed, and generating them under emulation takes seconds.
        .arg(concat!(
            "--extract-hook=mkdir -p \"$1/etc/ssh\" && ",
            "touch \"$1/etc/ssh/ssh_host_rsa_key\" \"$1/etc/ssh/ssh_host_ecdsa_key\" ",
            "\"$1/etc/ssh/ssh_host_ed25519_key\""
        ))
        .arg(format!("--extract-hook={UNPACK}"))
        .args(DPKG_OPTIONS.map(|option| format!("--dpkgopt={option}")))
        .arg(format!("--include={}", names.join(",")));
    if is_root && !may_mount {
        tool = tool.arg("--skip=check/canmount,chroot/mount");
    }
    tool = tool
        .arg(&spec.suite)
        .arg(out)
        .arg(repo::source_line(&archive).trim_end())
        .env("SOURCE_DATE_EPOCH", epoch.to_string())
        .env("LC_ALL", "C.UTF-8")
        .env("TMPDIR", work.as_str())
        .env("DEBIAN_FRONTEND", "noninteractive")
        // The packages' scripts inherit it.
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("BASE_DPKG_OPTIONS", DPKG_OPTIONS.map(|option| format!("--{option}")).join(" "))
        .current_dir(work)
        .log(log);
    // Each package is unpacked once and configured once.
    let step = ProgressStep::new(
        "base",
        "installing packages",
        2 * names.len() as u64,
        ProgressUnit::Items,
    );
    // `usr-is-merged` is listed twice: the hook for merged directories installs an empty one first.
    let mut done = BTreeSet::new();
    tool.run_lines(|line| {
        let context = ["Unpacking ", "Setting up "].into_iter().find(|p| line.starts_with(p));
        if let Some(verb) = context {
            let package = line[verb.len()..].split([' ', ':']).next().unwrap_or_default();
            step.advance(u64::from(done.insert((verb, package.to_owned()))));
            step.note(format!("{}{package}", verb.to_lowercase()));
        }
    })
    .context("installing the base system\nhelp: cargo xtask doctor lists what may be missing")
}

/// Whether root may mount here: in a plain container it may not.
fn can_mount() -> bool {
    Tool::new("unshare").args(["--mount", "true"]).run().is_ok()
}

/// An archive of the same packages without compression: dpkg unpacks them under emulation, where
/// decompression takes ten times as long.
fn plain_archive(debs: &[&LockedDeb], dir: &Utf8Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("creating {dir}"))?;
    make_readable(dir, 0o755)?;
    let step =
        ProgressStep::new("base", "reading packages", debs.len() as u64, ProgressUnit::Items);
    let stanzas = parallel::map(debs, parallel::cores(), |deb| {
        plain_deb(deb, dir).inspect(|_| step.advance(1))
    })?;
    let path = dir.join("Packages");
    fs::write(&path, stanzas.concat()).with_context(|| format!("writing {path}"))?;
    make_readable(&path, 0o644)
}

/// Regardless of the umask: the root of a user namespace is another user, who must be able to read
/// this.
fn make_readable(path: &Utf8Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .with_context(|| format!("setting the mode of {path}"))
}

fn plain_deb(deb: &LockedDeb, dir: &Utf8Path) -> Result<String> {
    let name = format!("{}.deb", deb.file.sha256);
    let path = dir.join(&name);
    let member = |option: &str| Tool::new("dpkg-deb").arg(option).arg(&deb.file.path).read_bytes();
    let members = [
        ("debian-binary", b"2.0\n".to_vec()),
        ("control.tar", member("--ctrl-tarfile")?),
        ("data.tar", member("--fsys-tarfile")?),
    ];
    write_atomically(&path, |out| {
        out.write_all(b"!<arch>\n")?;
        for (member, bytes) in &members {
            let size = bytes.len();
            // ar(5): name, time, owner, group, mode, size, in columns; data padded to even length.
            writeln!(out, "{member:<16}{:<12}{:<6}{:<6}{:<8}{size:<10}`", 0, 0, 0, "100644")?;
            out.write_all(bytes)?;
            out.write_all(if size % 2 == 1 { b"\n" } else { b"" })?;
        }
        Ok(())
    })
    .with_context(|| format!("rewriting {}", deb.package.name_and_version()))?;
    make_readable(&path, 0o644)?;
    let made = Artifact::from_file(path)?;
    repo::index_stanza(&made.path, &format!("./{name}"), made.size, &made.sha256)
}

/// Adds the kept modules to the root, and returns them as a separate tree.
fn add_modules(root: &mut RootTree, extras: &Utf8Path, modules: &Utf8Path) -> Result<RootTree> {
    let release = modules.file_name().unwrap_or_default().to_owned();
    let mut alone = RootTree::with_root(EntryOrigin::Base);
    for path in files_below(modules)? {
        let relative = path.strip_prefix(modules).with_context(|| format!("placing {path}"))?;
        let size = fs::metadata(&path).with_context(|| format!("reading {path}"))?.len();
        // `extras` is removed at the end; both trees are written before that.
        debug_assert!(path.starts_with(extras));
        let entry = RootEntry::new(
            0o644,
            RootEntryKind::File(FileData::Path(path.clone(), size)),
            EntryOrigin::Base,
        );
        alone.insert(relative.as_str(), entry.clone())?;
        root.insert(&format!("usr/lib/modules/{release}/{relative}"), entry)?;
    }
    Ok(alone)
}

/// Device firmware of extra packages (Wi-Fi settings of the Pi) that the root does not contain.
fn add_firmware(root: &mut RootTree, extras: &Utf8Path) -> Result<()> {
    let dir = extras.join("usr/lib/firmware");
    if !dir.is_dir() {
        return Ok(());
    }
    for path in files_below(&dir)? {
        let relative = path.strip_prefix(&dir).with_context(|| format!("placing {path}"))?;
        let size = fs::metadata(&path).with_context(|| format!("reading {path}"))?.len();
        let target = format!("usr/lib/firmware/{relative}");
        if root.get(&target).is_none() {
            let kind = RootEntryKind::File(FileData::Path(path, size));
            root.insert(&target, RootEntry::new(0o644, kind, EntryOrigin::Base))?;
        }
    }
    Ok(())
}

fn find_busybox(extras: &Utf8Path) -> Result<Utf8PathBuf> {
    let path = extras.join("usr/bin/busybox");
    ensure!(
        path.is_file(),
        "no unpacked package has a busybox\nhelp: add busybox-static to `unpacked` of [rootfs]"
    );
    Ok(path)
}
