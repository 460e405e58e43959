//! Reads a TOML table field by field and collects every finding with its place, instead of stopping
//! at the first: an unknown key (with the nearest known one), a missing key, a value of the wrong
//! form.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::Range;

use anyhow::{Context, Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// A place in a configuration file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConfigPlace {
    /// The file, relative to the workspace where possible.
    pub file: Utf8PathBuf,
    /// Line, counted from 1; 0 when the finding is about the file as a whole.
    pub line: usize,
    /// The offending text: that line of the file, trimmed.
    pub text: String,
}

impl ConfigPlace {
    /// The place of a range of bytes in a file's text.
    pub fn from_range(file: &Utf8Path, text: &str, at: &Range<usize>) -> Self {
        let before = text.get(..at.start.min(text.len())).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        let shown = text.lines().nth(line - 1).unwrap_or_default().trim().to_owned();
        Self { file: file.to_owned(), line, text: shown }
    }
}

/// A value together with the place where it was written.
#[derive(Debug, Clone)]
pub struct Located<T> {
    /// The value.
    pub value: T,
    /// Where it was written.
    pub place: ConfigPlace,
}

/// One thing that is wrong in the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConfigFinding {
    /// Where.
    pub place: ConfigPlace,
    /// What was expected and what was found.
    pub message: String,
    /// What to do; empty when the message says it.
    pub help: String,
}

impl ConfigFinding {
    /// Makes a finding at a place.
    pub fn new(place: &ConfigPlace, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { place: place.clone(), message: message.into(), help: help.into() }
    }
}

/// Everything that is wrong, in the order of the files.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ConfigFindings(pub Vec<ConfigFinding>);

impl std::fmt::Display for ConfigFindings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, finding) in self.0.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            let ConfigPlace { file, line, text } = &finding.place;
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

impl std::error::Error for ConfigFindings {}

impl ConfigFindings {
    /// `Ok` when nothing is wrong.
    ///
    /// # Errors
    /// The findings themselves, when there are any.
    pub fn check(mut self) -> Result<()> {
        self.0.sort_by(|a, b| (&a.place.file, a.place.line).cmp(&(&b.place.file, b.place.line)));
        if self.0.is_empty() { Ok(()) } else { Err(self.into()) }
    }
}

/// What to do about a lock that is damaged.
const DAMAGED: &str = "locks are not edited by hand: restore the committed file, or write it again with `cargo xtask lock`";

/// The values of a lock's text; messages call the file `path`.
///
/// # Errors
/// An empty file, for which there is `help`, and what is not TOML or no lock, with its line.
pub fn written_lock<T: DeserializeOwned>(text: &str, path: &Utf8Path, help: &str) -> Result<T> {
    ensure!(!text.trim().is_empty(), "{path} is empty: nothing was locked yet\nhelp: {help}");
    toml::from_str(text).map_err(|error| {
        let place = match error.span() {
            Some(at) => ConfigPlace::from_range(path, text, &at),
            None => ConfigPlace { file: path.to_owned(), line: 0, text: String::new() },
        };
        ConfigFindings(vec![ConfigFinding::new(&place, error.message(), DAMAGED)]).into()
    })
}

/// What is wrong with a key of an entry of a lock, the entry's table at a range of its text.
pub fn in_entry(
    text: &str,
    path: &Utf8Path,
    entry: &Range<usize>,
    key: &str,
    message: impl Into<String>,
) -> ConfigFinding {
    let rest = text.get(entry.start..).unwrap_or_default();
    // Its first line may be the header, which is not an end.
    let mut at = entry.start;
    for (n, line) in rest.split_inclusive('\n').enumerate() {
        let names = line.trim_start().strip_prefix(key);
        if names.is_some_and(|rest| rest.trim_start().starts_with('=')) {
            return ConfigFinding::new(
                &ConfigPlace::from_range(path, text, &(at..at)),
                message,
                DAMAGED,
            );
        }
        if n > 0 && line.starts_with('[') {
            break;
        }
        at += line.len();
    }
    ConfigFinding::new(&ConfigPlace::from_range(path, text, entry), message, DAMAGED)
}

/// One configuration file being read.
#[derive(Debug)]
pub struct ConfigSource {
    path: Utf8PathBuf,
    text: String,
    findings: RefCell<Vec<ConfigFinding>>,
}

