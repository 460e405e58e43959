//! A wheel's tree: unpacked from the verified bytes of a bundle into a directory, and hard-linked from there into a
//! version. Paths in an archive are never trusted, even if it is signed.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, SystemTime};

use bundle::component::{ComponentWheel, TREE_TIME};
use bundle::tree::{TreeEntryKind, TreeRules};
use bundle::{BundleInput, PayloadReader};
use sha2::{Digest, Sha256};

use super::whole::{SUM, hash_file, hash_tree};
use super::{ApiDir, failed};
use crate::files::{FileChanges, make_dirs};
use crate::install::from_source;
use crate::refusal::{Refusal, Result};

/// Number of pieces (at most 128 KiB each) that wait between the verification and the disk.
const WAITING: usize = 8;

/// Bytes that are written at a time.
const CHUNK: u64 = 256 << 10;

/// The directory of a wheel's tree.
fn place_of(place: &ApiDir<'_>, wheel: &ComponentWheel) -> PathBuf {
    place.wheels().join(&wheel.tree)
}

/// Unpacks a payload as the tree of a wheel. The tree has its final name only when it is complete and durable.
///
/// # Errors
/// `bad-tree`, `wrong-hash`: the tree does not match the lock. `io`, `source`, and the refusals of a bundle.
pub(super) fn unpack_wheel<I: BundleInput>(
    place: &ApiDir<'_>,
    wheel: &ComponentWheel,
    payload: &mut PayloadReader<'_, I>,
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    let folder = place_of(place, wheel);
    let mut name = folder.clone().into_os_string();
    name.push(super::NEW);
    let new = PathBuf::from(name);
    place.clear(&new)?;
    create_dir_with_parents(place.files, &new)?;
    let (sender, receiver) = sync_channel(WAITING);
    std::thread::scope(|scope| -> Result<()> {
        let (into, files) = (&new, place.files);
        let unpacking = std::thread::Builder::new()
            .spawn_scoped(scope, move || unpack(files, Pipe::new(receiver), wheel, into))
            .map_err(|error| Refusal::io("starting a thread", &error))?;
        let read = send_payload(payload, sender, progress);
        let unpacked = unpacking
            .join()
            .map_err(|_| Refusal::new("internal", "unpacking a wheel failed", "report it"))?;
        match read {
            // If the receiver stopped, its error says why.
            Ok(()) => unpacked,
            Err(refusal) => Err(refusal),
        }
    })?;
    let own = new.join(SUM);
    hash_tree(&new)
        .and_then(|sums| {
            place.files.create(&own)?;
            place.files.append(&own, &sums)?;
            place.files.set_mode(&own, 0o644)
        })
        .map_err(failed("writing", &own))?;
    place.flush_all(&new)?;
    // Replaces a changed tree: versions keep their links to the old files until they are linked again.
    place.clear(&folder)?;
    place.rename(&new, &folder)?;
    place.flush(&place.wheels())
}

/// Reads a payload to its end, or until the receiver closes.
fn send_payload<I: BundleInput>(
    payload: &mut PayloadReader<'_, I>,
    sender: SyncSender<Vec<u8>>,
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    let mut gone = false;
    while payload.next_frame().is_some() {
        let read = payload.read_frame(&mut |_, bytes| {
            progress(bytes.len() as u64);
            sender.send(bytes.to_vec()).map_err(|_| {
                gone = true;
                io::Error::other("the receiver is closed").into()
            })
        });
        match read {
            Err(_) if gone => break,
            other => other.map_err(from_source)?,
        }
    }
    Ok(())
}

/// Verified bytes as a stream.
struct Pipe {
    receiver: Receiver<Vec<u8>>,
    piece: io::Cursor<Vec<u8>>,
    hash: Sha256,
}

impl Pipe {
    fn new(receiver: Receiver<Vec<u8>>) -> Self {
        Self { receiver, piece: io::Cursor::default(), hash: Sha256::new() }
    }
}

impl Read for Pipe {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let n = self.piece.read(buffer)?;
            if n > 0 || buffer.is_empty() {
                return Ok(n);
            }
            let Ok(piece) = self.receiver.recv() else { return Ok(0) };
            self.hash.update(&piece);
            self.piece = io::Cursor::new(piece);
        }
    }
}

