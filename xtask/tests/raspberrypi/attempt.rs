//! Builds an example from its lock to a finished card. Instead of the real base, its packages are unpacked into the root
//! and not installed; the card has no wheels and no agent.

use crate::common::{copy_to, root};

use std::fs;

use anyhow::{Context, Result};
use camino::{Utf8Path, Utf8PathBuf};
use xtask::config;
use xtask::disk::{
    self, DiskSpec, FatFile, FileSource, Filesystem, PartitionContent, PartitionSpec, assemble,
};
use xtask::exec::{self, Tool};
use xtask::plan::CheckoutFacts;
use xtask::plan::{self, BootSourcePlan, Plan};
use xtask::render::{OverlayContent, RenderedFiles, render};
use xtask::rootfs::debian::{
    self, BoardFilePatterns, DebianRequest, DownloadedPackages, PackagesLock, PruneRules,
};
use xtask::rootfs::initrd::{self, InitrdCompression, InitrdRequest};
use xtask::rootfs::kernel::ModuleRules;
use xtask::rootfs::tree::{EntryOrigin, FileData, RootEntry, RootEntryKind, RootTree};
use xtask::rootfs::{BaseSystem, PackageRole};
use xtask::start::{self, BootCheck};

use super::packages::{VENDOR, World};

/// What became of an example.
pub struct Attempt {
    /// Holds the files.
    _folder: tempfile::TempDir,
    pub plan: Plan,
    pub lock: PackagesLock,
    pub system: BaseSystem,
    pub starts: BootCheck,
}

/// A text of a file in the workspace's copy, and its replacement.
pub type Change<'a> = (&'a str, &'a str, &'a str);

/// Locks, plans and builds an example, as far as it goes without the real archives.
pub fn attempt(world: &World, product: &str, change: Option<Change<'_>>) -> Result<Attempt> {
    let folder = tempfile::tempdir()?;
    let root = Utf8Path::from_path(folder.path()).context("UTF-8")?;
    copy_to(root)?;
    if let Some((file, from, to)) = change {
        let text = fs::read_to_string(root.join(file))?;
        assert!(text.contains(from), "{file} has no {from}");
        fs::write(root.join(file), text.replacen(from, to, 1))?;
    }
    // What the example says that its owner adds: the key, and the lock.
    let config = config::load(root, Some(product), None)?;
    for source in &config.product.rootfs.sources {
        assert_eq!(source.name.value.0, VENDOR);
        fs::copy(world.key(), root.join(&source.key.value))?;
    }
    let fetched = world.lock(&config)?;
    let config = config::load(root, Some(product), None)?;
    let facts = CheckoutFacts { commit: None, modified: false, epoch: 1_800_000_000 };
    let plan = plan::resolve(&config, &facts)?;
    let rendered = render(root, &plan)?;
    let out = root.join("out");
    let system = base(&plan, &fetched, &out)?;
    let initrd = initrd(&plan, &system, &out)?;
    let files = boot_files(&plan, &rendered, &system, &initrd)?;
    let slot = slot(&plan, &rendered, &system)?;
    let names: Vec<(String, String)> =
        files.iter().map(|(role, file)| (role.clone(), file.path.clone())).collect();
    let release = &system.kernel_release;
    xtask::compose::lint::check_system(&plan, &slot, release, &rendered.boot, &names)?;
    let image = card(&plan, &slot, files, &out)?;
    let starts = start::check_card(&image, Some((root, &plan)))?;
    Ok(Attempt { _folder: folder, plan, lock: fetched.lock, system, starts })
}

/// The engine, on a root of the packages' files.
fn base(plan: &Plan, fetched: &DownloadedPackages, out: &Utf8Path) -> Result<BaseSystem> {
    fs::create_dir_all(out)?;
    let root = out.join("root.tar");
    let mut tree = RootTree::with_root(EntryOrigin::Base);
    for deb in fetched.debs.iter().filter(|deb| deb.package.role == PackageRole::Root) {
        let folder = out.join("root").join(&deb.package.name);
        fs::create_dir_all(&folder)?;
        Tool::new("dpkg-deb").arg("--extract").arg(&deb.file.path).arg(&folder).run()?;
        for path in xtask::rootfs::parts::files_below(&folder)? {
            let relative = path.strip_prefix(&folder)?;
            // The merged directories of an installed root.
            let merged =
                ["bin/", "lib/", "sbin/"].iter().any(|top| relative.as_str().starts_with(top));
            let prefix = if merged { "usr/" } else { "" };
            let size = fs::metadata(&path)?.len();
            let kind = RootEntryKind::File(FileData::Path(path.clone(), size));
            tree.insert(
                &format!("{prefix}{relative}"),
                RootEntry::new(0o755, kind, EntryOrigin::Base),
            )?;
        }
    }
    for top in ["bin", "lib", "sbin"] {
        let kind = RootEntryKind::Symlink(format!("usr/{top}"));
        tree.insert(top, RootEntry::new(0o777, kind, EntryOrigin::Base))?;
    }
    for mount in ["dev", "proc", "run", "sys", "tmp", "var"] {
        tree.insert(mount, RootEntry::new(0o755, RootEntryKind::Folder, EntryOrigin::Base))?;
    }
    tree.write(fetched.lock.epoch, &mut fs::File::create(&root)?)?;
    let board = &plan.board;
    let mut prune = PruneRules::standard()?;
    prune.drop.extend(plan.rootfs.prune.iter().cloned());
    prune.keep.extend(plan.rootfs.keep.iter().cloned());
    debian::build_base_system(
        &DebianRequest {
            debs: &fetched.debs,
            epoch: fetched.lock.epoch,
            prune: &prune,
            board: &BoardFilePatterns {
                dtbs: board.device_trees.clone(),
                firmware: board.firmware.clone(),
                modules: ModuleRules { keep: board.modules_keep.clone(), drop: Vec::new() },
                bootloader: board.bootloader.clone(),
            },
            root: &root,
        },
        &out.join("base"),
    )
}

