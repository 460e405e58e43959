//! Checks that the programs that units start are in the image. Otherwise a service that cannot
//! start, or a console without a working login, is only discovered on the robot.

use anyhow::{Result, bail};

use crate::rootfs::tree::{EntryOrigin, RootEntryKind, RootTree};

/// The directories of units, and of the files that override them.
const FOLDERS: [&str; 3] =
    ["etc/systemd/system/", "usr/lib/systemd/system/", "usr/local/lib/systemd/system/"];
/// systemd searches these directories for a name without a directory (systemd.service(5),
/// `systemd-path search-binaries-default`).
const SEARCHED: [&str; 4] = ["usr/local/sbin", "usr/local/bin", "usr/sbin", "usr/bin"];
/// The keys of a service whose value starts with a program.
const KEYS: [&str; 7] = [
    "ExecStart",
    "ExecStartPre",
    "ExecStartPost",
    "ExecCondition",
    "ExecReload",
    "ExecStop",
    "ExecStopPost",
];
/// The conditions that systemd checks before it starts a unit (systemd.unit(5)). With its own
/// program in a condition, a unit is optional for a product.
const CONDITIONS: [&str; 3] =
    ["ConditionPathExists", "ConditionFileNotEmpty", "ConditionFileIsExecutable"];
/// The program that agetty(8) starts by default: its own package does not contain it.
const LOGIN: &str = "bin/login";

/// Checks every unit that an overlay adds or changes.
///
/// # Errors
/// Lists everything that is missing, with the overlay's file and line.
pub fn check_programs(tree: &RootTree) -> Result<()> {
    let mut missing = Vec::new();
    for (path, entry) in tree.iter() {
        let (EntryOrigin::Overlay(source), RootEntryKind::File(_)) = (&entry.origin, &entry.kind)
        else {
            continue;
        };
        if FOLDERS.iter().any(|dir| path.starts_with(dir)) {
            let text = tree.read(path)?;
            let settings = effective_settings(&String::from_utf8_lossy(&text));
            let of = |keys: &'static [&str]| {
                settings.iter().filter(move |setting| keys.contains(&setting.key.as_str()))
            };
            let conditions: Vec<&str> = of(&CONDITIONS).map(|c| c.value.as_str()).collect();
            for Setting { line, value, .. } in of(&KEYS) {
                let fault = find_fault(tree, value, &conditions);
                missing.extend(fault.map(|fault| format!("{source}:{line}: {fault}")));
            }
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    bail!("units start programs that this image does not contain:\n  - {}", missing.join("\n  - "))
}

/// A line of a unit, joined with those that continue it.
struct Setting {
    /// The number of its first line.
    line: usize,
    key: String,
    value: String,
}

/// The effective settings of a unit: an empty value resets earlier ones.
fn effective_settings(text: &str) -> Vec<Setting> {
    let mut found = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let line = line.trim();
        if line.starts_with(['#', ';']) {
            continue;
        }
        let Some((key, value)) = line.split_once('=') else { continue };
        let mut value = value.trim().to_owned();
        while value.ends_with('\\') {
            value.pop();
            value.push_str(lines.next().map_or("", |(_, next)| next.trim()));
        }
        if !value.is_empty() {
            found.push(Setting { line: number + 1, key: key.trim().to_owned(), value });
        }
    }
    found
}

