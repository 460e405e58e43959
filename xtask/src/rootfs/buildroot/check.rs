//! Compares every request of a defconfig with the configuration that Kconfig created, and explains
//! why requests were lost: Kconfig itself drops most of them silently, with exit status 0.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};
use camino::Utf8Path;
use serde::Serialize;

use super::expr::{KconfigExpr, KconfigValues};
use super::make::BuildrootSetup;
use super::symbols::{KconfigCondition, KconfigEntry, KconfigPaths, KconfigSymbols};
use crate::config::reader::{ConfigFinding, ConfigFindings, ConfigPlace, nearest_name};
use crate::plan::fragment::{Defconfig, SymbolRequest, SymbolValue};

/// Why a request was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossReason {
    /// No such symbol in this tree.
    Unknown,
    /// A dependency of the symbol is not met.
    Unmet,
    /// Another member of its choice won.
    Choice,
    /// A `select` forces it on.
    Selected,
    /// The symbol was retired; the next make of Buildroot would fail.
    Retired,
    /// The value does not match the symbol's type or range.
    Malformed,
    /// The symbol has no prompt: Kconfig computes it.
    Computed,
}

/// A request that was not met.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LostRequest {
    /// The reason.
    pub class: LossReason,
    /// The symbol.
    pub symbol: String,
    /// The requested value.
    pub asked: String,
    /// The value that Kconfig set.
    pub got: String,
    /// The cause, as a sentence.
    pub cause: String,
    /// What to do.
    pub help: String,
    /// The fragment's line.
    pub place: ConfigPlace,
}

impl LostRequest {
    fn finding(&self) -> ConfigFinding {
        let message = match self.class {
            LossReason::Unknown | LossReason::Retired | LossReason::Malformed => self.cause.clone(),
            _ => format!(
                "{} was requested as {}, but Kconfig set {}: {}",
                self.symbol, self.asked, self.got, self.cause
            ),
        };
        ConfigFinding::new(&self.place, message, &self.help)
    }
}

/// The result of a check.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DefconfigVerdict {
    /// How many requests were compared.
    pub compared: usize,
    /// The requests that were lost, in the fragments' order.
    pub losses: Vec<LostRequest>,
    /// The `.config`.
    #[serde(skip)]
    pub config: String,
}

impl DefconfigVerdict {
    /// `Ok` when nothing was lost.
    ///
    /// # Errors
    /// Every lost request, with its place.
    pub fn require(&self) -> Result<()> {
        ConfigFindings(self.losses.iter().map(LostRequest::finding).collect()).check()
    }
}

/// Runs Kconfig with the defconfig in the output directory, and compares the result.
///
/// # Errors
/// When Kconfig cannot run, prints a warning that no request explains, or gives another result when
/// it runs again. Lost requests are not errors here: they are in the verdict.
pub fn check_defconfig(
    setup: &BuildrootSetup,
    defconfig: &Defconfig,
    title: &str,
) -> Result<DefconfigVerdict> {
    std::fs::create_dir_all(&setup.output).with_context(|| format!("creating {}", setup.output))?;
    let path = setup.output.join("slipway_defconfig");
    let text = defconfig.render(title);
    std::fs::write(&path, &text).with_context(|| format!("writing {path}"))?;
    let mut printed = Vec::new();
    setup
        .make()
        .arg("-s")
        .arg(format!("BR2_DEFCONFIG={path}"))
        .arg("defconfig")
        .run_lines(|line| printed.push(line.to_owned()))
        .context("resolving the defconfig with Kconfig")?;
    let config = read_file(&setup.output.join(".config"))?;
    let symbols = KconfigSymbols::read(&KconfigPaths {
        tree: &setup.tree,
        output: &setup.output,
        external: &setup.external,
    })?;
    let values = KconfigValues::parse(&config);
    let losses = compare_requests(defconfig, &symbols, &values);
    if losses.is_empty() {
        if let Some(warning) = kconfig_warnings(&printed).first() {
            bail!(
                "Kconfig printed a warning that no request explains: {}",
                explain_warning(warning, &path, &text)
            );
        }
        if values.is_set("BR2_LEGACY") {
            bail!(
                "Kconfig set BR2_LEGACY, but no request explains it: see {}/.config",
                setup.output
            );
        }
        setup.make().args(["-s", "olddefconfig"]).run().context("running Kconfig again")?;
        let again = read_file(&setup.output.join(".config"))?;
        let (before, after) = (setting_lines(&config), setting_lines(&again));
        if let Some(at) =
            (0..before.len().max(after.len())).find(|&i| before.get(i) != after.get(i))
        {
            let line = |lines: &[&str]| lines.get(at).copied().unwrap_or("nothing").to_owned();
            bail!(
                "the configuration is not stable: `{}` became `{}` when Kconfig ran again",
                line(&before),
                line(&after)
            );
        }
    }
    Ok(DefconfigVerdict { compared: defconfig.0.len(), losses, config })
}

