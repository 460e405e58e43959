//! The stages `compose`, `image` and `bundle`.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use bundle::bootstate::BootState;
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use super::key::{BOOT_SLOTS, ComposeInputs, partition_size};
use super::{BuildContext, BuildKeys, BuiltBase, BundleCompression, alias, base, environment, key};
use crate::artifact::{Artifact, flush_file, write_atomically, write_large};
use crate::cache::CacheKey;
use crate::compose::{self, ComposeParts, lint, programs, sandbox, sizes};
use crate::config::board::BootFileFormat;
use crate::disk::{
    self, ChecksummedImage, DiskSpec, FatFile, FileSource, PartitionContent, PartitionSpec,
};
use crate::exec::Tool;
use crate::ext4::{self, Ext4Request};
use crate::plan::{BootSourcePlan, Plan};
use crate::progress::{format_bytes, say, warn};
use crate::render::{INIT, RenderedFiles};
use crate::rootfs::initrd::{self, InitrdCompression, InitrdRequest};
use crate::start::{self, BootCheck};
use crate::update::{self, ComponentRequest, PackRequest, PayloadRequest};

/// zstd's level for `.img.zst`: there are more downloads than builds, and it is still as fast as
/// the disk.
const ZST_LEVEL: i32 = 9;

/// The composed system.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ComposedSystem {
    /// The root filesystem: the content of each slot.
    pub root: ChecksummedImage,
    /// The empty data filesystem.
    pub data: ChecksummedImage,
    /// The initrd.
    pub initrd: Artifact,
    /// Bytes that the root filesystem uses.
    pub used: u64,
    /// Its capacity in bytes.
    pub capacity: u64,
    /// How they are distributed.
    pub sizes: sizes::SpaceUsage,
    /// The budget's warning.
    pub warning: Option<String>,
    /// The stage's key, which identifies the content.
    pub key: String,
}

/// The card image.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BuiltCard {
    /// The image.
    pub image: Utf8PathBuf,
    /// Its length.
    pub size: u64,
    /// Bytes that are written to the card.
    pub mapped: u64,
    /// Bytes that the image takes on disk.
    pub written: u64,
    /// Its block map.
    pub bmap: Artifact,
    /// The additional files for QEMU.
    pub qemu: Vec<Utf8PathBuf>,
    /// How each model starts from it.
    pub starts: BootCheck,
}

/// The stage `compose`.
///
/// # Errors
/// Parts that contradict each other, a slot that is too full, an image that would not boot.
pub fn compose_system(
    build: &mut BuildContext<'_>,
    inputs: &ComposeInputs<'_>,
) -> Result<ComposedSystem> {
    let init = std::fs::read(build.root.join(INIT)).with_context(|| format!("reading {INIT}"))?;
    let libc = base::wheel_lock(build)?.map(|(lock, _)| lock.target.libc.to_string());
    let (base_id, key) = key::compose_key(build.plan, inputs, &init, libc.as_deref())?;
    let system: ComposedSystem = build.stage(
        "compose",
        key,
        |system: &ComposedSystem| {
            vec![system.root.path.clone(), system.data.path.clone(), system.initrd.path.clone()]
        },
        |system| {
            let percent = (system.used * 100).div_ceil(system.capacity.max(1));
            format!(
                "root {} of {} ({percent} %)",
                format_bytes(system.used),
                format_bytes(system.capacity)
            )
        },
        |build, dir| compose_into(build, inputs, &init, libc.as_deref(), &base_id, dir),
    )?;
    if let Some(warning) = &system.warning {
        warn(warning);
    }
    Ok(system)
}

