//! The package lock: the result of apt's resolution by name, version and SHA-256, which builds
//! follow. It contains pool paths, never hosts: the same lock works with every mirror.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;

use anyhow::{Context, Result, anyhow, bail};
use camino::Utf8Path;
use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::apt::{AptArchive, AptMirrors, PrivateApt};
use super::download::LockedDeb;
use super::sources::AllowedPackages;
use super::{DebianSpec, host, repo};
use crate::artifact::write_atomically;
use crate::config::reader::{ConfigFindings, in_entry, written_lock};
use crate::progress;
use crate::rootfs::PackageRole;

/// The format of the lock file. Any other number is rejected.
const VERSION: u32 = 1;

/// Essential packages without apt, which treats itself as essential: an image with a read-only root
/// never installs packages, and apt alone needs fourteen others.
const ESSENTIAL: &str = "?and(?essential,?not(?exact-name(apt)))";

/// The name prefix of kernel image packages, real ones and metapackages.
const KERNEL: &str = "linux-image-";

/// A whole lock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct PackagesLock {
    /// Format of this file.
    pub version: u32,
    /// When it was created, seconds since 1970. The base's files have this time, so that neither a
    /// commit nor the date of the build changes the base.
    pub epoch: u64,
    /// The request; a build compares it with the product.
    pub request: DebianSpec,
    /// The packages that apt selected, sorted by role, name and architecture.
    pub package: Vec<LockedPackage>,
}

/// A lock as it is written, with the places of its packages.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Written {
    version: u32,
    epoch: u64,
    request: DebianSpec,
    package: Vec<Spanned<LockedPackage>>,
}

/// One package file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct LockedPackage {
    /// Installed, unpacked for the image, or unpacked for the build machine.
    pub role: PackageRole,
    /// Binary package name.
    pub name: String,
    /// Architecture (`arm64`, `all`).
    pub arch: String,
    /// Version, with its epoch.
    pub version: String,
    /// The archive that contains it.
    pub archive: ArchiveName,
    /// Path below the archive's address.
    pub filename: String,
    /// Length in bytes.
    pub size: u64,
    /// SHA-256, lower-case hexadecimal.
    pub sha256: String,
}

impl LockedPackage {
    /// The address of this package on these mirrors.
    ///
    /// # Errors
    /// When they do not include its source.
    pub fn url(&self, mirrors: &AptMirrors) -> Result<String> {
        // apt itself escapes these two characters in pool paths; some mirrors require it.
        let path = self.filename.replace('+', "%2b").replace('~', "%7e");
        Ok(format!("{}/{path}", self.archive.address(mirrors)?))
    }

    /// Rejects invalid package entries.
    pub(super) fn check(&self) -> Result<()> {
        self.find_problem().map_or(Ok(()), |(_, why)| Err(anyhow!(why)))
    }

    /// What cannot be true of a package of an archive: the key, and a sentence.
    fn find_problem(&self) -> Option<(&'static str, String)> {
        let Self { name, filename, sha256, archive, .. } = self;
        if sha256.len() != 64 || !sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            let why = format!("'{sha256}' is not a SHA-256 in lower-case hexadecimal");
            return Some(("sha256", format!("package {name}: {why}")));
        }
        let (fits, what) = match archive {
            ArchiveName::Debian | ArchiveName::Security => {
                let whole = |part: &str| part != "..";
                let fits = filename.starts_with("pool/") && filename.split('/').all(whole);
                (fits, "is not a path below pool/")
            }
            // Not every archive uses the name `pool`.
            ArchiveName::Source(_) => {
                let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~+/%:".contains(&b);
                let whole = |part: &str| !matches!(part, "" | "." | "..") && !part.ends_with(':');
                let fits = filename.bytes().all(plain) && filename.split('/').all(whole);
                (fits, "is not a path in an archive")
            }
        };
        (!fits).then(|| ("filename", format!("package {name}: '{filename}' {what}")))
    }

    /// `name version` as messages show it.
    pub fn name_and_version(&self) -> String {
        format!("{} {}", self.name, self.version)
    }

    /// The pool directory: all binaries of one source share it.
    pub(super) fn pool(&self) -> (&ArchiveName, &str) {
        (&self.archive, self.filename.rsplit_once('/').map_or("", |(dir, _)| dir))
    }
}

