//! The keys of the stages `compose`, `image` and `bundle`: everything that decides what they make.
//!
//! The plan is taken apart by name. A new field is a compile error until its author decides for each
//! stage whether it changes what the stage makes; `_` says that it does not, or by which other input it does.

use anyhow::{Context, Result};
use camino::Utf8Path;

use super::{BuildKeys, BuiltAgent, BuiltBase};
use crate::artifact::hash_bytes;
use crate::cache::CacheKey;
use crate::plan::{BoardPlan, Plan, RootfsPlan};
use crate::render::{OverlayContent, RenderedFiles};
use crate::wheel::InstalledWheels;

/// Raised when a change of compose changes its output.
const COMPOSE_VERSION: u32 = 5;
/// Raised when a change of assembling changes its output.
const IMAGE_VERSION: u32 = 6;
/// Raised when a change of packing changes its output.
const BUNDLE_VERSION: u32 = 2;

/// The roles of the boot partitions that belong to slots.
pub(super) const BOOT_SLOTS: [&str; 2] = ["boot-a", "boot-b"];

/// The inputs of compose.
#[derive(Clone, Copy)]
pub struct ComposeInputs<'a> {
    /// Generated texts.
    pub rendered: &'a RenderedFiles,
    /// The base system.
    pub base: &'a BuiltBase,
    /// The API wheels.
    pub wheels: Option<&'a InstalledWheels>,
    /// The robot's agent.
    pub agent: &'a BuiltAgent,
    /// The signers whose key set goes into the image.
    pub signing: &'a BuildKeys,
}

/// The size of a partition in bytes.
pub(super) fn partition_size(plan: &Plan, role: &str) -> Result<u64> {
    Ok(plan.disk.partition(role).with_context(|| format!("the board has no {role}"))?.size)
}

/// Names and hashes of the boot files' texts.
fn boot_texts(rendered: &RenderedFiles) -> Vec<(&(String, String), String)> {
    rendered.boot.iter().map(|(name, text)| (name, hash_bytes(text))).collect()
}

/// The id of the system that is composed, and the key of the stage `compose`.
///
/// # Errors
/// When the board lacks a partition.
pub(super) fn compose_key(
    plan: &Plan,
    inputs: &ComposeInputs<'_>,
    init: &[u8],
    libc: Option<&str>,
) -> Result<(String, CacheKey)> {
    let &ComposeInputs { rendered, base, wheels, agent, signing } = inputs;
    let sizes = (partition_size(plan, "root-a")?, partition_size(plan, "data")?);
    let Plan {
        schema: _,  // of plan.json
        product: _, // in the rendered texts
        board,
        commit: _,   // in the rendered texts
        modified: _, // in the rendered texts
        epoch,
        identifiers,
        disk: _, // the two sizes; offsets are in the rendered device.toml
        rootfs,
        overlay: _, // as it is rendered
        directories,
        api,
        users,
        ssh: _,        // in the rendered texts
        network: _,    // in the rendered texts
        update: _,     // in the rendered texts
        boot_files: _, // their texts; others are only looked for
        inputs: _,     // as what was made of them
    } = plan;
    let BoardPlan {
        name: _,               // in the rendered texts, and in messages
        title: _,              // in the rendered texts
        arch: _,               // base, agent
        boot_flow: _,          // in the rendered device.toml
        compatible: _,         // in the rendered device.toml
        eeprom_since: _,       // in the rendered texts
        left_out_revisions: _, // in the rendered texts
        console: _,            // in the rendered texts
        console_on_board: _,   // in the rendered texts
        cmdline: _,            // in the boot files' texts
        device_trees: _,       // base
        disk_bus,
        initrd_modules,
        modules_keep: _,  // base
        firmware: _,      // base
        bootloader: _,    // base
        uboot: _,         // in the boot files' texts
        qemu: _,          // the stage `image`
        earlier_cards: _, // in the rendered texts
        origins: _,       // only displayed
    } = board;
    let RootfsPlan {
        engine: _,         // base
        suite: _,          // base
        components: _,     // base
        packages: _,       // base
        extra_packages: _, // base
        lock: _,           // base
        sources: _,        // base
        buildroot: _,      // base
        fill_limit,
        fill_warning,
        prune: _, // base
        keep: _,  // base
    } = rootfs;
    let mut overlay = Vec::new();
    for entry in &rendered.overlay {
        let content = match &entry.content {
            OverlayContent::File(bytes) => hash_bytes(bytes),
            OverlayContent::Symlink(to) => format!("-> {to}"),
        };
        overlay.push((&entry.target, entry.attributes, content));
    }
    let passwords: Vec<_> = users.iter().map(|u| &u.password).collect();
    // All inputs of the system, except times, and passwords, whose hashes must not be exposed in
    // another way. A robot with another id than at its last start provisions again.
    let id = CacheKey::new("system", COMPOSE_VERSION)
        .with("base", &base.key)
        .with("wheels", wheels.map_or("", |w| &w.tar.sha256))
        .with_json("api", &(api, libc))?
        .with("agent", &agent.binary.sha256)
        .with("init", init)
        .with("keys", &signing.key_set)
        .with_json("overlay", &overlay)?
        .with_json("boot", &boot_texts(rendered))?
        .with_json("users", &(users, &rendered.authorized_keys))?
        .with_json("directories", directories)?
        .with_json("identifiers", identifiers)?
        .with_json("initrd modules", initrd_modules)?
        .with("disk bus", disk_bus.word())
        .with_json("sizes", &sizes)?
        .finish();
    let key = CacheKey::new("compose", COMPOSE_VERSION)
        .with("system", &id)
        .with("epoch", epoch.to_string())
        // A crypt hash allows guessing the password: only its hash goes into the key, which is
        // hashed again.
        .with_json("passwords", &passwords)?
        .with_json("budget", &(fill_limit, fill_warning))?;
    Ok((id, key))
}