/// The error in a command line of a unit that starts under these conditions, if any.
fn find_fault(tree: &RootTree, command: &str, conditions: &[&str]) -> Option<String> {
    // Prefixes of the program: systemd.service(5). With `-` it may fail, so it may be missing.
    let line = command.trim_start_matches(['-', '@', ':', '+', '!', '|']);
    let may_fail = command[..command.len() - line.len()].contains('-');
    let mut words = line.split_whitespace();
    let program = words.next()?.trim_matches(['"', '\'']);
    // Expanded by systemd on the robot.
    if program.contains(['%', '$']) || conditions.contains(&program) {
        return None;
    }
    let there = match program.strip_prefix('/') {
        Some(path) => tree.resolve(path).is_some(),
        None => SEARCHED.iter().any(|dir| tree.resolve(&format!("{dir}/{program}")).is_some()),
    };
    if !there {
        return (!may_fail).then(|| {
            format!(
                "`{program}` is missing\nhelp: add the package or the overlay file that contains it"
            )
        });
    }
    let own = |word: &str| {
        ["-l", "--login-program", "-n", "--skip-login"].iter().any(|o| word.starts_with(o))
    };
    let logs_in = program.ends_with("/agetty") && !words.any(own);
    (logs_in && tree.resolve(LOGIN).is_none()).then(|| {
        format!(
            "`{program}` starts /{LOGIN}, which is missing, so logins would fail\n\
         help: add the package `login`"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rootfs::tree::{FileData, RootEntry};

    fn tree(unit: &str, programs: &[&str]) -> RootTree {
        let mut tree = RootTree::with_root(EntryOrigin::Base);
        for program in programs {
            tree.file(program, 0o755, "").unwrap();
        }
        let kind = RootEntryKind::File(FileData::Bytes(unit.as_bytes().to_vec()));
        let entry =
            RootEntry::new(0o644, kind, EntryOrigin::Overlay("overlays/x/a.service".into()));
        tree.insert("etc/systemd/system/a.service", entry).unwrap();
        tree
    }

    fn findings(unit: &str, programs: &[&str]) -> String {
        check_programs(&tree(unit, programs)).map_or_else(|e| e.to_string(), |()| String::new())
    }

    #[test]
    fn a_missing_program_is_named_with_its_line() {
        let unit = "[Service]\nExecStartPre=+/usr/bin/here \\\n  --long\n# ExecStart=/no\nExecStart=!/usr/bin/gone x\n";
        let message = findings(unit, &["usr/bin/here"]);
        assert!(
            message.contains("overlays/x/a.service:5: `/usr/bin/gone` is missing"),
            "{message}"
        );
        assert_eq!(message.matches("a.service").count(), 1, "{message}");
    }

    #[test]
    fn what_may_be_missing_is_no_finding() {
        let unit = "ExecStart=\nExecStart=-/usr/bin/gone\nExecStop=/usr/bin/%i\nExecReload=kill -HUP $MAINPID\n";
        assert_eq!(findings(unit, &["usr/bin/kill"]), "");
        assert!(findings(unit, &[]).contains("`kill` is missing"));
    }

    #[test]
    fn a_unit_that_asks_for_its_program_may_be_without_it() {
        let unit =
            |condition: &str| format!("[Unit]\n{condition}\n[Service]\nExecStart=/usr/bin/gone\n");
        for condition in CONDITIONS {
            assert_eq!(findings(&unit(&format!("{condition}=/usr/bin/gone")), &[]), "");
        }
        // These start the unit without it, or name another program.
        for condition in [
            "ConditionPathExists=!/usr/bin/gone",
            "ConditionPathExists=|/usr/bin/gone",
            "ConditionPathExists=/usr/bin/other",
            "AssertPathExists=/usr/bin/gone",
        ] {
            assert!(findings(&unit(condition), &[]).contains("is missing"), "{condition}");
        }
    }

    #[test]
    fn a_getty_needs_the_program_that_logs_in() {
        let getty = "ExecStart=-/usr/sbin/agetty --autologin root - $TERM\n";
        let message = findings(getty, &["usr/sbin/agetty"]);
        assert!(
            message.contains("so logins would fail\nhelp: add the package `login`"),
            "{message}"
        );
        assert_eq!(findings(getty, &["usr/sbin/agetty", "bin/login"]), "");
        assert_eq!(
            findings("ExecStart=-/usr/sbin/agetty -n -l /bin/sh -\n", &["usr/sbin/agetty"]),
            ""
        );
    }
}