/// One of Debian's archives, or an additional one. In a lock it is written as its name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum ArchiveName {
    /// A release, its `-updates` and its `-backports`: one pool.
    Debian,
    /// A release's `-security`.
    Security,
    /// A source of the product.
    Source(String),
}

/// The key of a package for the comparison of two locks: its role, name and architecture.
pub(super) type PackageKey<'a> = (PackageRole, &'a str, &'a str);

impl PackagesLock {
    /// The packages by their keys.
    pub(super) fn by_key(&self) -> BTreeMap<PackageKey<'_>, &LockedPackage> {
        self.package.iter().map(|p| ((p.role, p.name.as_str(), p.arch.as_str()), p)).collect()
    }

    /// The differences of a newer lock, a line for each package: versions, and the archive if it
    /// changed.
    pub fn changes(&self, newer: &Self) -> Vec<String> {
        let (old, new) = (self.by_key(), newer.by_key());
        let keys: BTreeSet<_> = old.keys().chain(new.keys()).collect();
        let line = |key: &PackageKey<'_>| match (old.get(key), new.get(key)) {
            (Some(old), Some(new)) if old.sha256 == new.sha256 && old.archive == new.archive => {
                None
            }
            (Some(old), Some(new)) => {
                let moved = match old.archive == new.archive {
                    true => String::new(),
                    false => format!(", now from {}", new.archive.display_name()),
                };
                Some(format!("{} {} -> {}{moved}", key.1, old.version, new.version))
            }
            (None, Some(new)) => Some(format!(
                "{} {} added, from {}",
                key.1,
                new.version,
                new.archive.display_name()
            )),
            (Some(old), None) => Some(format!("{} {} removed", key.1, old.version)),
            (None, None) => None,
        };
        keys.into_iter().filter_map(line).collect()
    }
}

impl ArchiveName {
    /// Its name in messages.
    fn display_name(&self) -> &str {
        match self {
            Self::Debian => "Debian",
            Self::Security => "Debian's security archive",
            Self::Source(name) => name,
        }
    }

    fn address<'m>(&self, mirrors: &'m AptMirrors) -> Result<&'m str> {
        Ok(match self {
            Self::Debian => &mirrors.archive,
            Self::Security => &mirrors.security,
            Self::Source(name) => &mirrors.source(name)?.address,
        })
    }
}

impl From<String> for ArchiveName {
    fn from(name: String) -> Self {
        match name.as_str() {
            "debian" => Self::Debian,
            "security" => Self::Security,
            _ => Self::Source(name),
        }
    }
}

impl From<ArchiveName> for String {
    fn from(archive: ArchiveName) -> Self {
        match archive {
            ArchiveName::Debian => "debian".to_owned(),
            ArchiveName::Security => "security".to_owned(),
            ArchiveName::Source(name) => name,
        }
    }
}