/// Makes the composed system in the stage's directory.
fn compose_into(
    build: &BuildContext<'_>,
    inputs: &ComposeInputs<'_>,
    init: &[u8],
    libc: Option<&str>,
    base_id: &str,
    dir: &Utf8Path,
) -> Result<ComposedSystem> {
    let &ComposeInputs { rendered, base, wheels, agent, signing } = inputs;
    let plan = build.plan;
    let (capacity, data_size) = (partition_size(plan, "root-a")?, partition_size(plan, "data")?);
    let config = std::fs::read_to_string(&base.system.kernel_config.path)
        .context("reading the kernel's configuration")?;
    let initrd = initrd::build_initrd(
        &InitrdRequest {
            busybox: &base.system.initrd_parts.busybox.path,
            init,
            modules: &plan.board.initrd_modules,
            modules_archive: &base.system.initrd_parts.modules.path,
            kernel_release: &base.system.kernel_release,
            epoch: base.epoch,
            extra: &[(
                "etc/disk".to_owned(),
                0o644,
                format!("{}\n", plan.board.disk_bus.word()).into_bytes(),
            )],
            compression: InitrdCompression::for_kernel(&config),
        },
        &dir.join("initrd.img"),
    )?;
    let parts = ComposeParts {
        base: &base.system.rootfs.path,
        wheels: wheels.map(|w| w.tar.path.as_path()),
        distributions: wheels.map_or(&[], |w| &w.distributions),
        libc,
        rendered,
        kernel: &base.system.kernel,
        initrd: &initrd,
        agent: &agent.binary,
        device_trees: base.system.dtbs.iter().map(|d| (d.path.as_str(), &d.file)).collect(),
        key_set: &signing.key_set,
        base_id,
    };
    let tree = compose::build_tree(plan, &parts)?;
    let names = boot_names(build, base);
    lint::check_system(plan, &tree, &base.system.kernel_release, &rendered.boot, &names)?;
    programs::check_programs(&tree)?;
    sandbox::check_sandboxes(&tree)?;
    let sizes = sizes::measure_tree(&tree)?;
    let tar = dir.join("root.tar");
    write_large(&tar, |out| tree.write(plan.epoch, out))?;
    let tool = &base::find_mke2fs(build)?;
    let root = dir.join("root.ext4");
    let board = &plan.board.name;
    let usage = ext4::make_image(
        tool,
        &Ext4Request {
            tar: Some(&tar),
            size: capacity,
            label: "root",
            uuid: plan.identifiers.root,
            hash_seed: plan.identifiers.root_hash_seed,
            epoch: plan.epoch,
            journal: false,
            grows_to: None,
            size_key: &format!("the size of root-a and root-b in board/{board}/board.toml"),
        },
        &root,
    )?;
    std::fs::remove_file(&tar).with_context(|| format!("removing {tar}"))?;
    let product = format!("configs/{}.toml", plan.product.name);
    let (limit, warning) = (plan.rootfs.fill_limit, plan.rootfs.fill_warning);
    let used = usage.used;
    let warning = sizes::check_budget(used, capacity, limit, warning, &sizes, &product)?;
    let data = dir.join("data.ext4");
    ext4::make_image(
        tool,
        &Ext4Request {
            tar: None,
            size: data_size,
            label: "data",
            uuid: plan.identifiers.data,
            hash_seed: plan.identifiers.data_hash_seed,
            epoch: plan.epoch,
            journal: true,
            // The largest cards in use; room for the block group table to grow to it.
            grows_to: Some(1 << 40),
            size_key: &format!("the size of data in board/{board}/board.toml"),
        },
        &data,
    )?;
    let key = dir.file_name().unwrap_or_default().to_owned();
    let (root, data) = (disk::sum_image(&root)?, disk::sum_image(&data)?);
    Ok(ComposedSystem { root, data, initrd, used, capacity, sizes, warning, key })
}

/// Every file of the boot partitions: partition role and name.
fn boot_names(build: &BuildContext<'_>, base: &BuiltBase) -> Vec<(String, String)> {
    let mut names = Vec::new();
    for file in &build.plan.boot_files {
        let role = file.partition.clone();
        match &file.source {
            BootSourcePlan::Firmware => {
                names.extend(
                    base.system.firmware.iter().map(|f| (role.clone(), file_name_only(&f.path))),
                );
            }
            BootSourcePlan::DeviceTrees => {
                names.extend(
                    base.system.dtbs.iter().map(|f| (role.clone(), file_name_only(&f.path))),
                );
            }
            _ => names.push((role, file.path.clone())),
        }
    }
    names
}

/// A file's name without its directories.
fn file_name_only(path: &str) -> String {
    path.rsplit('/').next().unwrap_or(path).to_owned()
}

