//! `release check`: builds the same commit again in another directory and compares the results byte
//! by byte; differences are located down to the file inside the filesystem, and its first differing
//! byte.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, symlink};

use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use serde::Serialize;

use super::collect::{read_packages, read_report};
use super::create::{local_store, parse_version};
use crate::artifact::{hash_bytes, hash_file};
use crate::build::{self, Program};
use crate::cache::Cache;
use crate::config;
use crate::diff::{self, ChangeSet, EntryContent, Inventory, InventoryDifference, what_changed};
use crate::disk::read::{self, DiskTables};
use crate::exec::Tool;
use crate::facts;
use crate::git;
use crate::inspect::{DetectedFilesystem, detect_filesystem};
use crate::progress::say;
use crate::publish::{SigningAuthority, load_channel, load_manifest};
use crate::report::BuildReport;
use crate::store::ReleaseStore;
use crate::store::directory::DirectoryStore;
use crate::store::format::{Channel, ReleaseObject};
use crate::update;

/// How many bytes around the first difference are shown.
const SHOWN: usize = 24;
/// How many bytes are compared at a time.
const PIECE: usize = 1 << 20;

/// The result of a comparison.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BuildComparison {
    /// All outputs are equal, byte for byte.
    pub equal: bool,
    /// The outputs.
    pub outputs: Vec<ComparedOutput>,
}

/// One output of two builds.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ComparedOutput {
    /// The file's name.
    pub name: String,
    /// Equal, byte for byte.
    pub equal: bool,
    /// What differs.
    pub differences: Vec<LocatedDifference>,
}

/// One difference.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LocatedDifference {
    /// The place: a partition, a component, a part of the output.
    pub place: String,
    /// The file in this place.
    pub path: Option<String>,
    /// What differs.
    pub what: String,
}

fn difference_at(place: &str, path: Option<&str>, what: String) -> LocatedDifference {
    LocatedDifference { place: place.to_owned(), path: path.map(str::to_owned), what }
}

/// What to build again.
#[derive(Debug)]
pub struct RebuildRequest<'a> {
    /// The workspace.
    pub root: &'a Utf8Path,
    /// The product.
    pub product: &'a str,
    /// The board.
    pub board: &'a str,
    /// Stages that are not rebuilt.
    pub keep_stages: &'a [String],
    /// The compression level of the bundle, as for `build-image`.
    pub compression: &'a str,
    /// The programs of the release that was made of the current results, if there is one ([`released_programs`]).
    pub programs: &'a [ReleaseObject],
}

/// Builds the commit of the current results again, in another directory and with an empty stage
/// cache, and compares. If equal, the second build is removed. If different, it is kept, and its
/// directory is printed.
///
/// # Errors
/// When there are no results of the commit that is checked out, or the second build fails.
pub fn rebuild_and_compare(request: &RebuildRequest<'_>) -> Result<BuildComparison> {
    let RebuildRequest { root, product, board, .. } = *request;
    let dist = root.join("dist").join(product).join(board);
    let report = read_report(&dist, product, board)?;
    let facts = facts::collect(root)?;
    ensure!(
        !facts.modified && facts.commit.is_some() && facts.commit == report.commit,
        "the results are from commit {}, but the checkout is {}{}\n\
         help: commit the changes, and run `cargo xtask build-image --product {product} --board \
         {board}`",
        report.commit.as_deref().unwrap_or("none"),
        facts.commit.as_deref().unwrap_or("none"),
        if facts.modified { " with changes" } else { "" }
    );
    let target = root.join("target");
    fs::create_dir_all(&target).with_context(|| format!("creating {target}"))?;
    let keep = tempfile::Builder::new()
        .prefix("release-check-")
        .tempdir_in(&target)
        .with_context(|| format!("creating a directory in {target}"))?;
    let dir = Utf8PathBuf::try_from(keep.path().to_owned()).context("the path of the directory")?;
    let (checkout, cache) = (dir.join("checkout"), dir.join("cache"));
    git::create_checkout(root, facts.commit.as_deref().unwrap_or_default(), &checkout)?;
    share_downloads(&cache, request.keep_stages)?;
    let program = std::env::current_exe().context("finding this program")?;
    let program = Utf8PathBuf::try_from(program).context("this program's path")?;
    let words = ["build-image", "--locked", "--product", product, "--board", board];
    let mut tool = Tool::new(program.as_str())
        .args(words)
        .args(["--compression", request.compression])
        .env("SLIPWAY_CACHE", cache.as_str())
        // Results from a shared cache would prove nothing.
        .env_remove("SLIPWAY_SHARED_CACHE")
        .env("SOURCE_DATE_EPOCH", report.epoch.to_string())
        .current_dir(&checkout)
        .log(&dir.join("build.log"));
    // Only nightly builds have another version than their product.
    let configured = config::read_product(root, product)?.version.value;
    if configured.as_str() != report.product.version {
        tool = tool.arg("--nightly");
    }
    tool.run_lines(|line| say("again", line.trim_start())).context("building a second time")?;
    let second = checkout.join("dist").join(product).join(board);
    let mut comparison = compare_builds(&dist, &second)?;
    if !request.programs.is_empty() {
        let commit = facts.commit.as_deref().unwrap_or_default();
        let made = build::programs_in(&checkout, &Cache::in_dir(cache), commit)?;
        comparison.add(compare_programs(&local_store(root), request.programs, Some(&made))?);
    }
    if !comparison.equal {
        say("kept", format!("the second build is kept in {}", keep.keep().display()));
    }
    Ok(comparison)
}

