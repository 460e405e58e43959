//! Parses the output of a failed make into an error that names the package, the step, its own last
//! lines, and what to do. Parses text only.

use super::info::{BuildrootInfo, InfoDownload};
use super::make::MIRROR;
use crate::fetch::url_without_login;

/// How many of the failing package's lines are shown.
const TAIL: usize = 20;

/// How many lines of a failed download are shown: the reason is in the last lines.
const LAST_OF_DOWNLOAD: usize = 5;

/// The failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BuildrootFailure {
    /// A source is not available.
    Download {
        /// The package.
        package: String,
        /// Its sources: the sites of each, and its directory on a site.
        sources: Vec<InfoDownload>,
        /// Its directory below the download directory.
        folder: String,
        /// Its last lines.
        lines: Vec<String>,
    },
    /// A downloaded source does not match its hash.
    Hash {
        /// The package.
        package: String,
        /// Buildroot's lines about it.
        lines: Vec<String>,
    },
    /// A step of a package failed.
    Step {
        /// The package, with its version.
        package: String,
        /// `configured`, `built`, `target_installed`, …
        step: String,
        /// Its last lines.
        lines: Vec<String>,
    },
    /// Something else: make's own last lines.
    Other {
        /// The lines.
        lines: Vec<String>,
    },
}

/// Finds the failure in a log; `info` returns what the package of a directory downloads.
pub fn find_failure(log: &str, info: &BuildrootInfo) -> BuildrootFailure {
    let lines: Vec<&str> = log.lines().collect();
    let stop = lines.iter().position(|line| parse_stamp(line).is_some());
    let Some(index) = stop else {
        let start = lines.len().saturating_sub(TAIL);
        return BuildrootFailure::Other { lines: to_owned_lines(&lines[start..]) };
    };
    let (folder, step) = parse_stamp(lines[index]).unwrap_or_default();
    // With several packages in parallel, the lines of this one begin at its last headline.
    let name = |line: &str| parse_headline(line).is_some_and(|(n, v)| is_package_dir(folder, n, v));
    let start = lines[..index].iter().rposition(|line| name(line)).unwrap_or(0);
    let own = &lines[start..index];
    let package = parse_headline(lines[start])
        .map_or(folder.to_owned(), |(name, version)| format!("{name} {version}").trim().to_owned());
    if step.ends_with("downloaded") {
        let wrong: Vec<&str> =
            own.iter().copied().filter(|line| line.starts_with("ERROR: ")).collect();
        if !wrong.is_empty() {
            return BuildrootFailure::Hash { package, lines: to_owned_lines(&wrong) };
        }
        let entry = info
            .packages()
            .map(|(_, entry)| entry)
            .find(|e| e.stamp_dir.rsplit('/').next() == Some(folder));
        let start = own.len().saturating_sub(LAST_OF_DOWNLOAD);
        return BuildrootFailure::Download {
            package,
            sources: entry.map_or(Vec::new(), |e| e.downloads.clone()),
            folder: entry.map_or(String::new(), |e| e.dl_dir.clone()),
            lines: to_owned_lines(&own[start..]),
        };
    }
    let start = own.len().saturating_sub(TAIL);
    BuildrootFailure::Step { package, step: step.to_owned(), lines: to_owned_lines(&own[start..]) }
}

fn to_owned_lines(lines: &[&str]) -> Vec<String> {
    lines.iter().map(|line| hide_logins(&strip_colours(line))).collect()
}

/// `make: *** [package/pkg-generic.mk:273: /o/build/zlib-1.3.1/.stamp_built] Error 2`: the
/// package's directory and the step.
fn parse_stamp(line: &str) -> Option<(&str, &str)> {
    if !line.contains("*** [") {
        return None;
    }
    let (before, after) = line.split_once("/.stamp_")?;
    let folder = before.rsplit('/').next()?;
    Some((folder, after.split(']').next()?))
}

/// `>>> zlib 1.3.1 Building`: name and version.
fn parse_headline(line: &str) -> Option<(&str, &str)> {
    let (_, rest) = line.split_once(">>> ")?;
    let mut words = rest.split_whitespace();
    let name = words.next()?;
    let version = words.next().unwrap_or_default();
    // `>>> host-skeleton  Installing…` has no version.
    let has_version = rest.strip_prefix(name)?.starts_with(' ') && !rest.contains("  ");
    Some((name, if has_version { version } else { "" }))
}

fn is_package_dir(folder: &str, name: &str, version: &str) -> bool {
    folder == name || folder.strip_prefix(name) == Some(&format!("-{version}"))
}

/// Buildroot's headlines are in bold.
pub fn strip_colours(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    while let Some((before, after)) = rest.split_once('\x1b') {
        out.push_str(before);
        rest = after.split_once(|c: char| c.is_ascii_alphabetic()).map_or("", |(_, rest)| rest);
    }
    out.push_str(rest);
    out
}

impl std::fmt::Display for BuildrootFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list =
            |lines: &[String]| lines.iter().map(|line| format!("\n  | {line}")).collect::<String>();
        match self {
            Self::Download { package, sources, folder, lines } => {
                write!(f, "{package}: a source is missing and could not be downloaded:")?;
                for source in sources {
                    write!(f, "\n  {}, from", source.source)?;
                    for uri in &source.uris {
                        let uri = url_without_login(plain_uri(uri));
                        write!(f, "\n    {uri}/{}", source.source)?;
                    }
                }
                write!(f, "\nthe last lines:{}\n{}", list(lines), offline_help(folder))
            }
            Self::Hash { package, lines } => write!(
                f,
                "{package}: a source does not match its hash:{}\n\
                 help: if upstream changed the file, find out why; the hashes of Slipway's own \
                 packages are in external/",
                list(lines)
            ),
            Self::Step { package, step, lines } => {
                write!(
                    f,
                    "{package} could not be {}; its last lines:{}",
                    describe_step(step),
                    list(lines)
                )
            }
            Self::Other { lines } => write!(f, "make failed; its last lines:{}", list(lines)),
        }
    }
}

/// `https|urlencode+https://host/path` without Buildroot's method.
pub fn plain_uri(uri: &str) -> &str {
    match uri.split_once('+') {
        Some((method, rest)) if !method.contains("://") => rest,
        _ => uri,
    }
}

/// A line without the logins of the addresses in it: a mirror may have one.
fn hide_logins(line: &str) -> String {
    line.split(' ').map(url_without_login).collect::<Vec<_>>().join(" ")
}

/// The help when there is no network.
pub fn offline_help(folder: &str) -> String {
    format!(
        "help: put the file into the download directory, below {folder}/; or set {MIRROR} to a \
         mirror (an URL, or a directory as file:///…) that has it below {folder}/"
    )
}

fn describe_step(step: &str) -> String {
    match step.split_once('_') {
        Some((place @ ("target" | "staging" | "host" | "images"), "installed")) => {
            format!("installed ({place})")
        }
        _ => step.replace('_', " "),
    }
}
