//! A store in a directory: the local one, a web server's root, a USB stick.
//!
//! Each index is created under a unique name, `channels/<channel>.d/<serial>`, which only one
//! publisher can create; then it replaces the file for readers. A lock would fail with a crashed
//! owner or on a filesystem without locks.

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{Advice, CWD, FlockOperation, OFlags, RenameFlags, fadvise, flock, renameat_with};
use rustix::io::Errno;

use super::format::{Channel, ChannelIndex, LARGEST_TEXT, object_path};
use super::{ChannelToken, FileStore, ObjectError, ReleaseStore, newest_index};
use crate::artifact::{hash_bytes, hash_file, hash_reader, none_if_missing};
use crate::scratch::unique_name;

/// The suffix of unfinished files; `release gc` removes those of interrupted publishers.
pub const UNFINISHED: &str = ".partial-";

/// A directory with releases.
#[derive(Debug, Clone)]
pub struct DirectoryStore {
    root: Utf8PathBuf,
}

impl DirectoryStore {
    /// Creates nothing.
    pub fn new(root: &Utf8Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// The directory.
    pub fn root(&self) -> &Utf8Path {
        &self.root
    }

    /// The path of an object.
    pub fn object(&self, sha256: &str) -> Utf8PathBuf {
        self.root.join(object_path(sha256))
    }

    /// Writes a temporary file beside the final name, flushes it, verifies it by reading the
    /// medium, and renames it.
    fn write_and_rename(
        &self,
        path: &Utf8Path,
        replace: bool,
        fill: impl FnOnce(&mut File) -> Result<String>,
    ) -> Result<bool> {
        let dir = path.parent().context("a stored file has a directory")?;
        self.make_dirs(dir)?;
        let temporary = dir.join(format!("{UNFINISHED}{}", unique_name()));
        let attempt = || -> Result<bool> {
            let mut file =
                File::create_new(&temporary).with_context(|| format!("creating {temporary}"))?;
            let mode = file
                .metadata()
                .with_context(|| format!("looking at {temporary}"))?
                .permissions()
                .mode();
            // Best effort: a USB stick's FAT has no modes, and refuses.
            drop(file.set_permissions(Permissions::from_mode(mode & 0o7777 | READ | 0o200)));
            let expected = fill(&mut file)?;
            file.sync_all().with_context(|| format!("flushing {temporary}"))?;
            // The content of the page cache says nothing about a USB stick. Best effort: a
            // filesystem in memory does not support this advice.
            fadvise(&file, 0, None, Advice::DontNeed).ok();
            let (_, found) = hash_file(&temporary)?;
            ensure!(
                found == expected,
                "{path} was read back with SHA-256 {found}, expected {expected}\n\
                 help: the medium is faulty, or the file changed while it was read"
            );
            let placed = if replace {
                fs::rename(&temporary, path).with_context(|| format!("renaming to {path}"))?;
                true
            } else {
                rename_new(&temporary, path)?
            };
            File::open(dir)
                .and_then(|dir| dir.sync_all())
                .with_context(|| format!("flushing {dir}"))?;
            Ok(placed)
        };
        let result = attempt();
        if !matches!(result, Ok(true)) {
            // Best effort: the first error is the one to report.
            drop(fs::remove_file(&temporary));
        }
        result
    }

    /// Makes a directory and those above it, as far as the store's own; readers may pass through each.
    fn make_dirs(&self, dir: &Utf8Path) -> Result<()> {
        if dir.is_dir() {
            return Ok(());
        }
        match dir.parent() {
            Some(above) if dir != self.root => self.make_dirs(above)?,
            Some(above) => {
                fs::create_dir_all(above).with_context(|| format!("creating {above}"))?
            }
            None => {}
        }
        match fs::create_dir(dir) {
            Ok(()) => {
                let mode = |mode: u32| Permissions::from_mode(mode | READ | PASS | 0o200);
                let about = fs::metadata(dir).with_context(|| format!("looking at {dir}"))?;
                // As below: not every medium has modes.
                drop(fs::set_permissions(dir, mode(about.permissions().mode() & 0o7777)));
                Ok(())
            }
            // Another publisher's.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(error).with_context(|| format!("creating {dir}")),
        }
    }

    fn write_small(&self, path: &Utf8Path, replace: bool, content: &[u8]) -> Result<bool> {
        self.write_and_rename(path, replace, |file| {
            file.write_all(content).with_context(|| format!("writing {path}"))?;
            Ok(hash_bytes(content))
        })
    }

    fn generations(&self, channel: Channel) -> Utf8PathBuf {
        self.root.join(format!("channels/{channel}.d"))
    }

    /// The highest existing serial.
    fn newest(&self, channel: Channel) -> Result<Option<u64>> {
        let dir = self.generations(channel);
        let context = || format!("reading {dir}");
        let entries = none_if_missing(dir.read_dir_utf8()).with_context(context)?;
        let mut newest = None;
        for entry in entries.into_iter().flatten() {
            let entry = entry.with_context(context)?;
            newest = newest.max(entry.file_name().parse::<u64>().ok());
        }
        Ok(newest)
    }
}

/// What readers of a store need, whatever the publisher's umask: a web server runs as another user.
const READ: u32 = 0o444;
/// The same of directories. Whether others may write is up to the umask: a team may share a store.
const PASS: u32 = 0o111;

/// Renames without replacing an existing file: returns `false` if one exists.
fn rename_new(from: &Utf8Path, to: &Utf8Path) -> Result<bool> {
    let context = || format!("renaming to {to}");
    match renameat_with(CWD, from.as_str(), CWD, to.as_str(), RenameFlags::NOREPLACE) {
        Ok(()) => return Ok(true),
        Err(Errno::EXIST) => return Ok(false),
        // Not every filesystem supports this (NFS); those support links.
        Err(Errno::INVAL | Errno::NOSYS) => {}
        Err(error) => return Err(error).with_context(context),
    }
    match fs::hard_link(from, to) {
        Ok(()) => {
            fs::remove_file(from).with_context(context)?;
            Ok(true)
        }
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error).with_context(context),
    }
}