fn boot_partitions(
    build: &BuildContext<'_>,
    rendered: &RenderedFiles,
    base: &BuiltBase,
    system: &ComposedSystem,
    dir: &Utf8Path,
) -> Result<BTreeMap<String, Vec<FatFile>>> {
    let mut partitions: BTreeMap<String, Vec<FatFile>> = BTreeMap::new();
    for file in &build.plan.boot_files {
        let mut put = |path: String, source: FileSource| {
            partitions.entry(file.partition.clone()).or_default().push(FatFile { path, source });
        };
        let from = |artifact: &Artifact| FileSource::File(artifact.path.clone());
        match &file.source {
            BootSourcePlan::Template { compile, .. } => {
                let key = (file.partition.clone(), file.path.clone());
                let text = rendered.boot.get(&key).context("every template was rendered")?;
                let bytes = match compile {
                    Some(BootFileFormat::BootScript) => {
                        wrap_script(text, build.plan.epoch, dir, &build.log("image"))?
                    }
                    Some(BootFileFormat::UbootEnvironment) => environment::pack_environment(text)
                        .with_context(|| {
                        format!("creating {} from {}", file.path, file.partition)
                    })?,
                    None => text.clone(),
                };
                put(file.path.clone(), FileSource::Bytes(bytes));
            }
            BootSourcePlan::Firmware => {
                for f in &base.system.firmware {
                    put(file_name_only(&f.path), from(&f.file));
                }
            }
            BootSourcePlan::DeviceTrees => {
                for f in &base.system.dtbs {
                    put(file_name_only(&f.path), device_tree(&f.file, &file.aliases)?);
                }
            }
            BootSourcePlan::DeviceTree(path) => {
                put(file.path.clone(), device_tree(named_tree(base, path)?, &file.aliases)?);
            }
            BootSourcePlan::Bootloader => {
                let loader = base.system.bootloader.as_ref();
                put(file.path.clone(), from(loader.context("the board names no boot loader")?));
            }
            BootSourcePlan::Kernel => put(file.path.clone(), from(&base.system.kernel)),
            BootSourcePlan::Initrd => put(file.path.clone(), from(&system.initrd)),
        }
    }
    Ok(partitions)
}

/// The device tree with that path in the base system.
fn named_tree<'a>(base: &'a BuiltBase, wanted: &str) -> Result<&'a Artifact> {
    let named = base.system.dtbs.iter().find(|d| d.path == wanted);
    let named = named.with_context(|| {
        format!(
            "the base has no device tree {wanted}\n\
             help: `kernel.device-trees` in board.toml must match every tree that `boot-files` names"
        )
    })?;
    Ok(&named.file)
}

/// A device tree, with the board's aliases for its nodes, if any.
fn device_tree(file: &Artifact, aliases: &[String]) -> Result<FileSource> {
    if aliases.is_empty() {
        return Ok(FileSource::File(file.path.clone()));
    }
    let context = || format!("adding aliases to {}", file.path);
    let bytes = std::fs::read(&file.path).with_context(context)?;
    Ok(FileSource::Bytes(alias::add_aliases(&bytes, aliases).with_context(context)?))
}

/// The name of the volume of both: `boot-a` and `boot-b` hold the same bytes, as all slot images do.
const BOOT_SLOT: &str = "boot-slot";

fn fat_content(plan: &Plan, role: &str, files: Vec<FatFile>) -> PartitionContent {
    let shared = BOOT_SLOTS.contains(&role);
    let name = if shared { BOOT_SLOT } else { role };
    PartitionContent::Fat {
        label: name.to_owned(),
        volume_id: plan.identifiers.volume_id(name),
        placed: !shared,
        files,
    }
}

/// Wraps a boot script in U-Boot's image format, using two temporary files in `dir`.
///
/// # Errors
/// When `mkimage` is missing or fails.
pub fn wrap_script(text: &[u8], epoch: u64, dir: &Utf8Path, log: &Utf8Path) -> Result<Vec<u8>> {
    let (plain, wrapped) = (dir.join("boot.cmd"), dir.join("boot.scr"));
    std::fs::write(&plain, text).with_context(|| format!("writing {plain}"))?;
    Tool::new("mkimage")
        .args(["-T", "script", "-A", "arm64", "-C", "none", "-n", "slipway", "-d"])
        .arg(&plain)
        .arg(&wrapped)
        .env("SOURCE_DATE_EPOCH", epoch.to_string())
        .env("TZ", "UTC")
        .log(log)
        .run()
        .context("wrapping the boot script")?;
    std::fs::read(&wrapped).with_context(|| format!("reading {wrapped}"))
}

/// The files that QEMU needs besides the image: the boot loader, and a device tree where the
/// machine's firmware would provide one. They are below `dist/<product>/<board>/qemu`.
pub fn qemu_files(dist: &Utf8Path, plan: &Plan) -> Option<crate::qemu::MachineFiles> {
    let qemu = plan.board.qemu.as_ref()?;
    let dir = dist.join("qemu");
    Some(crate::qemu::MachineFiles {
        image: dist.join(format!("{}.img", plan.stem())),
        bootloader: dir.join("u-boot.bin"),
        device_tree: qemu.device_tree.as_ref().map(|path| dir.join(file_name_only(path))),
        device_tree_changes: qemu.device_tree_changes.as_ref().map(|_| dir.join("changes.dtsi")),
    })
}

