//! What a file of an image must not contain: a secret key, keys that sshd cannot read, a pointer
//! file of a version control system, line endings that its reader on the robot does not support.
//! Also file names that editors and desktops leave behind. Pure.

use camino::Utf8Path;

use crate::secret;
use crate::ssh_keys;

/// Something that is wrong with a file's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContentProblem {
    /// What was found. Never includes the content.
    pub message: String,
    /// What to do.
    pub help: String,
}

impl ContentProblem {
    fn new(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { message: message.into(), help: help.into() }
    }

    /// The finding as an error that names the file in the workspace.
    pub fn into_error(self, source: &Utf8Path) -> anyhow::Error {
        anyhow::anyhow!("{source}: {}\nhelp: {}", self.message, self.help)
    }
}

/// The destination of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileDestination<'a> {
    /// Into the root filesystem, at this path without the leading slash.
    Root(&'a Utf8Path),
    /// Onto a boot partition: text for the firmware, U-Boot or the kernel.
    Boot,
}

/// What is wrong with a file for this destination.
pub fn find_problem(place: FileDestination<'_>, bytes: &[u8]) -> Option<ContentProblem> {
    if let Some(kind) = secret::find_secret(bytes) {
        return Some(ContentProblem::new(
            format!(
                "the file contains a secret key ({kind}), which everyone with the image or its \
                 update could read"
            ),
            "leave it out; a robot's own secrets are made on the robot, or put on its `data` (docs/reference/robot.md)",
        ));
    }
    find_lfs_pointer(bytes).or_else(|| line_ends(place, bytes)).or_else(|| match place {
        FileDestination::Root(target) if ssh_keys::is_list(target) => {
            let bad = ssh_keys::parse_keys(bytes).err()?;
            let line = bad.line.map_or(String::new(), |line| format!("line {line}: "));
            Some(ContentProblem::new(
                format!("sshd cannot read these keys: {line}{}", bad.message),
                bad.help,
            ))
        }
        _ => None,
    })
}

/// The pointer file of a larger file that was not fetched. F: "Git LFS Specification", docs/spec.md
/// of git-lfs; git-annex(1), "pointer file".
fn find_lfs_pointer(bytes: &[u8]) -> Option<ContentProblem> {
    let (program, help) = if bytes.starts_with(b"version https://git-lfs.github.com/spec/") {
        ("git-lfs", "fetch the file itself: `git lfs install && git lfs pull`")
    } else if bytes.starts_with(b"/annex/objects/") {
        ("git-annex", "fetch the file itself: `git annex get FILE`")
    } else {
        return None;
    };
    Some(ContentProblem::new(
        format!("the file is a pointer of {program}, not the content itself"),
        help,
    ))
}

/// Directories whose readers treat the carriage return of a line end as part of the last word, or
/// reject such a file.
const LINE_READERS: [&str; 24] = [
    "etc/default",
    "etc/modprobe.d",
    "etc/modules-load.d",
    "etc/pam.d",
    "etc/profile.d",
    "etc/slotd",
    "etc/ssh",
    "etc/sudoers.d",
    "etc/sysctl.d",
    "etc/systemd",
    "etc/sysusers.d",
    "etc/tmpfiles.d",
    "etc/udev",
    "usr/lib/environment.d",
    "usr/lib/modprobe.d",
    "usr/lib/modules-load.d",
    "usr/lib/slipway",
    "usr/lib/sysctl.d",
    "usr/lib/systemd",
    "usr/lib/sysusers.d",
    "usr/lib/tmpfiles.d",
    "usr/lib/udev",
    "usr/share/dbus-1",
    "usr/share/polkit-1",
];
/// Single files with such readers.
const LINE_FILES: [&str; 10] = [
    "etc/environment",
    "etc/fstab",
    "etc/group",
    "etc/hostname",
    "etc/hosts",
    "etc/machine-id",
    "etc/os-release",
    "etc/passwd",
    "etc/resolv.conf",
    "etc/shadow",
];

