//! Changes from a menu, as lines for fragments. The menus work on a copy: a build depends on the
//! fragments only, and no change is lost before it is in a fragment.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use super::check;
use super::expr::KconfigValues;
use super::make::BuildrootSetup;
use crate::artifact::write_atomically;
use crate::plan::fragment::{self, Defconfig, SymbolValue};

/// One change that is not in the fragments yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MenuChange {
    /// The symbol.
    pub symbol: String,
    /// The line to write; `None` when the symbol has its default value again.
    pub line: Option<String>,
}

/// What to do about a change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ChangeAdvice {
    /// The line to write or to remove.
    pub line: String,
    /// `add`, `replace` or `remove`.
    pub action: &'static str,
    /// The file, with the number of an existing line.
    pub place: String,
}

/// The changes from one minimal defconfig (`savedefconfig`) to another.
pub fn diff_defconfigs(base: &str, edited: &str) -> Vec<MenuChange> {
    let read = |text: &str| -> BTreeMap<String, String> {
        let (requests, _) = fragment::parse_fragment(Utf8Path::new("defconfig"), text);
        requests.into_iter().map(|r| (r.symbol.clone(), r.line())).collect()
    };
    let (base, edited) = (read(base), read(edited));
    let mut found: Vec<MenuChange> = edited
        .iter()
        .filter(|(symbol, line)| base.get(*symbol) != Some(line))
        .map(|(symbol, line)| MenuChange { symbol: symbol.clone(), line: Some(line.clone()) })
        .collect();
    let gone = base.keys().filter(|symbol| !edited.contains_key(*symbol));
    found.extend(gone.map(|symbol| MenuChange { symbol: symbol.clone(), line: None }));
    found
}

/// The lines that apply changes on top of the fragments, for a menu that is opened again.
pub fn changes_as_lines(changes: &[MenuChange]) -> String {
    changes.iter().filter_map(|c| c.line.clone()).map(|line| line + "\n").collect()
}

/// The place for each change: the line that already requests the symbol, else the fragment with the
/// most similar symbols. Omits changes that are in the fragments already.
pub fn advise_changes(
    changes: &[MenuChange],
    defconfig: &Defconfig,
    values: &KconfigValues,
) -> Vec<ChangeAdvice> {
    let mut advice = Vec::new();
    for change in changes {
        let own = defconfig.get(&change.symbol);
        let at = own.map(|r| format!("{}:{}", r.place().file, r.place().line));
        match (&change.line, own, at) {
            (Some(line), Some(request), _) if request.line() == *line => {}
            (Some(line), _, Some(place)) => {
                advice.push(ChangeAdvice { line: line.clone(), action: "replace", place });
            }
            // A fragment may set it through a symbol that selects it.
            (Some(line), None, _) if is_met(line, values) => {}
            (Some(line), _, None) => advice.push(ChangeAdvice {
                line: line.clone(),
                action: "add",
                place: nearest_fragment(&change.symbol, defconfig),
            }),
            (None, Some(request), Some(place)) => {
                advice.push(ChangeAdvice { line: request.line(), action: "remove", place });
            }
            (None, ..) => {}
        }
    }
    advice
}

fn is_met(line: &str, values: &KconfigValues) -> bool {
    let (requests, _) = fragment::parse_fragment(Utf8Path::new("line"), line);
    requests.iter().all(|r| match &r.value {
        SymbolValue::Yes => values.is_set(&r.symbol),
        SymbolValue::No => !values.is_set(&r.symbol),
        SymbolValue::Text(text) | SymbolValue::Number(text) => values.get(&r.symbol) == text,
    })
}

fn nearest_fragment(symbol: &str, defconfig: &Defconfig) -> String {
    let common = |a: &str, b: &str| a.bytes().zip(b.bytes()).take_while(|(x, y)| x == y).count();
    // On a tie the last: fragments of products come after those of boards.
    let nearest = defconfig.0.iter().max_by_key(|r| common(&r.symbol, symbol));
    nearest.map_or_else(|| "a fragment".to_owned(), |r| r.place().file.to_string())
}

/// Lines of `utils/diffconfig` (`-A y`, `+A y`, ` A m -> y`) as lines of a fragment.
pub fn from_diffconfig(text: &str) -> Vec<String> {
    let line = |name: &str, value: &str| match value {
        "n" => format!("# CONFIG_{name} is not set"),
        value => format!("CONFIG_{name}={value}"),
    };
    let mut lines = Vec::new();
    for text in text.lines() {
        let (sign, rest) = text.split_at(text.len().min(1));
        let Some((name, value)) = rest.split_once(' ') else { continue };
        match (sign, value.split_once(" -> ")) {
            ("+", None) if value != "n" => lines.push(line(name, value)),
            (" ", Some((_, new))) => lines.push(line(name, new)),
            // A symbol that only appeared as `n`, or disappeared with a dependency, needs no line.
            _ => {}
        }
    }
    lines
}

/// The file of pending changes.
pub fn pending_changes_path(setup: &BuildrootSetup, menu: &str) -> Utf8PathBuf {
    setup.output.join(format!("slipway-{menu}.changes.json"))
}