/// The board's changes to the device tree for its machine in QEMU.
fn tree_changes(build: &BuildContext<'_>) -> Result<Option<Vec<u8>>> {
    let path = build.plan.board.qemu.as_ref().and_then(|qemu| qemu.device_tree_changes.as_ref());
    let read = |path: &Utf8PathBuf| {
        std::fs::read(build.root.join(path))
            .with_context(|| format!("reading {path}, the board's `qemu.device-tree-changes`"))
    };
    path.map(read).transpose()
}

fn copy_for_qemu(build: &BuildContext<'_>, base: &BuiltBase, changes: Option<&[u8]>) -> Result<()> {
    let Some(files) = qemu_files(&build.dist, build.plan) else { return Ok(()) };
    let copy = |from: &Artifact, to: &Utf8Path| {
        let bytes = std::fs::read(&from.path).with_context(|| format!("reading {}", from.path))?;
        write_atomically(to, |out| Ok(out.write_all(&bytes)?))
    };
    if let (Some(to), Some(text)) = (&files.device_tree_changes, changes) {
        write_atomically(to, |out| Ok(out.write_all(text)?))?;
    }
    let loader = base.system.bootloader.as_ref().context("QEMU needs the board's boot loader")?;
    copy(loader, &files.bootloader)?;
    if let (Some(to), Some(qemu)) = (&files.device_tree, &build.plan.board.qemu) {
        copy(named_tree(base, qemu.device_tree.as_deref().unwrap_or_default())?, to)?;
    }
    Ok(())
}

/// The stage `image`.
///
/// # Errors
/// Boot files that do not fit their partition, a full disk, a model of the board that would not start from the card.
pub fn build_card(
    build: &mut BuildContext<'_>,
    rendered: &RenderedFiles,
    base: &BuiltBase,
    system: &ComposedSystem,
) -> Result<BuiltCard> {
    let plan = build.plan;
    let (root, out) = (build.root, build.output("img"));
    let changes = tree_changes(build)?;
    let key = key::image_key(plan, rendered, base, &system.key, changes.as_deref(), &out)?;
    let card: BuiltCard = build.stage(
        "image",
        key,
        |card: &BuiltCard| {
            let mut files = vec![card.image.clone(), card.bmap.path.clone()];
            files.extend(card.qemu.iter().cloned());
            files
        },
        |card| {
            let shown = card.image.strip_prefix(root).unwrap_or(&card.image);
            format!("{shown}  {}, {} on disk", format_bytes(card.size), format_bytes(card.written))
        },
        |build, dir| {
            let mut boot = boot_partitions(build, rendered, base, system, dir)?;
            let partitions = plan
                .disk
                .partitions
                .iter()
                .map(|placed| PartitionSpec {
                    guid: plan.identifiers.partition(&placed.name),
                    size_key: format!(
                        "the size of {} in board/{}/board.toml",
                        placed.name, plan.board.name
                    ),
                    content: match placed.name.as_str() {
                        "root-a" | "root-b" => PartitionContent::Image(system.root.clone()),
                        "data" => PartitionContent::Image(system.data.clone()),
                        role => fat_content(plan, role, boot.remove(role).unwrap_or_default()),
                    },
                })
                .collect();
            let spec = DiskSpec {
                layout: plan.disk.clone(),
                disk_guid: plan.identifiers.disk,
                mbr_signature: plan.identifiers.disk_signature,
                epoch: plan.epoch,
                // Both copies, so that a new card does not appear to be damaged.
                states: vec![BootState::first().encode().to_vec(); plan.disk.states.len()],
                partitions,
            };
            let (made, starts) = disk::assemble_checked(&spec, &out, |image| {
                let starts = start::check_card(image, Some((root, plan)))?;
                start::require_bootable(&starts, &plan.board.name)?;
                Ok(starts)
            })?;
            // The image must be on the disk before the stage is marked as finished.
            flush_file(&made.path)?;
            flush_file(&made.bmap.path)?;
            copy_for_qemu(build, base, changes.as_deref())?;
            Ok(BuiltCard {
                image: made.path,
                size: made.size,
                mapped: made.mapped,
                written: made.written,
                bmap: made.bmap,
                qemu: qemu_files(&build.dist, plan)
                    .map(|f| {
                        let trees = f.device_tree.into_iter().chain(f.device_tree_changes);
                        trees.chain([f.bootloader]).collect()
                    })
                    .unwrap_or_default(),
                starts,
            })
        },
    )?;
    if build.options.zst {
        let packed = disk::compress::compress_image(&card.image, ZST_LEVEL)?;
        say("image", format!("{}  {}", packed.path, format_bytes(packed.size)));
    }
    Ok(card)
}

