//! A root filesystem overlay as a list of files, with their modes and owners.

use camino::Utf8PathBuf;

/// One overlay.
#[derive(Debug)]
pub struct Overlay {
    /// Its name, which is its folder's.
    pub name: String,
    /// Its files and links, sorted by target.
    pub files: Vec<OverlayFile>,
    /// Directories that it asks for with a mode or owner of their own.
    pub directories: Vec<(Utf8PathBuf, Attributes)>,
    /// What editors and desktops left in it, relative to the workspace; none of it goes to the robot.
    pub junk: Vec<Utf8PathBuf>,
}

/// Mode and numeric owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Attributes {
    /// Permission bits.
    pub mode: u32,
    /// Numeric user id.
    pub uid: u32,
    /// Numeric group id.
    pub gid: u32,
}

/// What an overlay file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum EntryKind {
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
    /// What it is.
    pub kind: EntryKind,
    /// Mode and owner on the robot.
    pub attributes: Attributes,
    /// SHA-256 of the content (of the link's target for a link).
    pub sha256: String,
}
