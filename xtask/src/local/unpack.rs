//! Unpacks a slot's filesystem to a directory as an ordinary user: each file's bytes, mode and
//! time, but no owners, since a user cannot set them.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use camino::Utf8Path;
use ext4_view::{Ext4, FileType};

use crate::artifact::{partial_path, write_large};
use crate::diff;
use crate::progress::{ProgressStep, ProgressUnit};

/// The permissions that are kept. A set-user-id program would get the privileges of the user who
/// unpacked it.
const MODE: u16 = 0o1777;

/// The kernel's id of the current boot (random(4)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Unpacks `image` to `out`, unless `out` has the same content already. `key` identifies the
/// image's content, `used` is the size of its content in bytes. Returns whether it was unpacked.
///
/// # Errors
/// An image that cannot be read, a full disk; `out` does not exist then.
pub(super) fn unpack_image(image: &Utf8Path, key: &str, used: u64, out: &Utf8Path) -> Result<bool> {
    // Nothing is flushed, which would take longer than unpacking again: after a reboot, which may
    // have been a power cut, the directory is not used.
    let boot = fs::read_to_string(BOOT_ID).with_context(|| format!("reading {BOOT_ID}"))?;
    let key = format!("{key}\n{boot}");
    // Written last: after an interrupted run it is missing or different.
    let stamp = out.with_extension("key");
    if out.is_dir() && fs::read_to_string(&stamp).is_ok_and(|kept| kept == key) {
        return Ok(false);
    }
    let fresh = partial_path(out);
    for old in [&stamp, &fresh, &out.to_owned()] {
        remove_path(old)?;
    }
    let step = ProgressStep::new("unpack", "the root filesystem", used, ProgressUnit::Bytes);
    let filesystem = diff::open_ext4(image, 0)?;
    unpack_tree(&filesystem, fresh.as_std_path(), &step)
        .with_context(|| format!("unpacking {image}"))?;
    fs::rename(&fresh, out).with_context(|| format!("renaming {fresh}"))?;
    write_large(&stamp, |file| Ok(file.write_all(key.as_bytes())?))?;
    Ok(true)
}

/// Removes a file or a directory, if it exists.
///
/// # Errors
/// When it cannot be removed.
pub(super) fn remove_path(path: &Utf8Path) -> Result<()> {
    let removed = match path.symlink_metadata() {
        Err(_) => return Ok(()),
        Ok(about) if about.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
    };
    removed.with_context(|| format!("removing {path}"))
}

fn unpack_tree(filesystem: &Ext4, out: &Path, step: &ProgressStep) -> Result<()> {
    fs::create_dir(out).with_context(|| format!("making {}", out.display()))?;
    let mut dirs: Vec<(PathBuf, u16)> = Vec::new();
    let mut todo = vec![b"/".to_vec()];
    let mut buffer = vec![0; 1 << 20];
    while let Some(dir) = todo.pop() {
        for entry in filesystem.read_dir(dir.as_slice())? {
            let entry = entry?;
            if matches!(entry.file_name().as_ref(), b"." | b"..") {
                continue;
            }
            let from = entry.path();
            let about = entry.metadata()?;
            let relative = from.as_ref().strip_prefix(b"/").unwrap_or(from.as_ref());
            let to = out.join(OsStr::from_bytes(relative));
            let context = || format!("writing {}", to.display());
            match about.file_type() {
                FileType::Directory => {
                    fs::create_dir(&to).with_context(context)?;
                    todo.push(from.as_ref().to_vec());
                    dirs.push((to, about.mode()));
                }
                FileType::Symlink => {
                    let target = filesystem.read_link(&from)?;
                    symlink(OsStr::from_bytes(target.as_ref()), &to).with_context(context)?;
                }
                FileType::Regular => {
                    let mut source = filesystem.open(&from)?;
                    let mut file = File::create_new(&to).with_context(context)?;
                    loop {
                        let read = source.read_bytes(&mut buffer)?;
                        let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty())
                        else {
                            break;
                        };
                        file.write_all(bytes).with_context(context)?;
                        step.advance(read as u64);
                    }
                    let seconds = u64::try_from(about.modified().seconds()).unwrap_or_default();
                    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
                    file.set_modified(time).with_context(context)?;
                    file.set_permissions(permissions_from_mode(about.mode()))
                        .with_context(context)?;
                }
                // Devices and the like: a user may not create them, and images do not contain any.
                _ => {}
            }
        }
    }
    // The deepest first: a read-only directory must get its mode last.
    for (path, bits) in dirs.iter().rev() {
        fs::set_permissions(path, permissions_from_mode(*bits))
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

fn permissions_from_mode(bits: u16) -> Permissions {
    Permissions::from_mode(u32::from(bits & MODE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::{Tool, find_program};
    use camino::Utf8PathBuf;

    /// A filesystem with a read-only directory, created by the usual tool.
    fn image(dir: &Utf8Path) -> Utf8PathBuf {
        let source = dir.join("source");
        let inner = source.join("usr/bin");
        fs::create_dir_all(&inner).unwrap();
        fs::write(inner.join("su"), "program").unwrap();
        fs::set_permissions(inner.join("su"), Permissions::from_mode(0o4755)).unwrap();
        fs::write(source.join("large"), vec![7; 3 << 20]).unwrap();
        symlink("usr/bin", source.join("bin")).unwrap();
        fs::set_permissions(&inner, Permissions::from_mode(0o555)).unwrap();
        let image = dir.join("root.ext4");
        let mke2fs = find_program("mke2fs").expect("e2fsprogs is installed");
        Tool::new(mke2fs)
            .args(["-q", "-t", "ext4", "-d", source.as_str(), image.as_str(), "16M"])
            .run()
            .unwrap();
        image
    }

    #[test]
    fn a_file_system_is_unpacked_once_and_whole() {
        let guard = tempfile::tempdir().unwrap();
        let dir = Utf8Path::from_path(guard.path()).unwrap();
        let image = image(dir);
        let out = dir.join("root");
        assert!(unpack_image(&image, "one", 1 << 20, &out).unwrap());
        assert_eq!(fs::read_to_string(out.join("bin/su")).unwrap(), "program");
        assert_eq!(fs::read(out.join("large")).unwrap(), vec![7; 3 << 20]);
        let bits = |path: &str| fs::metadata(out.join(path)).unwrap().permissions().mode() & 0o7777;
        assert_eq!((bits("usr/bin/su"), bits("usr/bin")), (0o755, 0o555));
        assert_eq!(fs::read_link(out.join("bin")).unwrap(), Path::new("usr/bin"));

        fs::write(out.join("mine"), "").unwrap();
        assert!(!unpack_image(&image, "one", 1 << 20, &out).unwrap());
        assert!(out.join("mine").exists());
        // The remains of an interrupted run are not used.
        fs::set_permissions(out.join("usr/bin"), Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(partial_path(&out)).unwrap();
        assert!(unpack_image(&image, "two", 1 << 20, &out).unwrap());
        assert!(!out.join("mine").exists() && !partial_path(&out).exists());
        for path in [out.join("usr/bin"), dir.join("source/usr/bin")] {
            fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
        }
    }
}
