//! Compose: merges the base, the overlays, the wheels and the build's own files into one root
//! filesystem tree.
//!
//! Invariant: the tree is the same for both slots; nothing in it depends on the slot.

pub mod api;
pub mod commands;
mod config_txt;
pub mod lint;
pub mod programs;
pub mod sandbox;
pub mod shell;
pub mod sizes;
pub mod units;
mod users;

use anyhow::{Context, Result};
use camino::Utf8Path;

use crate::artifact::Artifact;
use crate::config::board::BootFlowKind;
use crate::plan::Plan;
use crate::render::{OverlayContent, RenderedFiles};
use crate::rootfs::tree::{
    EntryOrigin, FileData, RootEntry, RootEntryKind, RootTree, TarSelection,
};
use crate::wheel::InstalledDistribution;

/// The path of the keys that the robot trusts.
pub const KEY_SET: &str = "usr/lib/slipway/keyset.json";
/// The path of the base's id: one line, which changes whenever the inputs of the system change.
pub const BASE_ID: &str = "usr/lib/slipway/base-id";
/// The path of the agent in the root.
pub const AGENT: &str = "usr/bin/slotd";

/// The inputs of compose besides the plan.
#[derive(Debug)]
pub struct ComposeParts<'a> {
    /// The engine's root filesystem, a tar.
    pub base: &'a Utf8Path,
    /// The installed wheels, a tar.
    pub wheels: Option<&'a Utf8Path>,
    /// The distributions in them.
    pub distributions: &'a [InstalledDistribution],
    /// The C library for which they were locked: `glibc 2.36`.
    pub libc: Option<&'a str>,
    /// Generated texts.
    pub rendered: &'a RenderedFiles,
    /// The kernel, as U-Boot loads it.
    pub kernel: &'a Artifact,
    /// The initrd.
    pub initrd: &'a Artifact,
    /// The robot's agent.
    pub agent: &'a Artifact,
    /// Device trees: path below `dtbs`, file.
    pub device_trees: Vec<(&'a str, &'a Artifact)>,
    /// The key set that the robot trusts, as JSON.
    pub key_set: &'a [u8],
    /// Identifies all inputs of the system.
    pub base_id: &'a str,
}

/// Builds the tree.
///
/// # Errors
/// Parts that contradict each other, each named with its origin.
pub fn build_tree(plan: &Plan, parts: &ComposeParts<'_>) -> Result<RootTree> {
    let mut tree = RootTree::default();
    tree.add_tar(parts.base, &EntryOrigin::Base, TarSelection::Contents)?;
    if let Some(wheels) = parts.wheels {
        tree.add_tar(wheels, &EntryOrigin::Api, TarSelection::Contents)?;
    }
    for (path, attributes) in &plan.directories {
        let mut entry =
            RootEntry::new(attributes.mode, RootEntryKind::Folder, EntryOrigin::Compose);
        (entry.uid, entry.gid) = (attributes.uid, attributes.gid);
        tree.insert(path.as_str(), entry)?;
    }
    for file in &parts.rendered.overlay {
        let kind = match &file.content {
            OverlayContent::File(bytes) => RootEntryKind::File(FileData::Bytes(bytes.clone())),
            OverlayContent::Symlink(to) => RootEntryKind::Symlink(to.clone()),
        };
        let origin = EntryOrigin::Overlay(file.source.clone());
        let mut entry = RootEntry::new(file.attributes.mode, kind, origin);
        (entry.uid, entry.gid) = (file.attributes.uid, file.attributes.gid);
        tree.insert(&file.target, entry)?;
    }
    users::add_users(&mut tree, &plan.users, parts.rendered)?;
    units::apply_presets(&mut tree)?;
    // With U-Boot the kernel travels in the slot's root; with tryboot in the slot's boot partition.
    if plan.board.boot_flow == BootFlowKind::Uboot {
        tree.file("boot/vmlinuz", 0o644, read_file(&parts.kernel.path)?)?;
        tree.file("boot/initrd.img", 0o644, read_file(&parts.initrd.path)?)?;
        for (path, file) in &parts.device_trees {
            tree.file(&format!("boot/dtbs/{path}"), 0o644, read_file(&file.path)?)?;
        }
    }
    tree.file(AGENT, 0o755, read_file(&parts.agent.path)?)?;
    tree.file(KEY_SET, 0o644, parts.key_set)?;
    tree.file(BASE_ID, 0o644, format!("{}\n", parts.base_id))?;
    if let Some(plan) = &plan.api {
        let floor = plan.minimum_version.as_deref();
        let text = api::describe_api(&tree, parts.distributions, floor, parts.libc)?;
        tree.file(api::API, 0o644, text)?;
    }
    Ok(tree)
}

fn read_file(path: &Utf8Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("reading {path}"))
}
