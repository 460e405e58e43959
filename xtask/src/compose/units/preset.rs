//! Preset files, by the rules of systemd.preset(5): sorted by file name over all directories, and
//! the first line that matches a unit applies.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use globset::{GlobBuilder, GlobMatcher};

use super::name::{UnitName, UnitNameForm};
use crate::rootfs::tree::{EntryOrigin, RootEntryKind, RootTree};

/// The directories of presets; a file in an earlier directory replaces one of the same name in a
/// later one.
const FOLDERS: [&str; 4] = [
    "etc/systemd/system-preset/",
    "run/systemd/system-preset/",
    "usr/local/lib/systemd/system-preset/",
    "usr/lib/systemd/system-preset/",
];

/// The action of a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PresetAction {
    /// Create its links; for a template, those of these instances.
    Enable(Vec<String>),
    /// Remove its links.
    Disable,
    /// Leave them as they are (systemd 255 and later).
    Ignore,
}

/// One line.
#[derive(Debug)]
pub struct PresetRule {
    /// A name or a pattern, as written.
    pub pattern: String,
    matcher: GlobMatcher,
    /// The action.
    pub action: PresetAction,
    /// The line and its file, for messages.
    pub line: String,
    /// Whether the line is from an overlay, not from the base system.
    pub ours: bool,
}

impl PresetRule {
    /// The unit that it names, unless it is a pattern.
    pub fn unit(&self) -> Option<UnitName> {
        UnitName::new(&self.pattern)
    }

    /// Whether it matches this unit.
    pub fn matches(&self, unit: &UnitName) -> bool {
        let listed = matches!(&self.action, PresetAction::Enable(instances)
            if unit.template().is_some_and(|t| t.as_str() == self.pattern)
                && instances.iter().any(|i| i == unit.instance()));
        listed || self.matcher.is_match(unit.as_str())
    }
}

/// All rules of a tree, in their order.
///
/// # Errors
/// An invalid line in an overlay's preset; an invalid line of the base system is ignored, as by
/// systemd.
pub fn read_rules(tree: &RootTree) -> Result<Vec<PresetRule>> {
    let mut files: BTreeMap<&str, (&str, bool)> = BTreeMap::new();
    for dir in FOLDERS {
        for (path, entry) in tree.iter() {
            let Some(name) = path.strip_prefix(dir) else { continue };
            let readable =
                !matches!(entry.kind, RootEntryKind::Folder | RootEntryKind::Special(..));
            if readable && name.ends_with(".preset") && !name.contains('/') {
                let ours = matches!(entry.origin, EntryOrigin::Overlay(_));
                files.entry(name).or_insert((path, ours));
            }
        }
    }
    let mut rules = Vec::new();
    for (path, ours) in files.into_values() {
        // A link to /dev/null, or a dangling link, hides the files of that name in the other
        // directories.
        if tree.resolve(path).is_none() {
            continue;
        }
        let text =
            String::from_utf8(tree.read(path)?).with_context(|| format!("reading /{path}"))?;
        for line in text.split(['\n', '\r']).map(|line| line.trim_matches([' ', '\t'])) {
            if line.is_empty() || line.starts_with(['#', ';']) {
                continue;
            }
            match parse_rule(line, ours) {
                Ok(mut rule) => {
                    rule.line = format!("`{line}` of /{path}");
                    rules.push(rule);
                }
                Err(error) if ours => return Err(error.context(format!("/{path}: `{line}`"))),
                Err(_) => {}
            }
        }
    }
    Ok(rules)
}

fn parse_rule(line: &str, ours: bool) -> Result<PresetRule> {
    let (word, rest) = line.split_once([' ', '\t']).unwrap_or((line, ""));
    let mut words = rest.split_ascii_whitespace();
    let pattern = words.next().context("the line names no unit")?.to_owned();
    let others: Vec<String> = words.map(str::to_owned).collect();
    let template =
        UnitName::new(&pattern).is_some_and(|unit| unit.form() == UnitNameForm::Template);
    let action = match word {
        "enable" => PresetAction::Enable(others.clone()),
        "disable" => PresetAction::Disable,
        "ignore" => PresetAction::Ignore,
        _ => bail!("expected `enable UNIT` or `disable UNIT`"),
    };
    ensure!(
        others.is_empty() || (template && word == "enable"),
        "more than one word after `{word}`\n\
         help: a line has one unit or pattern; only `enable` of a template lists instances after it"
    );
    Ok(PresetRule {
        matcher: compile_pattern(&pattern)?,
        pattern,
        action,
        line: String::new(),
        ours,
    })
}

/// Like fnmatch(3) without escapes: braces are normal characters.
fn compile_pattern(pattern: &str) -> Result<GlobMatcher> {
    ensure!(!pattern.contains("[["), "classes such as [[:digit:]] are not supported");
    let plain: String = pattern
        .chars()
        .map(|c| if "{}".contains(c) { format!("[{c}]") } else { c.to_string() })
        .collect();
    let glob = GlobBuilder::new(&plain).backslash_escape(false).literal_separator(false).build();
    Ok(glob.with_context(|| format!("reading the pattern `{pattern}`"))?.compile_matcher())
}
