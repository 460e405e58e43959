//! Checks that the programs that units and health checks start are in the image. Otherwise a service that
//! cannot start, a console without a working login, or a health check that rolls back every update is only
//! discovered on the robot.

use anyhow::{Result, bail};
use contract::health_file::{self, CheckTarget, HealthFile};

use crate::rootfs::tree::{EntryOrigin, RootEntry, RootEntryKind, RootTree};

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

/// Checks every unit and every health check that an overlay adds or changes.
///
/// # Errors
/// Lists everything that is missing, with the overlay's file and line.
pub fn check_programs(tree: &RootTree) -> Result<()> {
    let (mut missing, mut checks) = (Vec::new(), Vec::new());
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
        } else if is_health_check(path) {
            let fault = find_check_fault(tree, &String::from_utf8_lossy(&tree.read(path)?));
            checks.extend(fault.map(|fault| format!("{source}: {fault}")));
        }
    }
    let mut findings = Vec::new();
    for (what, list) in [
        ("units start programs that this image does not contain", missing),
        (
            "health checks would fail on every robot, and roll back every update to this image",
            checks,
        ),
    ] {
        if !list.is_empty() {
            findings.push(format!("{what}:\n  - {}", list.join("\n  - ")));
        }
    }
    if findings.is_empty() {
        return Ok(());
    }
    bail!("{}", findings.join("\n"))
}

/// Whether the agent reads this file as a health check: no other suffix, and no subdirectory.
fn is_health_check(path: &str) -> bool {
    path.strip_prefix(health_file::FOLDER)
        .and_then(|rest| rest.strip_prefix('/')?.strip_suffix(".toml"))
        .is_some_and(|name| !name.contains('/'))
}

/// The error in a health check, if any: an invalid file, or a program that cannot be started.
fn find_check_fault(tree: &RootTree, text: &str) -> Option<String> {
    const HELP: &str = "help: docs/guides/add-a-health-check.md has the forms of a check";
    let target = match HealthFile::parse(text) {
        Ok(file) => file.target,
        Err(why) => return Some(format!("{why}\n{HELP}")),
    };
    let CheckTarget::Command(words) = target else { return None };
    let program = words.first()?;
    // The API, and what it brings, may be on `data`.
    if program.starts_with("/data/") {
        return None;
    }
    match find_program(tree, program) {
        None => Some(missing_program(program)),
        Some(entry) if entry.mode & 0o111 == 0 => Some(format!(
            "`{program}` is not executable\nhelp: run `chmod +x` on the overlay's file"
        )),
        Some(_) => None,
    }
}

/// The file that a name stands for when a program is started by it.
fn find_program<'a>(tree: &'a RootTree, program: &str) -> Option<&'a RootEntry> {
    let found = match program.strip_prefix('/') {
        Some(path) => tree.resolve(path),
        None => SEARCHED.iter().find_map(|dir| tree.resolve(&format!("{dir}/{program}"))),
    };
    found.map(|(_, entry)| entry)
}

fn missing_program(program: &str) -> String {
    format!("`{program}` is missing\nhelp: add the package or the overlay file that contains it")
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
    if find_program(tree, program).is_none() {
        return (!may_fail).then(|| missing_program(program));
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
    use crate::rootfs::tree::FileData;

    /// What is reported of an image with these executable files, and this file of an overlay.
    fn findings_of(path: &str, text: &str, programs: &[&str]) -> String {
        let mut tree = RootTree::with_root(EntryOrigin::Base);
        for program in programs {
            tree.file(program, 0o755, "").unwrap();
        }
        tree.file("usr/lib/plain", 0o644, "").unwrap();
        let kind = RootEntryKind::File(FileData::Bytes(text.as_bytes().to_vec()));
        let name = path.rsplit('/').next().unwrap();
        let origin = EntryOrigin::Overlay(format!("overlays/x/{name}").into());
        tree.insert(path, RootEntry::new(0o644, kind, origin)).unwrap();
        check_programs(&tree).map_or_else(|e| e.to_string(), |()| String::new())
    }

    fn findings(unit: &str, programs: &[&str]) -> String {
        findings_of("etc/systemd/system/a.service", unit, programs)
    }

    #[test]
    fn a_health_check_that_can_never_pass_is_reported() {
        let findings =
            |text: &str| findings_of("etc/slotd/health.d/50-a.toml", text, &["usr/bin/here"]);
        for good in ["[command]\nrun = [\"/usr/bin/here\"]", "[command]\nrun = [\"here\", \"x\"]"] {
            assert_eq!(findings(good), "");
        }
        assert_eq!(findings("[unit]\nname = \"a.service\""), "");
        assert_eq!(findings("[command]\nrun = [\"/data/system/scripts/check\"]"), "");
        for (bad, expected) in [
            (
                "[command]\nrun = [\"/usr/bin/gone\"]",
                "50-a.toml: `/usr/bin/gone` is missing\nhelp: ",
            ),
            ("[command]\nrun = [\"/usr/lib/plain\"]", "`/usr/lib/plain` is not executable\nhelp: "),
            ("timeout = 3\n[command]\nrun = [\"here\"]", "unknown field `timeout`"),
            ("timeout-seconds = 121\n[command]\nrun = [\"here\"]", "expected 1 to 120\nhelp: "),
        ] {
            let message = findings(bad);
            assert!(message.starts_with("health checks would fail"), "{message}");
            assert!(message.contains(expected), "{message}");
        }
        // The agent reads neither of these.
        for path in ["etc/slotd/health.d/README", "etc/slotd/health.d/old/a.toml"] {
            assert_eq!(findings_of(path, "nonsense", &[]), "");
        }
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
