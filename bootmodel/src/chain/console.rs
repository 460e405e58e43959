//! Stage 12, the console: `console=` must name an enabled port of this device tree.
//!
//! Sources: Documentation/admin-guide/serial-console.rst; drivers/tty/serial/8250 (`ttyS<n>` by the alias
//! `serial<n>`) and amba-pl011.c (`ttyAMA<n>` likewise); the firmware replaces `console=serial0` by the right name.

use super::Run;
use super::system::{BootSystem, SystemParts};

/// Linux's names of serial ports, with the `compatible` strings of each.
const PORTS: [(&str, &[&str]); 2] = [
    ("ttyS", &["brcm,bcm2835-aux-uart", "snps,dw-apb-uart", "ns16550", "ns16550a"]),
    ("ttyAMA", &["arm,pl011", "arm,pl011-axi", "arm,primecell"]),
];

pub(super) fn check(run: &mut Run<'_>, system: &BootSystem<'_>, parts: &SystemParts) {
    let consoles: Vec<&str> =
        system.words.split(' ').filter_map(|word| word.strip_prefix("console=")).collect();
    let mut serial = None;
    let mut screen = false;
    for name in consoles.iter().map(|console| console.split(',').next().unwrap_or_default()) {
        screen |= name == "tty0" || name == "tty1";
        let Some((prefix, drivers)) = PORTS.iter().find(|(prefix, _)| {
            name.strip_prefix(prefix).is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()))
        }) else {
            // The kernel also accepts `console=` without a port, and ports by address.
            let known = ["", "null", "serial0", "uart", "uart8250"].contains(&name);
            if !name.starts_with("tty") && !known {
                run.stop(
                    "console-unknown",
                    system.places[3].clone(),
                    format!("this kernel has no port `{name}` (console={name})"),
                    "`console.device` in board.toml".to_owned(),
                );
            }
            continue;
        };
        let alias = format!("serial{}", &name[prefix.len()..]);
        let node = parts.tree.alias(&alias);
        let enabled = node.filter(|node| parts.tree.enabled(node));
        let drives = |node: &&super::fdt::DeviceTreeNode| {
            node.compatible().iter().any(|c| drivers.contains(&c.as_str()))
        };
        if let Some(node) = enabled.filter(drives) {
            serial = Some(format!("{name} at {}", node.path));
            continue;
        }
        let found = match (node, enabled) {
            (None, _) => format!("the device tree has no {alias}"),
            (Some(node), None) => {
                format!("{alias} ({}) is disabled in the device tree", node.path)
            }
            (Some(node), Some(_)) => {
                format!("{alias} is {} ({})", node.path, node.compatible().join(", "))
            }
        };
        run.stop(
            "console-port",
            system.places[3].clone(),
            format!(
                "console={name}, but {found}: the console does not work, and its login waits for ever"
            ),
            "`console.device` in board.toml: the alias of the device tree decides the number"
                .to_owned(),
        );
    }
    if !screen {
        run.degrade(
            "console-screen",
            system.places[3].clone(),
            "a screen connected to the robot shows nothing: console=tty0 is missing".to_owned(),
            "console=tty0 before the serial console".to_owned(),
        );
    }
    if let Some(serial) = serial {
        run.step("kernel", format!("console {serial}"));
    }
}
