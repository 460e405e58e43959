//! The boot lint: everything that booting needs must be in the image. A card that hangs silently
//! costs an afternoon; these checks cost milliseconds.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

use super::config_txt::{self, BootPartitionFiles};
use crate::config::board::BootFlowKind;
use crate::plan::{Plan, cmdline};
use crate::rootfs::tree::{RootEntryKind, RootTree};

/// Directories that something is mounted on.
const MOUNT_POINTS: [&str; 7] = ["dev", "proc", "sys", "run", "tmp", "data", "var"];

/// Checks the root filesystem and the boot partitions' files.
///
/// # Errors
/// Lists everything that is missing.
pub fn check_system(
    plan: &Plan,
    tree: &RootTree,
    kernel_release: &str,
    boot: &BTreeMap<(String, String), Vec<u8>>,
    boot_names: &[(String, String)],
) -> Result<()> {
    let mut missing = Vec::new();
    check_root(tree, kernel_release, &mut missing);
    match plan.board.boot_flow {
        BootFlowKind::Uboot => check_uboot(plan, tree, boot, &mut missing),
        BootFlowKind::Tryboot => check_tryboot(plan, boot, boot_names, &mut missing),
    }
    let partitions = BootPartitionFiles { texts: boot, names: boot_names };
    config_txt::check_named_files(&plan.board.compatible, &partitions, &mut missing)?;
    if missing.is_empty() {
        return Ok(());
    }
    bail!("this image would not boot:\n  - {}", missing.join("\n  - "))
}

fn check_root(tree: &RootTree, kernel_release: &str, missing: &mut Vec<String>) {
    match tree.resolve("sbin/init") {
        None => missing.push("/sbin/init is missing, or is a dangling link".to_owned()),
        Some((path, entry))
            if entry.mode & 0o111 == 0 || !matches!(entry.kind, RootEntryKind::File(_)) =>
        {
            missing.push(format!("/sbin/init leads to /{path}, which is not executable"));
        }
        Some(_) => {}
    }
    for dir in MOUNT_POINTS {
        if !matches!(tree.resolve(dir), Some((_, entry)) if matches!(entry.kind, RootEntryKind::Folder))
        {
            missing.push(format!("the mount point /{dir} is missing"));
        }
    }
    let modules = format!("usr/lib/modules/{kernel_release}/modules.dep");
    if tree.resolve(&modules).is_none() {
        missing.push(format!("/{modules} is missing: the modules do not match the kernel"));
    }
}

fn check_uboot(
    plan: &Plan,
    tree: &RootTree,
    boot: &BTreeMap<(String, String), Vec<u8>>,
    missing: &mut Vec<String>,
) {
    // gzip (RFC 1952) or a bare arm64 Image, whose header has "ARM\x64" at byte 56
    // (Documentation/arch/arm64/booting.rst).
    match tree.read("boot/vmlinuz") {
        Ok(k) if k.starts_with(&[0x1f, 0x8b]) || k.get(56..60) == Some(b"ARM\x64") => {}
        Ok(_) => missing.push("/boot/vmlinuz is neither gzip nor an arm64 kernel image".to_owned()),
        Err(_) => missing.push("the kernel /boot/vmlinuz is missing".to_owned()),
    }
    if !tree.read("boot/initrd.img").is_ok_and(|initrd| !initrd.is_empty()) {
        missing.push("the initrd /boot/initrd.img is missing".to_owned());
    }
    let has_tree = tree.iter().any(|(p, _)| p.starts_with("boot/dtbs/") && p.ends_with(".dtb"));
    if !plan.board.device_trees.is_empty() && !has_tree {
        let globs = plan.board.device_trees.join(", ");
        missing.push(format!("no device tree in /boot/dtbs matches {globs}"));
    }
    let Some(script) = boot.get(&("boot".to_owned(), "boot.scr".to_owned())) else {
        missing.push("the boot script boot.scr is missing from the boot partition".to_owned());
        return;
    };
    let script = String::from_utf8_lossy(script);
    for path in loaded_paths(&script) {
        let (fixed, variable) = path.split_once('$').map_or((path, false), |(f, _)| (f, true));
        let fixed = fixed.trim_matches('/');
        if tree.resolve(fixed).is_none() {
            let what = if variable { "from the directory" } else { "the file" };
            missing
                .push(format!("boot.scr loads {what} /{fixed}, but the slot does not contain it"));
        }
    }
    let lines = script_lines(&script);
    if lines.is_empty() {
        missing.push("boot.scr sets no `bootargs`, the kernel's command line".to_owned());
    }
    for line in &lines {
        check_line(plan, "boot.scr", line, &["root", "slipway.slot"], missing);
    }
}

