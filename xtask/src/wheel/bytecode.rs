//! Compiles installed modules with the base's own interpreter, under QEMU's user emulation and
//! without entering the base, or with this machine's where it is the same, so that the robot, whose root is read-only, need never compile.
//!
//! The bytes must depend on the source alone: the files have no times (`unchecked-hash`), paths are
//! the robot's, the hash seed is fixed, and every group of files is compiled in its own process
//! forked from one state, because CPython's marshalled bytes depend on reference counts.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;

use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};

use super::base::BasePython;
use super::target::PythonVersion;
use crate::artifact::{hash_bytes, write_atomically};
use crate::exec::{Tool, find_program};
use crate::progress::{ProgressStep, ProgressUnit, say};

/// Changes when the way of compiling does, so that old results in a cache are not used.
const RECIPE: &str = "unchecked-hash, one fork per group, groups of 256 KiB, 1";

/// Sources of this many bytes share a process: enough to amortise the fork, little enough to keep
/// all cores busy to the end. It never depends on the machine.
const GROUP: usize = 256 << 10;

/// Compiles each group in a forked child, as many at a time as there are cores. Its lines: `done N`
/// or `failed FILE`.
const DRIVER: &str = r#"
import os, py_compile, sys
root, prefix, jobs = sys.argv[1], sys.argv[2], int(sys.argv[3])
groups = {}
with open(os.path.join(root, "groups"), encoding="utf-8") as f:
    for line in f:
        number, _, path = line.rstrip("\n").partition(" ")
        groups.setdefault(int(number), []).append(path)
