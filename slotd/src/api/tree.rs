//! A wheel's tree: from verified bytes of a bundle into a folder, and from there, by hard links, into a
//! version. Paths in an archive are never trusted, whoever has signed it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, SystemTime};

use bundle::component::{LOCK_ROLE, TREE_TIME, Wheel};
use bundle::{Input, PayloadReader};
use sha2::{Digest, Sha256};

use super::whole::{SUM, sums};
use super::{Place, failed};
use crate::files::{Files, make_dirs};
use crate::install::from_source;
use crate::refusal::{Refusal, Result};

/// The deepest and the longest path of a file.
const DEEPEST: usize = 32;
const LONGEST: usize = 512;

/// Pieces of at most 128 KiB that wait between the verification and the disk.
const WAITING: usize = 8;

/// Bytes that are written at a time.
const CHUNK: u64 = 256 << 10;

/// Where a wheel's tree lies.
fn place_of(place: &Place<'_>, wheel: &Wheel) -> PathBuf {
    place.wheels().join(&wheel.tree)
}

/// Unpacks a payload as the tree of a wheel, which is there when it is complete and durable, or not at all.
///
/// # Errors
/// `bad-tree`, `wrong-hash`: it is not what the lock says. `io`, `source`, and what a bundle is refused for.
pub(super) fn receive<I: Input>(
    place: &Place<'_>,
    wheel: &Wheel,
    payload: &mut PayloadReader<'_, I>,
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    let folder = place_of(place, wheel);
    let mut name = folder.clone().into_os_string();
    name.push(super::NEW);
    let new = PathBuf::from(name);
    place.clear(&new)?;
    make(place.files, &new)?;
    let (sender, receiver) = sync_channel(WAITING);
    std::thread::scope(|scope| -> Result<()> {
        let (into, files) = (&new, place.files);
        let unpacking = std::thread::Builder::new()
            .spawn_scoped(scope, move || unpack(files, Pipe::new(receiver), wheel, into))
            .map_err(|error| Refusal::io("starting a thread", &error))?;
        let read = send(payload, sender, progress);
        let unpacked = unpacking
            .join()
            .map_err(|_| Refusal::new("internal", "unpacking a wheel failed", "report it"))?;
        match read {
            // One that stopped taking says why.
            Ok(()) => unpacked,
            Err(refusal) => Err(refusal),
        }
    })?;
    let own = new.join(SUM);
    sums(&new)
        .and_then(|sums| {
            place.files.create(&own)?;
            place.files.append(&own, &sums)?;
            place.files.set_mode(&own, 0o644)
        })
        .map_err(failed("writing", &own))?;
    place.flush_all(&new)?;
    // One that was changed: versions keep their links to what it was until they are linked anew.
    place.clear(&folder)?;
    place.rename(&new, &folder)?;
    place.flush(&place.wheels())
}

/// Reads a payload to its end, or until the other side takes no more.
fn send<I: Input>(
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
                io::Error::other("nobody takes it").into()
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

fn bad(wheel: &Wheel, why: &str) -> Refusal {
    Refusal::new(
        "bad-tree",
        format!("unpacking {} {}: {why}", wheel.name, wheel.version),
        "make the bundle again with a current `cargo xtask`",
    )
}

/// Unpacks a tar of plain files and folders.
fn unpack(files: &dyn Files, pipe: Pipe, wheel: &Wheel, into: &Path) -> Result<()> {
    let damaged = |error: io::Error| bad(wheel, &format!("the tar is damaged: {error}"));
    let mut archive = tar::Archive::new(pipe);
    let (mut count, mut bytes) = (0, 0_u64);
    let mut known = BTreeSet::new();
    for entry in archive.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        let name = entry.path().map_err(damaged)?.into_owned();
        let shown = name.to_string_lossy().escape_debug().to_string();
        let name = safe(&name)
            .ok_or_else(|| bad(wheel, &format!("`{shown}` is no path that may be written")))?;
        // Two names that differ in case only are one on some file systems, and no wheel's.
        if !known.insert(name.to_string_lossy().to_lowercase()) {
            return Err(bad(wheel, &format!("`{shown}` comes twice")));
        }
        let path = into.join(&name);
        match entry.header().entry_type() {
            tar::EntryType::Directory => make(files, &path)?,
            tar::EntryType::Regular => {
                (count, bytes) = (count + 1, bytes.saturating_add(entry.size()));
                if count > wheel.files || bytes > wheel.bytes {
                    return Err(bad(wheel, "it has more than its lock says"));
                }
                let executable = entry.header().mode().map_err(damaged)? & 0o100 != 0;
                write(files, &mut entry, &path, if executable { 0o755 } else { 0o644 })?;
            }
            _ => return Err(bad(wheel, &format!("`{shown}` is neither a file nor a folder"))),
        }
    }
    // What follows the last entry counts for the hash.
    let mut pipe = archive.into_inner();
    io::copy(&mut pipe, &mut io::sink()).map_err(damaged)?;
    if bundle::index::hex(&pipe.hash.finalize()) != wheel.tree {
        return Err(Refusal::new(
            "wrong-hash",
            format!("the tree of {} does not have the hash that its lock says", wheel.name),
            "make the bundle again with a current `cargo xtask`",
        ));
    }
    if (count, bytes) != (wheel.files, wheel.bytes) {
        return Err(bad(wheel, "it has less than its lock says"));
    }
    Ok(())
}

/// Writes one file.
fn write(files: &dyn Files, entry: &mut impl Read, path: &Path, mode: u32) -> Result<()> {
    if let Some(folder) = path.parent() {
        make(files, folder)?;
    }
    let mut written = || -> io::Result<()> {
        files.create(path)?;
        let mut chunk = Vec::new();
        while entry.by_ref().take(CHUNK).read_to_end(&mut chunk)? > 0 {
            files.append(path, &chunk)?;
            chunk.clear();
        }
        files.set_mode(path, mode)?;
        files.set_modified(path, time())
    };
    written().map_err(failed("writing", path))
}

fn time() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(TREE_TIME)
}

/// Makes a folder with those above it; that it is there is fine.
fn make(files: &dyn Files, folder: &Path) -> Result<()> {
    make_dirs(files, folder).map(drop).map_err(failed("creating", folder))
}

/// A path of plain names that neither begins with a dot nor is the lock's.
fn safe(name: &Path) -> Option<PathBuf> {
    let text = name.to_str()?;
    let mut parts = Vec::new();
    for part in name.components() {
        let Component::Normal(part) = part else { return None };
        parts.push(part);
    }
    let first = parts.first()?.to_str()?;
    let long = text.len() > LONGEST || parts.len() > DEEPEST;
    let ours = first.starts_with('.') || first == LOCK_ROLE;
    (!long && !ours && !text.contains('\0')).then(|| parts.iter().collect())
}

/// Links all files of a wheel's tree into a version's folder.
///
/// # Errors
/// `bad-tree`: another wheel has a file of the same name. `io`.
pub(super) fn link(place: &Place<'_>, wheel: &Wheel, into: &Path) -> Result<()> {
    let from = place_of(place, wheel);
    let mut waiting = vec![PathBuf::new()];
    while let Some(below) = waiting.pop() {
        let folder = from.join(&below);
        make(place.files, &into.join(&below))?;
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
            match place.files.link(&path, &into.join(&name)) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    let why = format!("another wheel installs `{}` too", name.display());
                    return Err(bad(wheel, &why));
                }
                other => other.map_err(failed("linking", &path))?,
            }
        }
    }
    Ok(())
}
