//! The texts inside a wheel: METADATA and WHEEL (mail headers), RECORD (CSV), entry_points.txt (INI).

use std::collections::BTreeMap;
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, bail, ensure};
use pep508_rs::pep440_rs::{Version, VersionSpecifiers};
use pep508_rs::{Requirement, VerbatimUrl, VersionOrUrl};

use super::target::WheelTarget;

/// A dependency as wheels write it (PEP 508).
pub type Dependency = Requirement<VerbatimUrl>;

/// Reads one requirement of a wheel or of pip's report. Indexes have wheels from before PEP 440,
/// whose metadata cannot be corrected any more: what pip tolerates is tolerated here, with a
/// warning.
///
/// # Errors
/// When the text does not even contain a name.
pub fn parse_lenient(text: &str, doubts: &mut Vec<String>) -> Result<Dependency> {
    let error = match parse_requirement(text) {
        Ok(found) => return Ok(found),
        Err(error) => error,
    };
    let (head, marker) = text.split_once(';').map_or((text, None), |(h, m)| (h, Some(m)));
    let at = head.find(|c: char| "(<>=!~".contains(c)).unwrap_or(head.len());
    let (name, rest) = head.split_at(at);
    let versions = rest.trim().trim_start_matches('(').trim_end_matches(')');
    let marker = marker.map(|marker| format!(" ;{marker}")).unwrap_or_default();
    let mended = format!("{} {}{marker}", name.trim(), mend_specifiers(versions));
    // Without versions, the name still says what is needed.
    let named = format!("{}{marker}", name.trim());
    for candidate in [&mended, &named] {
        if let Ok(found) = parse_requirement(candidate) {
            doubts.push(format!("{error:#}; read as '{}'", candidate.trim()));
            return Ok(found);
        }
    }
    Err(error)
}

/// Version specifiers in valid PEP 440 form: no stray commas, and `.*` only where it has a meaning.
fn mend_specifiers(text: &str) -> String {
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    let mended = parts.map(|part| match part.strip_suffix(".*") {
        Some(plain) if !part.starts_with("==") && !part.starts_with("!=") => plain,
        _ => part,
    });
    mended.collect::<Vec<_>>().join(",")
}

/// Reads one requirement.
///
/// # Errors
/// When it is not one.
pub fn parse_requirement(text: &str) -> Result<Dependency> {
    // The parser's own message has several lines and a caret; its first line says what is wrong.
    Dependency::from_str(text).map_err(|error| {
        let reason = error.to_string();
        anyhow!(
            "'{text}' is not a requirement (PEP 508): {}",
            reason.lines().next().unwrap_or_default()
        )
    })
}

/// Whether a version meets a requirement's specifiers. A requirement by URL is never met.
pub fn satisfies(requirement: &Dependency, version: &Version) -> bool {
    match &requirement.version_or_url {
        None => true,
        Some(VersionOrUrl::VersionSpecifier(specifiers)) => specifiers.contains(version),
        Some(VersionOrUrl::Url(_)) => false,
    }
}

/// Mail headers: keys in lower case, in order, continuation lines joined.
#[derive(Debug, Clone, Default)]
pub struct MailHeaders(Vec<(String, String)>);

impl MailHeaders {
    /// Reads headers up to the first empty line.
    pub fn parse(text: &str) -> Self {
        let mut headers: Vec<(String, String)> = Vec::new();
        for line in text.lines() {
            if line.is_empty() {
                break;
            }
            if line.starts_with([' ', '\t']) {
                if let Some((_, value)) = headers.last_mut() {
                    value.push('\n');
                    value.push_str(line.trim());
                }
            } else if let Some((key, value)) = line.split_once(':') {
                headers.push((key.trim().to_ascii_lowercase(), value.trim().to_owned()));
            }
        }
        Self(headers)
    }

    /// The first value of a key (lower case).
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, value)| value.as_str())
    }

    /// Every value of a key (lower case).
    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(k, _)| k == key).map(|(_, value)| value.as_str())
    }
}

