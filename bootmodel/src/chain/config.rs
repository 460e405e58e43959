//! `config.txt` and `autoboot.txt`: which lines apply to a board, each with its line number.
//!
//! F: "Conditional Filters", documentation of `config.txt` (conditional.adoc): `[all]` resets all filters; filters
//! of one kind replace each other; filters of different kinds must all pass. A filter that this module does not know
//! (a serial number, a GPIO, a screen) does not pass. `include FILE` inserts the content of a file
//! (what_is_config_txt.adoc); bootcode.bin and the EEPROM ignore it.

/// Maximum length of a file in bytes: a hundred times what files in use have.
pub(super) const MOST_BYTES: usize = 64 << 10;
/// Maximum depth and number of included files: this ends circular includes.
const DEEPEST: u32 = 8;
const MOST_FILES: u32 = 32;

/// A line that applies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigSetting {
    /// The included file that has the line; `None` when the line is in the file itself.
    pub file: Option<String>,
    /// Its number, from 1.
    pub line: usize,
    /// The text before `=`, or before the first blank where there is no `=`.
    pub key: String,
    /// The text after it; for `initramfs FILE followkernel` only the file.
    pub value: String,
    /// Whether the line has an `=`.
    pub assigned: bool,
}

/// What decides whether a filter passes.
#[derive(Debug, Clone, Copy)]
pub struct ConfigFilters<'a> {
    /// Names of the sections for models that pass; `None` when the reader knows none.
    pub models: Option<&'a [String]>,
    /// Whether `[tryboot]` passes; `None` when the reader does not know it.
    pub tryboot: Option<bool>,
    /// Whether sections are read at all: bootcode.bin and old EEPROMs ignore them.
    pub sections: bool,
}

