//! Installs wheels as a standard installer does (PEP 427, PEP 491, PEP 627), not into a system but
//! into a tar that the compose stage adds to the base. Equal wheels give equal bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use super::archive::{CheckedWheel, digest_text};
use super::base::BasePython;
use super::bytecode;
use super::check::{DependencyClosure, check_wheels};
use super::fetch::DownloadedWheel;
use super::lock::WheelLock;
use super::metadata::{EntryPoint, License, RecordLine, format_record};
use crate::artifact::{Artifact, write_atomically};
use crate::parallel;
use crate::progress::warn;

/// The content of INSTALLER (PEP 376).
const INSTALLER: &str = "slipway\n";

/// The base's interpreter, for every engine.
const INTERPRETER: &str = "/usr/bin/python3";

/// The target directories of wheels on the robot; absolute paths.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstallTarget {
    /// Modules: `/usr/local/lib/python3.11/dist-packages`.
    pub site_packages: Utf8PathBuf,
    /// Programs: `/usr/local/bin`.
    pub scripts: Utf8PathBuf,
    /// Where a wheel's `data` goes: `/usr/local`.
    pub prefix: Utf8PathBuf,
    /// The interpreter in a program's first line: `/usr/bin/python3`.
    pub interpreter: Utf8PathBuf,
}

impl InstallTarget {
    /// The directory in which Debian's Python looks for additional modules; a plain CPython
    /// (Buildroot) looks in `site-packages` under `/usr`.
    pub fn for_base(base: &BasePython, debian: bool) -> Self {
        let (prefix, dir) =
            if debian { ("/usr/local", "dist-packages") } else { ("/usr", "site-packages") };
        Self {
            site_packages: format!("{prefix}/lib/python{}/{dir}", base.version.short()).into(),
            scripts: format!("{prefix}/bin").into(),
            prefix: prefix.into(),
            interpreter: INTERPRETER.into(),
        }
    }

    /// The directory of an API that is installed on `data`, for every version and base.
    pub fn on_data() -> Self {
        let place = Utf8Path::new(bundle::component::PLACE);
        Self {
            site_packages: place.join(bundle::component::SITE),
            scripts: place.join(bundle::component::BIN),
            prefix: place.to_owned(),
            interpreter: INTERPRETER.into(),
        }
    }
}

/// One installation.
#[derive(Debug)]
pub struct InstallRequest<'a> {
    /// The lock.
    pub lock: &'a WheelLock,
    /// Its wheels, fetched.
    pub wheels: &'a [DownloadedWheel],
    /// The base's Python.
    pub base: &'a BasePython,
    /// The target directories.
    pub target: &'a InstallTarget,
    /// The cache directory; bytecode is kept there by wheel and interpreter.
    pub cache: &'a Utf8Path,
    /// The modification time of every file, seconds since 1970.
    pub epoch: u64,
    /// The tar to write.
    pub out: &'a Utf8Path,
    /// The log for the interpreter's output.
    pub log: Option<&'a Utf8Path>,
}

/// What was installed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct InstalledWheels {
    /// The tar: sorted, owner 0:0, all directories from the top, uncompressed.
    pub tar: Artifact,
    /// One for each wheel, sorted by name.
    pub distributions: Vec<InstalledDistribution>,
}

/// One installed distribution.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct InstalledDistribution {
    /// The name as its author spells it.
    pub name: String,
    /// The version.
    pub version: String,
    /// The wheel's file name.
    pub wheel: String,
    /// The wheel's SHA-256, lower-case hexadecimal.
    pub sha256: String,
    /// One sentence about it.
    pub summary: Option<String>,
    /// Its licence.
    pub license: Option<License>,
    /// The sum of its files' lengths in bytes, bytecode included.
    pub installed_bytes: u64,
    /// How many files it has, bytecode included.
    pub files: u64,
    /// How many of its modules do not compile and remain as source.
    pub uncompiled: u64,
    /// Whether the product asked for it (the others are its dependencies).
    pub top_level: bool,
    /// `/usr/local/lib/python3.11/dist-packages/opentrons/resources`, if the wheel has such a
    /// directory directly in the package of its own name.
    pub resources: Option<Utf8PathBuf>,
}