/// The lines that set a symbol or unset it. Without the heading: it contains the tree's version
/// from git, which is briefly "dirty" in a copied tree.
/// The settings, without what Buildroot writes about the workspace: its commit may change meanwhile.
fn setting_lines(config: &str) -> Vec<&str> {
    let setting = |line: &&str| line.contains("BR2_") && !line.starts_with("BR2_EXTERNAL_");
    config.lines().filter(setting).collect()
}

fn read_file(path: &Utf8Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("reading {path}"))
}

/// Kconfig's warnings: they name a file and a line, or begin with the word; indented lines after a
/// warning belong to it.
fn kconfig_warnings(printed: &[String]) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for line in printed {
        let begins =
            line.contains(":warning:") || line.to_ascii_lowercase().starts_with("warning:");
        match found.last_mut() {
            _ if begins => found.push(line.clone()),
            Some(warning) if line.starts_with(' ') => warning.push_str(&format!("\n{line}")),
            _ => {}
        }
    }
    found
}

/// The warning with the origin of the defconfig's line that it names.
fn explain_warning(warning: &str, path: &Utf8Path, defconfig: &str) -> String {
    let number = warning
        .strip_prefix(path.as_str())
        .and_then(|rest| rest.trim_start_matches(':').split(':').next()?.parse::<usize>().ok());
    let origin = number.and_then(|n| defconfig.lines().nth(n.checked_sub(2)?));
    match origin.and_then(|line| line.strip_prefix("# ")) {
        Some(origin) => format!("{warning} (from {origin})"),
        None => warning.to_owned(),
    }
}

/// All requests that the values do not meet.
pub fn compare_requests(
    defconfig: &Defconfig,
    symbols: &KconfigSymbols,
    values: &KconfigValues,
) -> Vec<LostRequest> {
    let judge = Judge { defconfig, symbols, values };
    defconfig.0.iter().filter_map(|request| judge.loss(request)).collect()
}

struct Judge<'a> {
    defconfig: &'a Defconfig,
    symbols: &'a KconfigSymbols,
    values: &'a KconfigValues,
}

