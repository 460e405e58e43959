//! `config.txt` and `autoboot.txt`: which lines a board takes, each with its number.
//!
//! F: "Conditional Filters", documentation of `config.txt` (conditional.adoc): `[all]` resets all filters, those
//! of one kind replace each other, those of different kinds must all pass; one that is not known here (a serial
//! number, a GPIO, a screen) does not pass.

/// A line that is taken, or would be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// Its number, from 1.
    pub line: usize,
    /// What stands before `=`; before the first blank where there is no `=`.
    pub key: String,
    /// What stands behind it; only the file of `initramfs FILE followkernel`.
    pub value: String,
    /// Whether it is spelt with `=`.
    pub assigned: bool,
}

/// What decides over filters.
#[derive(Debug, Clone, Copy)]
pub struct Filters<'a> {
    /// Names of the sections for models that pass; `None` when the reader knows none.
    pub models: Option<&'a [String]>,
    /// Whether `[tryboot]` passes; `None` when the reader does not know it.
    pub tryboot: Option<bool>,
    /// Whether sections are read at all: bootcode.bin and old EEPROMs pass them over.
    pub sections: bool,
}

/// Whether a section is one for models, as all of `[pi3]`, `[pi3+]`, `[pi02]`, `[cm4]` are.
fn is_model(name: &str) -> bool {
    let rest = name.strip_prefix("pi").or_else(|| name.strip_prefix("cm"));
    rest.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

/// The settings that pass.
pub fn settings(text: &[u8], filters: Filters<'_>) -> Vec<Setting> {
    let text = String::from_utf8_lossy(text);
    let (mut model, mut tryboot, mut other) = (true, true, true);
    let mut found = Vec::new();
    for (line, text) in (1..).zip(text.lines().map(str::trim)) {
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        if let Some(name) = section(text) {
            match name {
                _ if !filters.sections => {}
                "all" => (model, tryboot, other) = (true, true, true),
                "tryboot" => tryboot = filters.tryboot.unwrap_or(false),
                _ if is_model(name) => {
                    model = filters.models.is_some_and(|m| m.iter().any(|known| known == name));
                }
                _ => other = false,
            }
        } else if model && tryboot && other {
            found.extend(setting(line, text));
        }
    }
    found
}

/// The name in `[name]`.
pub fn section(line: &str) -> Option<&str> {
    line.strip_prefix('[').map(|rest| rest.trim_end_matches(']'))
}

/// A line's key and value.
pub fn setting(line: usize, text: &str) -> Option<Setting> {
    let assigned = text.contains('=');
    let (key, value) = text.split_once('=').or_else(|| text.split_once(' '))?;
    let value = if key == "initramfs" { value.split(' ').next().unwrap_or("") } else { value };
    Some(Setting { line, key: key.trim().to_owned(), value: value.trim().to_owned(), assigned })
}

/// The last setting of that key, which counts.
pub fn last<'a>(settings: &'a [Setting], key: &str) -> Option<&'a Setting> {
    settings.iter().rev().find(|setting| setting.key == key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(text: &str, tryboot: bool, model: &str) -> Vec<String> {
        let models = [model.to_owned()];
        let filters = Filters { models: Some(&models), tryboot: Some(tryboot), sections: true };
        let taken = settings(text.as_bytes(), filters);
        taken.into_iter().map(|s| format!("{}={}", s.key, s.value)).collect()
    }

    #[test]
    fn filters_replace_combine_and_reset_as_documented() {
        let text = "a=1\n[pi4]\nb=1\n[pi5]\nc=1\n[tryboot]\nd=1\n[all]\ne=1\n[none]\nf=1\n[all]\n# g=1\nh=1";
        assert_eq!(taken(text, false, "pi4"), ["a=1", "b=1", "e=1", "h=1"]);
        assert_eq!(taken(text, false, "pi5"), ["a=1", "c=1", "e=1", "h=1"]);
        assert_eq!(taken(text, true, "pi5"), ["a=1", "c=1", "d=1", "e=1", "h=1"]);
        assert_eq!(taken("[gpio4=1]\na=1\n[all]\nb=1", true, "pi4"), ["b=1"]);
        assert_eq!(
            taken("initramfs initrd.img followkernel", false, "pi4"),
            ["initramfs=initrd.img"]
        );
    }

    #[test]
    fn a_reader_without_sections_takes_every_line() {
        let filters = Filters { models: None, tryboot: None, sections: false };
        let taken = settings(b"a=1\n[tryboot]\na=2", filters);
        assert_eq!(last(&taken, "a").map(|s| (s.line, s.value.as_str())), Some((3, "2")));
    }
}