fn initrd(plan: &Plan, system: &BaseSystem, out: &Utf8Path) -> Result<Utf8PathBuf> {
    let init = fs::read(root().join("board/common/init"))?;
    let config = fs::read_to_string(&system.kernel_config.path)?;
    let request = InitrdRequest {
        busybox: &system.initrd_parts.busybox.path,
        init: &init,
        modules: &plan.board.initrd_modules,
        modules_archive: &system.initrd_parts.modules.path,
        kernel_release: &system.kernel_release,
        epoch: 1_800_000_000,
        extra: &[],
        compression: InitrdCompression::for_kernel(&config),
    };
    Ok(initrd::build_initrd(&request, &out.join("initrd.img"))?.path)
}

/// The files of the boot partitions, with the partition of each.
fn boot_files(
    plan: &Plan,
    rendered: &RenderedFiles,
    system: &BaseSystem,
    initrd: &Utf8Path,
) -> Result<Vec<(String, FatFile)>> {
    let mut files = Vec::new();
    for file in &plan.boot_files {
        let mut put = |path: &str, source: FileSource| {
            // Without its directories.
            let path = path.rsplit('/').next().unwrap_or(path).to_owned();
            files.push((file.partition.clone(), FatFile { path, source }));
        };
        match &file.source {
            BootSourcePlan::Template { .. } => {
                let key = (file.partition.clone(), file.path.clone());
                let text = rendered.boot.get(&key).context("rendered")?;
                put(&file.path, FileSource::Bytes(text.clone()));
            }
            BootSourcePlan::Firmware => {
                system
                    .firmware
                    .iter()
                    .for_each(|f| put(&f.path, FileSource::File(f.file.path.clone())));
            }
            BootSourcePlan::DeviceTrees => {
                system
                    .dtbs
                    .iter()
                    .for_each(|f| put(&f.path, FileSource::File(f.file.path.clone())));
            }
            BootSourcePlan::Kernel => put(&file.path, FileSource::File(system.kernel.path.clone())),
            BootSourcePlan::Initrd => put(&file.path, FileSource::File(initrd.to_owned())),
            other => anyhow::bail!("no example has {other:?}"),
        }
    }
    Ok(files)
}

/// A slot: the base and the overlays. Accounts and links of units need what the real base has.
fn slot(plan: &Plan, rendered: &RenderedFiles, system: &BaseSystem) -> Result<RootTree> {
    let mut tree = RootTree::from_tar(&system.rootfs.path)?;
    for (path, attributes) in &plan.directories {
        tree.insert(
            path.as_str(),
            RootEntry::new(attributes.mode, RootEntryKind::Folder, EntryOrigin::Compose),
        )?;
    }
    for file in &rendered.overlay {
        match &file.content {
            OverlayContent::File(bytes) => tree.file(&file.target, 0o644, bytes.clone())?,
            OverlayContent::Symlink(to) => {
                let kind = RootEntryKind::Symlink(to.clone());
                tree.insert(&file.target, RootEntry::new(0o777, kind, EntryOrigin::Compose))?;
            }
        }
    }
    Ok(tree)
}

/// The card, with both slots.
fn card(
    plan: &Plan,
    slot: &RootTree,
    files: Vec<(String, FatFile)>,
    out: &Utf8Path,
) -> Result<Utf8PathBuf> {
    let (tar, folder, root) = (out.join("slot.tar"), out.join("slot"), out.join("slot.ext4"));
    slot.write(1_800_000_000, &mut fs::File::create(&tar)?)?;
    fs::create_dir_all(&folder)?;
    Tool::new("tar").arg("-C").arg(&folder).args(["--no-same-owner", "-xf"]).arg(&tar).run()?;
    // Whichever mke2fs there is: its bytes need not be the same each time.
    let mke2fs = exec::find_program("mke2fs").context("mke2fs")?;
    Tool::new(mke2fs)
        .args(["-q", "-F", "-t", "ext4", "-d"])
        .arg(&folder)
        .arg(&root)
        .arg("64m")
        .run()?;
    let root = disk::sum_image(&root)?;
    let mut partitions = Vec::new();
    for placed in &plan.disk.partitions {
        let role = placed.name.as_str();
        let own = files.iter().filter(|(partition, _)| partition == role);
        let content = match placed.filesystem {
            Filesystem::Vfat => PartitionContent::Fat {
                label: role.to_owned(),
                volume_id: plan.identifiers.volume_id(role),
                placed: role == "boot",
                files: own.map(|(_, file)| file.clone()).collect(),
            },
            _ if role.starts_with("root-") => PartitionContent::Image(root.clone()),
            _ => PartitionContent::Empty,
        };
        let guid = plan.identifiers.partition(role);
        partitions.push(PartitionSpec { guid, content, size_key: "this test".to_owned() });
    }
    let spec = DiskSpec {
        layout: plan.disk.clone(),
        disk_guid: plan.identifiers.disk,
        mbr_signature: plan.identifiers.disk_signature,
        epoch: 1_800_000_000,
        states: Vec::new(),
        partitions,
    };
    Ok(assemble(&spec, &out.join("card.img"))?.path)
}
