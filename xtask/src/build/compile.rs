//! Compiles one program of the workspace for an architecture, into one static binary whose bytes depend on its sources and the
//! compiler alone.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use camino::{Utf8Path, Utf8PathBuf};

use crate::artifact::hash_bytes;
use crate::exec::{Tool, cargo_home};
use crate::progress::{ProgressStep, ProgressUnit};

/// What is compiled, for which architecture, and where.
pub(super) struct Compilation<'a> {
    /// The workspace.
    pub(super) root: &'a Utf8Path,
    /// The package.
    pub(super) package: &'a str,
    /// Its program.
    pub(super) program: &'a str,
    /// Rust's target.
    pub(super) triple: &'a str,
    /// The linker, if this machine has another architecture.
    pub(super) cross_linker: Option<&'a str>,
    /// Debian's package of the target's static C library.
    pub(super) static_libc: &'a str,
    /// Cargo's directory of intermediate files.
    pub(super) into: &'a Utf8Path,
    /// Whether to use no network.
    pub(super) offline: bool,
    /// The log of cargo's output.
    pub(super) log: Utf8PathBuf,
    /// The name of the step in the progress.
    pub(super) step: &'static str,
}

/// Runs `cargo`, and returns the content of the program.
///
/// # Errors
/// Code that does not compile; a program that is not static.
pub(super) fn compile(wanted: &Compilation<'_>, mut cargo: Tool) -> Result<Vec<u8>> {
    let Compilation { root, package, program, triple, into, .. } = *wanted;
    let home = cargo_home()?;
    let variable = triple.to_uppercase().replace('-', "_");
    if let Some(linker) = wanted.cross_linker {
        cargo = cargo
            .env(&format!("CARGO_TARGET_{variable}_LINKER"), linker)
            .env(&format!("CC_{}", variable.to_lowercase()), linker);
    }
    // The binary must not contain the paths of sources.
    let flags = [
        "-Ctarget-feature=+crt-static".to_owned(),
        format!("--remap-path-prefix={root}=/slipway"),
        format!("--remap-path-prefix={home}=/cargo"),
    ];
    // The crate `cc` splits these like a shell (its variable below), so directories may contain
    // spaces.
    let quoted = |flag: String| format!("'{}'", flag.replace('\'', r"'\''"));
    let c_flags = [
        quoted(format!("-ffile-prefix-map={home}=/cargo")),
        quoted(format!("-ffile-prefix-map={into}=/build")),
    ];
    cargo = cargo
        .args(["build", "--locked", "--package", package, "--bin", program, "--release"])
        .args(["--target", triple])
        .env("CARGO_TARGET_DIR", into.as_str())
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .env("CC_SHELL_ESCAPED_FLAGS", "1")
        .env(&format!("CFLAGS_{}", variable.to_lowercase()), c_flags.join(" "))
        .env_remove("RUSTFLAGS")
        .current_dir(root)
        .log(&wanted.log);
    if wanted.offline {
        cargo = cargo.arg("--offline");
    }
    let step = ProgressStep::new(wanted.step, "compiling", 0, ProgressUnit::Items);
    cargo
        .run_lines(|line| {
            if let Some(name) = line.trim_start().strip_prefix("Compiling ") {
                step.note(name);
                step.advance(1);
            }
        })
        .with_context(|| format!("compiling {program} for {triple}"))?;
    let made = into.join(triple).join("release").join(program);
    let content = std::fs::read(&made).with_context(|| format!("reading {made}"))?;
    check_static(&content, wanted.static_libc)
        .with_context(|| format!("reading the metadata of {made}"))?;
    Ok(content)
}

/// The version of the machine's own compiler, if it supports the target.
pub(super) fn own_compiler(triple: &str) -> Option<String> {
    let ask = |arguments: &[&str]| Tool::new("rustc").args(arguments).read().ok();
    let folder = ask(&["--print", "target-libdir", "--target", triple])?;
    let there = Utf8Path::new(folder.trim()).is_dir();
    if there { ask(&["--version"]).map(|text| text.trim().to_owned()) } else { None }
}

/// The version of a linker, for a stage's key.
pub(super) fn linker_version(linker: &str) -> Result<String> {
    let said = Tool::new(linker).arg("--version").read()?;
    Ok(said.lines().next().unwrap_or_default().to_owned())
}

/// The hash of each of these files, and of all files below these directories.
pub(super) fn hashes(root: &Utf8Path, sources: &[&str]) -> Result<BTreeMap<Utf8PathBuf, String>> {
    let mut found = BTreeMap::new();
    for source in sources {
        collect(root, Utf8Path::new(source), &mut found)?;
    }
    Ok(found)
}

fn collect(
    root: &Utf8Path,
    path: &Utf8Path,
    into: &mut BTreeMap<Utf8PathBuf, String>,
) -> Result<()> {
    let full = root.join(path);
    if full.is_dir() {
        for entry in full.read_dir_utf8().with_context(|| format!("reading {path}"))? {
            collect(root, &path.join(entry?.file_name()), into)?;
        }
    } else {
        let content = std::fs::read(&full).with_context(|| format!("reading {path}"))?;
        into.insert(path.to_owned(), hash_bytes(&content));
    }
    Ok(())
}

/// Rejects an ELF that needs a dynamic loader: the libraries where it runs are not this machine's.
fn check_static(content: &[u8], static_libc: &str) -> Result<()> {
    /// `PT_INTERP` (System V ABI, chapter 5, "Program Header"): names the dynamic loader.
    const INTERPRETER: u32 = 3;
    let number = |at: usize, length: usize| -> Option<usize> {
        let bytes = content.get(at..at + length)?;
        Some(bytes.iter().rev().fold(0, |all, byte| all << 8 | usize::from(*byte)))
    };
    let headers = || -> Option<Vec<u32>> {
        // ELF64, little-endian: e_phoff at 32, e_phentsize at 54, e_phnum at 56.
        let (offset, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        (0..count).map(|n| u32::try_from(number(offset + n * size, 4)?).ok()).collect()
    };
    if !content.starts_with(b"\x7fELF\x02\x01") {
        bail!("not a 64-bit ELF file");
    }
    let headers = headers().context("the program headers are truncated")?;
    if headers.contains(&INTERPRETER) {
        bail!(
            "the program is not statically linked\n\
             help: install the static C library (on Debian: {static_libc})"
        );
    }
    Ok(())
}
