//! Enables systemd units as `systemctl preset` would: the `*.preset` files of the overlays say
//! which, the units' `[Install]` sections say where. Done here because the root filesystem is
//! read-only on the robot and the host need not have systemd.

use anyhow::{Context, Result, bail};

use crate::rootfs::tree::{Entry, Kind, Origin, Tree};

const UNIT_DIRS: [&str; 2] = ["etc/systemd/system", "usr/lib/systemd/system"];
const PRESET_DIR: &str = "usr/lib/systemd/system-preset/";

/// Makes the links of every `enable` line and removes those of every `disable` line of the presets
/// that came from overlays.
///
/// # Errors
/// A preset that names a unit that does not exist, or one that cannot be enabled.
pub fn apply_presets(tree: &mut Tree) -> Result<()> {
    let presets: Vec<(String, String)> = tree
        .iter()
        .filter(|(path, entry)| {
            path.starts_with(PRESET_DIR)
                && path.ends_with(".preset")
                && matches!(entry.origin, Origin::Overlay(_))
        })
        .map(|(path, _)| Ok((path.to_owned(), String::from_utf8(tree.read(path)?)?)))
        .collect::<Result<_>>()?;
    for (path, text) in presets {
        for line in text.lines().map(str::trim) {
            if line.is_empty() || line.starts_with(['#', ';']) {
                continue;
            }
            let applied = match line.split_once(char::is_whitespace) {
                Some(("enable", unit)) => enable(tree, unit.trim()),
                Some(("disable", unit)) => {
                    disable(tree, unit.trim());
                    Ok(())
                }
                _ => bail!("/{path}: expected `enable UNIT` or `disable UNIT`, found `{line}`"),
            };
            applied.with_context(|| format!("applying `{line}` of /{path}"))?;
        }
    }
    Ok(())
}

fn enable(tree: &mut Tree, unit: &str) -> Result<()> {
    // An instance such as serial-getty@ttyS1.service is enabled through its template.
    let file = match unit.split_once('@') {
        Some((name, rest)) => {
            let suffix = rest.rsplit_once('.').map_or("service", |(_, s)| s);
            format!("{name}@.{suffix}")
        }
        None => unit.to_owned(),
    };
    let found =
        UNIT_DIRS.iter().map(|dir| format!("{dir}/{file}")).find(|p| tree.resolve(p).is_some());
    let Some(path) = found else {
        bail!("there is no unit {file}\nhelp: name a unit of the base system or of an overlay")
    };
    let text = String::from_utf8(tree.read(&path)?).context("the unit is not UTF-8")?;
    let mut links = Vec::new();
    let mut also = Vec::new();
    let mut section = "";
    for line in text.lines().map(str::trim) {
        if line.starts_with('[') {
            section = line;
        }
        let ("[Install]", Some((key, value))) = (section, line.split_once('=')) else { continue };
        let words = value.split_whitespace().map(str::to_owned);
        match key.trim() {
            "WantedBy" => links.extend(words.map(|w| format!("{w}.wants/{unit}"))),
            "RequiredBy" => links.extend(words.map(|w| format!("{w}.requires/{unit}"))),
            "Alias" => links.extend(words),
            "Also" => also.extend(words),
            _ => {}
        }
    }
    if links.is_empty() && also.is_empty() {
        bail!("{file} has no [Install] section: it cannot be enabled, something else starts it");
    }
    for link in links {
        let entry = Entry::new(0o777, Kind::Symlink(format!("/{path}")), Origin::Compose);
        tree.insert(&format!("etc/systemd/system/{link}"), entry)?;
    }
    // `Also=` names units of the same package; one that is not installed is no mistake.
    for other in also {
        if other != unit
            && UNIT_DIRS.iter().any(|dir| tree.resolve(&format!("{dir}/{other}")).is_some())
        {
            enable(tree, &other)?;
        }
    }
    Ok(())
}

fn disable(tree: &mut Tree, unit: &str) {
    let suffix = format!("/{unit}");
    let links: Vec<String> = tree
        .iter()
        .filter(|(path, entry)| {
            path.starts_with("etc/systemd/system/")
                && path.ends_with(&suffix)
                && matches!(entry.kind, Kind::Symlink(_))
        })
        .map(|(path, _)| path.to_owned())
        .collect();
    for link in links {
        tree.remove(&link);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(preset: &str) -> Tree {
        let mut tree = Tree::default();
        let unit = "[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n";
        tree.file("usr/lib/systemd/system/a.service", 0o644, unit).expect("placed");
        tree.file("usr/lib/systemd/system/static.service", 0o644, "[Service]\n").expect("placed");
        let kind = Kind::File(crate::rootfs::tree::Data::Bytes(preset.into()));
        let entry = Entry::new(0o644, kind, Origin::Overlay("overlays/x".into()));
        tree.insert("usr/lib/systemd/system-preset/10-x.preset", entry).expect("placed");
        tree
    }

    const LINK: &str = "etc/systemd/system/multi-user.target.wants/a.service";

    #[test]
    fn presets_make_and_remove_links() {
        let mut enabled = tree("# why\nenable a.service\n");
        apply_presets(&mut enabled).expect("applied");
        assert!(enabled.get(LINK).is_some());
        let mut disabled = tree("enable a.service\ndisable a.service\n");
        apply_presets(&mut disabled).expect("applied");
        assert!(disabled.get(LINK).is_none());
    }

    #[test]
    fn a_preset_for_nothing_is_an_error() {
        let error = apply_presets(&mut tree("enable b.service\n")).expect_err("unknown");
        assert!(format!("{error:#}").contains("there is no unit b.service"), "{error:#}");
        let error = apply_presets(&mut tree("enable static.service\n")).expect_err("static");
        assert!(format!("{error:#}").contains("no [Install] section"), "{error:#}");
    }
}