/// A file on its way into the tar.
pub(super) struct PlacedFile {
    pub bytes: Vec<u8>,
    digest: String,
    mode: u32,
    /// The wheels that install it, in the lock's order. Namespace packages ship one `__init__.py` in each part.
    pub wheels: Vec<usize>,
}

impl PlacedFile {
    /// Whether one file may replace the other: the same file, or bytecode of the same source.
    /// CPython's marshalled bytes depend on what was compiled before; a `.pyc` begins with its
    /// magic number, its flags and its source's hash (PEP 552), 16 bytes.
    fn is_like(&self, other: &Self, path: &str) -> bool {
        let bytecode = path.ends_with(".pyc") && path.contains("/__pycache__/");
        let same_source = || self.bytes.len() > 16 && self.bytes.get(..16) == other.bytes.get(..16);
        self.mode == other.mode && (self.digest == other.digest || (bytecode && same_source()))
    }
}

/// The tree under construction; paths without the leading slash.
#[derive(Default)]
pub(super) struct InstallTree {
    pub files: BTreeMap<String, PlacedFile>,
}

impl InstallTree {
    /// Adds a file of one wheel. A file that exists already with the same content and mode belongs
    /// to both.
    fn add(&mut self, path: String, placed: PlacedFile, names: &[String]) -> Result<()> {
        let name = |placed: &PlacedFile| placed.wheels.first().and_then(|w| names.get(*w)).cloned();
        let Some(there) = self.files.get_mut(&path) else {
            self.files.insert(path, placed);
            return Ok(());
        };
        ensure!(
            there.is_like(&placed, &path),
            "{} and {} both install /{path}, with different content or mode\n\
             help: remove one of them from the API's requirements, or ask the authors of {} to \
             move the file into a \
             separate package",
            name(&placed).unwrap_or_default(),
            name(there).unwrap_or_default(),
            path.rsplit('/').next().unwrap_or_default()
        );
        for wheel in placed.wheels {
            if !there.wheels.contains(&wheel) {
                there.wheels.push(wheel);
            }
        }
        Ok(())
    }
}

/// Wheels laid out, before anything is written.
pub(super) struct WheelLayout {
    pub tree: InstallTree,
    /// In the lock's order, which is that of [`PlacedFile::wheels`].
    pub distributions: Vec<InstalledDistribution>,
    /// The programs that each wheel asks for, in the same order.
    pub entry_points: Vec<Vec<EntryPoint>>,
    /// Which distribution needs which.
    pub closure: DependencyClosure,
}

/// Checks and installs wheels into a tar.
///
/// # Errors
/// When a wheel breaks a rule, wheels do not fit the base or each other, two of them install the
/// same file, the base's Python cannot be run, or the tar cannot be written.
pub fn install_wheels(request: &InstallRequest<'_>) -> Result<InstalledWheels> {
    let WheelLayout { tree, mut distributions, .. } = lay_out(request)?;
    let files: Vec<_> = tree.files.iter().map(|(path, placed)| (path.as_str(), placed)).collect();
    write_atomically(request.out, |out| write_tar(&files, request.epoch, out))
        .with_context(|| format!("writing {}", request.out))?;
    distributions.sort_by(|a, b| a.wheel.cmp(&b.wheel));
    Ok(InstalledWheels { tar: Artifact::from_file(request.out)?, distributions })
}

/// Checks wheels and collects their files, compiled, as `request` says.
pub(super) fn lay_out(request: &InstallRequest<'_>) -> Result<WheelLayout> {
    let InstallRequest { lock, wheels: fetched, base, target, .. } = request;
    let mut on = lock.target.clone();
    ensure!(
        (on.python.major, on.python.minor) == (base.version.major, base.version.minor),
        "the wheels were locked for Python {}, but the base has {}\n\
         help: resolve the wheels again with `cargo xtask lock`",
        on.python,
        base.version
    );
    on.python = base.version;
    let wheels = open_all(fetched)?;
    tell_doubts(&wheels);
    let closure = check_wheels(&lock.requirement, &wheels, &on, &base.distributions)
        .context("checking the wheels against the base")?;

    let entry_points = wheels.iter().map(|wheel| wheel.entry_points.clone()).collect();
    let Arranged { mut tree, mut facts, names } =
        arrange_wheels(wheels, target, &lock.top_level()?)?;
    compile_files(request, &mut tree, &mut facts, &names)?;
    write_records(&mut tree, &mut facts, target);
    for placed in tree.files.values() {
        for wheel in &placed.wheels {
            let fact = &mut facts[*wheel].0;
            fact.files += 1;
            fact.installed_bytes += placed.bytes.len() as u64;
        }
    }
    let distributions = facts.into_iter().map(|(fact, _)| fact).collect();
    Ok(WheelLayout { tree, distributions, entry_points, closure })
}