/// A cache that contains only the downloads, the host's tools, and the stages to keep.
fn share_downloads(cache: &Utf8Path, stages: &[String]) -> Result<()> {
    let shared = Cache::locate()?.root;
    let stages = stages.iter().map(|stage| format!("stages/{stage}"));
    for part in ["downloads".to_owned(), "tools".to_owned()].into_iter().chain(stages) {
        let (from, to) = (shared.join(&part), cache.join(&part));
        let parent = to.parent().context("a part has a parent directory")?;
        fs::create_dir_all(&from).with_context(|| format!("creating {from}"))?;
        fs::create_dir_all(parent).with_context(|| format!("creating {parent}"))?;
        symlink(&from, &to).with_context(|| format!("linking {to}"))?;
    }
    Ok(())
}

/// Compares the results of two builds: two directories `dist/<product>/<board>`.
///
/// # Errors
/// When one has files that the other lacks, or cannot be read.
pub fn compare_builds(one: &Utf8Path, other: &Utf8Path) -> Result<BuildComparison> {
    let mut names = list_outputs(one)?;
    names.extend(list_outputs(other)?);
    names.sort();
    names.dedup();
    let mut found = Vec::new();
    for name in names {
        let (a, b) = (one.join(&name), other.join(&name));
        let mut differences = Vec::new();
        let missing: Vec<_> = [&a, &b].into_iter().filter(|path| !path.is_file()).collect();
        if let Some(path) = missing.first() {
            differences.push(difference_at("file", None, format!("{path} does not exist")));
        } else if let Some(at) = first_difference(&File::open(&a)?, &File::open(&b)?, 0..u64::MAX)?
        {
            differences = match a.extension() {
                Some("img") => compare_images(&a, &b)?,
                Some("bundle") => compare_bundles(&a, &b)?,
                Some("json") => compare_sboms(&a, &b)?,
                _ => Vec::new(),
            };
            if differences.is_empty() {
                differences.push(difference_at("file", None, describe_difference(&a, &b, at)?));
            }
        }
        found.push(ComparedOutput { name, equal: differences.is_empty(), differences });
    }
    Ok(BuildComparison { equal: found.iter().all(|output| output.equal), outputs: found })
}

/// The programs of the release in the local store that was made of these results; none when there is no such release. Its
/// manifest is signed by a trusted key.
///
/// # Errors
/// When the store, the manifest or the report of the results is not valid.
pub fn released_programs(
    root: &Utf8Path,
    product: &str,
    board: &str,
    authority: &SigningAuthority,
) -> Result<Vec<ReleaseObject>> {
    let (store, dist) = (local_store(root), root.join("dist").join(product).join(board));
    let report = read_report(&dist, product, board)?;
    if !store.exists() {
        return Ok(Vec::new());
    }
    let version = parse_version(&report.product.version)?;
    for channel in Channel::ALL {
        let (index, _) = load_channel(&store, channel, authority)?;
        let Some(entry) = index.find(product, &version) else { continue };
        let manifest = load_manifest(&store, entry, authority.keys())?;
        if manifest.commit == report.commit {
            return Ok(manifest.programs);
        }
    }
    Ok(Vec::new())
}

