//! Unpacks packages natively, without running any of their programs.

use std::fs;
use std::os::unix::fs::symlink;

use anyhow::{Context, Result, ensure};
use camino::Utf8Path;

use crate::exec::Tool;

/// Directories that are links into `usr` on an installed system, and that packages up to Debian 12
/// still contain at the top level.
const ALIASES: [&str; 3] = ["bin", "lib", "sbin"];

/// Unpacks the files of one package into a directory.
pub(super) fn unpack_deb(package: &Utf8Path, into: &Utf8Path) -> Result<()> {
    fs::create_dir_all(into).with_context(|| format!("creating {into}"))?;
    Tool::new("dpkg-deb").arg("--extract").arg(package).arg(into).run()
}

/// Moves `bin`, `lib` and `sbin` of unpacked packages below `usr`, as in packages of Debian 13, and
/// replaces them by links: `dpkg-deb` replaces links by directories, so call this after the last
/// package.
///
/// # Errors
/// When two packages contain the same file, in either directory.
pub(super) fn merge_usr(root: &Utf8Path) -> Result<()> {
    for name in ALIASES {
        let (alias, merged) = (root.join(name), root.join("usr").join(name));
        if alias.is_symlink() {
            continue;
        }
        fs::create_dir_all(&merged).with_context(|| format!("creating {merged}"))?;
        if alias.is_dir() {
            move_into(&alias, &merged)?;
        }
        let target = format!("usr/{name}");
        symlink(&target, &alias).with_context(|| format!("creating the link {alias}"))?;
    }
    Ok(())
}

fn move_into(from: &Utf8Path, to: &Utf8Path) -> Result<()> {
    let moving = || format!("moving {from} to {to}");
    for entry in from.read_dir_utf8().with_context(moving)? {
        let entry = entry.with_context(moving)?;
        let (old, new) = (entry.path(), to.join(entry.file_name()));
        if new.symlink_metadata().is_err() {
            fs::rename(old, &new).with_context(moving)?;
        } else {
            let dirs = [old, &new].iter().all(|path| path.is_dir() && !path.is_symlink());
            ensure!(dirs, "{old} and {new} are the same file on an installed system");
            move_into(old, &new)?;
        }
    }
    fs::remove_dir(from).with_context(moving)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpacked_packages_of_both_layouts_are_one_tree() {
        let guard = tempfile::tempdir().unwrap();
        let root = Utf8Path::from_path(guard.path()).unwrap();
        let file = |path: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, path.file_name().unwrap()).unwrap();
        };
        for path in ["lib/modules/6/a.ko", "usr/lib/modules/6/b.ko", "usr/lib/firmware/c", "bin/d"]
        {
            file(path);
        }
        symlink("d", root.join("bin/e")).unwrap();
        merge_usr(root).unwrap();
        for path in ["modules/6/a.ko", "modules/6/b.ko", "firmware/c"] {
            assert!(root.join("usr/lib").join(path).is_file(), "{path}");
            assert!(root.join("lib").join(path).is_file(), "{path}");
        }
        assert_eq!(fs::read_to_string(root.join("usr/bin/e")).unwrap(), "d");
        assert_eq!(fs::read_link(root.join("sbin")).unwrap(), Utf8Path::new("usr/sbin"));
        merge_usr(root).unwrap();

        fs::remove_file(root.join("lib")).unwrap();
        file("lib/firmware/c");
        let error = merge_usr(root).unwrap_err().to_string();
        assert!(error.ends_with("are the same file on an installed system"), "{error}");
    }
}
