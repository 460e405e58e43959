//! The `[Install]` section of a unit and of its drop-ins, read as systemd reads it: continued
//! lines, comments between them, quotes, specifiers, empty values that reset earlier ones.

use anyhow::{Result, bail, ensure};

use super::name::{MAX, UnitName, UnitNameForm};

/// What enabling a unit does. Values may contain specifiers.
#[derive(Debug, Default)]
pub struct InstallSection {
    /// Aliases.
    pub aliases: Vec<String>,
    /// Units that want it.
    pub wanted_by: Vec<String>,
    /// Units that require it.
    pub required_by: Vec<String>,
    /// Units that keep it running (systemd 254 and later).
    pub upheld_by: Vec<String>,
    /// Units that are enabled with it.
    pub also: Vec<UnitName>,
    /// The default instance of a template.
    pub default_instance: Option<String>,
}

impl InstallSection {
    /// Whether the section is empty.
    pub fn is_empty(&self) -> bool {
        let lists = [&self.aliases, &self.wanted_by, &self.required_by, &self.upheld_by];
        lists.iter().all(|list| list.is_empty()) && self.also.is_empty()
    }

    /// Adds the settings of a file about `unit`: the unit's own file, then each drop-in.
    ///
    /// # Errors
    /// What makes systemd reject the file.
    pub fn read(&mut self, unit: &UnitName, text: &[u8]) -> Result<()> {
        let text = String::from_utf8_lossy(text);
        let mut here = false;
        for line in logical_lines(&text) {
            let line = line.trim_matches(BLANK);
            ensure!(!line.contains('\u{fffd}'), "the file is not UTF-8");
            if let Some(rest) = line.strip_prefix('[') {
                let Some(section) = rest.strip_suffix(']') else {
                    bail!("`{line}` is not a section");
                };
                here = section == "Install";
            } else if let (true, Some((key, value))) = (here, line.split_once('=')) {
                self.assign(unit, key.trim_matches(BLANK), value.trim_matches(BLANK))?;
            }
        }
        Ok(())
    }

    fn assign(&mut self, unit: &UnitName, key: &str, value: &str) -> Result<()> {
        let list = match key {
            "WantedBy" => &mut self.wanted_by,
            "RequiredBy" => &mut self.required_by,
            "UpheldBy" => &mut self.upheld_by,
            "Alias" if unit.may_alias() => &mut self.aliases,
            "Also" => {
                for word in split_words(value, Quotes::Literal)? {
                    let name = self.print(unit, &word)?;
                    let Some(name) = UnitName::new(&name) else {
                        bail!("Also={name}: not a valid unit name");
                    };
                    self.also.push(name);
                }
                return Ok(());
            }
            "DefaultInstance" if unit.form() == UnitNameForm::Template => {
                let instance = self.print(unit, value)?;
                let named = unit.with_instance(&instance);
                ensure!(
                    instance.is_empty() || named.is_some(),
                    "DefaultInstance={instance}: not a valid instance name"
                );
                self.default_instance = named.map(|_| instance);
                return Ok(());
            }
            _ => return Ok(()),
        };
        if value.is_empty() {
            list.clear();
        }
        list.extend(split_words(value, Quotes::Removed)?);
        Ok(())
    }

    /// A value with its specifiers replaced.
    ///
    /// # Errors
    /// A specifier that does not exist, or whose value only the robot knows.
    pub fn print(&self, unit: &UnitName, value: &str) -> Result<String> {
        let default = self.default_instance.as_deref().unwrap_or_default();
        let instance =
            if unit.form() == UnitNameForm::Template { default } else { unit.instance() };
        let filled = unit.with_instance(instance).unwrap_or_else(|| unit.clone());
        let mut text = String::new();
        let mut chars = value.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                text.push(c);
                continue;
            }
            match chars.next() {
                Some('%') | None => text.push('%'),
                Some('i') => text.push_str(instance),
                Some('p') => text.push_str(unit.prefix()),
                Some('j') => text.push_str(unit.prefix().rsplit('-').next().unwrap_or_default()),
                Some('n') => text.push_str(filled.as_str()),
                Some('N') => text.push_str(filled.stem()),
                Some('u' | 'g') => text.push_str("root"),
                Some('U' | 'G') => text.push('0'),
                Some(known) if "aAbBHlqmMovwW".contains(known) => bail!(
                    "`{value}` has the specifier %{known}, whose value only the running robot knows\n\
                     help: create the link in an overlay instead, as a symbolic link"
                ),
                Some(unknown) if unknown.is_ascii_alphanumeric() => {
                    bail!(
                        "`{value}` has the specifier %{unknown}, which does not exist in [Install]"
                    )
                }
                Some(other) => text.extend(['%', other]),
            }
        }
        ensure!(text.len() <= MAX + 1, "`{value}` expands to {} bytes", text.len());
        Ok(text)
    }
}

/// What systemd strips from lines, keys and values.
const BLANK: [char; 4] = [' ', '\t', '\n', '\r'];

/// Lines with those appended that continue them (systemd.syntax(7)): the backslash becomes a blank,
/// and comments in between are skipped.
fn logical_lines(text: &str) -> Vec<String> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text).replace("\r\n", "\n");
    let mut lines = Vec::new();
    let mut open: Option<String> = None;
    for line in text.split(['\n', '\r', '\0']) {
        if line.trim_start_matches(BLANK).starts_with(['#', ';']) {
            continue;
        }
        let mut whole = open.take().unwrap_or_default() + line;
        let backslashes = whole.len() - whole.trim_end_matches('\\').len();
        if backslashes % 2 == 1 {
            whole.pop();
            open = Some(whole + " ");
        } else {
            lines.push(whole);
        }
    }
    lines.extend(open);
    lines
}

/// How quotes and backslashes are interpreted in a list of words.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Quotes {
    /// Quotes delimit a word and are removed; a backslash is a normal character.
    Removed,
    /// Quotes are normal characters; a backslash is removed, and the next character is kept
    /// (`Also=`).
    Literal,
}

/// # Errors
/// A backslash at the end, where it has a meaning.
fn split_words(value: &str, quotes: Quotes) -> Result<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut open: Option<char> = None;
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        match (open, c) {
            (Some(quote), c) if c == quote => open = None,
            (None, '\'' | '"') if quotes == Quotes::Removed => {
                open = Some(c);
                word.get_or_insert_default();
            }
            (None, '\\') if quotes == Quotes::Literal => {
                let Some(next) = chars.next() else { bail!("`{value}` ends in a backslash") };
                word.get_or_insert_default().push(next);
            }
            (None, c) if BLANK.contains(&c) => words.extend(word.take()),
            _ => word.get_or_insert_default().push(c),
        }
    }
    // systemd ignores a word whose quote is not closed.
    if open.is_none() {
        words.extend(word);
    }
    Ok(words)
}