/// The parts of a wheel's METADATA that the tool uses.
#[derive(Debug, Clone)]
pub struct WheelMetadata {
    /// The distribution's name as its author spells it.
    pub name: String,
    /// The version, parsed.
    pub version: Version,
    /// The version as its author spells it.
    pub version_text: String,
    /// One sentence about it.
    pub summary: Option<String>,
    /// Its licence.
    pub license: Option<License>,
    /// The Python versions that it says it runs on.
    pub requires_python: Option<String>,
    /// What it needs, with its markers.
    pub requires: Vec<Dependency>,
    /// The extras that it offers.
    pub extras: Vec<String>,
    /// Its mistakes, and how they were read.
    pub doubts: Vec<String>,
}

/// A distribution's licence, as far as its metadata specify it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum License {
    /// An SPDX expression (PEP 639's `License-Expression`, or a classifier that has one meaning).
    Expression(String),
    /// A free text.
    Text(String),
}

/// Classifiers that name exactly one SPDX licence. `BSD License` is not among them: it does not
/// specify which of the BSD licences.
const CLASSIFIERS: [(&str, &str); 6] = [
    ("MIT License", "MIT"),
    ("ISC License (ISCL)", "ISC"),
    ("Mozilla Public License 2.0 (MPL 2.0)", "MPL-2.0"),
    ("Python Software Foundation License", "PSF-2.0"),
    ("GNU Lesser General Public License v3 (LGPLv3)", "LGPL-3.0-only"),
    ("GNU General Public License v3 (GPLv3)", "GPL-3.0-only"),
];

impl WheelMetadata {
    /// Reads a METADATA file.
    ///
    /// # Errors
    /// When name or version is missing, or a requirement has no name.
    pub fn parse(text: &str) -> Result<Self> {
        let headers = MailHeaders::parse(text);
        let field = |key: &str, shown: &str| {
            headers.get(key).map(str::to_owned).with_context(|| format!("{shown} is missing"))
        };
        let name = field("name", "Name")?;
        let version_text = field("version", "Version")?;
        let version = Version::from_str(&version_text)
            .map_err(|_| anyhow!("'{version_text}' is not a version (PEP 440)"))?;
        let mut doubts = Vec::new();
        let requires = headers
            .all("requires-dist")
            .map(|text| parse_lenient(text, &mut doubts))
            .collect::<Result<Vec<_>>>()?;
        let requires_python = headers.get("requires-python").map(str::to_owned);
        if let Some(text) = &requires_python
            && VersionSpecifiers::from_str(text).is_err()
        {
            let mended = mend_specifiers(text);
            let taken = match VersionSpecifiers::from_str(&mended) {
                Ok(_) => format!("read as '{mended}'"),
                Err(_) => "ignored".to_owned(),
            };
            doubts.push(format!("Requires-Python '{text}' is not a version specifier; {taken}"));
        }
        Ok(Self {
            name,
            version,
            version_text,
            summary: headers.get("summary").filter(|s| !s.is_empty()).map(str::to_owned),
            license: read_license(&headers),
            requires_python,
            requires,
            doubts,
            extras: headers.all("provides-extra").map(str::to_owned).collect(),
        })
    }

    /// Checks `Requires-Python` against the target. An invalid one is ignored, as by pip.
    ///
    /// # Errors
    /// When the target's Python is not among the versions.
    pub fn check_python(&self, target: &WheelTarget) -> Result<()> {
        let Some(text) = &self.requires_python else { return Ok(()) };
        let specifiers = VersionSpecifiers::from_str(text)
            .or_else(|_| VersionSpecifiers::from_str(&mend_specifiers(text)));
        let Ok(specifiers) = specifiers else { return Ok(()) };
        let version = Version::from_str(&target.python.full())
            .map_err(|error| anyhow!("{}: {error}", target.python))?;
        ensure!(
            specifiers.contains(&version),
            "the wheel requires Python {text}, but the base has {}",
            target.python
        );
        Ok(())
    }
}