impl PackagesLock {
    /// Reads a lock file.
    ///
    /// # Errors
    /// When it cannot be read, is malformed (with line and text), or has another format.
    pub fn load(path: &Utf8Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| {
            format!("reading {path}\nhelp: run `cargo xtask lock` to create it")
        })?;
        Self::parse(&text, path)
    }

    /// Parses the text of a lock file; messages call the file `path`.
    ///
    /// # Errors
    /// As [`PackagesLock::load`].
    pub fn parse(text: &str, path: &Utf8Path) -> Result<Self> {
        let Written { version, epoch, request, package: entries } =
            written_lock(text, path, "cargo xtask lock makes it")?;
        if version != VERSION {
            bail!(
                "reading {path}: the lock has format {version}, but this tool reads format {VERSION}"
            );
        }
        let (mut seen, mut wrong) = (BTreeSet::new(), Vec::new());
        for entry in &entries {
            let package = entry.get_ref();
            let LockedPackage { role, name, arch, archive, .. } = package;
            let mut find = |key: &str, message: String| {
                wrong.push(in_entry(text, path, &entry.span(), key, message));
            };
            if let Some((key, message)) = package.find_problem() {
                find(key, message);
            }
            if let ArchiveName::Source(source) = archive
                && !request.sources.iter().any(|known| known.name == *source)
            {
                let message = format!(
                    "package {name} comes from '{source}', but the request has no such source"
                );
                find("archive", message);
            }
            if !seen.insert((*role, name, arch)) {
                find("name", format!("package {name} ({arch}) is listed twice"));
            }
        }
        ConfigFindings(wrong).check()?;
        let package = entries.into_iter().map(Spanned::into_inner).collect();
        Ok(Self { version, epoch, request, package })
    }

    /// The text of the lock file: sorted, and equal for equal content.
    ///
    /// # Errors
    /// Never for a lock of this module; the serializer may return errors.
    pub fn to_text(&self) -> Result<String> {
        let body = toml::to_string(self).context("writing the package lock")?;
        Ok(format!("# Made by `cargo xtask lock`; builds obey it. Do not edit by hand.\n{body}"))
    }

    /// Writes the lock file.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Utf8Path) -> Result<()> {
        let text = self.to_text()?;
        write_atomically(path, |out| Ok(out.write_all(text.as_bytes())?))
    }

    /// The packages of one role.
    pub fn of_role(&self, role: PackageRole) -> impl Iterator<Item = &LockedPackage> {
        self.package.iter().filter(move |p| p.role == role)
    }

    /// Refuses a lock that was made for another request than this one of `product`.
    ///
    /// # Errors
    /// When the request differs; lists what was added and removed.
    pub fn check_request(&self, spec: &DebianSpec, product: &str) -> Result<()> {
        let set = |spec: &DebianSpec| -> BTreeSet<String> {
            let list = |what: &str, names: &[String]| -> Vec<String> {
                names.iter().map(|name| format!("{what} {name}")).collect()
            };
            let mut all = list("component", &spec.components);
            all.extend(list("package", &spec.packages));
            all.extend(list("extra package", &spec.extra));
            for source in &spec.sources {
                let about = |what: &str| format!("source {}: {what}", source.name);
                all.push(about(&format!("suite {}", source.suite)));
                all.extend(list(&about("component"), &source.components));
                all.extend(list(&about("package"), &source.packages));
            }
            all.extend([format!("suite {}", spec.suite), format!("architecture {}", spec.arch)]);
            all.into_iter().collect()
        };
        let (asked, locked) = (set(spec), set(&self.request));
        if asked == locked {
            return Ok(());
        }
        let more: Vec<_> = asked.difference(&locked).cloned().collect();
        let less: Vec<_> = locked.difference(&asked).cloned().collect();
        let part = |what: &str, names: &[String]| match names {
            [] => String::new(),
            names => format!("; {what} {}", names.join(", ")),
        };
        bail!(
            "the package lock was made for another request{}{}\n\
             help: cargo xtask lock --product {product} --only packages",
            part("not in it:", &more),
            part("only in it:", &less)
        )
    }
}

/// Resolves the request with apt and the machine's mirrors, and locks the result.
///
/// `cache` keeps the package indexes. Only indexes are downloaded, and root is not needed.
///
/// # Errors
/// When a mirror is unreachable, a signature is invalid, or apt finds no solution (with apt's
/// message).
pub fn lock_packages(
    spec: &DebianSpec,
    mirrors: &AptMirrors,
    cache: &Utf8Path,
) -> Result<PackagesLock> {
    progress::say("lock", format!("{} {}: querying the mirrors", spec.suite, spec.arch));
    let offers = AllowedPackages::read(spec, mirrors, cache)?;
    let apt = target_apt(spec, mirrors, cache)?;
    offers.bring_in(&apt)?;
    apt.pin(offers.pins())?;
    let solved = apt.update().and_then(|()| solve_request(&apt, spec, mirrors, &[], &offers));
    // The next product to lock may have no sources.
    apt.pin("")?;
    let mut package = solved?;
    package.extend(host::lock_host_tools(mirrors, cache)?);
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let epoch = match crate::variable::find("SOURCE_DATE_EPOCH")? {
        Some(text) if !text.trim().is_empty() => {
            text.trim().parse().context("SOURCE_DATE_EPOCH is not a number of seconds")?
        }
        _ => now().context("the system clock is set before 1970")?.as_secs(),
    };
    finish_lock(spec, epoch, package)
}