/// Line ends of Windows, and the byte order mark that its editors put before the first line.
fn line_ends(place: FileDestination<'_>, bytes: &[u8]) -> Option<ContentProblem> {
    let marked = bytes.strip_prefix(&[0xef, 0xbb, 0xbf]);
    let text = marked.unwrap_or(bytes);
    let (what, consequence) = match place {
        FileDestination::Boot => ("boot file", "no boot loader accepts it"),
        FileDestination::Root(_) if text.starts_with(b"#!") => {
            ("script", "the kernel would not find its interpreter")
        }
        FileDestination::Root(path)
            if LINE_READERS.iter().any(|dir| path.starts_with(dir))
                || LINE_FILES.iter().any(|file| path == *file) =>
        {
            ("configuration", "its reader would treat the extra bytes as content")
        }
        FileDestination::Root(_) => return None,
    };
    // Not a text: a picture, or a program.
    if text.contains(&0) {
        return None;
    }
    let help = "save the file with Unix line ends (LF) in UTF-8 without a byte order mark; if git \
     converted the line ends: \
                `git config core.autocrlf false`, then check the file out again";
    if marked.is_some() {
        return Some(ContentProblem::new(
            format!("the {what} begins with a byte order mark: {consequence}"),
            help,
        ));
    }
    let line = text.split(|byte| *byte == b'\n').position(|line| line.ends_with(b"\r"))?;
    Some(ContentProblem::new(
        format!("line {} of the {what} ends with CR LF: {consequence}", line + 1),
        help,
    ))
}

/// File names that editors, desktops and Python leave behind; the robot ignores the same names in
/// an API's resources (docs/reference/slotd.md).
pub fn is_junk(name: &str) -> bool {
    const NAMES: [&str; 6] =
        [".DS_Store", "__MACOSX", "__pycache__", "Thumbs.db", "ehthumbs.db", "desktop.ini"];
    let swap = |rest: &str| {
        let end = rest.rsplit_once('.').map(|(name, end)| (!name.is_empty(), end.as_bytes()));
        matches!(end, Some((true, [b's', b'w', b'a'..=b'p'])))
    };
    NAMES.iter().any(|junk| name.eq_ignore_ascii_case(junk))
        || name.starts_with("._")
        || name.starts_with(".#")
        || (name.len() > 2 && name.starts_with('#') && name.ends_with('#'))
        || name.ends_with('~')
        || [".pyc", ".pyo"].iter().any(|end| name.ends_with(end))
        || name.strip_prefix('.').is_some_and(swap)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(path: &str, bytes: &[u8]) -> String {
        find_problem(FileDestination::Root(Utf8Path::new(path)), bytes)
            .map_or(String::new(), |p| p.message)
    }

    #[test]
    fn line_ends_matter_where_their_reader_minds() {
        assert!(root("opt/x", b"#!/bin/sh\r\necho\r\n").contains("line 1 of the script"));
        assert!(root("opt/x", b"\xef\xbb\xbf#!/bin/sh\n").contains("byte order mark"));
        assert!(
            root("etc/systemd/system/a.service", b"[Unit]\nA=b\r\n").contains("line 2 of the conf")
        );
        assert!(root("etc/fstab", b"a b c\r\n").contains("configuration"));
        assert!(find_problem(FileDestination::Boot, b"kernel=u-boot.bin\r\n").is_some());
        // Files with tolerant readers, and binary files.
        assert_eq!(root("srv/page.html", b"<p>\r\n</p>\r\n"), "");
        assert_eq!(root("etc/issue", b"Hello\r\n"), "");
        assert_eq!(root("usr/lib/slipway/picture", b"GIF\0\r\n"), "");
        assert_eq!(root("opt/x", b"#!/bin/sh\nprintf 'a\\r\\n'\n"), "");
        assert_eq!(find_problem(FileDestination::Boot, b"kernel=u-boot.bin\n"), None);
    }

    #[test]
    fn what_stands_for_a_file_is_not_taken_for_it() {
        let lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n";
        assert!(root("opt/model", lfs).contains("pointer of git-lfs"));
        assert!(
            root("opt/model", b"/annex/objects/SHA256E-s1--00\n").contains("pointer of git-annex")
        );
        assert_eq!(root("opt/notes", b"see version https://git-lfs.github.com/spec/v1\n"), "");
    }

    #[test]
    fn keys_in_an_overlay_are_looked_at() {
        let secret = b"-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAABG5vbmU\n";
        assert!(root("etc/any", secret).contains("secret key"));
        assert!(
            find_problem(FileDestination::Boot, secret)
                .is_some_and(|p| p.message.contains("secret key"))
        );
        for path in ["etc/ssh/authorized_keys.d/robot", "root/.ssh/authorized_keys"] {
            assert!(root(path, b"# me\nssh-ed25519 AAAA me\n").contains("line 2: "), "{path}");
        }
        assert_eq!(root("etc/any", b"ssh-ed25519 AAAA me\n"), "");
    }

    #[test]
    fn junk_is_known_by_its_name() {
        for name in
            [".DS_Store", "._a", ".#motd", "#motd#", "motd~", ".motd.swp", "a.pyc", "thumbs.db"]
        {
            assert!(is_junk(name), "{name}");
        }
        for name in ["motd", ".profile", "#", "a.swp", ".swp", ".bashrc", "pyc", "~motd"] {
            assert!(!is_junk(name), "{name}");
        }
    }
}
