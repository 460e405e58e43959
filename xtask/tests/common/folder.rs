//! Temporary directories, which are removed when their guard is dropped.

use camino::Utf8PathBuf;
use tempfile::TempDir;

pub fn folder() -> (TempDir, Utf8PathBuf) {
    with_path(tempfile::tempdir().expect("a directory"))
}

/// On a disk, not in memory: what is measured and killed has to wait for it.
pub fn folder_on_disk() -> (TempDir, Utf8PathBuf) {
    with_path(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory"))
}

fn with_path(dir: TempDir) -> (TempDir, Utf8PathBuf) {
    let path = dir.path().canonicalize().expect("its path");
    (dir, Utf8PathBuf::try_from(path).expect("UTF-8"))
}
