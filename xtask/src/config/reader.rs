//! Reads a TOML table field by field and collects every finding with its place, instead of stopping
//! at the first: an unknown key (with the nearest known one), a missing key, a value of the wrong
//! form.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::Range;

use anyhow::{Context, Result};
use camino::{Utf8Path, Utf8PathBuf};
use serde::Serialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// A place in a configuration file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Place {
    /// The file, relative to the workspace where possible.
    pub file: Utf8PathBuf,
    /// Line, counted from 1; 0 when the finding is about the file as a whole.
    pub line: usize,
    /// The offending text: that line of the file, trimmed.
    pub text: String,
}

/// A value together with the place where it was written.
#[derive(Debug, Clone)]
pub struct Located<T> {
    /// The value.
    pub value: T,
    /// Where it stands.
    pub place: Place,
}

/// One thing that is wrong in the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Where.
    pub place: Place,
    /// What was expected and what was found.
    pub message: String,
    /// What to do; empty when the message says it all.
    pub help: String,
}

impl Finding {
    /// A finding at a place.
    pub fn new(place: &Place, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { place: place.clone(), message: message.into(), help: help.into() }
    }
}

/// Everything that is wrong, in the order of the files.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Findings(pub Vec<Finding>);

impl std::fmt::Display for Findings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, finding) in self.0.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            let Place { file, line, text } = &finding.place;
            if *line == 0 {
                write!(f, "{file}: {}", finding.message)?;
            } else {
                write!(f, "{file}:{line}: {}\n  | {text}", finding.message)?;
            }
            if !finding.help.is_empty() {
                write!(f, "\n  help: {}", finding.help)?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for Findings {}

impl Findings {
    /// `Ok` when nothing is wrong.
    ///
    /// # Errors
    /// The findings themselves, when there are any.
    pub fn check(mut self) -> Result<()> {
        self.0.sort_by(|a, b| (&a.place.file, a.place.line).cmp(&(&b.place.file, b.place.line)));
        if self.0.is_empty() { Ok(()) } else { Err(self.into()) }
    }
}

/// One configuration file being read.
#[derive(Debug)]
pub struct Source {
    path: Utf8PathBuf,
    text: String,
    findings: RefCell<Vec<Finding>>,
}

impl Source {
    /// Reads the file; `shown` is the path that messages use.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read(root: &Utf8Path, shown: &Utf8Path) -> Result<Self> {
        let full = root.join(shown);
        let text = std::fs::read_to_string(&full).with_context(|| format!("reading {shown}"))?;
        Ok(Self { path: shown.to_owned(), text, findings: RefCell::default() })
    }

    /// Parses the text and lets `build` take the fields out of it.
    ///
    /// # Errors
    /// All findings of the file, when there are any.
    pub fn parse<T>(self, build: impl FnOnce(&mut Fields<'_>) -> Option<T>) -> Result<T> {
        let (table, errors) = DeTable::parse_recoverable(&self.text);
        for error in errors {
            let at = error.span().unwrap_or(0..0);
            self.finding(&at, format!("this is not TOML: {}", error.message()), "");
        }
        let built = if self.findings.borrow().is_empty() {
            let mut fields = Fields::new(&self, table.get_ref(), table.span(), String::new());
            let built = build(&mut fields);
            fields.finish();
            built
        } else {
            None
        };
        drop(table);
        let findings = Findings(self.findings.into_inner());
        findings.check()?;
        built.context("a configuration file was rejected without a finding")
    }

    fn place(&self, at: &Range<usize>) -> Place {
        let start = at.start.min(self.text.len());
        let before = self.text.get(..start).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let text = self.text.lines().nth(line - 1).unwrap_or_default().trim().to_owned();
        Place { file: self.path.clone(), line, text }
    }

    fn finding(&self, at: &Range<usize>, message: impl Into<String>, help: impl Into<String>) {
        self.findings.borrow_mut().push(Finding::new(&self.place(at), message, help));
    }
}

/// A TOML value that can become a `Self`, or say what was expected instead.
pub trait FromToml: Sized {
    /// What a person should have written, such as "a string" or "a size such as \"64MiB\"".
    const EXPECTED: &'static str;

    /// The value, or `Err` with what is wrong with it (empty: it is not of the expected kind).
    ///
    /// # Errors
    /// A sentence about the value, or an empty string.
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String>;
}

impl FromToml for String {
    const EXPECTED: &'static str = "a string";
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        value.as_str().map(str::to_owned).ok_or_default()
    }
}