/// Opens a stored file: its size; `None` when it does not exist. A FIFO or a device in a store would block or never end.
fn open_stored(path: &Utf8Path) -> Result<Option<(File, u64)>> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = none_if_missing(File::options().read(true).custom_flags(flags).open(path))
        .with_context(|| format!("opening {path}"))?;
    let Some(file) = file else { return Ok(None) };
    let about = file.metadata().with_context(|| format!("looking at {path}"))?;
    if !about.is_file() {
        return Err(ObjectError::Damaged(format!(
            "{path} is not a regular file\nhelp: use another copy of the store"
        ))
        .into());
    }
    Ok(Some((file, about.len())))
}

impl FileStore for DirectoryStore {
    fn name(&self) -> String {
        self.root.to_string()
    }

    fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        let path = self.root.join(path);
        let Some((file, _)) = open_stored(&path)? else { return Ok(None) };
        let mut content = Vec::new();
        file.take(LARGEST_TEXT + 1)
            .read_to_end(&mut content)
            .with_context(|| format!("reading {path}"))?;
        ensure!(content.len() as u64 <= LARGEST_TEXT, "{path} is larger than {LARGEST_TEXT} bytes");
        Ok(Some(content))
    }

    fn present(&self, objects: &[(String, u64)]) -> Result<BTreeSet<String>> {
        let mut present = BTreeSet::new();
        for (sha256, size) in objects {
            let path = self.object(sha256);
            if fs::metadata(&path).is_ok_and(|m| m.len() == *size) && hash_file(&path)?.1 == *sha256
            {
                // This tells `release gc` that the object is in use again.
                File::options()
                    .append(true)
                    .open(&path)
                    .and_then(|file| file.set_modified(std::time::SystemTime::now()))
                    .with_context(|| format!("touching {path}"))?;
                present.insert(sha256.clone());
            }
        }
        Ok(present)
    }

    fn put(&self, sha256: &str, from: &Utf8Path) -> Result<()> {
        let mut source = File::open(from).with_context(|| format!("opening {from}"))?;
        self.write_and_rename(&self.object(sha256), true, |file| {
            let failed = |error| anyhow::Error::new(error).context(format!("reading {from}"));
            let (_, found) =
                hash_reader(&mut source, failed, |bytes| file.write_all(bytes).context("writing"))?;
            ensure!(
                found == sha256,
                "{from} has the SHA-256 {found}, expected {sha256}\n\
                 help: the file is damaged; create the release again"
            );
            Ok(found)
        })?;
        Ok(())
    }

    fn get(&self, sha256: &str, limit: u64, into: &Utf8Path, received: &dyn Fn(u64)) -> Result<()> {
        let from = self.object(sha256);
        let bad = |what: String| Err(ObjectError::Damaged(format!("{from} {what}")).into());
        let Some((source, size)) = open_stored(&from)? else {
            return Err(ObjectError::Missing(format!("{from} is missing")).into());
        };
        if size > limit {
            return bad(format!("has {size} bytes, expected at most {limit}"));
        }
        let mut out = File::create(into).with_context(|| format!("creating {into}"))?;
        let failed = |error| anyhow::Error::new(error).context(format!("reading {from}"));
        // One more byte is enough to notice a file that grows.
        let mut source = source.take(limit.saturating_add(1));
        let (_, found) = hash_reader(&mut source, failed, |bytes| {
            out.write_all(bytes).with_context(|| format!("writing {into}"))?;
            received(bytes.len() as u64);
            Ok(())
        })?;
        if found != sha256 {
            return bad(format!("is damaged: its SHA-256 is {found}"));
        }
        Ok(())
    }

    fn write(&self, path: &str, content: &[u8]) -> Result<()> {
        if self.read(path)?.as_deref() == Some(content) {
            return Ok(());
        }
        self.write_small(&self.root.join(path), true, content)?;
        Ok(())
    }
}

