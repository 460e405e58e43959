//! Reads one wheel whole into memory and trusts nothing in it: its paths, its sizes, its WHEEL,
//! METADATA and RECORD are checked before any other code uses its files. Where its own metadata
//! contradict it and a lock confirms its bytes, that is a warning and not an error: pip installs
//! such wheels, and published wheels cannot be corrected.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Cursor, Read};

use anyhow::{Context, Result, anyhow, bail, ensure};
use camino::Utf8Path;
use sha2::{Digest, Sha256, Sha384, Sha512};

use super::metadata::{
    EntryPoint, MailHeaders, RecordLine, WheelMetadata, parse_entry_points, parse_record,
};
use super::target::{WheelName, WheelTag, expand_tags, normalise_name};
use crate::artifact::hash_bytes;

/// A wheel that unpacks to more is refused (1 GiB); the largest wheels in use stay below it.
const MAX_UNPACKED: u64 = 1 << 30;

/// One file of a wheel.
#[derive(Debug, Clone)]
pub struct WheelFile {
    /// Its content.
    pub bytes: Vec<u8>,
    /// Whether the archive marks it as executable.
    pub executable: bool,
    /// SHA-256 as RECORD writes it: `sha256=` and URL-safe base64 without padding.
    pub digest: String,
}

/// A wheel that has passed every check that needs nothing but the wheel.
#[derive(Debug, Clone)]
pub struct CheckedWheel {
    /// The file name.
    pub file: String,
    /// SHA-256 of the wheel file, lower-case hexadecimal.
    pub sha256: String,
    /// What the file name says.
    pub name: WheelName,
    /// What METADATA says.
    pub metadata: WheelMetadata,
    /// Whether files at the top level go to `purelib` (else `platlib`).
    pub purelib: bool,
    /// The programs to make.
    pub entry_points: Vec<EntryPoint>,
    /// `opentrons-10.1.0.dist-info`
    pub dist_info: String,
    /// Its contradictory metadata; each entry is part of a sentence.
    pub doubts: Vec<String>,
    /// Every file by its path in the wheel.
    pub files: BTreeMap<String, WheelFile>,
}

impl CheckedWheel {
    /// Reads a wheel file. `file` is its name (in the cache its name is its hash), `sha256` is the
    /// hash in the lock, if any.
    ///
    /// # Errors
    /// When it cannot be read, or breaks a rule; the error names the wheel and the file in it.
    pub fn open(path: &Utf8Path, file: &str, sha256: Option<&str>) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("reading {path}"))?;
        Self::read(&bytes, file, sha256)
    }

    /// Reads a wheel's bytes.
    ///
    /// # Errors
    /// When it breaks a rule; the error names the wheel and the file in it. Without `sha256` only
    /// the wheel itself confirms its bytes: then its metadata must be correct.
    pub fn read(bytes: &[u8], file: &str, sha256: Option<&str>) -> Result<Self> {
        Self::read_inner(bytes, file, sha256).with_context(|| format!("reading the wheel {file}"))
    }

    fn read_inner(bytes: &[u8], file: &str, sha256: Option<&str>) -> Result<Self> {
        let name = WheelName::parse(file)?;
        let found = hash_bytes(bytes);
        if let Some(expected) = sha256 {
            ensure!(
                found == expected,
                "the sha256 of the wheel is {found}, but the lock has {expected}"
            );
        }
        let files = unpack_wheel(bytes)?;
        let dist_info = find_dist_info(&files, &name)?;
        let text = |file: &str| -> Result<&str> {
            let path = format!("{dist_info}/{file}");
            let entry = files.get(&path).with_context(|| format!("{path} is missing"))?;
            std::str::from_utf8(&entry.bytes).with_context(|| format!("{path} is not UTF-8"))
        };
        let mut doubts = Vec::new();
        let record = format!("{dist_info}/RECORD");
        let lines = parse_record(text("RECORD")?);
        let wrong = lines.map(|lines| check_record(&files, &lines, &record));
        doubts.extend(
            wrong.with_context(|| format!("reading {record}")).map_or_else(
                |error| Some(format!("{error:#}")),
                |places| summarise_places(&places),
            ),
        );
        let mut about = Vec::new();
        let purelib = check_wheel_text(text("WHEEL")?, &name.tags, &mut about)
            .with_context(|| format!("checking {dist_info}/WHEEL"))?;
        doubts.extend(about.iter().map(|doubt| format!("checking {dist_info}/WHEEL: {doubt}")));
        let metadata = WheelMetadata::parse(text("METADATA")?)
            .and_then(|metadata| check_name(metadata, &name))
            .with_context(|| format!("checking {dist_info}/METADATA"))?;
        let about = metadata.doubts.iter();
        doubts.extend(about.map(|doubt| format!("checking {dist_info}/METADATA: {doubt}")));
        if sha256.is_none() {
            ensure!(doubts.is_empty(), "{}", doubts.join("; "));
        }
        let points = format!("{dist_info}/entry_points.txt");
        let entry_points = match files.contains_key(&points) {
            true => parse_entry_points(text("entry_points.txt")?)
                .with_context(|| format!("reading {points}"))?,
            false => Vec::new(),
        };
        Ok(Self {
            file: file.to_owned(),
            sha256: found,
            name,
            metadata,
            purelib,
            entry_points,
            dist_info,
            doubts,
            files,
        })
    }
}

