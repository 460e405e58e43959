//! `overlays/<name>/`: a root filesystem overlay, read as a list of files. Literal files, symbolic
//! links, and `*.j2` templates; `overlay.toml` lists the exceptions from the usual modes and
//! owners.

use camino::Utf8PathBuf;

/// One overlay.
#[derive(Debug)]
pub struct Overlay {
    /// Its name, which is its directory's.
    pub name: String,
    /// Its files and links, sorted by target.
    pub files: Vec<OverlayFile>,
    /// Directories that it requests with an explicit mode or owner.
    pub directories: Vec<(Utf8PathBuf, FileAttributes)>,
    /// Files that editors and desktops left in it, relative to the workspace; they are not copied
    /// to the robot.
    pub junk: Vec<Utf8PathBuf>,
}

/// Mode and numeric owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct FileAttributes {
    /// Permission bits.
    pub mode: u32,
    /// Numeric user id.
    pub uid: u32,
    /// Numeric group id.
    pub gid: u32,
}

/// The kind of an overlay file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OverlayFileKind {
    /// Copied as it is.
    Literal,
    /// Rendered; the target's name lacks the `.j2`.
    Template,
    /// A symbolic link, copied as a link.
    Symlink,
}

/// One file of an overlay.
#[derive(Debug)]
pub struct OverlayFile {
    /// Path relative to the workspace.
    pub source: Utf8PathBuf,
    /// Path on the robot, without the leading slash.
    pub target: Utf8PathBuf,
    /// Its kind.
    pub kind: OverlayFileKind,
    /// Mode and owner on the robot.
    pub attributes: FileAttributes,
    /// SHA-256 of the content (of the link's target for a link).
    pub sha256: String,
}
