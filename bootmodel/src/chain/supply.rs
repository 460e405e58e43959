//! Stage 9, the storage's suppliers: every driver that the card's controller waits for must be built in or in the
//! initrd; otherwise the controller waits for ever (`-EPROBE_DEFER`).
//!
//! Sources: drivers/of/property.c (`of_supplier_bindings`: which properties name suppliers); the same failure:
//! nerves-project/nerves_system_rpi4, pull request 31.

use std::cell::Cell;
use std::collections::BTreeSet;

use super::Run;
use super::fdt::{DeviceTree, DeviceTreeNode};
use super::system::{BootSystem, SystemParts};

/// Properties in which every number may be the phandle of a supplier, with the supplier's property that says how many
/// arguments follow it; `None` where there are no arguments.
const SUPPLIERS: [(&str, Option<&str>); 12] = [
    ("clocks", Some("#clock-cells")),
    ("gpios", Some("#gpio-cells")),
    ("gpio", Some("#gpio-cells")),
    ("resets", Some("#reset-cells")),
    ("power-domains", Some("#power-domain-cells")),
    ("interrupts-extended", Some("#interrupt-cells")),
    ("dmas", Some("#dma-cells")),
    ("mboxes", Some("#mbox-cells")),
    ("phys", Some("#phy-cells")),
    ("iommus", Some("#iommu-cells")),
    ("mmc-pwrseq", None),
    ("interrupt-parent", None),
];

/// Maximum number of suppliers in one property. A Raspberry Pi's clocks name ten.
const MOST_NAMED: usize = 64;

/// Nodes that a node names, with the property.
fn named<'t>(tree: &'t DeviceTree, node: &DeviceTreeNode) -> Vec<(String, &'t DeviceTreeNode)> {
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    for (name, _) in &node.properties {
        let bare = name.rsplit('-').next().unwrap_or_default();
        let cells = match SUPPLIERS.iter().find(|(known, _)| known == name) {
            Some((_, cells)) => *cells,
            None if name.ends_with("-supply") => None,
            None if name.starts_with("pinctrl-") && bare.bytes().all(|b| b.is_ascii_digit()) => {
                None
            }
            // cd-gpios, enable-gpio and similar.
            None if bare == "gpios" || bare == "gpio" => Some("#gpio-cells"),
            None => continue,
        };
        let numbers = node.numbers(name);
        let mut at = 0;
        let mut count = 0;
        while let Some(supplier) = numbers.get(at).and_then(|number| tree.phandle(*number))
            && count < MOST_NAMED
        {
            count += 1;
            if seen.insert((name.as_str(), supplier.path.as_str())) {
                found.push((name.clone(), supplier));
            }
            let more = cells.and_then(|cells| supplier.number(cells)).unwrap_or(0);
            at = at.saturating_add(1 + more as usize);
        }
    }
    found
}

/// The node that a driver binds to: this node, or its nearest parent with a `compatible` (a pin group, a regulator below
/// its chip).
fn device<'t>(tree: &'t DeviceTree, node: &'t DeviceTreeNode) -> Option<&'t DeviceTreeNode> {
    let mut node = Some(node);
    while let Some(current) = node {
        if current.property("compatible").is_some() && current.path != "/" {
            return Some(current);
        }
        node = tree.parent(current);
    }
    None
}

/// Maximum number of nodes visited for one card. A Raspberry Pi 4 or 5 needs a few thousand.
const FUEL: u32 = 50_000;

/// A search for suppliers in a device tree.
struct Walk<'t> {
    tree: &'t DeviceTree,
    /// What is left of [`FUEL`].
    fuel: Cell<u32>,
}

/// Whether a node waits for a device, directly or through other nodes.
fn waits_for(walk: &Walk<'_>, from: &DeviceTreeNode, device_path: &str) -> bool {
    let mut seen = BTreeSet::new();
    let mut left = vec![from];
    while let Some(node) = left.pop() {
        let Some(fuel) = walk.fuel.get().checked_sub(1) else { return false };
        walk.fuel.set(fuel);
        let bound = device(walk.tree, node);
        if bound.is_some_and(|bound| bound.path == device_path) {
            return true;
        }
        for node in [Some(node), bound].into_iter().flatten() {
            if seen.insert(node.path.as_str()) {
                left.extend(named(walk.tree, node).into_iter().map(|(_, supplier)| supplier));
            }
        }
    }
    false
}