fn bad(wheel: &ComponentWheel, why: &str) -> Refusal {
    Refusal::new(
        "bad-tree",
        format!("unpacking {} {}: {why}", wheel.name, wheel.version),
        crate::NEWER_BUNDLE,
    )
}

/// Unpacks a tar of regular files and directories.
fn unpack(files: &dyn FileChanges, pipe: Pipe, wheel: &ComponentWheel, into: &Path) -> Result<()> {
    let damaged = |error: io::Error| bad(wheel, &format!("the tar is damaged: {error}"));
    let mut archive = tar::Archive::new(pipe);
    let mut rules = TreeRules::new(wheel);
    for entry in archive.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        let name = entry.path().map_err(damaged)?.into_owned();
        let Some(text) = name.to_str() else {
            let text = name.to_string_lossy().escape_debug().to_string();
            return Err(bad(wheel, &format!("`{text}` is not UTF-8")));
        };
        let kind = match entry.header().entry_type() {
            tar::EntryType::Directory => TreeEntryKind::Folder,
            tar::EntryType::Regular => TreeEntryKind::File(entry.size()),
            _ => TreeEntryKind::Other,
        };
        rules.entry(text, kind)?;
        let path = into.join(&name);
        if kind == TreeEntryKind::Folder {
            create_dir_with_parents(files, &path)?;
        } else {
            let executable = entry.header().mode().map_err(damaged)? & 0o100 != 0;
            write(files, &mut entry, &path, if executable { 0o755 } else { 0o644 })?;
        }
    }
    // The bytes after the last entry are part of the hash.
    let mut pipe = archive.into_inner();
    io::copy(&mut pipe, &mut io::sink()).map_err(damaged)?;
    rules.end(&bundle::index::to_hex(&pipe.hash.finalize()))?;
    Ok(())
}

/// Writes one file.
fn write(files: &dyn FileChanges, entry: &mut impl Read, path: &Path, mode: u32) -> Result<()> {
    if let Some(folder) = path.parent() {
        create_dir_with_parents(files, folder)?;
    }
    let mut written = || -> io::Result<()> {
        files.create(path)?;
        let mut chunk = Vec::new();
        while entry.by_ref().take(CHUNK).read_to_end(&mut chunk)? > 0 {
            files.append(path, &chunk)?;
            chunk.clear();
        }
        files.set_mode(path, mode)?;
        files.set_modified(path, fixed_time())
    };
    written().map_err(failed("writing", path))
}

fn fixed_time() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(TREE_TIME)
}

/// Creates a directory with its parents, unless it exists.
fn create_dir_with_parents(files: &dyn FileChanges, folder: &Path) -> Result<()> {
    make_dirs(files, folder).map(drop).map_err(failed("creating", folder))
}

/// Links all files of a wheel's tree into a version's directory. Two wheels may have the same file with the same
/// content and mode: namespace packages have one `__init__.py` in each of their parts.
///
/// # Errors
/// `bad-tree`: another wheel has a different file with the same name. `io`.
pub(super) fn link_wheel(place: &ApiDir<'_>, wheel: &ComponentWheel, into: &Path) -> Result<()> {
    let from = place_of(place, wheel);
    let mut waiting = vec![PathBuf::new()];
    while let Some(below) = waiting.pop() {
        let folder = from.join(&below);
        create_dir_with_parents(place.files, &into.join(&below))?;
        for entry in fs::read_dir(&folder).map_err(failed("reading", &folder))? {
            let entry = entry.map_err(failed("reading", &folder))?;
            let (name, path) = (below.join(entry.file_name()), entry.path());
            if name == Path::new(SUM) {
                continue;
            }
            if entry.file_type().map_err(failed("reading", &path))?.is_dir() {
                waiting.push(name);
                continue;
            }
            let to = into.join(&name);
            match place.files.link(&path, &to) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    let (theirs, own) = (hash_file(&to), hash_file(&path));
                    if theirs.map_err(failed("reading", &to))?
                        != own.map_err(failed("reading", &path))?
                    {
                        let why =
                            format!("another wheel installs a different `{}`", name.display());
                        return Err(bad(wheel, &why));
                    }
                }
                other => other.map_err(failed("linking", &path))?,
            }
        }
    }
    Ok(())
}