/// Compares the programs of a release with their objects in the store, by size and SHA-256, and with those that were `made`
/// again, byte for byte.
///
/// # Errors
/// When a file cannot be read.
pub fn compare_programs(
    store: &DirectoryStore,
    programs: &[ReleaseObject],
    made: Option<&[Program]>,
) -> Result<Vec<ComparedOutput>> {
    let compare = |program: &ReleaseObject| -> Result<Vec<LocatedDifference>> {
        let stored = store.object(&program.sha256);
        let different = |place: &str, what: String| Ok(vec![difference_at(place, None, what)]);
        if !stored.is_file() {
            return different("store", format!("{stored} is missing"));
        }
        let found = hash_file(&stored)?;
        if found != (program.size, program.sha256.clone()) {
            let (size, sha256) = found;
            return different(
                "store",
                format!(
                    "{stored} has {size} bytes and the SHA-256 {sha256}, the manifest other ones"
                ),
            );
        }
        let Some(made) = made else { return Ok(Vec::new()) };
        let Some(again) = made.iter().find(|made| made.name == program.name) else {
            return different(
                "file",
                "not made again: releases.toml of the commit does not name its platform".to_owned(),
            );
        };
        let again = &again.binary.path;
        match first_difference(&File::open(&stored)?, &File::open(again)?, 0..u64::MAX)? {
            Some(at) => different("file", describe_difference(&stored, again, at)?),
            None => Ok(Vec::new()),
        }
    };
    let outputs = programs.iter().map(|program| {
        let differences = compare(program)?;
        let name = program.name.clone();
        Ok(ComparedOutput { name, equal: differences.is_empty(), differences })
    });
    outputs.collect()
}

/// The files of a build that are part of a release, by its report: files of earlier versions are
/// ignored.
fn list_outputs(dir: &Utf8Path) -> Result<Vec<String>> {
    let path = dir.join("report.json");
    let text = fs::read_to_string(&path).with_context(|| {
        format!("reading {path}\nhelp: build first, or name a directory dist/<product>/<board>")
    })?;
    let report = BuildReport::from_json(&text).with_context(|| format!("reading {path}"))?;
    let stem = format!("{}-{}-{}", report.product.name, report.product.version, report.board);
    let mut names = vec!["sbom.cdx.json".to_owned()];
    names.extend(["img", "img.bmap", "bundle"].map(|extension| format!("{stem}.{extension}")));
    Ok(names)
}

/// The first differing byte in a range, counted from its start; a difference in length is a
/// difference, too.
fn first_difference(one: &File, other: &File, range: std::ops::Range<u64>) -> Result<Option<u64>> {
    let (mut a, mut b) = (vec![0; PIECE], vec![0; PIECE]);
    let mut at = range.start;
    let read = |file: &File, buffer: &mut [u8], at: u64| -> Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match file.read_at(&mut buffer[filled..], at + filled as u64)? {
                0 => break,
                n => filled += n,
            }
        }
        Ok(filled)
    };
    while at < range.end {
        let wanted = usize::try_from(range.end - at).unwrap_or(PIECE).min(PIECE);
        let (n, m) = (read(one, &mut a[..wanted], at)?, read(other, &mut b[..wanted], at)?);
        let same = a[..n].iter().zip(&b[..m]).position(|(x, y)| x != y);
        if let Some(same) = same.or((n != m).then_some(n.min(m))) {
            return Ok(Some(at + same as u64 - range.start));
        }
        if n == 0 {
            break;
        }
        at += n as u64;
    }
    Ok(None)
}

/// The bytes around a difference, printable.
fn describe_difference(one: &Utf8Path, other: &Utf8Path, at: u64) -> Result<String> {
    let part = |path: &Utf8Path| -> Result<Vec<u8>> {
        let mut bytes = vec![0; SHOWN];
        let n =
            File::open(path)?.read_at(&mut bytes, at).with_context(|| format!("reading {path}"))?;
        bytes.truncate(n);
        Ok(bytes)
    };
    Ok(describe_bytes(&part(one)?, &part(other)?, at))
}

fn describe_bytes(one: &[u8], other: &[u8], at: u64) -> String {
    let text = |bytes: &[u8]| {
        let bytes = bytes.get(..SHOWN.min(bytes.len())).unwrap_or_default();
        format!("\"{}\"", bytes.escape_ascii())
    };
    format!("differs from byte {at}: {} and {}", text(one), text(other))
}

