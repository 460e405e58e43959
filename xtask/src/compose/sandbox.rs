//! Checks that systemd was built with the features that the sandboxes of units need. Otherwise systemd
//! ignores the line, with a note in the journal, and the service runs without the sandbox.

use anyhow::{Result, bail};

use super::programs::{UNIT_DIRS, effective_settings};
use crate::rootfs::tree::{EntryOrigin, RootEntryKind, RootTree};

/// A feature of systemd, the settings that need it (systemd.exec(5), systemd.resource-control(5);
/// systemd, src/core/exec-invoke.c), and the help for an image without it.
const FEATURES: [(&str, &[&str], &str); 4] = [
    (
        "SECCOMP",
        &[
            "LockPersonality",
            "MemoryDenyWriteExecute",
            "RestrictAddressFamilies",
            "RestrictNamespaces",
            "RestrictRealtime",
            "RestrictSUIDSGID",
            "SystemCallArchitectures",
            "SystemCallErrorNumber",
            "SystemCallFilter",
            "SystemCallLog",
        ],
        "select BR2_PACKAGE_LIBSECCOMP in external/package/slipway-base/Config.in",
    ),
    ("APPARMOR", &["AppArmorProfile"], "use a systemd with AppArmor, or remove the line"),
    (
        "BPF_FRAMEWORK",
        &["RestrictFileSystems", "RestrictNetworkInterfaces", "SocketBindAllow", "SocketBindDeny"],
        "use a systemd with the BPF framework, or remove the line",
    ),
    ("SELINUX", &["SELinuxContext"], "use a systemd with SELinux, or remove the line"),
];

/// Checks the units and drop-ins of overlays against the features that systemd names.
///
/// # Errors
/// Lists the lines that this systemd would ignore, with the overlay's file and line.
pub fn check_sandboxes(tree: &RootTree) -> Result<()> {
    let mut ignored = Vec::new();
    let mut absent = None;
    for (path, entry) in tree.iter() {
        let (EntryOrigin::Overlay(source), RootEntryKind::File(_)) = (&entry.origin, &entry.kind)
        else {
            continue;
        };
        if !UNIT_DIRS.iter().any(|dir| path.starts_with(dir)) {
            continue;
        }
        for setting in effective_settings(tree, path)? {
            let mut features = FEATURES.iter();
            let key = setting.key.as_str();
            let Some((feature, _, help)) = features.find(|(_, keys, _)| keys.contains(&key)) else {
                continue;
            };
            // With `-` before the value, systemd.exec(5) allows that it cannot be applied.
            let off = ["0", "n", "no", "f", "false", "off"];
            let is_off = off.iter().any(|word| setting.value.eq_ignore_ascii_case(word));
            if setting.value.starts_with('-') || is_off {
                continue;
            }
            if absent.is_none() {
                absent = Some(absent_features(tree)?);
            }
            if absent.as_ref().is_some_and(|absent| absent.contains(feature)) {
                let line = setting.line;
                ignored.push(format!("{source}:{line}: `{key}=` needs +{feature}\nhelp: {help}"));
            }
        }
    }
    if ignored.is_empty() {
        return Ok(());
    }
    bail!(
        "this image's systemd would ignore lines of sandboxes, because it was built without what they \
         need:\n  - {}",
        ignored.join("\n  - ")
    )
}

/// The features of [`FEATURES`] that systemd says it was built without: its list of features
/// (`systemctl --version`) is in its shared library, in older versions in its program. Without this
/// list nothing is known, and nothing is absent.
fn absent_features(tree: &RootTree) -> Result<Vec<&'static str>> {
    let library = |path: &str| {
        let name = path.rsplit('/').next().unwrap_or_default();
        name.starts_with("libsystemd-shared-") && name.ends_with(".so")
    };
    let libraries = tree.iter().map(|(path, _)| path).filter(|path| library(path));
    for path in libraries.chain(["usr/lib/systemd/systemd"]) {
        if tree.resolve(path).is_none() {
            continue;
        }
        let bytes = tree.read(path)?;
        let text = String::from_utf8_lossy(&bytes);
        let has = |sign: char, feature: &str| {
            [' ', '\0'].iter().any(|end| text.contains(&format!("{sign}{feature}{end}")))
        };
        let names = FEATURES.iter().map(|(feature, ..)| *feature);
        if has('+', "SECCOMP") || has('-', "SECCOMP") {
            return Ok(names.filter(|feature| has('-', feature)).collect());
        }
    }
    Ok(Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rootfs::tree::{FileData, RootEntry};

    const UNIT: &str = "[Service]\nProtectSystem=strict\nLockPersonality=no\n\
        SystemCallFilter=@system-service\nSystemCallFilter=~@privileged\nRestrictRealtime=yes\n\
        AppArmorProfile=-x\nMemoryDenyWriteExecute=No\nSystemCallLog=@x\nSystemCallLog=\n";

    /// What is reported of this unit with a systemd that has this list in this file.
    fn findings(file: &str, features: &str) -> String {
        let mut tree = RootTree::with_root(EntryOrigin::Base);
        let bytes = [&[0x7f; 5000], features.as_bytes(), b"\0"].concat();
        tree.file(file, 0o755, bytes).unwrap();
        let kind = RootEntryKind::File(FileData::Bytes(UNIT.into()));
        let origin = EntryOrigin::Overlay("overlays/x/a.service".into());
        let path = "usr/lib/systemd/system/a.service";
        tree.insert(path, RootEntry::new(0o644, kind, origin)).unwrap();
        check_sandboxes(&tree).map_or_else(|error| error.to_string(), |()| String::new())
    }

    #[test]
    fn a_line_that_this_systemd_would_ignore_is_reported() {
        for file in ["usr/lib/systemd/libsystemd-shared-256.so", "usr/lib/systemd/systemd"] {
            let message = findings(file, "-PAM -APPARMOR -SECCOMP +ACL");
            assert_eq!(message.matches("needs +SECCOMP").count(), 3, "{message}");
            assert!(
                message.contains(
                    "overlays/x/a.service:4: `SystemCallFilter=` needs +SECCOMP\n\
                     help: select BR2_PACKAGE_LIBSECCOMP in external/package/slipway-base/Config.in"
                ),
                "{message}"
            );
            assert!(!message.contains("AppArmor"), "{message}");
            assert_eq!(findings(file, "-PAM -APPARMOR +SECCOMP +ACL"), "");
        }
    }

    #[test]
    fn without_a_list_of_features_nothing_is_known() {
        assert_eq!(findings("usr/lib/systemd/systemd", "x-SECCOMPx"), "");
        assert_eq!(findings("usr/lib/other", "-SECCOMP -ACL"), "");
    }
}