impl ConfigSource {
    /// Takes a file's content; `shown` is the path that messages use.
    ///
    /// # Errors
    /// When the content is not text.
    pub fn new(shown: &Utf8Path, bytes: Vec<u8>) -> Result<Self> {
        // UTF-16 contains zero bytes, and may still be valid UTF-8.
        let text = String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'));
        let text = text.with_context(|| {
            format!(
                "reading {shown}: not a UTF-8 text\n\
             help: save it as UTF-8; some editors and shells of Windows write UTF-16"
            )
        })?;
        Ok(Self { path: shown.to_owned(), text, findings: RefCell::default() })
    }

    /// Parses the text and calls `build` to read the fields.
    ///
    /// # Errors
    /// All findings of the file, when there are any.
    pub fn parse<T>(self, build: impl FnOnce(&mut TableFields<'_>) -> Option<T>) -> Result<T> {
        self.parse_over(Vec::new(), build)
    }

    /// Like [`ConfigSource::parse`], for a file that includes others: a value that it does not define
    /// comes from the first included file that does; lists and arrays of tables are joined, the
    /// included ones first, in order. Every value keeps its place.
    ///
    /// # Errors
    /// All findings of the files, when there are any.
    pub fn parse_over<T>(
        self,
        included: Vec<Self>,
        build: impl FnOnce(&mut TableFields<'_>) -> Option<T>,
    ) -> Result<T> {
        let sources: Vec<Self> = std::iter::once(self).chain(included).collect();
        let mut tables = Vec::new();
        for source in &sources {
            let (table, errors) = DeTable::parse_recoverable(&source.text);
            for error in errors {
                let at = error.span().unwrap_or(0..0);
                source.finding(&at, format!("this is not TOML: {}", error.message()), "");
            }
            tables.push(table);
        }
        let built = if sources.iter().all(|source| source.findings.borrow().is_empty()) {
            let layers = sources.iter().zip(&tables);
            let layers = layers.map(|(source, table)| Layer {
                source,
                table: table.get_ref(),
                at: table.span(),
            });
            let mut fields = TableFields::new(layers.collect(), String::new());
            let built = build(&mut fields);
            fields.finish();
            built
        } else {
            None
        };
        drop(tables);
        let findings = sources.into_iter().flat_map(|source| source.findings.into_inner());
        ConfigFindings(findings.collect()).check()?;
        built.context("a configuration file was rejected without a finding")
    }

    /// The paths in the list `key` at the top of the file, to read what it includes before it is
    /// parsed; mistakes in them are reported then.
    pub fn paths(&self, key: &str) -> Vec<Utf8PathBuf> {
        let (table, _) = DeTable::parse_recoverable(&self.text);
        let list = table.get_ref().get(key).and_then(|value| value.get_ref().as_array());
        let paths = list.into_iter().flat_map(|list| list.iter());
        paths.filter_map(|item| Utf8PathBuf::from_toml(item.get_ref()).ok()).collect()
    }

    fn place(&self, at: &Range<usize>) -> ConfigPlace {
        ConfigPlace::from_range(&self.path, &self.text, at)
    }

    fn finding(&self, at: &Range<usize>, message: impl Into<String>, help: impl Into<String>) {
        self.findings.borrow_mut().push(ConfigFinding::new(&self.place(at), message, help));
    }
}

/// Conversion from a TOML value, or a description of what was expected instead.
pub trait FromToml: Sized {
    /// What should have been written, such as "a string" or "a size such as \"64MiB\"".
    const EXPECTED: &'static str;

    /// The value, or `Err` with the reason (empty: the value has another type).
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

/// A whole number with the range of its key.
#[derive(Debug, Clone, Copy)]
pub struct WholeNumber {
    /// What is counted, such as "seconds"; empty: nothing.
    pub of: &'static str,
    /// The lowest one.
    pub from: u32,
    /// The highest one.
    pub to: u32,
}

impl WholeNumber {
    /// What a person should have written.
    pub fn expected(&self) -> String {
        let of = if self.of.is_empty() { String::new() } else { format!(" of {}", self.of) };
        format!("a whole number{of} from {} to {}", self.from, self.to)
    }

    fn of_toml(&self, value: &DeValue<'_>) -> Result<u32, String> {
        let integer = value.as_integer().ok_or(String::new())?;
        let number = u32::from_str_radix(integer.as_str(), integer.radix()).ok();
        number.filter(|number| (self.from..=self.to).contains(number)).ok_or_default()
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

/// A table in one of the files that include one another.
#[derive(Debug, Clone)]
struct Layer<'a> {
    source: &'a ConfigSource,
    table: &'a DeTable<'a>,
    at: Range<usize>,
}

/// The fields of one table; each may be read once, and a key that was not read is an unknown key.
pub struct TableFields<'a> {
    /// The file's own table, if any, before those of the files that it includes.
    layers: Vec<Layer<'a>>,
    prefix: String,
    known: BTreeSet<&'static str>,
    open: bool,
}

/// A value, and the file that contains it.
type Found<'a> = (&'a ConfigSource, &'a Spanned<DeValue<'a>>);

impl<'a> TableFields<'a> {
    fn new(layers: Vec<Layer<'a>>, prefix: String) -> Self {
        Self { layers, prefix, known: BTreeSet::new(), open: false }
    }

    /// The value of every layer that has one, the file's own first.
    fn values(&mut self, key: &'static str) -> Vec<Found<'a>> {
        self.known.insert(key);
        let has = |layer: &Layer<'a>| Some((layer.source, layer.table.get(key)?));
        self.layers.iter().filter_map(has).collect()
    }

    fn value(&mut self, key: &'static str) -> Option<Found<'a>> {
        self.values(key).into_iter().next()
    }

    /// Like [`TableFields::values`], in the order in which lists are joined.
    fn parts(&mut self, key: &'static str) -> Vec<Found<'a>> {
        let own = self.layers.first().is_some_and(|layer| layer.table.contains_key(key));
        let mut values = self.values(key);
        if own {
            values.rotate_left(1);
        }
        values
    }

    /// The file's own table, or else that of an included file.
    fn own(&self) -> &Layer<'a> {
        &self.layers[0]
    }

    fn missing(&self, key: &str, expected: &str) {
        let name = format!("{}{key}", self.prefix);
        let Layer { source, at, .. } = self.own();
        let place = if self.prefix.is_empty() {
            ConfigPlace { file: source.path.clone(), line: 0, text: String::new() }
        } else {
            source.place(at)
        };
        source.findings.borrow_mut().push(ConfigFinding::new(
            &place,
            format!("`{name}` is missing"),
            format!("add `{key} = …`: {expected}"),
        ));
    }

    fn convert<T: FromToml>(&self, key: &str, found: Found<'_>) -> Option<T> {
        self.convert_with(key, found, T::EXPECTED, T::from_toml)
    }

    fn convert_with<T>(
        &self,
        key: &str,
        (source, value): Found<'_>,
        expected: &str,
        from_toml: impl FnOnce(&DeValue<'_>) -> Result<T, String>,
    ) -> Option<T> {
        let why = match from_toml(value.get_ref()) {
            Ok(converted) => return Some(converted),
            Err(why) => why,
        };
        let kind = value.get_ref().type_str();
        let found = match value.get_ref() {
            DeValue::String(text) => format!("\"{text}\""),
            DeValue::Array(_) | DeValue::Table(_) => {
                format!("{} {kind}", if kind.starts_with('a') { "an" } else { "a" })
            }
            // As it is written there.
            _ => source.text.get(value.span()).unwrap_or(kind).to_owned(),
        };
        let reason = if why.is_empty() { String::new() } else { format!(": {why}") };
        let message = format!("`{}{key}`: expected {expected}, found {found}{reason}", self.prefix);
        source.finding(&value.span(), message, "");
        None
    }

    /// A required whole number.
    pub fn number(&mut self, key: &'static str, whole: WholeNumber) -> Option<Located<u32>> {
        let Some(found) = self.value(key) else {
            self.missing(key, &whole.expected());
            return None;
        };
        let value = self.convert_with(key, found, &whole.expected(), |v| whole.of_toml(v))?;
        Some(Located { value, place: found.0.place(&found.1.span()) })
    }

    /// A whole number with a default.
    pub fn number_or(
        &mut self,
        key: &'static str,
        whole: WholeNumber,
        default: u32,
    ) -> Option<u32> {
        if self.value(key).is_none() {
            return Some(default);
        }
        self.number(key, whole).map(|located| located.value)
    }

    /// A required field.
    pub fn required<T: FromToml>(&mut self, key: &'static str) -> Option<Located<T>> {
        match self.value(key) {
            Some(found) => {
                let value = self.convert(key, found)?;
                Some(Located { value, place: found.0.place(&found.1.span()) })
            }
            None => {
                self.missing(key, T::EXPECTED);
                None
            }
        }
    }

    /// An optional field: outer `None` when it is present and invalid, inner `None` when it is
    /// absent.
    pub fn optional<T: FromToml>(&mut self, key: &'static str) -> Option<Option<Located<T>>> {
        match self.value(key) {
            Some(found) => {
                let value = self.convert(key, found)?;
                Some(Some(Located { value, place: found.0.place(&found.1.span()) }))
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
        let mut converted = Vec::new();
        for (source, value) in self.parts(key) {
            let Some(array) = value.get_ref().as_array() else {
                source.finding(
                    &value.span(),
                    format!("`{}{key}`: expected a list, each {}", self.prefix, T::EXPECTED),
                    "",
                );
                return None;
            };
            for item in array {
                let place = source.place(&item.span());
                converted
                    .push(self.convert(key, (source, item)).map(|v| Located { value: v, place }));
            }
        }
        converted.into_iter().collect()
    }

    /// A required table.
    pub fn table<T>(
        &mut self,
        key: &'static str,
        build: impl FnOnce(&mut TableFields<'_>) -> Option<T>,
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
        build: impl FnOnce(&mut TableFields<'_>) -> Option<T>,
    ) -> Option<Option<T>> {
        let values = self.values(key);
        if values.is_empty() {
            return Some(None);
        }
        self.inner_table(key, &values, build).map(Some)
    }

    /// An array of tables; absent means empty.
    pub fn tables<T>(
        &mut self,
        key: &'static str,
        mut build: impl FnMut(&mut TableFields<'_>) -> Option<T>,
    ) -> Option<Vec<T>> {
        let mut built = Vec::new();
        for (source, value) in self.parts(key) {
            let Some(array) = value.get_ref().as_array() else {
                let message = format!("`{}{key}`: expected tables, written [[{key}]]", self.prefix);
                source.finding(&value.span(), message, "");
                return None;
            };
            built.extend(
                array.iter().map(|item| self.inner_table(key, &[(source, item)], &mut build)),
            );
        }
        built.into_iter().collect()
    }

    fn inner_table<T>(
        &self,
        key: &str,
        values: &[Found<'a>],
        build: impl FnOnce(&mut TableFields<'_>) -> Option<T>,
    ) -> Option<T> {
        let mut layers = Vec::new();
        for &(source, value) in values {
            let Some(table) = value.get_ref().as_table() else {
                let message = format!("`{}{key}`: expected a table", self.prefix);
                source.finding(&value.span(), message, "");
                return None;
            };
            layers.push(Layer { source, table, at: value.span() });
        }
        let prefix = format!("{}{key}.", self.prefix);
        let mut fields = TableFields::new(layers, prefix);
        let built = build(&mut fields);
        fields.finish();
        built
    }

    /// All remaining keys, whose values must be strings; such a table has no unknown keys.
    pub fn strings(&mut self) -> std::collections::BTreeMap<String, String> {
        let mut found = std::collections::BTreeMap::new();
        // The file's own value last: it overrides the included ones.
        for layer in self.layers.iter().rev() {
            for (key, value) in layer.table {
                if let Some(text) = self.convert::<String>(key.get_ref(), (layer.source, value)) {
                    found.insert(key.get_ref().to_string(), text);
                }
            }
        }
        self.open = true;
        found
    }

    /// Where this table was written.
    pub fn place(&self) -> ConfigPlace {
        let Layer { source, at, .. } = self.own();
        source.place(at)
    }

    /// Adds a finding from the caller.
    pub fn reject(&self, place: &ConfigPlace, message: impl Into<String>, help: impl Into<String>) {
        self.own().source.findings.borrow_mut().push(ConfigFinding::new(place, message, help));
    }

    fn finish(self) {
        if self.open {
            return;
        }
        for Layer { source, table, .. } in &self.layers {
            for key in table.keys() {
                let name: &str = key.get_ref();
                if self.known.contains(name) {
                    continue;
                }
                let help = match nearest_name(name, self.known.iter().copied()) {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => {
                        let known: Vec<_> = self.known.iter().copied().collect();
                        format!("known keys: {}", known.join(", "))
                    }
                };
                let message = format!("unknown key `{}{name}`", self.prefix);
                source.finding(&key.span(), message, help);
            }
        }
    }
}

/// The known name nearest to a misspelt one, when one is near enough: two letters (a transposition
/// is two), or a third of a long name.
pub fn nearest_name<'n>(name: &str, known: impl IntoIterator<Item = &'n str>) -> Option<&'n str> {
    known
        .into_iter()
        .map(|candidate| (edit_distance(name, candidate), candidate))
        .filter(|(d, candidate)| *d <= (candidate.len().max(name.len()) / 3).max(2))
        .min()
        .map(|(_, candidate)| candidate)
}

/// Levenshtein distance.
fn edit_distance(a: &str, b: &str) -> usize {
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