fn compare_images(one: &Utf8Path, other: &Utf8Path) -> Result<Vec<LocatedDifference>> {
    let (tables, others) = (read::read_tables(one)?, read::read_tables(other)?);
    let mut found = Vec::new();
    if let Some(what) = table_difference(&tables, &others) {
        found.push(difference_at("partition table", None, what));
        return Ok(found);
    }
    let (a, b) = (File::open(one)?, File::open(other)?);
    let mut seen: BTreeMap<String, String> = BTreeMap::new();
    let mut end = 0;
    for p in &tables.partitions {
        let name = p.name.clone().unwrap_or_else(|| format!("partition {}", p.number));
        if let Some(at) = first_difference(&a, &b, end..p.offset)? {
            let what = describe_difference(one, other, end + at)?;
            found.push(difference_at("outside of partitions", None, what));
        }
        end = p.offset + p.size;
        let Some(at) = first_difference(&a, &b, p.offset..end)? else { continue };
        let mut inside = match detect_filesystem(one, p.offset)? {
            Some(DetectedFilesystem::Ext4) => compare_ext4((one, other), p.offset, &name)?,
            Some(DetectedFilesystem::Fat) => compare_fats((one, other), p.offset, p.size, &name)?,
            None => Vec::new(),
        };
        if inside.is_empty() {
            let what =
                format!("no file differs; {}", describe_difference(one, other, p.offset + at)?);
            inside.push(difference_at(&name, None, what));
        }
        // Both slots contain the same bytes: the second one would repeat everything.
        let differences: Vec<_> = inside.iter().map(|l| (&l.path, &l.what)).collect();
        let key = hash_bytes(format!("{differences:?}").as_bytes());
        match seen.get(&key) {
            Some(first) => {
                found.push(difference_at(&name, None, format!("differs as {first} does")))
            }
            None => {
                seen.insert(key, name);
                found.extend(inside);
            }
        }
    }
    if let Some(at) = first_difference(&a, &b, end..u64::MAX)? {
        found.push(difference_at(
            "after the last partition",
            None,
            describe_difference(one, other, end + at)?,
        ));
    }
    Ok(found)
}

fn table_difference(one: &DiskTables, other: &DiskTables) -> Option<String> {
    let places = |tables: &DiskTables| -> Vec<_> {
        tables.partitions.iter().map(|p| (p.number, p.name.clone(), p.offset, p.size)).collect()
    };
    let (a, b) = (places(one), places(other));
    if a == b {
        return None;
    }
    let differing = a.iter().zip(&b).find(|(x, y)| x != y);
    Some(match differing {
        Some((x, y)) => format!("{x:?} and {y:?}"),
        None => format!("{} partitions and {}", a.len(), b.len()),
    })
}

fn compare_ext4(
    images: (&Utf8Path, &Utf8Path),
    offset: u64,
    name: &str,
) -> Result<Vec<LocatedDifference>> {
    let old = Inventory::of_ext4(images.0, offset)?;
    let new = Inventory::of_ext4(images.1, offset)?;
    let difference = InventoryDifference::between(&old, &new);
    let mut found = Vec::new();
    for path in difference.files.removed.keys() {
        found.push(difference_at(name, Some(path), "only in the first".to_owned()));
    }
    for path in difference.files.added.keys() {
        found.push(difference_at(name, Some(path), "only in the second".to_owned()));
    }
    for (path, change) in &difference.files.changed {
        let mut what = what_changed(change);
        let hashes = (&change.old.content, &change.new.content);
        if let ((EntryContent::Sha256(a), EntryContent::Sha256(b)), true) =
            (hashes, path.starts_with('/'))
            && a != b
        {
            let text = |image: &Utf8Path| -> Result<Vec<u8>> {
                let filesystem = diff::open_ext4(image, offset)?;
                Ok(filesystem.read(path.as_str())?)
            };
            what.push_str("; ");
            what.push_str(&bytes_difference(&text(images.0)?, &text(images.1)?));
        }
        found.push(difference_at(name, Some(path), what));
    }
    Ok(found)
}

fn bytes_difference(one: &[u8], other: &[u8]) -> String {
    let at = one.iter().zip(other).position(|(a, b)| a != b);
    let at = at.unwrap_or(one.len().min(other.len()));
    let rest = |bytes: &[u8]| bytes.get(at..).unwrap_or_default().to_vec();
    describe_bytes(&rest(one), &rest(other), at as u64)
}

