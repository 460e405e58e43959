//! Checks that the programs that units, health checks and shell scripts start are in the image. Otherwise a
//! service that cannot start, a console without a working login, a script that fails in the middle, or a health
//! check that rolls back every update is only discovered on the robot.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use contract::health_file::{self, CheckTarget, HealthFile};

use super::commands::{
    find_missing_commands, find_program, is_elsewhere, is_shell_script, missing_program,
};
use crate::rootfs::tree::{EntryOrigin, RootEntryKind, RootTree};

/// The directories of units, and of the files that override them, by priority (systemd.unit(5)).
pub(super) const UNIT_DIRS: [&str; 3] =
    ["etc/systemd/system/", "usr/local/lib/systemd/system/", "usr/lib/systemd/system/"];
/// The endings of units' names: systemd ignores other files, such as `a.service.bak`.
const UNIT_ENDINGS: [&str; 10] = [
    ".service",
    ".socket",
    ".target",
    ".timer",
    ".mount",
    ".automount",
    ".swap",
    ".path",
    ".slice",
    ".scope",
];
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

/// Checks every unit, health check and shell script that an overlay adds or changes.
///
/// # Errors
/// Lists everything that is missing, with the overlay's file and line.
pub fn check_programs(tree: &RootTree) -> Result<()> {
    let (mut missing, mut checks, mut scripts) = (Vec::new(), Vec::new(), Vec::new());
    for (path, entry) in tree.iter() {
        let (EntryOrigin::Overlay(source), RootEntryKind::File(_)) = (&entry.origin, &entry.kind)
        else {
            continue;
        };
        if UNIT_DIRS.iter().any(|dir| path.starts_with(dir)) {
            let settings = effective_settings(tree, path)?;
            let of = |keys: &'static [&str]| {
                settings.iter().filter(move |setting| keys.contains(&setting.key.as_str()))
            };
            let conditions: Vec<&str> = of(&CONDITIONS).map(|c| c.value.as_str()).collect();
            for Setting { line, value, .. } in of(&KEYS) {
                let fault = find_fault(tree, value, &conditions);
                missing.extend(fault.map(|fault| format!("{source}:{line}: {fault}")));
                let inner = inline_script(value).unwrap_or_default();
                for (line, fault) in find_missing_commands(tree, &inner, *line, &conditions) {
                    scripts.push(format!("{source}:{line}: {fault}"));
                }
            }
        } else if is_health_check(path) {
            let fault = find_check_fault(tree, &String::from_utf8_lossy(&tree.read(path)?));
            checks.extend(fault.map(|fault| format!("{source}: {fault}")));
        } else {
            let text = tree.read(path)?;
            let text = String::from_utf8_lossy(&text);
            if is_shell_script(&text) {
                for (line, fault) in find_missing_commands(tree, &text, 1, &[]) {
                    scripts.push(format!("{source}:{line}: {fault}"));
                }
            }
        }
    }
    let mut findings = Vec::new();
    for (what, list) in [
        ("units start programs that this image does not contain", missing),
        ("shell scripts use commands that this image does not contain", scripts),
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
        None => Some(missing_program(tree, program)),
        Some(entry) if entry.mode & 0o111 == 0 => Some(format!(
            "`{program}` is not executable\nhelp: run `chmod +x` on the overlay's file"
        )),
        Some(_) => None,
    }
}

/// A line of a unit, joined with those that continue it.
pub(super) struct Setting {
    /// The number of its first line.
    pub(super) line: usize,
    pub(super) key: String,
    pub(super) value: String,
}

/// What systemd applies of a unit or drop-in of this path (systemd.unit(5)): nothing of a file that
/// it does not read or reads another one for, and no setting that the unit's drop-ins reset.
///
/// # Errors
/// When a file of the tree cannot be read.
pub(super) fn effective_settings(tree: &RootTree, path: &str) -> Result<Vec<Setting>> {
    let (dir, name) = path.rsplit_once('/').unwrap_or_default();
    let is_drop_in = dir.ends_with(".d");
    let is_read = match is_drop_in {
        true => name.ends_with(".conf"),
        false => UNIT_ENDINGS.iter().any(|end| name.ends_with(end)),
    };
    if !is_read || is_replaced(tree, path) {
        return Ok(Vec::new());
    }
    let mut settings = without_resets(read_settings(&String::from_utf8_lossy(&tree.read(path)?)));
    if !is_drop_in {
        let resets = find_resets(tree, name)?;
        settings.retain(|setting| !resets.contains(&setting.key));
    }
    Ok(settings)
}

