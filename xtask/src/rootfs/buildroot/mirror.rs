//! Mirrors of sources, in the layout that Buildroot reads: `<package>/<file>`. A source is
//! identified by its hash, whatever the name and the directory it was found under.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail};
use camino::{Utf8Component, Utf8Path, Utf8PathBuf};
use serde::Serialize;
use sha2::{Digest, Sha512};

use super::info::FileHashes;
use super::sources::SourceFile;
use crate::artifact::{hash_reader, hex, none_if_missing, write_atomically};
use crate::exec::Tool;
use crate::git;
use crate::parallel;
use crate::progress::{ProgressStep, ProgressUnit, list_names, warn};
use crate::scratch::create_scratch_dir;

/// The index at the top of a mirror: `sha256sum --check` reads it.
pub const INDEX: &str = "SHA256SUMS";

/// The largest file that is examined: as large as a download of an unknown size may be.
const LARGEST_SOURCE: u64 = 4 << 30;

/// The first bytes of files with these suffixes. A file with other first bytes is not hashed.
const FORMS: [(&[&str], &[u8]); 6] = [
    (&[".gz", ".tgz"], b"\x1f\x8b"),
    (&[".xz", ".txz"], b"\xfd7zXZ\0"),
    (&[".bz2", ".tbz2", ".tbz"], b"BZh"),
    (&[".lz"], b"LZIP"),
    (&[".zst"], b"\x28\xb5\x2f\xfd"),
    (&[".zip", ".whl", ".jar"], b"PK"),
];

/// A defect of a mirror.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MirrorFinding {
    /// The kind of defect.
    pub kind: MirrorDefect,
    /// The source's path in the layout of a mirror.
    pub source: Utf8PathBuf,
    /// The file that is damaged, or that has the content under another name.
    pub file: Option<PathBuf>,
}

/// Kinds of defects of a mirror.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MirrorDefect {
    /// No file has the content.
    Missing,
    /// The file's content does not match the hash.
    Damaged,
    /// A file with another name has the content.
    Misnamed,
}

impl std::fmt::Display for MirrorFinding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let file = self.file.as_deref().unwrap_or(Path::new("")).display();
        match self.kind {
            MirrorDefect::Missing => write!(f, "missing   {}", self.source),
            MirrorDefect::Damaged => write!(f, "damaged   {file}"),
            MirrorDefect::Misnamed => write!(f, "misnamed  {file} is {}", self.source),
        }
    }
}

/// Compares a mirror with the sources that it must have.
///
/// # Errors
/// When a file cannot be read.
pub fn check_mirror(sources: &[SourceFile], mirror: &Utf8Path) -> Result<Vec<MirrorFinding>> {
    let states = hash_all(sources, |source| source.locate_in(mirror))?;
    let (mut findings, mut absent, mut right) = (Vec::new(), Vec::new(), BTreeSet::new());
    for (source, state) in sources.iter().zip(states) {
        match state {
            None => absent.push(source),
            Some((path, true)) => drop(right.insert(path.into_std_path_buf())),
            Some((path, false)) => findings.push(MirrorFinding {
                kind: MirrorDefect::Damaged,
                source: source.path(),
                file: Some(path.into_std_path_buf()),
            }),
        }
    }
    let found = find_by_hash(&absent, &[mirror.to_owned()], &right)?;
    findings.extend(absent.iter().map(|source| {
        let file = found.get(&source.path()).cloned();
        let kind = if file.is_some() { MirrorDefect::Misnamed } else { MirrorDefect::Missing };
        MirrorFinding { kind, source: source.path(), file }
    }));
    findings.sort_by(|a, b| (a.kind, &a.source).cmp(&(b.kind, &b.source)));
    Ok(findings)
}

/// The sources whose file in a directory with the layout of a mirror is missing or damaged.
///
/// # Errors
/// When a file cannot be read.
pub fn list_lacking<'a>(sources: &'a [SourceFile], dir: &Utf8Path) -> Result<Vec<&'a SourceFile>> {
    let place = |source: &SourceFile| Some(dir.join(source.path())).filter(|path| path.is_file());
    let states = hash_all(sources, place)?;
    let lacking = sources.iter().zip(states);
    Ok(lacking
        .filter(|(_, s)| !s.as_ref().is_some_and(|s| s.1))
        .map(|(source, _)| source)
        .collect())
}