fn compare_fats(
    (one, other): (&Utf8Path, &Utf8Path),
    offset: u64,
    size: u64,
    name: &str,
) -> Result<Vec<LocatedDifference>> {
    let files = |image: &Utf8Path| -> Result<BTreeMap<String, Vec<u8>>> {
        let listing = read::list_fat(image, offset, size)?;
        let files = listing.entries.into_iter().filter(|entry| !entry.folder);
        files
            .map(|entry| {
                let content = read::fat_file(image, offset, size, &entry.path)?;
                Ok((entry.path, content))
            })
            .collect()
    };
    let changes = ChangeSet::between(&files(one)?, &files(other)?);
    let mut found = Vec::new();
    for path in changes.removed.keys() {
        found.push(difference_at(name, Some(path), "only in the first".to_owned()));
    }
    for path in changes.added.keys() {
        found.push(difference_at(name, Some(path), "only in the second".to_owned()));
    }
    for (path, change) in &changes.changed {
        found.push(difference_at(name, Some(path), bytes_difference(&change.old, &change.new)));
    }
    Ok(found)
}

fn compare_bundles(one: &Utf8Path, other: &Utf8Path) -> Result<Vec<LocatedDifference>> {
    let (old, new) = (update::read_unverified(one)?.0, update::read_unverified(other)?.0);
    let mut found = Vec::new();
    let head = |m: &bundle::BundleManifest| {
        serde_json::json!([m.product, m.version, m.kind, m.boards, m.epoch, m.key_epoch])
    };
    if head(&old) != head(&new) {
        found.push(difference_at("manifest", None, format!("{} and {}", head(&old), head(&new))));
    }
    let payloads = |m: &bundle::BundleManifest| -> BTreeMap<String, bundle::Payload> {
        let all = m
            .components
            .iter()
            .flat_map(|c| c.payloads.iter().map(|p| (format!("{}/{}", c.name, p.role), p.clone())));
        all.collect()
    };
    let changes = ChangeSet::between(&payloads(&old), &payloads(&new));
    let only = changes.removed.keys().chain(changes.added.keys());
    found.extend(only.map(|name| difference_at(name, None, "only in one of the two".to_owned())));
    for (name, change) in &changes.changed {
        let what = if change.old.index == change.new.index {
            "equal content, packed differently: was another --compression used?".to_owned()
        } else {
            "different content: see the image".to_owned()
        };
        found.push(difference_at(name, None, what));
    }
    if found.is_empty() {
        let what = "equal content with another signature: was another key used?".to_owned();
        found.push(difference_at("signature", None, what));
    }
    Ok(found)
}

fn compare_sboms(one: &Utf8Path, other: &Utf8Path) -> Result<Vec<LocatedDifference>> {
    let read = |path: &Utf8Path| -> Result<BTreeMap<String, String>> {
        let mut text = Vec::new();
        File::open(path)?.read_to_end(&mut text).with_context(|| format!("reading {path}"))?;
        read_packages(&text).with_context(|| format!("reading {path}"))
    };
    let changes = ChangeSet::between(&read(one)?, &read(other)?);
    let mut found = Vec::new();
    for (name, version) in changes.removed.iter().chain(&changes.added) {
        found.push(difference_at(
            "packages",
            Some(name),
            format!("{version}, in only one of the two"),
        ));
    }
    for (name, change) in &changes.changed {
        found.push(difference_at(
            "packages",
            Some(name),
            format!("{} and {}", change.old, change.new),
        ));
    }
    Ok(found)
}

impl BuildComparison {
    /// Adds outputs that were compared.
    pub fn add(&mut self, outputs: Vec<ComparedOutput>) {
        self.equal &= outputs.iter().all(|output| output.equal);
        self.outputs.extend(outputs);
    }

    /// The comparison in human-readable form.
    pub fn describe(&self) -> String {
        let mut text = String::new();
        for output in &self.outputs {
            let word = if output.equal { "equal" } else { "DIFFERS" };
            text.push_str(&format!(" {word:<8} {}\n", output.name));
            for found in &output.differences {
                let path = found.path.as_deref().unwrap_or_default();
                text.push_str(&format!("          {} {path}: {}\n", found.place, found.what));
            }
        }
        text
    }
}