/// Sorts and completes a lock.
pub(super) fn finish_lock(
    spec: &DebianSpec,
    epoch: u64,
    mut package: Vec<LockedPackage>,
) -> Result<PackagesLock> {
    let mut request = spec.clone();
    let sources = request.sources.iter_mut().flat_map(|s| [&mut s.components, &mut s.packages]);
    let lists = [&mut request.components, &mut request.packages, &mut request.extra];
    for list in lists.into_iter().chain(sources) {
        list.sort();
        list.dedup();
    }
    package.sort();
    package.dedup();
    Ok(PackagesLock { version: VERSION, epoch, request, package })
}

/// The private apt for the target, with the three suites that every image uses.
pub(super) fn target_apt(
    spec: &DebianSpec,
    mirrors: &AptMirrors,
    cache: &Utf8Path,
) -> Result<PrivateApt> {
    let suite = &spec.suite;
    let sources = [
        AptArchive { uri: mirrors.archive.clone(), suite: suite.clone() },
        AptArchive { uri: mirrors.archive.clone(), suite: format!("{suite}-updates") },
        AptArchive { uri: mirrors.security.clone(), suite: format!("{suite}-security") },
    ];
    let dir = cache.join(format!("apt/{suite}-{}", spec.arch));
    PrivateApt::new(&dir, &spec.arch, &sources, &spec.components, &mirrors.keyring)
}

/// What apt would install and unpack, with roles. `kept` lists the packages in the local archive of
/// an old lock.
fn solve_request(
    apt: &PrivateApt,
    spec: &DebianSpec,
    mirrors: &AptMirrors,
    kept: &[LockedDeb],
    offers: &AllowedPackages,
) -> Result<Vec<LockedPackage>> {
    let mut wanted = vec![ESSENTIAL];
    wanted.extend(spec.packages.iter().map(String::as_str));
    let install =
        ["-qq", "--print-uris", "install", "--"].into_iter().chain(wanted.iter().copied());
    let root = apt.get(install).map_err(|error| {
        let reasons = apt.reasons_against(&wanted);
        let context = format!("resolving the packages of {} for {}", spec.suite, spec.arch);
        if reasons.is_empty() {
            return error.context(context);
        }
        anyhow!(
            "{context}: apt cannot install them together\n  - {}\n\
             help: change `packages` in the product's file or the board's: list only one of the \
             packages that \
             conflict, and instead of a virtual package one that provides it",
            reasons.join("\n  - ")
        )
    })?;
    let is_kept = |line: &&str| {
        let hash = repo::hash_in(line);
        line.starts_with(repo::URI_PREFIX) && kept.iter().any(|d| hash == Some(&d.file.sha256))
    };
    let (local, remote): (Vec<&str>, Vec<&str>) = root.lines().partition(is_kept);
    let mut locked = locked_from_uris(apt, &remote.join("\n"), mirrors, offers, PackageRole::Root)?;
    for hash in local.into_iter().filter_map(repo::hash_in) {
        locked.extend(kept.iter().find(|d| d.file.sha256 == hash).map(|d| d.package.clone()));
    }
    // A kernel's package name contains its version, so the metapackage is compared by its prefix.
    let same = |locked: &str, asked: &str| {
        locked == asked || (locked.starts_with(KERNEL) && asked.starts_with(KERNEL))
    };
    let mut wanted = Vec::new();
    for name in &spec.extra {
        let mut extras = kept.iter().map(|d| &d.package).filter(|p| p.role == PackageRole::Extra);
        match extras.find(|p| same(&p.name, name)) {
            Some(package) => locked.push(package.clone()),
            None => wanted.push(name.clone()),
        }
    }
    locked.extend(lock_unpacked(apt, &wanted, mirrors, offers, PackageRole::Extra)?);
    Ok(locked)
}

/// Locks packages that are only unpacked. `names` may end in `/suite`.
pub(super) fn lock_unpacked(
    apt: &PrivateApt,
    names: &[String],
    mirrors: &AptMirrors,
    offers: &AllowedPackages,
    role: PackageRole,
) -> Result<Vec<LockedPackage>> {
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let mut wanted = Vec::new();
    for name in names {
        wanted.push(kernel_behind(apt, name)?.unwrap_or_else(|| name.clone()));
    }
    let args =
        ["-qq", "--print-uris", "download", "--"].map(str::to_owned).into_iter().chain(wanted);
    let uris = apt.get(args).context("resolving the packages that are only unpacked")?;
    locked_from_uris(apt, &uris, mirrors, offers, role)
}