impl FromToml for bool {
    const EXPECTED: &'static str = "true or false";
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        value.as_bool().ok_or_default()
    }
}

impl FromToml for u32 {
    const EXPECTED: &'static str = "a whole number from 0 to 4294967295";
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let integer = value.as_integer().ok_or(String::new())?;
        u32::from_str_radix(integer.as_str(), integer.radix()).map_err(|_| String::new())
    }
}

impl FromToml for u8 {
    const EXPECTED: &'static str = "a whole number from 0 to 255";
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let number = u32::from_toml(value)?;
        Self::try_from(number).map_err(|_| String::new())
    }
}

impl FromToml for Utf8PathBuf {
    const EXPECTED: &'static str = "a path relative to the workspace";
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let text = value.as_str().ok_or(String::new())?;
        let path = Utf8Path::new(text);
        if text.is_empty() || path.is_absolute() || path.components().any(|c| c.as_str() == "..") {
            return Err("the path must be relative and must not contain `..`".to_owned());
        }
        Ok(path.to_owned())
    }
}

trait OkOrDefault<T> {
    fn ok_or_default(self) -> Result<T, String>;
}

impl<T> OkOrDefault<T> for Option<T> {
    fn ok_or_default(self) -> Result<T, String> {
        self.ok_or_else(String::new)
    }
}

/// The fields of one table; each may be taken once, and what nobody took is an unknown key.
pub struct Fields<'a> {
    source: &'a Source,
    table: &'a DeTable<'a>,
    at: Range<usize>,
    prefix: String,
    known: BTreeSet<&'static str>,
    open: bool,
}

impl<'a> Fields<'a> {
    fn new(source: &'a Source, table: &'a DeTable<'a>, at: Range<usize>, prefix: String) -> Self {
        Self { source, table, at, prefix, known: BTreeSet::new(), open: false }
    }

    fn value(&mut self, key: &'static str) -> Option<&'a Spanned<DeValue<'a>>> {
        self.known.insert(key);
        self.table.get(key)
    }

    fn missing(&self, key: &str, expected: &str) {
        let name = format!("{}{key}", self.prefix);
        let place = if self.prefix.is_empty() {
            Place { file: self.source.path.clone(), line: 0, text: String::new() }
        } else {
            self.source.place(&self.at)
        };
        self.source.findings.borrow_mut().push(Finding::new(
            &place,
            format!("`{name}` is missing"),
            format!("add `{key} = …`: {expected}"),
        ));
    }

    fn convert<T: FromToml>(&self, key: &str, value: &Spanned<DeValue<'_>>) -> Option<T> {
        match T::from_toml(value.get_ref()) {
            Ok(converted) => Some(converted),
            Err(why) => {
                let kind = value.get_ref().type_str();
                let found = match value.get_ref().as_str() {
                    Some(text) => format!("\"{text}\""),
                    None => {
                        format!("{} {kind}", if kind.starts_with(['a', 'i']) { "an" } else { "a" })
                    }
                };
                let reason = if why.is_empty() { String::new() } else { format!(": {why}") };
                self.source.finding(
                    &value.span(),
                    format!(
                        "`{}{key}`: expected {}, found {found}{reason}",
                        self.prefix,
                        T::EXPECTED
                    ),
                    "",
                );
                None
            }
        }
    }

    /// A required field.
    pub fn required<T: FromToml>(&mut self, key: &'static str) -> Option<Located<T>> {
        match self.value(key) {
            Some(value) => {
                let converted = self.convert(key, value)?;
                Some(Located { value: converted, place: self.source.place(&value.span()) })
            }
            None => {
                self.missing(key, T::EXPECTED);
                None
            }
        }
    }

    /// An optional field: outer `None` when it is there and wrong, inner `None` when it is absent.
    pub fn optional<T: FromToml>(&mut self, key: &'static str) -> Option<Option<Located<T>>> {
        match self.value(key) {
            Some(value) => {
                let converted = self.convert(key, value)?;
                let place = self.source.place(&value.span());
                Some(Some(Located { value: converted, place }))
            }
            None => Some(None),
        }
    }

    /// An optional field with a default.
    pub fn or<T: FromToml>(&mut self, key: &'static str, default: T) -> Option<T> {
        Some(self.optional(key)?.map_or(default, |located| located.value))
    }