def work(paths):
    for path in paths:
        source = os.path.join(root, "tree", path)
        final = prefix + path.partition("/")[2]
        try:
            py_compile.compile(source, dfile=final, doraise=True,
                invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
        except py_compile.PyCompileError:
            os.write(1, ("failed %s\n" % path).encode())
    os.write(1, ("done %d\n" % len(paths)).encode())
running = 0
def reap():
    if os.wait()[1] != 0:
        os._exit(1)
for number in sorted(groups):
    if running == jobs:
        reap()
        running -= 1
    if os.fork() == 0:
        try:
            work(groups[number])
        except BaseException as error:
            os.write(2, ("%r\n" % error).encode())
            os._exit(1)
        os._exit(0)
    running += 1
for _ in range(running):
    reap()
"#;

/// Modules of one wheel: path on the robot without the leading slash, and content.
pub type ModuleSources<'a> = BTreeMap<&'a str, &'a [u8]>;

/// Compiled modules: path on the robot without the leading slash, and content.
pub type CompiledModules = BTreeMap<String, Vec<u8>>;

/// The path of a module's compiled form: `a/b.py` gives `a/__pycache__/b.cpython-311.pyc`.
pub fn cached_name(path: &str, python: PythonVersion) -> Option<String> {
    let stem = path.strip_suffix(".py")?;
    let (dir, name) = stem.rsplit_once('/')?;
    let PythonVersion { major, minor, .. } = python;
    Some(format!("{dir}/__pycache__/{name}.cpython-{major}{minor}.pyc"))
}

/// The bytecode of each wheel, from the cache where it is there. `wheels` has each wheel's SHA-256
/// and sources; the answer is in the same order. A module that does not compile is skipped, as
/// every installer does: some wheels contain templates and tests for other Pythons.
///
/// # Errors
/// When the emulator is missing or the interpreter fails.
pub fn compile_wheels(
    wheels: &[(String, ModuleSources<'_>)],
    base: &BasePython,
    arch: &str,
    cache: &Utf8Path,
    log: Option<&Utf8Path>,
) -> Result<Vec<CompiledModules>> {
    let places: Vec<Utf8PathBuf> = wheels
        .iter()
        .map(|(sha256, sources)| bytecode_path(cache, sha256, sources, base))
        .collect();
    let missing: Vec<usize> = (0..wheels.len()).filter(|i| !places[*i].exists()).collect();
    if !missing.is_empty() {
        let mut made = run_compiler(wheels, &missing, base, arch, log)
            .context("compiling the wheels' modules with the base's Python")?;
        for index in missing {
            let compiled = made.remove(&index).unwrap_or_default();
            write_tar(&places[index], &compiled)?;
        }
    }
    places.iter().map(|path| read_tar(path)).collect()
}

/// The cache's place for one wheel's bytecode.
fn bytecode_path(
    cache: &Utf8Path,
    sha256: &str,
    sources: &ModuleSources<'_>,
    base: &BasePython,
) -> Utf8PathBuf {
    // The paths are part of the bytecode; the contents follow from the wheel.
    let paths = sources.keys().copied().collect::<Vec<_>>().join("\n");
    let key = hash_bytes(format!("{RECIPE}\n{sha256}\n{}\n{paths}", base.identity).as_bytes());
    cache.join("stages/wheels").join(format!("{key}.tar"))
}

/// The base's interpreter as a program of this machine.
fn emulated_interpreter(base: &BasePython, arch: &str, scratch: &Utf8Path) -> Result<Tool> {
    let emulator = format!("qemu-{arch}-static");
    ensure!(
        find_program(&emulator).is_some(),
        "{emulator} is missing\nhelp: install qemu-user-static (apt-get install qemu-user-static)"
    );
    let root = base.runnable(scratch)?;
    let interpreter = root.join(&base.interpreter);
    Ok(Tool::new(&emulator).args(["-L", root.as_str()]).arg(interpreter))
}

fn run_compiler(
    wheels: &[(String, ModuleSources<'_>)],
    missing: &[usize],
    base: &BasePython,
    arch: &str,
    log: Option<&Utf8Path>,
) -> Result<BTreeMap<usize, CompiledModules>> {
    let scratch = tempfile::tempdir().context("making a temporary directory")?;
    let dir =
        Utf8Path::from_path(scratch.path()).context("the temporary directory is not UTF-8")?;
    let python = match base.own() {
        Some(python) => Tool::new(python),
        None => emulated_interpreter(base, arch, &dir.join("base"))?,
    };

    let mut groups = String::new();
    let mut group = 0;
    let mut total = 0;
    for index in missing {
        let mut filled = 0;
        for (path, bytes) in &wheels[*index].1 {
            if filled > GROUP {
                group += 1;
                filled = 0;
            }
            filled += bytes.len();
            total += 1;
            groups.push_str(&format!("{group} {index}/{path}\n"));
            let file = dir.join("tree").join(index.to_string()).join(path);
            if let Some(parent) = file.parent() {
                std::fs::create_dir_all(parent).with_context(|| format!("creating {parent}"))?;
            }
            std::fs::write(&file, bytes).with_context(|| format!("writing {file}"))?;
        }
        group += 1;
    }
    std::fs::write(dir.join("groups"), groups).with_context(|| format!("writing {dir}/groups"))?;

    let cores = crate::parallel::cores();
    let step = ProgressStep::new("wheels", "compiling modules", total, ProgressUnit::Items);
    let mut failed = 0;
    let mut tool = python
        .args(["-S", "-s", "-W", "ignore", "-X", "utf8", "-c", DRIVER])
        .args([dir.as_str(), "/", &cores.to_string()])
        .current_dir(dir);
    // The developer's settings for another Python, linker or emulator are not passed to this one
    // (`exec`).
    tool = tool.env("PYTHONHASHSEED", "0").env("PYTHONDONTWRITEBYTECODE", "1").env("LC_ALL", "C");
    if let Some(log) = log {
        tool = tool.log(log);
    }
    tool.run_lines(|line| {
        if let Some(count) = line.strip_prefix("done ").and_then(|n| n.parse().ok()) {
            step.advance(count);
        } else if line.starts_with("failed ") {
            failed += 1;
        }
    })?;
    drop(step);
    if failed > 0 {
        say("wheels", format!("{failed} of {total} modules do not compile and stay as source"));
    }

    let mut made = BTreeMap::new();
    for index in missing {
        let mut compiled = CompiledModules::new();
        for path in wheels[*index].1.keys() {
            let Some(name) = cached_name(path, base.version) else { continue };
            let file = dir.join("tree").join(index.to_string()).join(&name);
            if file.exists() {
                let bytes = std::fs::read(&file).with_context(|| format!("reading {file}"))?;
                compiled.insert(name, bytes);
            }
        }
        made.insert(*index, compiled);
    }
    Ok(made)
}

fn write_tar(path: &Utf8Path, compiled: &CompiledModules) -> Result<()> {
    write_atomically(path, |out| {
        let mut builder = tar::Builder::new(out);
        for (name, bytes) in compiled {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            builder
                .append_data(&mut header, name, bytes.as_slice())
                .with_context(|| format!("writing {path}"))?;
        }
        builder.into_inner().with_context(|| format!("writing {path}")).map(drop)
    })
}

fn read_tar(path: &Utf8Path) -> Result<CompiledModules> {
    let help =
        || format!("reading {path}\nhelp: remove that file: the next build creates it again");
    let file = File::open(path).with_context(help)?;
    let mut archive = tar::Archive::new(std::io::BufReader::new(file));
    let mut compiled = CompiledModules::new();
    for entry in archive.entries().with_context(help)? {
        let mut entry = entry.with_context(help)?;
        let name = String::from_utf8(entry.path_bytes().into_owned()).with_context(help)?;
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).with_context(help)?;
        compiled.insert(name, bytes);
    }
    Ok(compiled)
}