/// Warns about contradictory metadata in wheels. Their bytes are those of the lock nevertheless.
pub(super) fn tell_doubts(wheels: &[CheckedWheel]) {
    for wheel in wheels.iter().filter(|wheel| !wheel.doubts.is_empty()) {
        warn(format!(
            "the metadata of {} contradict the wheel's content (the file is the one of the index): {}",
            wheel.file,
            wheel.doubts.join("; ")
        ));
    }
}

/// Wheels with a path for each file, not compiled and without RECORDs.
struct Arranged {
    tree: InstallTree,
    facts: Vec<Fact>,
    /// The wheels' file names.
    names: Vec<String>,
}

fn arrange_wheels(
    wheels: Vec<CheckedWheel>,
    target: &InstallTarget,
    top: &str,
) -> Result<Arranged> {
    let names: Vec<String> = wheels.iter().map(|wheel| wheel.file.clone()).collect();
    let (mut tree, mut facts) = (InstallTree::default(), Vec::new());
    for (index, wheel) in wheels.into_iter().enumerate() {
        facts.push(
            place_files(&mut tree, index, wheel, target, &names, top)
                .with_context(|| format!("installing {}", names[index]))?,
        );
    }
    Ok(Arranged { tree, facts, names })
}

/// A file of an installation of wheels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstalledFile {
    /// SHA-256 as RECORD writes it.
    pub digest: String,
    /// Whether all users may execute it.
    pub executable: bool,
    /// The wheels that install it.
    pub wheels: Vec<String>,
}

/// Where wheels would be installed, by path without the leading slash; bytecode and RECORDs, which
/// are created during the installation, are not included.
///
/// # Errors
/// Two wheels that install different files under one name; a wheel with an unknown feature.
pub fn preview_files(
    wheels: Vec<CheckedWheel>,
    target: &InstallTarget,
    top: &str,
) -> Result<BTreeMap<String, InstalledFile>> {
    let Arranged { tree, names, .. } = arrange_wheels(wheels, target, top)?;
    let files = tree.files.into_iter().map(|(path, placed)| {
        let wheels = placed.wheels.iter().map(|wheel| names[*wheel].clone()).collect();
        let executable = placed.mode & 0o111 != 0;
        (path, InstalledFile { digest: placed.digest, executable, wheels })
    });
    Ok(files.collect())
}

/// Reads and checks all wheels, on all cores.
fn open_all(fetched: &[DownloadedWheel]) -> Result<Vec<CheckedWheel>> {
    // The largest first, so that the cores finish at about the same time.
    let mut order: Vec<usize> = (0..fetched.len()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(fetched[*i].locked.size));
    let mut wheels = parallel::map(&order, parallel::cores(), |&index| {
        let DownloadedWheel { locked, path } = &fetched[index];
        Ok((index, CheckedWheel::open(path, &locked.file, Some(&locked.sha256))?))
    })?;
    wheels.sort_by_key(|(index, _)| *index);
    Ok(wheels.into_iter().map(|(_, wheel)| wheel).collect())
}

/// The input of `write_records` from `place`: the distribution, and the path of its RECORD.
type Fact = (InstalledDistribution, String);

/// A robot's path in the form of the tree.
pub(super) fn path_in_tree(path: &Utf8Path) -> &str {
    path.as_str().trim_matches('/')
}

