//! A copy of the workspace's boards, products and overlays, for tests that change them.

use anyhow::{Context, Result};
use camino::{Utf8Path, Utf8PathBuf};

pub fn workspace() -> Utf8PathBuf {
    Utf8Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

/// Copies what a product's plan is made of.
pub fn copy_to(root: &Utf8Path) -> Result<()> {
    ["board", "configs", "overlays"].iter().try_for_each(|part| {
        let (from, to) = (workspace().join(part), root.join(part));
        copy(&from, &to).with_context(|| format!("copying {from}"))
    })
}

fn copy(from: &Utf8Path, to: &Utf8Path) -> Result<()> {
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