/// Whether a section filters by model, such as `[pi3]`, `[pi3+]`, `[pi02]` or `[cm4]`.
fn is_model(name: &str) -> bool {
    let rest = name.strip_prefix("pi").or_else(|| name.strip_prefix("cm"));
    rest.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

/// The settings that pass.
pub fn read_settings(text: &[u8], filters: ConfigFilters<'_>) -> Vec<ConfigSetting> {
    read_with_includes(text, filters, &|_| None).0
}

/// The settings that pass, including those of files that `read` returns; and the includes that are not followed.
pub fn read_with_includes<'a>(
    text: &'a [u8],
    filters: ConfigFilters<'_>,
    read: &dyn Fn(&str) -> Option<&'a [u8]>,
) -> (Vec<ConfigSetting>, Vec<(ConfigSetting, &'static str)>) {
    let pass = (true, true, true);
    let mut reader =
        Reader { filters, read, pass, found: Vec::new(), refused: Vec::new(), files: 0 };
    reader.text(text, None, 0);
    (reader.found, reader.refused)
}

struct Reader<'a, 'r> {
    filters: ConfigFilters<'r>,
    read: &'r dyn Fn(&str) -> Option<&'a [u8]>,
    /// Whether the filters of models, of trials and of other kinds pass.
    pass: (bool, bool, bool),
    found: Vec<ConfigSetting>,
    refused: Vec<(ConfigSetting, &'static str)>,
    files: u32,
}

impl<'a> Reader<'a, '_> {
    fn text(&mut self, text: &'a [u8], file: Option<&str>, depth: u32) {
        let text = String::from_utf8_lossy(text.get(..MOST_BYTES).unwrap_or(text));
        for (line, text) in (1..).zip(text.lines().map(str::trim)) {
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            if let Some(name) = parse_section(text) {
                // The programs contain the names in lower case, including `[EDID=…]` and `[HDMI:0]`.
                self.section(&name.to_ascii_lowercase());
                continue;
            }
            let setting = parse_setting(line, text).filter(|_| self.pass == (true, true, true));
            let Some(mut setting) = setting else { continue };
            setting.file = file.map(str::to_owned);
            if setting.key == "include" && !setting.assigned {
                self.include(setting, depth);
            } else {
                self.found.push(setting);
            }
        }
    }

    fn section(&mut self, name: &str) {
        let ConfigFilters { models, tryboot, sections } = self.filters;
        let (model, trial, other) = &mut self.pass;
        match name {
            _ if !sections => {}
            "all" => self.pass = (true, true, true),
            "tryboot" => *trial = tryboot.unwrap_or(false),
            _ if is_model(name) => {
                *model = models.is_some_and(|m| m.iter().any(|known| known == name));
            }
            _ => *other = false,
        }
    }

    fn include(&mut self, setting: ConfigSetting, depth: u32) {
        self.files += 1;
        let reason = if depth >= DEEPEST || self.files > MOST_FILES {
            "circular includes, or too many files"
        } else if let Some(text) = (self.read)(&setting.value) {
            return self.text(text, Some(&setting.value), depth + 1);
        } else {
            "the file does not exist"
        };
        if self.refused.is_empty() {
            self.refused.push((setting, reason));
        }
    }
}

/// The name in `[name]`.
pub fn parse_section(line: &str) -> Option<&str> {
    line.strip_prefix('[').map(|rest| rest.trim_end_matches(']'))
}

/// A line's key and value.
pub fn parse_setting(line: usize, text: &str) -> Option<ConfigSetting> {
    let assigned = text.contains('=');
    let (key, value) = text.split_once('=').or_else(|| text.split_once(' '))?;
    let value = if key == "initramfs" { value.split(' ').next().unwrap_or("") } else { value };
    let (key, value) = (key.trim().to_owned(), value.trim().to_owned());
    Some(ConfigSetting { file: None, line, key, value, assigned })
}

/// The last setting of that key, which is the one that applies.
pub fn last_value<'a>(settings: &'a [ConfigSetting], key: &str) -> Option<&'a ConfigSetting> {
    settings.iter().rev().find(|setting| setting.key == key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(text: &str, tryboot: bool, model: &str) -> Vec<String> {
        let models = [model.to_owned()];
        let filters =
            ConfigFilters { models: Some(&models), tryboot: Some(tryboot), sections: true };
        let taken = read_settings(text.as_bytes(), filters);
        taken.into_iter().map(|s| format!("{}={}", s.key, s.value)).collect()
    }

    #[test]
    fn filters_replace_combine_and_reset_as_documented() {
        let text = "a=1\n[pi4]\nb=1\n[pi5]\nc=1\n[tryboot]\nd=1\n[all]\ne=1\n[none]\nf=1\n[all]\n# g=1\nh=1";
        assert_eq!(taken(text, false, "pi4"), ["a=1", "b=1", "e=1", "h=1"]);
        assert_eq!(taken(text, false, "pi5"), ["a=1", "c=1", "e=1", "h=1"]);
        assert_eq!(taken(text, true, "pi5"), ["a=1", "c=1", "d=1", "e=1", "h=1"]);
        assert_eq!(taken("[PI5]\na=1\n[ALL]\nb=1", false, "pi4"), ["b=1"]);
        assert_eq!(taken("[gpio4=1]\na=1\n[all]\nb=1", true, "pi4"), ["b=1"]);
        assert_eq!(
            taken("initramfs initrd.img followkernel", false, "pi4"),
            ["initramfs=initrd.img"]
        );
    }

    #[test]
    fn included_files_are_read_in_their_place_and_a_circle_has_an_end() {
        let filters = ConfigFilters { models: None, tryboot: Some(false), sections: true };
        let read = |name: &str| match name {
            "a.txt" => Some(&b"kernel=a\n[none]\n"[..]),
            "circle.txt" => Some(&b"x=1\ninclude circle.txt\ninclude circle.txt\n"[..]),
            _ => None,
        };
        let (found, refused) =
            read_with_includes(b"kernel=b\ninclude a.txt\nkernel=c", filters, &read);
        assert_eq!(last_value(&found, "kernel").map(|s| s.value.as_str()), Some("a"));
        assert_eq!(last_value(&found, "kernel").and_then(|s| s.file.as_deref()), Some("a.txt"));
        assert!(refused.is_empty(), "{refused:?}");
        let (found, refused) = read_with_includes(b"include circle.txt", filters, &read);
        assert!(found.len() < 100, "{} settings", found.len());
        assert_eq!(refused.len(), 1, "{refused:?}");
        let (_, refused) = read_with_includes(b"include none.txt", filters, &read);
        assert_eq!(refused[0].1, "the file does not exist");
        let long = [&b"a=1\n"[..]; 100_000].concat();
        assert!(read_settings(&long, filters).len() <= MOST_BYTES / 4);
    }

    #[test]
    fn a_reader_without_sections_takes_every_line() {
        let filters = ConfigFilters { models: None, tryboot: None, sections: false };
        let taken = read_settings(b"a=1\n[tryboot]\na=2", filters);
        assert_eq!(last_value(&taken, "a").map(|s| (s.line, s.value.as_str())), Some((3, "2")));
    }
}