/// The compression level of a bundle.
pub(super) fn compression_level(compression: BundleCompression) -> bundle::CompressionLevel {
    match compression {
        BundleCompression::Fast => bundle::CompressionLevel::Fast,
        BundleCompression::Release => bundle::CompressionLevel::Release,
        BundleCompression::Slow => bundle::CompressionLevel::Slow,
    }
}

/// The stage `bundle`.
///
/// # Errors
/// A key that may not sign this product, a full disk.
pub fn build_bundle(
    build: &mut BuildContext<'_>,
    rendered: &RenderedFiles,
    base: &BuiltBase,
    system: &ComposedSystem,
    signing: &BuildKeys,
) -> Result<Artifact> {
    let plan = build.plan;
    let (out, ids) = (build.output("bundle"), signing.signer_ids());
    let level = compression_level(build.options.compression);
    let key = key::bundle_key(plan, rendered, base, &system.key, &ids, level, &out)?;
    pack_component(build, signing, key, &out, |build, dir| {
        let mut payloads = Vec::new();
        // Install the firmware's files first: a root filesystem that does not match its kernel
        // does not boot.
        let boot = dir.join("boot.vfat");
        let role = BOOT_SLOTS[0];
        if let Some(placed) = plan.disk.partition(role) {
            let mut files = boot_partitions(build, rendered, base, system, dir)?;
            let content = fat_content(plan, role, files.remove(role).unwrap_or_default());
            let size_key = format!("the size of {role} in board/{}/board.toml", plan.board.name);
            disk::write_shared(placed, &content, plan.epoch, &size_key, &boot)?;
            payloads.push(PayloadRequest { role: "boot".to_owned(), path: boot });
        }
        payloads.push(PayloadRequest { role: "root".to_owned(), path: system.root.path.clone() });
        let version = plan.product.version.clone();
        Ok(ComponentRequest { name: "system".to_owned(), version, payloads })
    })
}

/// The stage `bundle` with this key: packs a component into the bundle `out`. Payloads that `component`
/// creates in the stage's directory are removed afterwards.
///
/// # Errors
/// As [`update::pack_bundle`], and the errors of `component`.
pub(super) fn pack_component(
    build: &mut BuildContext<'_>,
    signing: &BuildKeys,
    key: CacheKey,
    out: &Utf8Path,
    component: impl FnOnce(&BuildContext<'_>, &Utf8Path) -> Result<ComponentRequest>,
) -> Result<Artifact> {
    let (plan, root) = (build.plan, build.root);
    build.stage(
        "bundle",
        key,
        |bundle: &Artifact| vec![bundle.path.clone()],
        |bundle| {
            let size = format_bytes(bundle.size);
            let shown = bundle.path.strip_prefix(root).unwrap_or(&bundle.path);
            let (kind, ids) = (plan.product.kind, signing.signer_ids().join(" and "));
            format!("{shown}  {size}, signed by the {kind} key {ids}")
        },
        |build, dir| {
            let component = component(build, dir)?;
            let payloads = component.payloads.iter().map(|payload| payload.path.clone());
            let created: Vec<_> = payloads.filter(|path| path.starts_with(dir)).collect();
            let request = PackRequest {
                product: plan.product.name.clone(),
                version: plan.product.version.clone(),
                kind: plan.product.kind,
                boards: vec![plan.board.name.clone()],
                minimum_version: plan.update.minimum_version.clone(),
                key_epoch: None,
                epoch: plan.epoch,
                components: vec![component],
                level: compression_level(build.options.compression),
                workers: None,
                signers: &signing.signers,
            };
            let packed = update::pack_bundle(&request, out)?.artifact;
            flush_file(&packed.path)?;
            for path in created {
                std::fs::remove_file(&path).with_context(|| format!("removing {path}"))?;
            }
            Ok(packed)
        },
    )
}