impl Judge<'_> {
    fn loss(&self, request: &SymbolRequest) -> Option<LostRequest> {
        let symbol = request.symbol.as_str();
        let got = self.values.0.get(symbol).map(String::as_str);
        let met = match &request.value {
            SymbolValue::Yes => got == Some("y"),
            SymbolValue::No => matches!(got, None | Some("n")),
            SymbolValue::Text(text) | SymbolValue::Number(text) => got == Some(text.as_str()),
        };
        let entries = self.symbols.entries_of(symbol);
        let wants = !matches!(request.value, SymbolValue::No);
        let build = |class, cause: String, help: String| {
            Some(LostRequest {
                class,
                symbol: symbol.to_owned(),
                asked: request.value.to_string(),
                got: got.map_or("unset".to_owned(), str::to_owned),
                cause,
                help,
                place: request.place(),
            })
        };
        if entries.is_empty() {
            let near = nearest_name(symbol, self.symbols.entries.keys().map(String::as_str));
            let help = near.map_or("make menuconfig's `/` searches for symbols".to_owned(), |n| {
                format!("did you mean {n}?")
            });
            return build(
                LossReason::Unknown,
                format!("this Buildroot has no symbol {symbol}"),
                help,
            );
        }
        // A retired symbol remains `y`, and the next make fails because of it.
        let empty = request.value == SymbolValue::Text(String::new());
        if let Some(entry) = self.symbols.retired(symbol).filter(|_| wants && !empty) {
            let prompt = entry.prompt.clone().unwrap_or_default();
            let cause = format!("{symbol} is retired: {prompt} ({})", entry.at);
            return build(LossReason::Retired, cause, self.replacement(entry));
        }
        // A wrong type is a finding even where Kconfig happens to set the value.
        if let Some((cause, help)) = self.mistyped(request) {
            return build(LossReason::Malformed, cause, help);
        }
        if met {
            return None;
        }
        let unmet = self.unmet(entries);
        if wants && let Some((cause, help)) = unmet {
            return build(LossReason::Unmet, cause, help);
        }
        if let Some((cause, help)) = self.lost_choice(symbol, entries, wants) {
            return build(LossReason::Choice, cause, help);
        }
        if !wants && let Some((cause, help)) = self.forced(symbol) {
            return build(LossReason::Selected, cause, help);
        }
        if entries.iter().all(|entry| entry.prompt.is_none()) {
            let cause =
                format!("the symbol has no prompt, so only Kconfig sets it ({})", entries[0].at);
            return build(LossReason::Computed, cause, self.who_sets(symbol));
        }
        let range = entries.iter().find_map(|e| e.range.as_ref().map(|r| (r, &e.at)));
        let (cause, help) = match range {
            Some(((low, high), at)) => (
                format!("{symbol} accepts {low} to {high} ({at}), not {}", request.value),
                "choose a value within the range".to_owned(),
            ),
            None => (
                format!("{symbol} does not accept {} ({})", request.value, entries[0].at),
                format!("the accepted values are defined at {}", entries[0].at),
            ),
        };
        build(LossReason::Malformed, cause, help)
    }

    /// What replaces a retired symbol: what it selects besides the legacy mark, and its help text.
    fn replacement(&self, entry: &KconfigEntry) -> String {
        let successors: Vec<&str> = entry
            .selects
            .iter()
            .map(|(name, _)| name.as_str())
            .filter(|name| *name != "BR2_LEGACY")
            .collect();
        match (successors.as_slice(), entry.help.as_str()) {
            ([], "") => "remove the line".to_owned(),
            ([], help) => format!("remove the line. Buildroot says: {help}"),
            (names, help) => {
                let says = if help.is_empty() {
                    String::new()
                } else {
                    format!(" Buildroot says: {help}")
                };
                format!("replace it by {}.{says}", names.join(", "))
            }
        }
    }

    fn mistyped(&self, request: &SymbolRequest) -> Option<(String, String)> {
        let symbol = &request.symbol;
        let kind = self.symbols.kind(symbol)?;
        let at = &self.symbols.entries_of(symbol).first()?.at;
        let (fits, form) = match (kind, &request.value) {
            ("bool" | "tristate", SymbolValue::Yes | SymbolValue::No) => return None,
            ("bool" | "tristate", _) => (false, format!("{symbol}=y or `# {symbol} is not set`")),
            ("string", SymbolValue::Text(_)) => return None,
            // "Not set" also means no text and no number in a `.config`.
            (_, SymbolValue::No) => return None,
            ("string", value) => (false, format!("{symbol}=\"{value}\"")),
            ("hex", SymbolValue::Number(n)) => (n.starts_with("0x"), format!("{symbol}=0x{n}")),
            ("int", SymbolValue::Number(n)) => (!n.contains(['x', 'X']), format!("{symbol}=42")),
            ("int" | "hex", SymbolValue::Text(text)) => (false, format!("{symbol}={text}")),
            _ => (false, format!("{symbol}=<a number>")),
        };
        let cause = format!("{symbol} is of the type {kind} ({at}), not {}", request.value);
        (!fits).then(|| (cause, format!("write {form}")))
    }

    /// The conditions that hide a symbol, when every entry with a prompt is hidden.
    fn unmet(&self, entries: &[KconfigEntry]) -> Option<(String, String)> {
        let mut shown: Option<(String, String)> = None;
        for entry in entries.iter().filter(|e| e.prompt.is_some()) {
            let conditions = entry.depends.iter().chain(&entry.visible);
            let failing: Vec<&KconfigCondition> =
                conditions.filter(|c| !c.expr.eval(self.values)).collect();
            if failing.is_empty() {
                return None;
            }
            shown.get_or_insert_with(|| self.describe(&failing));
        }
        shown
    }

    fn describe(&self, failing: &[&KconfigCondition]) -> (String, String) {
        let mut parts = Vec::new();
        let mut blamed = BTreeSet::new();
        for condition in failing {
            for part in condition.expr.unmet(self.values) {
                let symbols = part.symbols();
                let values: Vec<String> =
                    symbols.iter().map(|s| format!("{s} = {}", self.values.get(s))).collect();
                parts.push(format!("`{part}` at {}, and {}", condition.at, values.join(", ")));
                blamed.extend(symbols.into_iter().map(str::to_owned));
            }
        }
        parts.dedup();
        let cause = format!("the symbol depends on {}", parts.join("; on "));
        let helps: BTreeSet<String> = blamed.iter().filter_map(|s| self.hint(s)).collect();
        let help = if helps.is_empty() {
            "meet the dependencies, or remove the line".to_owned()
        } else {
            helps.into_iter().collect::<Vec<_>>().join("; ")
        };
        (cause, help)
    }

    /// How a symbol gets the other value.
    fn hint(&self, symbol: &str) -> Option<String> {
        let entries = self.symbols.entries_of(symbol);
        if self.values.is_set(symbol) {
            let place = self.defconfig.get(symbol).map(SymbolRequest::place);
            return place.map(|p| format!("{symbol} is requested in {}:{}", p.file, p.line));
        }
        if entries.iter().any(|e| e.prompt.is_some()) {
            return Some(format!("add {symbol}=y"));
        }
        let who = self.who_sets(symbol);
        (!who.is_empty()).then_some(who)
    }

    /// Whether menuconfig would show a symbol.
    fn can_be_set(&self, symbol: &str) -> bool {
        self.symbols.entries_of(symbol).iter().any(|entry| {
            let mut conditions = entry.depends.iter().chain(&entry.visible);
            entry.prompt.is_some() && conditions.all(|c| c.expr.eval(self.values))
        })
    }

    /// The symbols with a prompt that can set a symbol without one.
    fn who_sets(&self, symbol: &str) -> String {
        let mut by: Vec<&str> = self
            .symbols
            .selectors
            .get(symbol)
            .into_iter()
            .flatten()
            .map(|(name, _, _)| name.as_str())
            .filter(|name| self.can_be_set(name))
            .collect();
        by.dedup();
        match by.len() {
            0 => String::new(),
            n => {
                let more = if n > 4 { format!(" and {} more", n - 4) } else { String::new() };
                by.truncate(4);
                format!("{symbol} is set by {}{more}", by.join(", "))
            }
        }
    }

    fn lost_choice(
        &self,
        symbol: &str,
        entries: &[KconfigEntry],
        wants: bool,
    ) -> Option<(String, String)> {
        let index = entries.iter().find_map(|e| e.choice)?;
        let choice = self.symbols.choices.get(index)?;
        let title = format!("the choice \"{}\" ({})", choice.prompt, choice.at);
        if !wants {
            let cause = format!("{title} needs one winner, and this is its default");
            return Some((cause, format!("request another member: {}", choice.members.join(", "))));
        }
        let winner = choice.members.iter().find(|m| self.values.is_set(m))?;
        let why = match self.defconfig.get(winner) {
            Some(request) => {
                let place = request.place();
                format!("requested in {}:{}", place.file, place.line)
            }
            None => "its default".to_owned(),
        };
        let cause = format!("{winner} won {title}, {why}");
        Some((cause, format!("request only one of {winner} and {symbol}")))
    }

    fn forced(&self, symbol: &str) -> Option<(String, String)> {
        let selectors = self.symbols.selectors.get(symbol)?;
        let active: Vec<String> = selectors
            .iter()
            .filter(|(by, condition, _)| {
                let holds = condition.as_ref().is_none_or(|c: &KconfigExpr| c.eval(self.values));
                self.values.is_set(by) && holds
            })
            .map(|(by, _, at)| format!("{by} ({at})"))
            .collect();
        if active.is_empty() {
            return None;
        }
        let cause = format!("the symbol is selected by {}", active.join(", "));
        Some((cause, "remove the line, or the symbols that select it".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_of_warnings_are_seen() {
        // Recorded from Buildroot 2025.02.16's conf.
        let printed = [
            "  HOSTCC scripts/kconfig/conf.o",
            "WARNING: unmet direct dependencies detected for BR2_PACKAGE_E2FSPROGS_FSCK",
            "  Depends on [n]: BR2_PACKAGE_E2FSPROGS [=y] && !BR2_PACKAGE_UTIL_LINUX_FSCK [=y]",
            "#",
            "/o/slipway_defconfig:5:warning: symbol value 'm' invalid for BR2_CCACHE",
            "# configuration written to /o/.config",
        ];
        let found = kconfig_warnings(&printed.map(str::to_owned));
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("FSCK\n  Depends on"), "{found:?}");
        let defconfig = "# t\n#\n\n# a.fragment:7\nBR2_CCACHE=m\n";
        let shown = explain_warning(&found[1], Utf8Path::new("/o/slipway_defconfig"), defconfig);
        assert!(shown.ends_with("(from a.fragment:7)"), "{shown}");
    }
}