/// Whether a directory with priority has a file of the same name, or masks it.
fn is_replaced(tree: &RootTree, path: &str) -> bool {
    let Some(own) = UNIT_DIRS.iter().position(|dir| path.starts_with(dir)) else { return false };
    let name = &path[UNIT_DIRS[own].len()..];
    UNIT_DIRS[..own].iter().map(|dir| format!("{dir}{name}")).any(|other| {
        // A link to this file does not replace it.
        tree.get(&other).is_some() && tree.resolve(&other).is_none_or(|(real, _)| real != path)
    })
}

/// The keys that drop-ins of a unit reset.
fn find_resets(tree: &RootTree, unit: &str) -> Result<BTreeSet<String>> {
    let dirs: Vec<String> = UNIT_DIRS.iter().map(|dir| format!("{dir}{unit}.d/")).collect();
    let mut found = BTreeSet::new();
    for (path, entry) in tree.iter() {
        let is_drop_in = path.ends_with(".conf") && dirs.iter().any(|dir| path.starts_with(dir));
        if !is_drop_in || !matches!(entry.kind, RootEntryKind::File(_)) || is_replaced(tree, path) {
            continue;
        }
        let settings = read_settings(&String::from_utf8_lossy(&tree.read(path)?));
        found.extend(settings.into_iter().filter(|s| s.value.is_empty()).map(|s| s.key));
    }
    Ok(found)
}

/// The settings after resets: an empty value removes the earlier ones of its key, that of a
/// condition all conditions.
fn without_resets(settings: Vec<Setting>) -> Vec<Setting> {
    let is_condition = |key: &str| key.starts_with("Condition");
    let mut kept: Vec<Setting> = Vec::new();
    for setting in settings {
        if setting.value.is_empty() {
            let all = is_condition(&setting.key);
            kept.retain(|old| old.key != setting.key && !(all && is_condition(&old.key)));
        } else {
            kept.push(setting);
        }
    }
    kept
}

/// All settings of a text, with those that reset others.
fn read_settings(text: &str) -> Vec<Setting> {
    let is_comment = |line: &str| line.starts_with(['#', ';']);
    let mut found = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let line = line.trim();
        if is_comment(line) {
            continue;
        }
        let Some((key, value)) = line.split_once('=') else { continue };
        let mut value = value.trim().to_owned();
        while value.ends_with('\\') {
            // The backslash stands for a space, and comments may be between the lines.
            value.pop();
            value.push(' ');
            let next = lines.by_ref().map(|(_, next)| next.trim()).find(|next| !is_comment(next));
            value.push_str(next.unwrap_or_default());
        }
        let (key, value) = (key.trim().to_owned(), value.trim().to_owned());
        found.push(Setting { line: number + 1, key, value });
    }
    found
}

/// The error in a command line of a unit that starts under these conditions, if any.
fn find_fault(tree: &RootTree, command: &str, conditions: &[&str]) -> Option<String> {
    // Prefixes of the program: systemd.service(5). With `-` it may fail, so it may be missing.
    let line = command.trim_start_matches(['-', '@', ':', '+', '!', '|']);
    let may_fail = command[..command.len() - line.len()].contains('-');
    let mut words = line.split_whitespace();
    let word = words.next()?;
    let program = word.trim_matches(['"', '\'']);
    // A path with a space.
    if word.starts_with(['"', '\'']) && word.len() != program.len() + 2 {
        return None;
    }
    // Expanded by systemd on the robot.
    if program.contains(['%', '$']) || conditions.contains(&program) || is_elsewhere(program) {
        return None;
    }
    if find_program(tree, program).is_none() {
        return (!may_fail).then(|| missing_program(tree, program));
    }
    let own = |word: &str| {
        ["-l", "--login-program", "-n", "--skip-login"].iter().any(|o| word.starts_with(o))
    };
    let logs_in = program.ends_with("/agetty") && !words.any(own);
    (logs_in && tree.resolve(LOGIN).is_none()).then(|| {
        format!(
            "logins would fail, because {program} starts /{LOGIN}: {}",
            missing_program(tree, LOGIN)
        )
    })
}