fn unpack_wheel(bytes: &[u8]) -> Result<BTreeMap<String, WheelFile>> {
    let mut archive = zip::ZipArchive::new(Cursor::new(bytes)).context("opening the archive")?;
    // The archive reader keeps only one of several members with the same name, so they are counted
    // here.
    check_duplicates(bytes, archive.central_directory_start())?;
    let mut files = BTreeMap::new();
    let mut left = MAX_UNPACKED;
    for index in 0..archive.len() {
        let entry = archive.by_index(index).with_context(|| format!("reading member {index}"))?;
        let path = std::str::from_utf8(entry.name_raw())
            .map_err(|_| anyhow!("the path of member {index} is not UTF-8"))?
            .to_owned();
        check_path(path.trim_end_matches('/'))?;
        ensure!(!entry.is_symlink(), "{path} is a symbolic link, which is not allowed in a wheel");
        ensure!(!entry.encrypted(), "{path} is encrypted");
        if entry.is_dir() {
            continue;
        }
        // As pip: the bits of a regular file only.
        let regular = |mode: u32| mode & 0o170_000 == 0o100_000 && mode & 0o111 != 0;
        let executable = entry.unix_mode().is_some_and(regular);
        let mut content = Vec::new();
        // Reading one byte more than is allowed detects a longer file.
        let n = entry
            .take(left + 1)
            .read_to_end(&mut content)
            .with_context(|| format!("unpacking {path}"))? as u64;
        left = left.checked_sub(n).with_context(|| {
            format!("the wheel unpacks to more than {MAX_UNPACKED} bytes, the maximum")
        })?;
        let digest = digest_text(&content);
        files.insert(path, WheelFile { bytes: content, executable, digest });
    }
    Ok(files)
}

/// Walks the archive's central directory and refuses a second member of the same name.
fn check_duplicates(bytes: &[u8], start: u64) -> Result<()> {
    /// APPNOTE.TXT 4.3.12: signature and fixed length of a central directory header.
    const SIGNATURE: &[u8] = b"PK\x01\x02";
    const HEADER: usize = 46;
    let mut seen = BTreeSet::new();
    let mut rest = usize::try_from(start).ok().and_then(|start| bytes.get(start..)).unwrap_or(&[]);
    while let Some(header) = rest.get(..HEADER).filter(|header| header.starts_with(SIGNATURE)) {
        let length = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
        let (name, extra, comment) = (length(28), length(30), length(32));
        let name_bytes = rest.get(HEADER..HEADER + name).context("the archive is truncated")?;
        if !seen.insert(name_bytes) {
            bail!("the archive has two members named {}", String::from_utf8_lossy(name_bytes));
        }
        rest = rest.get(HEADER + name + extra + comment..).context("the archive is truncated")?;
    }
    Ok(())
}

/// Rejects a path that could lead out of the directory that it is unpacked to, or that is
/// ambiguous.
fn check_path(path: &str) -> Result<()> {
    ensure!(!path.starts_with('/'), "the path {path} is absolute");
    let strange = |c: char| c == '\\' || c.is_control();
    ensure!(!path.contains(strange), "the path {path:?} has a backslash or a control character");
    let bad = path.split('/').find(|part| matches!(*part, "" | "." | ".."));
    if let Some(part) = bad {
        bail!("the path {path} has the part '{part}', which can lead out of its directory");
    }
    Ok(())
}

fn find_dist_info(files: &BTreeMap<String, WheelFile>, name: &WheelName) -> Result<String> {
    let found: BTreeSet<&str> = files
        .keys()
        .filter_map(|path| path.split_once('/'))
        .map(|(top, _)| top)
        .filter(|top| top.ends_with(".dist-info"))
        .collect();
    let found: Vec<&str> = found.into_iter().collect();
    let [dist_info] = found[..] else {
        bail!("the wheel has {} .dist-info directories, expected one", found.len());
    };
    // Its version may be spelt differently from the file name's: METADATA decides.
    let stem = dist_info.trim_end_matches(".dist-info");
    let agrees = stem.split('-').next().is_some_and(|found| normalise_name(found) == name.name);
    ensure!(
        agrees,
        "the wheel has the directory {dist_info}, but its name needs {}-{}.dist-info",
        name.name,
        name.version
    );
    Ok(dist_info.to_owned())
}