/// The key of the stage `image` of the system with this key, which writes to `out`; `changes`: what the board changes in the device tree of its
/// machine in QEMU.
///
/// # Errors
/// When an input has no JSON form.
pub(super) fn image_key(
    plan: &Plan,
    rendered: &RenderedFiles,
    base: &BuiltBase,
    system: &str,
    changes: Option<&[u8]>,
    out: &Utf8Path,
) -> Result<CacheKey> {
    let Plan {
        schema: _,  // of plan.json
        product: _, // in the system, and in the name of the output
        board,
        commit: _,   // in the system
        modified: _, // in the system
        epoch,
        identifiers,
        disk,
        rootfs: _,      // base, system
        overlay: _,     // system
        directories: _, // system
        api: _,         // system
        users: _,       // system
        ssh: _,         // system
        network: _,     // system
        update: _,      // system
        boot_files,
        inputs: _, // as what was made of them
    } = plan;
    let BoardPlan {
        name: _,      // in the name of the output, and in messages
        title: _,     // system
        arch: _,      // base
        boot_flow: _, // system, and the boot files' texts
        compatible,
        eeprom_since: _,       // system
        left_out_revisions: _, // system
        console: _,            // in the boot files' texts
        console_on_board: _,   // in the boot files' texts
        cmdline: _,            // in the boot files' texts
        device_trees: _,       // base
        disk_bus: _,           // system
        initrd_modules: _,     // system
        modules_keep: _,       // base
        firmware: _,           // base
        bootloader: _,         // base
        uboot: _,              // in the boot files' texts
        qemu,
        earlier_cards: _, // system
        origins: _,       // only displayed
    } = board;
    let tree = qemu.as_ref().and_then(|qemu| qemu.device_tree.as_ref());
    CacheKey::new("image", IMAGE_VERSION)
        .with_json("qemu", &(tree, &changes.map(hash_bytes)))?
        .with("out", out.as_str())
        .with("system", system)
        .with("base", &base.key)
        .with("epoch", epoch.to_string())
        .with_json("boot files", boot_files)?
        .with_json("boot", &boot_texts(rendered))?
        .with_json("layout", disk)?
        .with_json("identifiers", identifiers)?
        .with_json("boards", &(crate::start::model_version(), compatible))
}

/// The key of the stage `bundle` of the system with this key, which writes to `out`; `signers`: the ids of the keys that sign.
///
/// # Errors
/// When an input has no JSON form.
pub(super) fn bundle_key(
    plan: &Plan,
    rendered: &RenderedFiles,
    base: &BuiltBase,
    system: &str,
    signers: &[&str],
    level: bundle::CompressionLevel,
    out: &Utf8Path,
) -> Result<CacheKey> {
    let Plan {
        schema: _, // of plan.json
        product,
        board,
        commit: _,   // system
        modified: _, // system
        epoch,
        identifiers: _, // system; the volume's comes of product and board
        disk,
        rootfs: _,      // base, system
        overlay: _,     // system
        directories: _, // system
        api: _,         // system
        users: _,       // system
        ssh: _,         // system
        network: _,     // system
        update,
        boot_files,
        inputs: _, // as what was made of them
    } = plan;
    let BoardPlan {
        name,
        title: _,     // system
        arch: _,      // base
        boot_flow: _, // system, and the boot files' texts
        compatible,
        eeprom_since: _,       // system
        left_out_revisions: _, // system
        console: _,            // in the boot files' texts
        console_on_board: _,   // in the boot files' texts
        cmdline: _,            // in the boot files' texts
        device_trees: _,       // base
        disk_bus: _,           // system
        initrd_modules: _,     // system
        modules_keep: _,       // base
        firmware: _,           // base
        bootloader: _,         // base
        uboot: _,              // in the boot files' texts
        qemu: _,               // not in bundles
        earlier_cards: _,      // system
        origins: _,            // only displayed
    } = board;
    Ok(CacheKey::new("bundle", BUNDLE_VERSION)
        .with("out", out.as_str())
        .with("system", system)
        .with("base", &base.key)
        .with("epoch", epoch.to_string())
        .with("signer", signers.join(" "))
        .with_json("boot files", boot_files)?
        .with_json("boot", &boot_texts(rendered))?
        .with_json("boot slot", &disk.partition(BOOT_SLOTS[0]).map(|p| p.size))?
        .with_json("product", &(product, name, update))?
        .with_json("compatible", compatible)?
        .with("level", format!("{level:?}")))
}