/// The suppliers that a device waits for, without disabled ones and without those that wait for the device themselves:
/// the kernel detects such cycles and ignores them (`of_get_compat_node`, and cycles in drivers/base/core.c). For
/// example, a Raspberry Pi's clocks name the display ports, which name the clocks.
fn suppliers<'t>(walk: &Walk<'t>, node: &'t DeviceTreeNode) -> Vec<(String, &'t DeviceTreeNode)> {
    let tree = walk.tree;
    let own = device(tree, node).map_or_else(String::new, |bound| bound.path.clone());
    let all = named(tree, node).into_iter();
    all.filter(|(_, supplier)| {
        let on = device(tree, supplier).is_some_and(|bound| tree.enabled(bound));
        on && !waits_for(walk, supplier, &own)
    })
    .collect()
}

enum Driver {
    BuiltIn,
    Initrd,
    Module(String),
    None,
}

fn driver(parts: &SystemParts, node: &DeviceTreeNode) -> Driver {
    let names = node.compatible();
    if names.iter().any(|name| parts.built_in.contains(name)) {
        return Driver::BuiltIn;
    }
    if names.iter().any(|name| parts.loaded.values().any(|of| of.contains(name))) {
        return Driver::Initrd;
    }
    match names.iter().find_map(|name| parts.modules.get(name)) {
        Some(module) => Driver::Module(module.clone()),
        None => Driver::None,
    }
}

pub(super) fn check(run: &mut Run<'_>, system: &BootSystem<'_>, parts: &SystemParts) {
    let tree = &parts.tree;
    let storage = |node: &&DeviceTreeNode| {
        node.compatible().iter().any(|name| run.soc.storage.contains(name))
    };
    let Some(card) = tree.nodes.iter().find(|node| storage(node) && tree.enabled(node)) else {
        run.stop(
            "storage-node",
            system.places[2].clone(),
            format!(
                "the device tree has no enabled controller for the card ({})",
                run.soc.storage.join(", ")
            ),
            "use the device tree of this model".to_owned(),
        );
        return;
    };
    let walk = Walk { tree, fuel: Cell::new(FUEL) };
    let mut seen = BTreeSet::new();
    // Node, and why it is needed.
    let mut left = vec![(card, "has the card".to_owned())];
    let mut missing = Vec::new();
    let mut supplied = 0;
    while let Some((node, why)) = left.pop() {
        let Some(bound) = device(tree, node) else { continue };
        if seen.insert(node.path.clone()) {
            for (property, supplier) in suppliers(&walk, node) {
                left.push((supplier, format!("is {property} of {}", node.path)));
            }
        }
        if !seen.insert(format!("driver of {}", bound.path)) {
            continue;
        }
        supplied += 1;
        for (property, supplier) in suppliers(&walk, bound) {
            left.push((supplier, format!("is {property} of {}", bound.path)));
        }
        // A bus is the parent of its devices.
        if let Some(parent) = tree.parent(bound).and_then(|parent| device(tree, parent)) {
            left.push((parent, format!("is the bus of {}", bound.path)));
        }
        match driver(parts, bound) {
            Driver::BuiltIn | Driver::Initrd => {}
            Driver::Module(module) => missing.push((bound, why, Some(module))),
            Driver::None => missing.push((bound, why, None)),
        }
    }
    if walk.fuel.get() == 0 {
        run.stop(
            "tree-knotted",
            system.places[2].clone(),
            "the devices of this tree wait for each other in too many ways to check".to_owned(),
            "use the device tree of this model".to_owned(),
        );
    }
    let storage_path = card.path.clone();
    for (node, why, module) in missing {
        let names = node.compatible().join(", ");
        let (message, help) = match module {
            Some(module) => (
                format!("{} ({names}) {why}; its driver {module} is a module and not in the initrd", node.path),
                format!("add \"{module}\" to `kernel.initrd-modules` in board.toml"),
            ),
            None => (
                format!("{} ({names}) {why}; no driver for it is in this kernel, the initrd or the kept modules", node.path),
                "keep its module (`kernel.modules-keep` and `kernel.initrd-modules` in board.toml), or use a kernel that has a driver".to_owned(),
            ),
        };
        run.stop("initrd-supplier", system.places[1].clone(), message, help);
    }
    run.step("kernel", format!("card at {storage_path}, {supplied} drivers in total"));
}