/// For each source: its file, and whether the content is right; `None` without a file.
fn hash_all(
    sources: &[SourceFile],
    place: impl Fn(&SourceFile) -> Option<Utf8PathBuf>,
) -> Result<Vec<Option<(Utf8PathBuf, bool)>>> {
    let items: Vec<(&SourceFile, Option<Utf8PathBuf>)> =
        sources.iter().map(|source| (source, place(source))).collect();
    let size = |path: &Utf8PathBuf| fs::metadata(path).map_or(0, |about| about.len());
    let total = items.iter().filter_map(|(_, path)| path.as_ref()).map(size).sum();
    let step = ProgressStep::new("sources", "checking hashes", total, ProgressUnit::Bytes);
    parallel::map(&items, parallel::cores(), |(source, path)| {
        let Some(path) = path else { return Ok(None) };
        let mut file = File::open(path).with_context(|| format!("opening {path}"))?;
        let hashes = hash_source(&mut file, source.hashes.sha512.is_some(), |n| step.advance(n))
            .with_context(|| format!("reading {path}"))?;
        Ok(Some((path.clone(), is_match(&source.hashes, &hashes))))
    })
}

/// Finds files by their content, below directories, whatever their names: for each source that was
/// found its path in the layout of a mirror, and the file. Reads regular files only and follows no
/// link; `except` are files that belong to another source.
///
/// # Errors
/// When a directory does not exist, or a file cannot be read.
pub fn find_by_hash(
    wanted: &[&SourceFile],
    dirs: &[Utf8PathBuf],
    except: &BTreeSet<PathBuf>,
) -> Result<BTreeMap<Utf8PathBuf, PathBuf>> {
    let wanted: Vec<&SourceFile> =
        wanted.iter().copied().filter(|s| s.hashes != FileHashes::default()).collect();
    let (mut files, mut unread) = (Vec::new(), Vec::new());
    for dir in dirs {
        let real = dir.canonicalize().with_context(|| format!("looking for {dir}"))?;
        if !real.is_dir() {
            bail!("{dir} is not a directory");
        }
        walk(&real, &mut files, &mut unread);
    }
    if !unread.is_empty() {
        warn(format!("not searched, because they cannot be read: {}", list_names(&unread)));
    }
    files.sort();
    files.dedup();
    files.retain(|(path, size)| {
        let fits = |source: &&SourceFile| source.size.is_none_or(|known| known == *size);
        !except.contains(path) && *size <= LARGEST_SOURCE && wanted.iter().any(fits)
    });
    let total = files.iter().map(|(_, size)| size).sum();
    let step = ProgressStep::new("sources", "searching by hash", total, ProgressUnit::Bytes);
    let (found, left) = (Mutex::new(BTreeMap::new()), AtomicUsize::new(wanted.len()));
    parallel::map(&files, parallel::cores(), |(path, size)| {
        if left.load(Ordering::Relaxed) == 0 {
            return Ok(());
        }
        let Some(hashes) = hash_candidate(path, *size, &wanted, &step)
            .with_context(|| format!("reading {}", path.display()))?
        else {
            step.advance(*size);
            return Ok(());
        };
        for source in wanted.iter().filter(|source| is_match(&source.hashes, &hashes)) {
            let mut found = found.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if found.insert(source.path(), path.clone()).is_none() {
                left.fetch_sub(1, Ordering::Relaxed);
            }
        }
        Ok(())
    })?;
    Ok(found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
}

/// Adds all regular files below a directory, with their sizes, and what could not be read.
fn walk(dir: &Path, files: &mut Vec<(PathBuf, u64)>, unread: &mut Vec<String>) {
    let Ok(entries) = fs::read_dir(dir) else {
        unread.push(dir.display().to_string());
        return;
    };
    for entry in entries {
        // `file_type` and `metadata` of an entry do not follow links.
        let Ok((path, about)) = entry.and_then(|entry| Ok((entry.path(), entry.metadata()?)))
        else {
            unread.push(dir.display().to_string());
            continue;
        };
        if about.is_dir() {
            walk(&path, files, unread);
        } else if about.is_file() && about.len() > 0 {
            files.push((path, about.len()));
        }
    }
}

/// The hashes of a file that may be a wanted source; `None` when its first bytes exclude it, or it
/// cannot be opened.
fn hash_candidate(
    path: &Path,
    size: u64,
    wanted: &[&SourceFile],
    step: &ProgressStep,
) -> Result<Option<FileHashes>> {
    // Another process may have replaced the file by a link or by a pipe.
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let flags = i32::try_from(flags.bits()).context("the flags of open(2)")?;
    let opened = fs::OpenOptions::new().read(true).custom_flags(flags).open(path);
    let mut file = match opened {
        Ok(file) => file,
        Err(error) => {
            warn(format!("{} is not examined: {error}", path.display()));
            return Ok(None);
        }
    };
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    let mut first = Vec::new();
    (&mut file).take(8).read_to_end(&mut first)?;
    let fits = |source: &&&SourceFile| {
        let form = FORMS.iter().find(|(ends, _)| ends.iter().any(|end| source.file.ends_with(end)));
        source.size.is_none_or(|known| known == size)
            && form.is_none_or(|(_, begin)| first.starts_with(begin))
    };
    let fitting: Vec<&&SourceFile> = wanted.iter().filter(fits).collect();
    if fitting.is_empty() {
        return Ok(None);
    }
    file.rewind()?;
    let sha512 = fitting.iter().any(|source| source.hashes.sha512.is_some());
    hash_source(&mut file, sha512, |n| step.advance(n)).map(Some)
}

/// SHA-256, and SHA-512 where it is needed.
fn hash_source(reader: &mut impl Read, sha512: bool, advance: impl Fn(u64)) -> Result<FileHashes> {
    let mut second = sha512.then(Sha512::new);
    let (_, sha256) = hash_reader(reader, anyhow::Error::from, |piece| {
        if let Some(second) = &mut second {
            second.update(piece);
        }
        advance(piece.len() as u64);
        Ok(())
    })?;
    Ok(FileHashes { sha256: Some(sha256), sha512: second.map(|hash| hex(&hash.finalize())) })
}

/// Whether a file has every hash that is known, and at least one.
fn is_match(known: &FileHashes, found: &FileHashes) -> bool {
    let agrees = |a: &Option<String>, b: &Option<String>| a.is_none() || a == b;
    *known != FileHashes::default()
        && agrees(&known.sha256, &found.sha256)
        && agrees(&known.sha512, &found.sha512)
}

/// Copies a source into a directory with the layout of a mirror, atomically; returns its size.
///
/// # Errors
/// When the content is not that of the source; no file is created then.
pub fn copy_source(source: &SourceFile, from: &Path, dir: &Utf8Path) -> Result<u64> {
    let shown = from.display();
    let mut size = 0;
    write_atomically(&dir.join(source.path()), |out| {
        let mut file = File::open(from).with_context(|| format!("opening {shown}"))?;
        let mut second = source.hashes.sha512.is_some().then(Sha512::new);
        let (length, sha256) = hash_reader(&mut file, anyhow::Error::from, |piece| {
            if let Some(second) = &mut second {
                second.update(piece);
            }
            Ok(out.write_all(piece)?)
        })?;
        let sha512 = second.map(|hash| hex(&hash.finalize()));
        let hashes = FileHashes { sha256: Some(sha256), sha512 };
        if !is_match(&source.hashes, &hashes) {
            bail!("{shown} does not have the content of {}", source.path());
        }
        size = length;
        Ok(())
    })
    .with_context(|| format!("copying {shown}"))?;
    Ok(size)
}

/// Makes GitHub's archives of tags from a clone, in a directory with the layout of a mirror. Keeps
/// only archives with the right hash, and returns their paths.
///
/// # Errors
/// When `repository` is not a git repository, or a program fails.
pub fn pack_git(
    lacking: &[&SourceFile],
    repository: &Utf8Path,
    to: &Utf8Path,
) -> Result<Vec<Utf8PathBuf>> {
    let top = git::git_in(repository).args(["rev-parse", "--git-dir"]).read();
    top.with_context(|| format!("looking for a clone in {repository}"))?;
    let (_guard, scratch) = create_scratch_dir()?;
    let mut made = Vec::new();
    for source in lacking {
        let Some((name, tag)) = source.addresses.iter().find_map(|url| github_tag(url)) else {
            continue;
        };
        let commit = format!("{tag}^{{commit}}");
        let known = git::git_in(repository).args(["rev-parse", "--verify", "--quiet", &commit]);
        if known.read().is_err() {
            continue;
        }
        // GitHub leaves out the letter of `v1.2`.
        let digits =
            tag.strip_prefix('v').filter(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
        let tar = scratch.join("archive.tar");
        git::git_in(repository)
            .args(["archive", "--format=tar"])
            .arg(format!("--prefix={name}-{}/", digits.unwrap_or(tag)))
            .args(["-o", tar.as_str(), tag])
            .run()?;
        Tool::new("gzip").args(["-n", "-f"]).arg(&tar).run()?;
        let packed = format!("{tar}.gz");
        let mut file = File::open(&packed).with_context(|| format!("opening {packed}"))?;
        let hashes = hash_source(&mut file, source.hashes.sha512.is_some(), |_| {})?;
        if !is_match(&source.hashes, &hashes) {
            warn(format!(
                "{repository}: the archive of {tag} does not have the hash of {}",
                source.path()
            ));
            continue;
        }
        copy_source(source, Path::new(&packed), to)?;
        made.push(source.path());
    }
    Ok(made)
}

/// Repository and tag of `https://github.com/<owner>/<repository>/archive/<tag>/<file>`.
fn github_tag(address: &str) -> Option<(&str, &str)> {
    let rest = address.strip_prefix("https://github.com/")?;
    let (above, _file) = rest.rsplit_once('/')?;
    let (owner_and_name, tag) = above.split_once("/archive/")?;
    // A name that git would take for an option is not a tag.
    Some((owner_and_name.split_once('/')?.1, tag)).filter(|(_, tag)| !tag.starts_with('-'))
}

/// Writes the index of a mirror: a line for each of these sources that it has, and the lines of an
/// earlier index for other files of the mirror that still exist.
///
/// # Errors
/// When the index cannot be read or written.
pub fn write_index(sources: &[SourceFile], mirror: &Utf8Path) -> Result<Utf8PathBuf> {
    let path = mirror.join(INDEX);
    let old = none_if_missing(fs::read(&path)).with_context(|| format!("reading {path}"))?;
    let old = old.unwrap_or_default();
    let old = String::from_utf8_lossy(&old);
    let is_sum = |sum: &str| sum.len() == 64 && sum.bytes().all(|b| b.is_ascii_hexdigit());
    let is_inside = |file: &str| {
        Utf8Path::new(file).components().all(|part| matches!(part, Utf8Component::Normal(_)))
    };
    let mut lines: BTreeMap<String, String> = BTreeMap::new();
    for (sum, file) in old.lines().filter_map(|line| line.split_once("  ")) {
        if is_sum(sum) && is_inside(file) && mirror.join(file).is_file() {
            lines.insert(file.to_owned(), sum.to_owned());
        }
    }
    for source in sources {
        let file = source.path();
        let whole = mirror.join(&file);
        if !whole.is_file() {
            lines.remove(file.as_str());
            continue;
        }
        let sum = match &source.hashes.sha256 {
            Some(sum) => sum.clone(),
            None => crate::artifact::hash_file(&whole)?.1,
        };
        lines.insert(file.into_string(), sum);
    }
    let text: String = lines.iter().map(|(file, sum)| format!("{sum}  {file}\n")).collect();
    write_atomically(&path, |out| Ok(out.write_all(text.as_bytes())?))?;
    Ok(path)
}
