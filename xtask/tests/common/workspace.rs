//! This workspace: its files, and a copy of its boards, products and overlays for tests that change them.
#![allow(dead_code)]

use std::process::Command;

use anyhow::{Context, Result};
use camino::{Utf8Path, Utf8PathBuf};

pub fn root() -> Utf8PathBuf {
    Utf8Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

/// Files that git tracks or would track, with their text; what is not UTF-8 is left out.
pub fn files() -> Vec<(Utf8PathBuf, String)> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .expect("git runs");
    assert!(output.status.success(), "git ls-files failed");
    String::from_utf8(output.stdout)
        .expect("UTF-8")
        .lines()
        .filter_map(|line| {
            let text = std::fs::read_to_string(root().join(line)).ok()?;
            Some((Utf8PathBuf::from(line), text))
        })
        .collect()
}

/// Fails with all findings, if there are any.
pub fn complain(findings: Vec<String>) {
    assert!(findings.is_empty(), "\n{}\n", findings.join("\n"));
}

/// Copies what a product's plan is made of.
pub fn copy_to(target: &Utf8Path) -> Result<()> {
    ["board", "configs", "overlays"].iter().try_for_each(|part| {
        let (from, to) = (root().join(part), target.join(part));
        copy(&from, &to).with_context(|| format!("copying {from}"))
    })
}

pub fn copy(from: &Utf8Path, to: &Utf8Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in from.read_dir_utf8()? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy(entry.path(), &target)?;
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(std::fs::read_link(entry.path())?, target)?;
        } else {
            std::fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}