    /// A list; absent means empty.
    pub fn list<T: FromToml>(&mut self, key: &'static str) -> Option<Vec<Located<T>>> {
        let Some(value) = self.value(key) else { return Some(Vec::new()) };
        let Some(array) = value.get_ref().as_array() else {
            self.source.finding(
                &value.span(),
                format!("`{}{key}`: expected a list, each {}", self.prefix, T::EXPECTED),
                "",
            );
            return None;
        };
        let converted: Vec<_> = array
            .iter()
            .map(|item| {
                let value = self.convert(key, item)?;
                Some(Located { value, place: self.source.place(&item.span()) })
            })
            .collect();
        converted.into_iter().collect()
    }

    /// A required table.
    pub fn table<T>(
        &mut self,
        key: &'static str,
        build: impl FnOnce(&mut Fields<'_>) -> Option<T>,
    ) -> Option<T> {
        match self.optional_table(key, build)? {
            Some(built) => Some(built),
            None => {
                self.missing(key, "a table");
                None
            }
        }
    }

    /// An optional table.
    pub fn optional_table<T>(
        &mut self,
        key: &'static str,
        build: impl FnOnce(&mut Fields<'_>) -> Option<T>,
    ) -> Option<Option<T>> {
        let Some(value) = self.value(key) else { return Some(None) };
        self.inner_table(key, value, build).map(Some)
    }

    /// An array of tables; absent means empty.
    pub fn tables<T>(
        &mut self,
        key: &'static str,
        mut build: impl FnMut(&mut Fields<'_>) -> Option<T>,
    ) -> Option<Vec<T>> {
        let Some(value) = self.value(key) else { return Some(Vec::new()) };
        let Some(array) = value.get_ref().as_array() else {
            let message = format!("`{}{key}`: expected tables, written [[{key}]]", self.prefix);
            self.source.finding(&value.span(), message, "");
            return None;
        };
        let built: Vec<_> =
            array.iter().map(|item| self.inner_table(key, item, &mut build)).collect();
        built.into_iter().collect()
    }

    fn inner_table<T>(
        &self,
        key: &str,
        value: &Spanned<DeValue<'_>>,
        build: impl FnOnce(&mut Fields<'_>) -> Option<T>,
    ) -> Option<T> {
        let Some(table) = value.get_ref().as_table() else {
            let message = format!("`{}{key}`: expected a table", self.prefix);
            self.source.finding(&value.span(), message, "");
            return None;
        };
        let prefix = format!("{}{key}.", self.prefix);
        let mut fields = Fields::new(self.source, table, value.span(), prefix);
        let built = build(&mut fields);
        fields.finish();
        built
    }

    /// All remaining keys, whose values must be strings; such a table has no unknown key.
    pub fn strings(&mut self) -> std::collections::BTreeMap<String, String> {
        let mut found = std::collections::BTreeMap::new();
        for (key, value) in self.table {
            if let Some(text) = self.convert::<String>(key.get_ref(), value) {
                found.insert(key.get_ref().to_string(), text);
            }
        }
        self.open = true;
        found
    }

    /// Where this table stands.
    pub fn place(&self) -> Place {
        self.source.place(&self.at)
    }

    /// Adds a finding of the caller's.
    pub fn reject(&self, place: &Place, message: impl Into<String>, help: impl Into<String>) {
        self.source.findings.borrow_mut().push(Finding::new(place, message, help));
    }

    fn finish(self) {
        for key in self.table.keys() {
            let name: &str = key.get_ref();
            if self.open || self.known.contains(name) {
                continue;
            }
            let help = match nearest(name, self.known.iter().copied()) {
                Some(near) => format!("did you mean `{near}`?"),
                None => {
                    let known: Vec<_> = self.known.iter().copied().collect();
                    format!("known keys: {}", known.join(", "))
                }
            };
            let message = format!("unknown key `{}{name}`", self.prefix);
            self.source.finding(&key.span(), message, help);
        }
    }
}

/// The known name nearest to a misspelt one, when one is near enough: two letters (a transposition
/// counts as two), or a third of a long name.
pub fn nearest<'n>(name: &str, known: impl IntoIterator<Item = &'n str>) -> Option<&'n str> {
    known
        .into_iter()
        .map(|candidate| (distance(name, candidate), candidate))
        .filter(|(d, candidate)| *d <= (candidate.len().max(name.len()) / 3).max(2))
        .min()
        .map(|(_, candidate)| candidate)
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