/// Every place where RECORD and the wheel disagree.
fn check_record(
    files: &BTreeMap<String, WheelFile>,
    lines: &[RecordLine],
    record: &str,
) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut listed = BTreeSet::new();
    for RecordLine { path, hash, size } in lines {
        if !listed.insert(path.as_str()) {
            wrong.push(format!("{record} lists {path} twice"));
        }
        let Some(file) = files.get(path) else {
            wrong.push(format!("{record} lists {path}, which the wheel does not have"));
            continue;
        };
        if path == record {
            continue;
        }
        if hash.is_empty() {
            wrong.push(format!("{record} has no hash for {path}"));
        } else if let Err(error) = check_hash(hash, file) {
            wrong.push(format!("checking {path} with {record}: {error:#}"));
        }
        let found = file.bytes.len();
        if *size != found.to_string() {
            wrong.push(format!("{record} gives {path} {size} bytes, but it has {found}"));
        }
    }
    // Signatures of RECORD cannot be in it (PEP 427).
    let exempt = |path: &str| {
        path == record || path == format!("{record}.jws") || path == format!("{record}.p7s")
    };
    let unlisted = files.keys().filter(|path| !exempt(path) && !listed.contains(path.as_str()));
    wrong.extend(unlisted.map(|path| format!("{path} is in the wheel but not in {record}")));
    wrong
}

/// The first places, and how many more there are.
fn summarise_places(places: &[String]) -> Option<String> {
    const SHOWN: usize = 2;
    let (shown, rest) = places.split_at(places.len().min(SHOWN));
    let more =
        if rest.is_empty() { String::new() } else { format!("; {} more places", rest.len()) };
    (!places.is_empty()).then(|| format!("{}{more}", shown.join("; ")))
}

fn check_hash(given: &str, file: &WheelFile) -> Result<()> {
    let (algorithm, _) =
        given.split_once('=').with_context(|| format!("'{given}' is not a hash"))?;
    let found = match algorithm {
        "sha256" => file.digest.clone(),
        "sha384" => format!("sha384={}", base64_url(&Sha384::digest(&file.bytes))),
        "sha512" => format!("sha512={}", base64_url(&Sha512::digest(&file.bytes))),
        other => bail!("the hash '{other}' is too weak: sha256 or better is needed (PEP 427)"),
    };
    ensure!(
        given.trim_end_matches('=') == found,
        "the hash of the file is {found}, but RECORD has {given}"
    );
    Ok(())
}

/// Checks WHEEL; true when the root is `purelib`. The tags of the file name decide which wheel is
/// chosen.
fn check_wheel_text(text: &str, tags: &[WheelTag], doubts: &mut Vec<String>) -> Result<bool> {
    let headers = MailHeaders::parse(text);
    let version = headers.get("wheel-version").context("Wheel-Version is missing")?;
    ensure!(
        matches!(version.split('.').next(), Some("0" | "1")),
        "Wheel-Version is {version}, but this tool supports 1.x only"
    );
    let root = headers.get("root-is-purelib").map(str::to_ascii_lowercase);
    if !matches!(root.as_deref(), Some("true" | "false")) {
        doubts.push(format!("Root-Is-Purelib is {root:?}, expected true or false"));
    }
    let mut inside = Vec::new();
    for tag in headers.all("tag") {
        match tag.split('-').collect::<Vec<_>>()[..] {
            [python, abi, platform] => inside.extend(expand_tags(python, abi, platform)),
            _ => doubts.push(format!("'{tag}' is not a tag")),
        }
    }
    inside.sort();
    inside.dedup();
    let show =
        |tags: &[WheelTag]| tags.iter().map(WheelTag::to_string).collect::<Vec<_>>().join(", ");
    if inside != tags {
        let (inside, named) = (show(&inside), show(tags));
        doubts.push(format!("the tags in the wheel are {inside}, but the file name has {named}"));
    }
    Ok(root.as_deref() == Some("true"))
}

fn check_name(metadata: WheelMetadata, name: &WheelName) -> Result<WheelMetadata> {
    ensure!(
        normalise_name(&metadata.name) == name.name,
        "Name is {}, but the file name has {}",
        metadata.name,
        name.name
    );
    // A version such as 1.0+local.1 is spelt with `_` in file names.
    ensure!(
        metadata.version_text.replace('-', "_") == name.version
            || name.version.replace('_', "-").parse().is_ok_and(|v| metadata.version == v),
        "Version is {}, but the file name has {}",
        metadata.version_text,
        name.version
    );
    Ok(metadata)
}

/// A hash as RECORD writes it.
pub fn digest_text(bytes: &[u8]) -> String {
    format!("sha256={}", base64_url(&Sha256::digest(bytes)))
}

/// URL-safe base64 without padding (RFC 4648, section 5).
fn base64_url(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().fold(0u32, |n, b| (n << 8) | u32::from(*b));
        let group = group << (8 * (3 - chunk.len()));
        for digit in 0..=chunk.len() {
            let index = (group >> (18 - 6 * digit)) & 63;
            text.push(char::from(ALPHABET[index as usize]));
        }
    }
    text
}