fn read_license(headers: &MailHeaders) -> Option<License> {
    let given = |text: &&str| !text.is_empty() && !text.eq_ignore_ascii_case("unknown");
    if let Some(expression) = headers.get("license-expression").filter(given) {
        return Some(License::Expression(expression.to_owned()));
    }
    let classes: Vec<&str> = headers
        .all("classifier")
        .filter(|class| class.starts_with("License ::"))
        .filter_map(|class| class.rsplit(" :: ").next())
        .collect();
    let known = |class: &str| CLASSIFIERS.iter().find(|(name, _)| *name == class);
    if let [class] = classes[..]
        && let Some((_, spdx)) = known(class)
    {
        return Some(License::Expression((*spdx).to_owned()));
    }
    // A whole licence text in this field is common; only a short one is a name.
    let short = |text: &&str| text.len() <= 80 && !text.contains('\n');
    if let Some(text) = headers.get("license").filter(given).filter(short) {
        return Some(License::Text(text.to_owned()));
    }
    (!classes.is_empty()).then(|| License::Text(classes.join(", ")))
}

/// One line of a RECORD.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordLine {
    /// The path as it is written there.
    pub path: String,
    /// `sha256=…`; empty for RECORD itself.
    pub hash: String,
    /// The length in bytes, in decimal; empty for RECORD itself.
    pub size: String,
}

/// Reads a RECORD: CSV with three fields.
///
/// # Errors
/// When a line has another number of fields or an open quote.
pub fn parse_record(text: &str) -> Result<Vec<RecordLine>> {
    let mut lines = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.is_empty() {
            continue;
        }
        let fields = split_csv(line).with_context(|| format!("line {}: {line}", number + 1))?;
        let Ok([path, hash, size]) = <[String; 3]>::try_from(fields) else {
            bail!("line {}: expected path, hash and size, found '{line}'", number + 1);
        };
        lines.push(RecordLine { path, hash, size });
    }
    Ok(lines)
}

/// Writes a RECORD.
pub fn format_record(lines: &[RecordLine]) -> String {
    let quote = |field: &str| {
        if field.contains([',', '"', '\n', '\r']) {
            format!("\"{}\"", field.replace('"', "\"\""))
        } else {
            field.to_owned()
        }
    };
    lines.iter().map(|l| format!("{},{},{}\n", quote(&l.path), l.hash, l.size)).collect()
}

fn split_csv(line: &str) -> Result<Vec<String>> {
    let mut fields = vec![String::new()];
    let mut quoted = false;
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        let field = fields.last_mut().context("a CSV line has at least one field")?;
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                field.push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            c => field.push(c),
        }
    }
    ensure!(!quoted, "a quote is not closed");
    Ok(fields)
}

/// A program that the installer creates for a wheel.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct EntryPoint {
    /// The program's name.
    pub name: String,
    /// The module that contains its function.
    pub module: String,
    /// The function, possibly an attribute of something: `cli.main`.
    pub function: String,
}

/// Reads the `console_scripts` and `gui_scripts` of an entry_points.txt, sorted by name.
///
/// # Errors
/// When an entry is not `name = module:function`, or its name is not a file name.
pub fn parse_entry_points(text: &str) -> Result<Vec<EntryPoint>> {
    let mut section = String::new();
    let mut found = BTreeMap::new();
    for line in text.lines().map(str::trim) {
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            name.trim().clone_into(&mut section);
            continue;
        }
        if section != "console_scripts" && section != "gui_scripts" {
            continue;
        }
        let wrong = || anyhow!("'{line}' is not NAME = MODULE:FUNCTION");
        let (name, object) = line.split_once('=').ok_or_else(wrong)?;
        // An extra in brackets says when the script is useful; installers always create it.
        let object = object.split('[').next().unwrap_or_default();
        let (module, function) = object.split_once(':').ok_or_else(wrong)?;
        let (name, module, function) = (name.trim(), module.trim(), function.trim());
        let dotted = |path: &str| {
            path.split('.').all(|part| {
                !part.is_empty()
                    && !part.starts_with(|c: char| c.is_ascii_digit())
                    && part.chars().all(|c| c.is_alphanumeric() || c == '_')
            })
        };
        let plain = !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0']);
        if !plain || !dotted(module) || !dotted(function) {
            return Err(wrong());
        }
        found.insert(
            name.to_owned(),
            EntryPoint {
                name: name.to_owned(),
                module: module.to_owned(),
                function: function.to_owned(),
            },
        );
    }
    Ok(found.into_values().collect())
}