/// The real kernel package of a metapackage such as `linux-image-arm64`.
fn kernel_behind(apt: &PrivateApt, name: &str) -> Result<Option<String>> {
    if !name.starts_with(KERNEL) {
        return Ok(None);
    }
    let text = apt
        .cache(["show", "--no-all-versions", name])
        .with_context(|| format!("looking up {name}"))?;
    let depends = split_stanzas(&text).into_iter().find_map(|s| s.get("Depends").cloned());
    Ok(depends.and_then(|depends| {
        let names = depends.split(',').filter_map(|item| item.split_whitespace().next());
        names.into_iter().find(|item| item.starts_with(KERNEL)).map(str::to_owned)
    }))
}

/// Reads lines of `--print-uris`: `'URI' FILE SIZE [HASH]`, and adds SHA-256 from the indexes.
fn locked_from_uris(
    apt: &PrivateApt,
    text: &str,
    mirrors: &AptMirrors,
    offers: &AllowedPackages,
    role: PackageRole,
) -> Result<Vec<LockedPackage>> {
    let (mut found, mut offered) = (Vec::new(), Vec::new());
    for line in text.lines().filter(|line| line.starts_with('\'')) {
        let context = || format!("parsing apt's output: {line}");
        if line.starts_with(repo::URI_PREFIX) {
            let hash = repo::hash_in(line).with_context(context)?;
            let package = offers.with_hash(hash);
            offered.push(package.with_context(|| format!("apt selected an unknown file {hash}"))?);
            continue;
        }
        let package = parse_uri_line(line, mirrors, role).with_context(context)?;
        match offers.instead_of(&package) {
            Some(package) => offered.push(package),
            None => found.push(package),
        }
    }
    let offered: Vec<LockedPackage> =
        offered.into_iter().map(|package| LockedPackage { role, ..package.clone() }).collect();
    if found.is_empty() {
        return Ok(offered);
    }
    let queries: Vec<String> = found.iter().map(|p| format!("{}={}", p.name, p.version)).collect();
    let shown = apt.cache(["show"].map(str::to_owned).into_iter().chain(queries))?;
    let mut hashes: HashMap<String, String> = HashMap::new();
    for mut stanza in split_stanzas(&shown) {
        if let (Some(file), Some(hash)) = (stanza.remove("Filename"), stanza.remove("SHA256")) {
            hashes.insert(file, hash);
        }
    }
    for package in &mut found {
        package.sha256 = hashes
            .remove(&package.filename)
            .ok_or_else(|| anyhow!("the index has no SHA-256 for {}", package.filename))?;
    }
    found.extend(offered);
    Ok(found)
}

fn parse_uri_line(line: &str, mirrors: &AptMirrors, role: PackageRole) -> Result<LockedPackage> {
    let mut fields = line.split_whitespace();
    let (Some(uri), Some(file), Some(size)) = (fields.next(), fields.next(), fields.next()) else {
        bail!("expected an address, a file name and a size");
    };
    let uri = uri.trim_matches('\'');
    let below = |mirror: &str| uri.strip_prefix(mirror)?.strip_prefix('/').map(percent_decode);
    // The security archive first: its address often begins with the archive's address.
    let (archive, filename) = match (below(&mirrors.security), below(&mirrors.archive)) {
        (Some(path), _) => (ArchiveName::Security, path),
        (None, Some(path)) => (ArchiveName::Debian, path),
        (None, None) => bail!("the address does not belong to any of the mirrors"),
    };
    let parts: Vec<String> = file.trim_end_matches(".deb").split('_').map(percent_decode).collect();
    let [name, version, arch] = parts.as_slice() else {
        bail!("'{file}' is not NAME_VERSION_ARCH.deb")
    };
    Ok(LockedPackage {
        role,
        name: name.clone(),
        arch: arch.clone(),
        version: version.clone(),
        archive,
        filename,
        size: size.parse().with_context(|| format!("'{size}' is not a size"))?,
        sha256: String::new(),
    })
}