fn place_files(
    tree: &mut InstallTree,
    index: usize,
    wheel: CheckedWheel,
    target: &InstallTarget,
    names: &[String],
    top: &str,
) -> Result<Fact> {
    let site = path_in_tree(&target.site_packages);
    let scripts = path_in_tree(&target.scripts);
    let prefix = path_in_tree(&target.prefix);
    let info = format!("{site}/{}", wheel.dist_info);
    let record = format!("{info}/RECORD");
    let top_level = wheel.name.name == top;
    let package = wheel.name.name.replace('-', "_");
    let resources = format!("{package}/resources/");
    let resources = wheel
        .files
        .keys()
        .any(|path| path.starts_with(&resources))
        .then(|| target.site_packages.join(resources.trim_end_matches('/')));

    let source_record = format!("{}/RECORD", wheel.dist_info);
    let put = |tree: &mut InstallTree, path: String, bytes: Vec<u8>, executable: bool| {
        let digest = digest_text(&bytes);
        let mode = if executable { 0o755 } else { 0o644 };
        tree.add(path, PlacedFile { bytes, digest, mode, wheels: vec![index] }, names)
    };
    for (path, file) in wheel.files {
        if path == source_record {
            continue;
        }
        let mode = if file.executable { 0o755 } else { 0o644 };
        let placed =
            PlacedFile { bytes: file.bytes, digest: file.digest, mode, wheels: vec![index] };
        // Like pip: any name before `.data` is accepted.
        let data = path.split_once('/').filter(|(dir, _)| dir.ends_with(".data"));
        let Some((_, rest)) = data else {
            tree.add(format!("{site}/{path}"), placed, names)?;
            continue;
        };
        let (kind, rest) = rest
            .split_once('/')
            .with_context(|| format!("{path} is not in the directory of a scheme"))?;
        let to = match kind {
            "purelib" | "platlib" => format!("{site}/{rest}"),
            "data" => format!("{prefix}/{rest}"),
            // The spelling of sysconfig and of every installer: the interpreter's, then the
            // project's.
            "headers" => format!("{prefix}/include/{}/{package}/{rest}", python_dir(site)),
            // Old tools also ship the program of an entry point; the generated program replaces it.
            "scripts"
                if wheel.entry_points.iter().any(|point| point.name == entry_point_name(rest)) =>
            {
                continue;
            }
            "scripts" => {
                let bytes = rewrite_shebang(placed.bytes, target);
                put(tree, format!("{scripts}/{rest}"), bytes, true)?;
                continue;
            }
            other => bail!("{path} is in the unknown scheme '{other}'"),
        };
        tree.add(to, placed, names)?;
    }
    for point in &wheel.entry_points {
        let text = script_text(point, target);
        put(tree, format!("{scripts}/{}", point.name), text.into_bytes(), true)?;
    }
    put(tree, format!("{info}/INSTALLER"), INSTALLER.into(), false)?;
    if top_level {
        put(tree, format!("{info}/REQUESTED"), Vec::new(), false)?;
    }
    let metadata = wheel.metadata;
    let fact = InstalledDistribution {
        name: metadata.name,
        version: metadata.version_text,
        wheel: wheel.file,
        sha256: wheel.sha256,
        summary: metadata.summary,
        license: metadata.license,
        installed_bytes: 0,
        files: 0,
        uncompiled: 0,
        top_level,
        resources,
    };
    Ok((fact, record))
}

/// The entry point of a program of old tools, without the endings that it has on some systems.
fn entry_point_name(file: &str) -> &str {
    let ends = [".exe", "-script.py", ".pya"];
    ends.iter().find_map(|end| file.strip_suffix(end)).unwrap_or(file)
}

/// `python3.11` of `usr/local/lib/python3.11/dist-packages`.
fn python_dir(site: &str) -> &str {
    site.split('/').find(|part| part.starts_with("python3")).unwrap_or("python3")
}

/// A script whose first line is `#!python…` gets the robot's interpreter (PEP 427).
fn rewrite_shebang(bytes: Vec<u8>, target: &InstallTarget) -> Vec<u8> {
    let Some(rest) = bytes.strip_prefix(b"#!python") else { return bytes };
    let end = rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len());
    // `pythonw` only exists on Windows; arguments are kept.
    let line = rest[..end].strip_prefix(b"w").unwrap_or(&rest[..end]);
    let mut new = format!("#!{}", target.interpreter).into_bytes();
    new.extend_from_slice(line.trim_ascii_end());
    new.extend_from_slice(&rest[end..]);
    new
}

/// The program for an entry point.
fn script_text(point: &EntryPoint, target: &InstallTarget) -> String {
    let EntryPoint { module, function, .. } = point;
    let imported = function.split('.').next().unwrap_or(function);
    format!(
        "#!{}\nimport sys\n\nfrom {module} import {imported}\n\n\
         if __name__ == \"__main__\":\n    sys.exit({function}())\n",
        target.interpreter
    )
}