/// The pending changes; empty when no menu was used.
///
/// # Errors
/// When the file exists and cannot be read.
pub fn read_pending<T: serde::de::DeserializeOwned + Default>(path: &Utf8Path) -> Result<T> {
    if !path.is_file() {
        return Ok(T::default());
    }
    let text = fs::read(path).with_context(|| format!("reading {path}"))?;
    serde_json::from_slice(&text).with_context(|| format!("reading {path}"))
}

/// Saves pending changes.
///
/// # Errors
/// When they cannot be written.
pub fn save_pending(path: &Utf8Path, changes: &impl Serialize) -> Result<()> {
    let json = serde_json::to_vec_pretty(changes).context("describing changes")?;
    write_atomically(path, |out| Ok(out.write_all(&json)?))
}

/// Buildroot's own menus, on a copy of the configuration with the pending changes; returns all
/// changes from the fragments. `edit` runs the interactive menu.
///
/// # Errors
/// When the configuration is broken or the menu fails.
pub fn edit_menu(
    setup: &BuildrootSetup,
    defconfig: &Defconfig,
    title: &str,
    edit: impl FnOnce(&BuildrootSetup) -> Result<()>,
) -> Result<Vec<MenuChange>> {
    let path = pending_changes_path(setup, "buildroot");
    let before: Vec<MenuChange> = read_pending(&path)?;
    check::check_defconfig(setup, defconfig, title)?.require()?;
    let base = minimal_defconfig(setup)?;
    if !before.is_empty() {
        let file = setup.output.join("slipway_menu_defconfig");
        let text = format!("{base}{}", changes_as_lines(&before));
        fs::write(&file, text).with_context(|| format!("writing {file}"))?;
        let make = setup.make().arg("-s").arg(format!("BR2_DEFCONFIG={file}")).arg("defconfig");
        make.run().context("restoring the pending changes")?;
    }
    edit(setup)?;
    let found = diff_defconfigs(&base, &minimal_defconfig(setup)?);
    save_pending(&path, &found)?;
    Ok(found)
}

/// The minimal defconfig of the current `.config`: about ten seconds.
fn minimal_defconfig(setup: &BuildrootSetup) -> Result<String> {
    let path = setup.output.join("slipway_minimal_defconfig");
    let make = setup.make().arg("-s").arg(format!("BR2_DEFCONFIG={path}")).arg("savedefconfig");
    make.run().context("creating the minimal defconfig with Kconfig")?;
    fs::read_to_string(&path).with_context(|| format!("reading {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn defconfig() -> Defconfig {
        let (merged, findings) = fragment::merge_fragments([
            (Utf8Path::new("board.fragment"), "BR2_LINUX_KERNEL_DEFCONFIG=\"x\"\n"),
            (Utf8Path::new("product.fragment"), "BR2_PACKAGE_PYTHON3=y\nBR2_JLEVEL=2\n"),
        ]);
        assert!(findings.is_empty());
        merged
    }

    #[test]
    fn changes_become_lines_with_the_file_where_each_belongs() {
        let found = diff_defconfigs(
            "BR2_PACKAGE_PYTHON3=y\nBR2_JLEVEL=2\n",
            "BR2_JLEVEL=3\nBR2_PACKAGE_PYTHON3_SSL=y\nBR2_LINUX_KERNEL_DTB_KEEP_DIRNAME=y\n",
        );
        let shown: Vec<String> = advise_changes(&found, &defconfig(), &KconfigValues::default())
            .into_iter()
            .map(|a| format!("{} {} {}", a.action, a.line, a.place))
            .collect();
        assert_eq!(
            shown,
            [
                "replace BR2_JLEVEL=3 product.fragment:2",
                "add BR2_LINUX_KERNEL_DTB_KEEP_DIRNAME=y board.fragment",
                "add BR2_PACKAGE_PYTHON3_SSL=y product.fragment",
                "remove BR2_PACKAGE_PYTHON3=y product.fragment:1",
            ]
        );
    }

    #[test]
    fn what_the_fragments_say_by_now_is_left_out() {
        let change = |symbol: &str, line: Option<&str>| MenuChange {
            symbol: symbol.to_owned(),
            line: line.map(str::to_owned),
        };
        let done = [
            change("BR2_JLEVEL", Some("BR2_JLEVEL=2")),
            change("BR2_CCACHE", Some("BR2_CCACHE=y")),
            change("BR2_X", None),
        ];
        let values = KconfigValues::parse("BR2_CCACHE=y\n");
        assert!(advise_changes(&done, &defconfig(), &values).is_empty());
        assert_eq!(changes_as_lines(&done), "BR2_JLEVEL=2\nBR2_CCACHE=y\n");
    }

    #[test]
    fn diffconfig_becomes_lines_of_a_fragment() {
        let text =
            "-GONE y\n+NEW m\n+SHOWN n\n MOVED m -> y\n OFF y -> n\n TEXT \"a b\" -> \"c -> d\"\n";
        assert_eq!(
            from_diffconfig(text),
            ["CONFIG_NEW=m", "CONFIG_MOVED=y", "# CONFIG_OFF is not set", "CONFIG_TEXT=\"c -> d\""]
        );
    }
}
