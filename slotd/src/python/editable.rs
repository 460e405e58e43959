//! Editable installs of setuptools whose `.pth` file is code: the code imports a finder, and the finder's
//! file has its table as data, in one line `MAPPING = {'module': '/folder'}`. This line is parsed; no code
//! is run.

use std::path::{Path, PathBuf};

use super::{Interpreter, PythonModule, is_file};
use crate::root::RootDir;

/// How a finder's module begins (`setuptools/command/editable_wheel.py`).
const PREFIX: &str = "__editable___";

/// The longest finder that is read, in bytes; setuptools' template has about five thousand.
const MAX_FINDER: u64 = 1 << 20;

/// The modules and their paths that a finder declares, if a `.pth` line installs a finder. `None` for any other
/// line.
pub(super) fn parse_mapping(
    root: &RootDir,
    site: &Path,
    line: &str,
) -> Option<Result<Vec<(String, PathBuf)>, String>> {
    let (module, then) = line.strip_prefix("import")?.trim_start().split_once(';')?;
    let plain = module.starts_with(PREFIX)
        && module.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if !plain || then.trim() != format!("{module}.install()") {
        return None;
    }
    Some(
        read(&root.path(site.join(format!("{module}.py")))).ok_or_else(|| {
            format!("the editable install's finder {module}.py has no readable table")
        }),
    )
}

fn read(finder: &Path) -> Option<Vec<(String, PathBuf)>> {
    if std::fs::metadata(finder).ok().filter(std::fs::Metadata::is_file)?.len() > MAX_FINDER {
        return None;
    }
    let text = std::fs::read_to_string(finder).ok()?;
    let table = |name: &str| {
        text.lines().find_map(|line| {
            let rest = line.strip_prefix(name)?;
            let (kind, value) = rest.split_once('=')?;
            (kind.trim().is_empty() || kind.starts_with(':')).then(|| value.trim().to_owned())
        })
    };
    // Namespaces among the modules are assembled by the finder's code.
    if table("NAMESPACES").is_some_and(|value| value != "{}") {
        return None;
    }
    parse_dictionary(&table("MAPPING")?)
}

/// Parses a dictionary of strings, as `repr` writes it.
fn parse_dictionary(text: &str) -> Option<Vec<(String, PathBuf)>> {
    let mut rest = text.strip_prefix('{')?.trim_start();
    let mut found = Vec::new();
    loop {
        if let Some(end) = rest.strip_prefix('}') {
            return end.trim().is_empty().then_some(found);
        }
        let (key, after) = parse_string(rest)?;
        let (value, after) = parse_string(after.trim_start().strip_prefix(':')?.trim_start())?;
        found.push((key, PathBuf::from(value)));
        let after = after.trim_start();
        rest = match after.strip_prefix(',') {
            Some(more) => more.trim_start(),
            None if after.starts_with('}') => after,
            None => return None,
        };
    }
}

/// Parses a string literal, and returns it with the rest. Only escaped quotes and backslashes are accepted:
/// `repr` writes other escapes only for names that no module has.
fn parse_string(text: &str) -> Option<(String, &str)> {
    let quote = text.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    let mut value = String::new();
    let mut characters = text.char_indices().skip(1);
    while let Some((at, c)) = characters.next() {
        match c {
            '\\' => match characters.next()? {
                (_, escaped @ ('\\' | '\'' | '"')) => value.push(escaped),
                _ => return None,
            },
            c if c == quote => return Some((value, text.get(at + 1..)?)),
            c => value.push(c),
        }
    }
    None
}

/// `_EditableFinder._find_spec`: the directory's `__init__.py`, else a file next to it.
pub(super) fn find(root: &RootDir, python: &Interpreter, place: &Path) -> Option<PythonModule> {
    let init = place.join("__init__.py");
    if is_file(&root.path(&init)) {
        return Some(PythonModule::Package { folder: place.to_owned(), init });
    }
    // `importlib.machinery.all_suffixes`: source, bytecode, compiled.
    let [compiled, stable, plain, source, bytecode] = python.suffixes();
    for suffix in [source, bytecode, compiled, stable, plain] {
        let path = place.with_extension(suffix.trim_start_matches('.'));
        if is_file(&root.path(&path)) {
            return Some(PythonModule::File { path });
        }
    }
    None
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test may fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn only_a_plain_table_is_read() {
        let pair = |key: &str, value: &str| (key.to_owned(), PathBuf::from(value));
        assert_eq!(parse_dictionary("{}").unwrap(), []);
        assert_eq!(
            parse_dictionary("{'a': '/x', \"b\": '/it\\'s',}").unwrap(),
            [pair("a", "/x"), pair("b", "/it's")]
        );
        for bad in [
            "{'a': b}",
            "{'a': '/x'",
            "{'a' '/x'}",
            "{'a': '/x'} or {}",
            "{'a': '\\x41'}",
            "[]",
            "{'a': '/x' 'b'}",
        ] {
            assert_eq!(parse_dictionary(bad), None, "{bad}");
        }
    }
}