fn compile_files(
    request: &InstallRequest<'_>,
    tree: &mut InstallTree,
    facts: &mut [Fact],
    names: &[String],
) -> Result<()> {
    let site = format!("{}/", path_in_tree(&request.target.site_packages));
    let mut wheels: Vec<(String, bytecode::ModuleSources<'_>)> =
        facts.iter().map(|(fact, _)| (fact.sha256.clone(), BTreeMap::new())).collect();
    for (path, placed) in &tree.files {
        if path.starts_with(&site) && path.ends_with(".py") {
            for wheel in &placed.wheels {
                wheels[*wheel].1.insert(path, &placed.bytes);
            }
        }
    }
    let arch = &request.lock.target.arch;
    let made = bytecode::compile_wheels(&wheels, request.base, arch, request.cache, request.log)?;
    for (index, compiled) in made.iter().enumerate() {
        facts[index].0.uncompiled = (wheels[index].1.len() - compiled.len()) as u64;
    }
    // Some wheels contain bytecode by mistake; like every installer, replace it by new bytecode.
    for path in made.iter().flat_map(BTreeMap::keys) {
        tree.files.remove(path);
    }
    for (index, compiled) in made.into_iter().enumerate() {
        for (path, bytes) in compiled {
            let digest = digest_text(&bytes);
            tree.add(path, PlacedFile { bytes, digest, mode: 0o644, wheels: vec![index] }, names)?;
        }
    }
    Ok(())
}

/// Writes each distribution's RECORD: every installed file with hash and size, paths relative to
/// the directory of the modules, sorted.
fn write_records(tree: &mut InstallTree, facts: &mut [Fact], target: &InstallTarget) {
    let site = path_in_tree(&target.site_packages);
    let mut records: Vec<Vec<RecordLine>> = facts.iter().map(|_| Vec::new()).collect();
    for (path, placed) in &tree.files {
        for wheel in &placed.wheels {
            records[*wheel].push(RecordLine {
                path: relative_path(path, site),
                hash: placed.digest.clone(),
                size: placed.bytes.len().to_string(),
            });
        }
    }
    for (index, mut lines) in records.into_iter().enumerate() {
        let path = facts[index].1.clone();
        lines.push(RecordLine {
            path: relative_path(&path, site),
            hash: String::new(),
            size: String::new(),
        });
        lines.sort_by(|a, b| a.path.cmp(&b.path));
        let bytes = format_record(&lines).into_bytes();
        let digest = digest_text(&bytes);
        tree.files.insert(path, PlacedFile { bytes, digest, mode: 0o644, wheels: vec![index] });
    }
}

/// The path of `usr/local/bin/x` relative to `usr/local/lib/python3.11/dist-packages` is
/// `../../../bin/x`.
fn relative_path(path: &str, from: &str) -> String {
    let path: Vec<&str> = path.split('/').collect();
    let from: Vec<&str> = from.split('/').collect();
    let common = path.iter().zip(&from).take_while(|(a, b)| a == b).count();
    let up = std::iter::repeat_n("..", from.len() - common);
    up.chain(path[common..].iter().copied()).collect::<Vec<_>>().join("/")
}

/// Writes files, sorted by path, with all their directories.
pub(super) fn write_tar(
    files: &[(&str, &PlacedFile)],
    epoch: u64,
    out: &mut dyn Write,
) -> Result<()> {
    let mut dirs = BTreeSet::new();
    for (path, _) in files {
        let mut rest = *path;
        while let Some((parent, _)) = rest.rsplit_once('/') {
            if !dirs.insert(parent) {
                break;
            }
            rest = parent;
        }
    }
    let mut builder = tar::Builder::new(out);
    let header = |kind: tar::EntryType, mode: u32, size: u64| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(epoch);
        header.set_size(size);
        header
    };
    let mut dirs = dirs.into_iter().peekable();
    for (path, placed) in files {
        while let Some(dir) = dirs.next_if(|dir| dir < path) {
            let mut header = header(tar::EntryType::Directory, 0o755, 0);
            builder.append_data(&mut header, format!("{dir}/"), std::io::empty())?;
        }
        let mut header = header(tar::EntryType::Regular, placed.mode, placed.bytes.len() as u64);
        builder
            .append_data(&mut header, path, placed.bytes.as_slice())
            .with_context(|| format!("adding /{path}"))?;
    }
    builder.into_inner().context("finishing the tar").map(drop)
}