impl ReleaseStore for DirectoryStore {
    /// The directory itself, and the path that was given: a symbolic link in it may lead to another directory tomorrow.
    fn identities(&self) -> Result<Vec<String>> {
        let context = || format!("looking up the full path of {}", self.root);
        let full = camino::absolute_utf8(&self.root).with_context(context)?;
        // Of a directory that may not exist yet, one of its parents exists.
        let there =
            full.ancestors().find(|path| path.exists()).context("the root directory exists")?;
        let itself = there.canonicalize_utf8().with_context(context)?;
        // Without a `/` at the end, which joining an empty path would add.
        let itself: Utf8PathBuf = itself
            .components()
            .chain(full.strip_prefix(there).with_context(context)?.components())
            .collect();
        let given: Utf8PathBuf = full.components().collect();
        let mut identities = vec![itself.into_string(), given.into_string()];
        identities.dedup();
        Ok(identities)
    }

    fn exists(&self) -> bool {
        self.root.exists()
    }

    fn index(&self, channel: Channel) -> Result<(Option<Vec<u8>>, ChannelToken)> {
        let visible = self.read(&channel.path())?;
        let seen = visible.as_deref().map(ChannelIndex::serial_of).transpose();
        let seen = seen.with_context(|| format!("reading {} of {}", channel.path(), self.root))?;
        newest_index((visible, seen), self.newest(channel)?, |newest| {
            let path = format!("channels/{channel}.d/{newest}");
            self.read(&path)?.with_context(|| format!("{path} of {} no longer exists", self.root))
        })
    }

    fn swap(
        &self,
        channel: Channel,
        token: &ChannelToken,
        serial: u64,
        content: &[u8],
    ) -> Result<bool> {
        let expected = match token {
            ChannelToken::Absent => 1,
            ChannelToken::Version(seen) => seen.parse::<u64>().context("a serial is a number")? + 1,
        };
        if serial != expected {
            bail!("the index has the serial {serial}, expected {expected}");
        }
        let path = self.generations(channel).join(serial.to_string());
        self.write_small(&path, false, content)
    }

    fn make_visible(&self, channel: Channel) -> Result<()> {
        if self.newest(channel)?.is_none() {
            return Ok(());
        }
        // Publishers on this machine take turns, so that an older file never replaces a newer one.
        // On filesystems without locks, the loop below is sufficient.
        let dir = self.generations(channel);
        let turn = File::open(&dir).with_context(|| format!("opening {dir}"))?;
        flock(&turn, FlockOperation::LockExclusive).ok();
        loop {
            let (newest, token) = self.index(channel)?;
            let Some(newest) = newest else { return Ok(()) };
            if self.read(&channel.path())?.as_ref() != Some(&newest) {
                self.write_small(&self.root.join(channel.path()), true, &newest)?;
            }
            if self.index(channel)?.1 == token {
                return Ok(());
            }
        }
    }
}