/// The script in `sh -c '…'`, in quotes of one kind and without escapes: systemd changes others
/// before the shell reads them. None where it may fail: then it may be without its commands.
fn inline_script(command: &str) -> Option<String> {
    let line = command.trim_start_matches(['-', '@', ':', '+', '!', '|']);
    if command[..command.len() - line.len()].contains('-') {
        return None;
    }
    let (shell, rest) = line.split_once(char::is_whitespace)?;
    if !["/bin/sh", "/usr/bin/sh", "sh"].contains(&shell) {
        return None;
    }
    let (option, rest) = rest.trim_start().split_once(char::is_whitespace)?;
    let rest = rest.trim_start();
    let quote = rest.chars().next().filter(|c| ['\'', '"'].contains(c))?;
    let (script, _) = rest.get(1..)?.split_once(quote)?;
    let is_command = option.starts_with('-') && option.ends_with('c') && !script.contains('\\');
    // `%%` and `$$` are how systemd is told to leave the character to the shell; what has a specifier
    // is not known before the unit starts.
    let script = script.replace("%%", "").replace("$$", "$");
    (is_command && !script.contains('%')).then_some(script)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rootfs::tree::{FileData, RootEntry};

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
    fn a_command_of_a_script_that_is_missing_is_named_with_its_line() {
        let here = ["usr/bin/busybox", "usr/bin/grep", "usr/sbin/e2fsck"];
        let findings = |text: &str| findings_of("usr/lib/x/script", text, &here);
        let script = "#!/bin/sh -e\nset -u\nsay() {\n  echo \"$1\" | grep x\n}\nsay \"$(e2fsck /dev/x)\"\n\
                      timeout -k 1 2 \"$script\" && say x\n";
        assert_eq!(
            findings(script),
            "shell scripts use commands that this image does not contain:\n  - \
             overlays/x/script:7: `timeout` is missing\n\
             help: add the package or the overlay file that contains it, or test for it with \
             `command -v timeout` if the script works without it"
        );
        // Not a script for /bin/sh, not in the image, not certain.
        for text in [
            "timeout 1 x",
            "#!/usr/bin/python3\ntimeout",
            "#!/bin/sh\n/data/x; /run/y; ./z; \"$PROGRAM\"",
            "#!/bin/sh\n. /usr/lib/functions\nfunction_of_it",
            "#!/bin/sh\ncommand -v timeout && timeout 1 x",
            "#!/bin/sh\n[ -x /usr/sbin/gone ] || exit 0\ngone x",
            "#!/bin/sh\ncommand -v gone && exec /usr/sbin/gone",
            "#!/bin/sh\ntimeout() { \"$@\"; }\ntimeout 1",
        ] {
            assert_eq!(findings(text), "", "{text}");
        }
        assert!(findings("#!/bin/sh\n/usr/bin/gone").contains(":2: `/usr/bin/gone` is missing"));
    }

    #[test]
    fn the_symbol_that_brings_a_command_is_named() {
        let mut tree = RootTree::with_root(EntryOrigin::Base);
        tree.file("usr/bin/busybox", 0o755, "").unwrap();
        for (path, target) in [("bin", "usr/bin"), ("usr/bin/sh", "busybox")] {
            let kind = RootEntryKind::Symlink(target.to_owned());
            tree.insert(path, RootEntry::new(0o777, kind, EntryOrigin::Base)).unwrap();
        }
        let script = "#!/bin/sh\ntimeout 1 x\nresize2fs x\nfrobnicate\n";
        let kind = RootEntryKind::File(FileData::Bytes(script.into()));
        let entry = RootEntry::new(0o755, kind, EntryOrigin::Overlay("overlays/x/s".into()));
        tree.insert("usr/lib/s", entry).unwrap();
        let message = check_programs(&tree).unwrap_err().to_string();
        for expected in [
            "s:2: `timeout` is missing\nhelp: add `CONFIG_TIMEOUT=y` to external/busybox/busybox.fragment",
            "s:3: `resize2fs` is missing\nhelp: select BR2_PACKAGE_E2FSPROGS_RESIZE2FS in external/",
            "s:4: `frobnicate` is missing\nhelp: select the Buildroot package that installs it",
        ] {
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn a_script_in_a_unit_is_read_too() {
        let here = ["usr/bin/sh", "bin/sh", "usr/bin/cat"];
        let unit = "[Service]\nExecStart=/bin/sh -ec 'x=$$(cat /x); timeout 1 \\\n  ${FOO} cat'\n";
        let message = findings(unit, &here);
        assert!(message.contains("a.service:2: `timeout` is missing"), "{message}");
        for unit in [
            "ExecStart=/bin/sh -c '%i x'\n",
            "ExecStart=/bin/sh -c 'cat'\n",
            "ExecStart=/bin/sh -x 'gone'\n",
            "ExecStart=/bin/sh -c \"a\\x20b\"\n",
            "ExecStop=-/bin/sh -c 'gone x'\n",
            "ConditionPathExists=/usr/bin/gone\nExecStart=/bin/sh -c 'gone x'\n",
        ] {
            assert_eq!(findings(unit, &here), "", "{unit}");
        }
    }

    #[test]
    fn what_may_be_missing_is_no_finding() {
        let unit = "ExecStart=\nExecStart=-/usr/bin/gone\nExecStop=/usr/bin/%i\nExecReload=kill -HUP $MAINPID\n";
        assert_eq!(findings(unit, &["usr/bin/kill"]), "");
        assert!(findings(unit, &[]).contains("`kill` is missing"));
    }

    #[test]
    fn only_what_systemd_applies_of_a_unit_is_a_finding() {
        for unit in [
            "ExecStart=/usr/bin/gone\nExecStart=\nExecStart=/usr/bin/here\n",
            "ExecStart=/usr/bin/here\\\n  --long\n",
            "ExecStart=/usr/bin/here a \\\n; c\n # c\n  b\n",
            "ExecStart=/data/app/run\nExecStop=/run/x/y\n",
            "ExecStart=\"/opt/my vendor/run\" x\n",
            "ExecStart=\"/usr/bin/here\" x\n",
        ] {
            assert_eq!(findings(unit, &["usr/bin/here"]), "", "{unit}");
        }
        let unit =
            "ConditionPathExists=/usr/bin/gone\nConditionPathExists=\nExecStart=/usr/bin/gone\n";
        assert!(findings(unit, &[]).contains("`/usr/bin/gone` is missing"));
        assert!(findings("ExecStart=\"/usr/bin/gone\" x\n", &[]).contains("is missing"));
        // systemd reads neither of these.
        for path in ["etc/systemd/system/a.service.bak", "etc/systemd/system/a.service.d/README"] {
            assert_eq!(findings_of(path, "ExecStart=/usr/bin/gone\n", &[]), "", "{path}");
        }
    }

    #[test]
    fn a_unit_that_another_file_replaces_or_resets_is_no_finding() {
        const GONE: &str = "[Service]\nExecStart=/usr/bin/gone\n";
        let overlay = |text: &str| {
            let kind = RootEntryKind::File(FileData::Bytes(text.as_bytes().to_vec()));
            RootEntry::new(0o644, kind, EntryOrigin::Overlay("overlays/x/a".into()))
        };
        let link = |to: &str| {
            let kind = RootEntryKind::Symlink(to.to_owned());
            RootEntry::new(0o777, kind, EntryOrigin::Overlay("overlays/y/a".into()))
        };
        let reset = "[Service]\nExecStart=\nExecStart=/usr/bin/here\n";
        for (path, entry, is_finding) in [
            ("etc/systemd/system/a.service", overlay(reset), false),
            ("etc/systemd/system/a.service", link("/dev/null"), false),
            ("etc/systemd/system/a.service", link("/usr/lib/systemd/system/a.service"), true),
            ("etc/systemd/system/a.service.d/10-x.conf", overlay(reset), false),
            ("etc/systemd/system/a.service.d/10-x.off", overlay(reset), true),
            ("etc/systemd/system/b.service.d/10-x.conf", overlay(reset), true),
            ("etc/systemd/system/a.service.d/10-x.conf", overlay("[Unit]\nAfter=\n"), true),
        ] {
            let mut tree = RootTree::with_root(EntryOrigin::Base);
            tree.file("usr/bin/here", 0o755, "").unwrap();
            tree.insert("usr/lib/systemd/system/a.service", overlay(GONE)).unwrap();
            tree.insert(path, entry).unwrap();
            assert_eq!(check_programs(&tree).is_err(), is_finding, "{path}");
        }
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
            message.contains("logins would fail, because /usr/sbin/agetty starts /bin/login"),
            "{message}"
        );
        assert_eq!(findings(getty, &["usr/sbin/agetty", "bin/login"]), "");
        assert_eq!(
            findings("ExecStart=-/usr/sbin/agetty -n -l /bin/sh -\n", &["usr/sbin/agetty"]),
            ""
        );
    }
}