/// Decodes `%xx`.
fn percent_decode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('%') {
        out.push_str(before);
        let code = after.get(..2).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match code.filter(u8::is_ascii) {
            Some(byte) => {
                out.push(char::from(byte));
                rest = &after[2..];
            }
            None => {
                out.push('%');
                rest = after;
            }
        }
    }
    out + rest
}

/// Splits deb822 text into its stanzas; continuation lines belong to the previous field.
pub(super) fn split_stanzas(text: &str) -> Vec<BTreeMap<String, String>> {
    let mut all = Vec::new();
    for block in text.split("\n\n") {
        let mut fields: BTreeMap<String, String> = BTreeMap::new();
        let mut last = String::new();
        for line in block.lines() {
            if line.starts_with([' ', '\t']) {
                if let Some(value) = fields.get_mut(&last) {
                    value.push('\n');
                    value.push_str(line.trim());
                }
            } else if let Some((key, value)) = line.split_once(':') {
                last = key.to_owned();
                fields.insert(last.clone(), value.trim().to_owned());
            }
        }
        if !fields.is_empty() {
            all.push(fields);
        }
    }
    all
}

/// Resolves the request with these packages available, in exactly these versions if possible.
pub(super) fn solve_with_kept(
    spec: &DebianSpec,
    mirrors: &AptMirrors,
    cache: &Utf8Path,
    kept: &[LockedDeb],
) -> Result<Vec<LockedPackage>> {
    let offers = AllowedPackages::read(spec, mirrors, cache)?;
    let apt = target_apt(spec, mirrors, cache)?;
    offers.bring_in(&apt)?;
    let local = cache.join("apt/kept");
    repo::write_archive(&local, &kept.iter().collect::<Vec<_>>())?;
    let local = local.canonicalize_utf8().context("resolving the local archive")?;
    apt.add_local(&local)?;
    // Above 1000: preferred even when the archive has a newer version.
    let pins = kept.iter().fold(offers.pins().to_owned(), |text, LockedDeb { package, .. }| {
        let LockedPackage { name, version, .. } = package;
        text + &format!("Package: {name}\nPin: version {version}\nPin-Priority: 1001\n\n")
    });
    apt.pin(&pins)?;
    let solved = apt.update().and_then(|()| solve_request(&apt, spec, mirrors, kept, &offers));
    apt.pin("")?;
    solved
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(packages: &[(&str, &str, ArchiveName)]) -> PackagesLock {
        let package = |(name, version, archive): &(&str, &str, ArchiveName)| LockedPackage {
            role: PackageRole::Root,
            name: (*name).to_owned(),
            arch: "arm64".to_owned(),
            version: (*version).to_owned(),
            archive: archive.clone(),
            filename: format!("pool/{name}.deb"),
            size: 1,
            sha256: format!("{name} {version}"),
        };
        let request = DebianSpec {
            suite: "bookworm".to_owned(),
            components: Vec::new(),
            arch: "arm64".to_owned(),
            packages: Vec::new(),
            extra: Vec::new(),
            sources: Vec::new(),
        };
        PackagesLock {
            version: 1,
            epoch: 0,
            request,
            package: packages.iter().map(package).collect(),
        }
    }

    #[test]
    fn each_package_that_changes_moves_comes_or_goes_is_told() {
        let acme = || ArchiveName::Source("acme".to_owned());
        let old = lock(&[
            ("bash", "5", ArchiveName::Debian),
            ("curl", "7", ArchiveName::Debian),
            ("less", "590", ArchiveName::Debian),
            ("vim", "9", ArchiveName::Debian),
        ]);
        let new = lock(&[
            ("bash", "5", ArchiveName::Debian),
            ("curl", "8", ArchiveName::Debian),
            ("less", "590", acme()),
            ("motor", "1", acme()),
        ]);
        assert_eq!(
            old.changes(&new),
            [
                "curl 7 -> 8",
                "less 590 -> 590, now from acme",
                "motor 1 added, from acme",
                "vim 9 removed",
            ]
        );
        assert_eq!(old.changes(&old), [""; 0]);
    }
}