/// The command lines that a boot script sets, as its shell would expand them: up to the closing
/// quote, with a placeholder for each variable.
fn script_lines(script: &str) -> Vec<String> {
    let starts = script.match_indices("setenv bootargs \"").map(|(at, word)| at + word.len());
    let lines = starts.filter_map(|at| script.get(at..)).map(|rest| {
        let line = rest.split(['"', '\'', '\n']).next().unwrap_or_default();
        let mut pieces = line.split("${");
        let mut text = pieces.next().unwrap_or_default().to_owned();
        for piece in pieces {
            let (name, rest) = piece.split_once('}').unwrap_or((piece, ""));
            text.push_str(name);
            text.push_str(rest);
        }
        text
    });
    lines.collect()
}

/// Checks that every argument of the board, and of `ours`, is a separate argument on the line.
fn check_line(plan: &Plan, file: &str, line: &str, ours: &[&str], missing: &mut Vec<String>) {
    let found = cmdline::split_arguments(line);
    for name in ours.iter().filter(|name| !found.iter().any(|(found, _)| found == *name)) {
        missing.push(format!("{file} does not set `{name}=` on the kernel's command line"));
    }
    for word in &plan.board.cmdline {
        if cmdline::split_arguments(word).iter().any(|argument| !found.contains(argument)) {
            missing.push(format!(
                "{file} does not pass the argument `{word}` to the kernel, which would get: {line}"
            ));
        }
    }
}

/// The absolute paths in a boot script's `load` commands.
fn loaded_paths(script: &str) -> Vec<&str> {
    let mut paths = Vec::new();
    for line in script.lines().filter(|l| !l.trim_start().starts_with('#')) {
        for command in line.split(['\'', ';', '&', '|']) {
            let mut words = command.split_whitespace().skip_while(|w| *w != "load");
            if words.next().is_some() {
                paths.extend(words.filter(|w| w.starts_with("/boot/")));
            }
        }
    }
    paths
}

fn check_tryboot(
    plan: &Plan,
    boot: &BTreeMap<(String, String), Vec<u8>>,
    boot_names: &[(String, String)],
    missing: &mut Vec<String>,
) {
    if !boot.contains_key(&("boot".to_owned(), "autoboot.txt".to_owned())) {
        missing.push("autoboot.txt is missing from the boot partition".to_owned());
    }
    for role in ["boot-a", "boot-b"] {
        for name in ["config.txt", "cmdline.txt"] {
            if !boot.contains_key(&(role.to_owned(), name.to_owned())) {
                missing.push(format!("{name} is missing from the partition {role}"));
            }
        }
        if let Some(text) = boot.get(&(role.to_owned(), "cmdline.txt".to_owned())) {
            // The firmware uses the first line only.
            let text = String::from_utf8_lossy(text);
            let line = text.lines().next().unwrap_or_default();
            check_line(plan, "cmdline.txt", line, &["slipway.tryboot"], missing);
        }
        if !boot_names.iter().any(|(r, n)| r == role && n.ends_with(".dtb")) {
            missing.push(format!("no device tree is in the partition {role}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_a_script_loads() {
        let script = "# load x /boot/no\nsetenv y 'load ${d} 0x1 /boot/vmlinuz && load a b /boot/dtbs/${f}'\n";
        assert_eq!(loaded_paths(script), ["/boot/vmlinuz", "/boot/dtbs/${f}"]);
    }

    #[test]
    fn a_command_line_ends_where_the_shell_would_end_it() {
        let script =
            "setenv start 'setenv bootargs \"root=PARTUUID=${u} ro ${x} a=\"b c\" gpt\"; booti'\n";
        assert_eq!(script_lines(script), ["root=PARTUUID=u ro x a="]);
        assert_eq!(script_lines("setenv s 'setenv bootargs \"ro a='b' gpt\"'"), ["ro a="]);
    }

    #[test]
    fn an_empty_root_lacks_everything() {
        let mut missing = Vec::new();
        check_root(&RootTree::default(), "6.1", &mut missing);
        assert_eq!(missing.len(), 2 + MOUNT_POINTS.len(), "{missing:?}");
    }
}
