//! Fragments: parts of a defconfig in Kconfig's own notation. Parses them with the place of every
//! line, rejects each form that Kconfig would drop silently, and merges them. Pure.

use std::collections::BTreeMap;
use std::fmt;

use camino::Utf8Path;
use serde::Serialize;

use crate::config::reader::{ConfigFinding, ConfigPlace};

/// The value that a line requests for a symbol.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SymbolValue {
    /// `SYMBOL=y`
    Yes,
    /// `# SYMBOL is not set`, or `SYMBOL=n`
    No,
    /// `SYMBOL="text"`, without quotes and escapes.
    Text(String),
    /// `SYMBOL=42`, `SYMBOL=0x2a`: as written.
    Number(String),
}

impl fmt::Display for SymbolValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Yes => f.write_str("y"),
            Self::No => f.write_str("n"),
            Self::Number(number) => f.write_str(number),
            Self::Text(text) => {
                let escaped = text.replace('\\', "\\\\").replace('"', "\\\"");
                write!(f, "\"{escaped}\"")
            }
        }
    }
}

/// One symbol with all its requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SymbolRequest {
    /// The symbol's name, with its `BR2_`.
    pub symbol: String,
    /// The requested value.
    pub value: SymbolValue,
    /// The lines with the request; several fragments may agree.
    pub places: Vec<ConfigPlace>,
}

impl SymbolRequest {
    /// The place that messages name.
    pub fn place(&self) -> ConfigPlace {
        self.places.first().cloned().unwrap_or(ConfigPlace {
            file: "the defconfig".into(),
            line: 0,
            text: String::new(),
        })
    }

    /// The defconfig's line for it.
    pub fn line(&self) -> String {
        match &self.value {
            SymbolValue::No => format!("# {} is not set", self.symbol),
            value => format!("{}={value}", self.symbol),
        }
    }
}

/// The merged requests, in the order in which they were first written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Defconfig(pub Vec<SymbolRequest>);

/// The kind of a line.
enum Line {
    Nothing,
    Request(String, SymbolValue),
    Malformed { message: String, help: String },
}

/// Reads one fragment.
///
/// Kconfig accepts only four forms: `X=y`, `X=42`, `X="text"` and `# X is not set`. It ignores
/// everything else, with a warning at best; here it is a finding.
pub fn parse_fragment(file: &Utf8Path, text: &str) -> (Vec<SymbolRequest>, Vec<ConfigFinding>) {
    let (mut requests, mut findings) = (Vec::new(), Vec::new());
    for (index, line) in text.lines().enumerate() {
        let place =
            ConfigPlace { file: file.to_owned(), line: index + 1, text: line.trim().to_owned() };
        match classify_line(line) {
            Line::Nothing => {}
            Line::Request(symbol, value) => {
                requests.push(SymbolRequest { symbol, value, places: vec![place] });
            }
            Line::Malformed { message, help } => {
                findings.push(ConfigFinding::new(&place, message, help))
            }
        }
    }
    (requests, findings)
}

fn malformed_line(message: impl Into<String>, help: impl Into<String>) -> Line {
    Line::Malformed { message: message.into(), help: help.into() }
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

fn classify_line(line: &str) -> Line {
    let full = line;
    let line = line.trim_end();
    if line.is_empty() {
        return Line::Nothing;
    }
    if let Some(comment) = line.trim_start().strip_prefix('#') {
        return classify_comment(line, comment);
    }
    let Some((name, value)) = line.split_once('=') else {
        return malformed_line(
            "neither `SYMBOL=value` nor `# SYMBOL is not set`: Kconfig ignores the line",
            "write the line in one of these forms, or begin it with `#`",
        );
    };
    if name != name.trim() || value != value.trim_start() || full.trim_end_matches('\r') != line {
        return malformed_line(
            "blanks before, after or around `=`: Kconfig ignores such a line",
            format!("write {}={}", name.trim(), value.trim()),
        );
    }
    if !is_name(name) {
        return malformed_line(format!("`{name}` is not the name of a symbol"), "");
    }
    if !name.starts_with("BR2_") {
        let help = if name.starts_with("CONFIG_") {
            "move options of the kernel or of a boot loader to its own fragment"
        } else {
            "every symbol of Buildroot begins with BR2_"
        };
        return malformed_line(format!("{name} is not a symbol of Buildroot"), help);
    }
    match parse_value(value) {
        Ok(value) => Line::Request(name.to_owned(), value),
        Err((message, help)) => {
            malformed_line(format!("{name}: {message}"), help.replace("SYMBOL", name))
        }
    }
}

/// A comment is free text, unless it resembles `is not set`.
fn classify_comment(line: &str, comment: &str) -> Line {
    let words: Vec<&str> = comment.split_whitespace().collect();
    let [symbol, rest @ ..] = words.as_slice() else { return Line::Nothing };
    if !(symbol.starts_with("BR2_") && is_name(symbol)) {
        return Line::Nothing;
    }
    if line == format!("# {symbol} is not set") {
        return Line::Request((*symbol).to_owned(), SymbolValue::No);
    }
    let nearly = matches!(
        rest,
        ["is", "not", "set"] | ["not", "set"] | ["is", "unset"] | ["is", "not", "set."]
    );
    if nearly {
        return malformed_line(
            format!("for Kconfig this is a comment: {symbol} keeps its default"),
            format!("write exactly `# {symbol} is not set`"),
        );
    }
    Line::Nothing
}

/// The value of a line, or the error and the help.
fn parse_value(text: &str) -> Result<SymbolValue, (String, String)> {
    if let Some(rest) = text.strip_prefix('"') {
        let Some((inner, after)) = unquote(rest) else {
            return Err(("the closing quote is missing".into(), "end the text with `\"`".into()));
        };
        if !after.is_empty() {
            return Err((
                format!("`{after}` follows the closing quote and is ignored"),
                "write a quote inside a text as `\\\"`, and a comment on a separate line".into(),
            ));
        }
        return Ok(SymbolValue::Text(inner));
    }
    let digits = text.strip_prefix('-').unwrap_or(text);
    let hex = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X"));
    match text {
        "y" => Ok(SymbolValue::Yes),
        "n" => Ok(SymbolValue::No),
        "m" => Err((
            "invalid value `m`: Buildroot has no modules".into(),
            "write SYMBOL=y; kernel modules are chosen in the kernel's fragment".into(),
        )),
        "" => Err((
            "no value: Kconfig ignores the line".into(),
            "write SYMBOL=y, SYMBOL=\"\" or `# SYMBOL is not set`".into(),
        )),
        _ if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) => {
            Ok(SymbolValue::Number(text.to_owned()))
        }
        _ if hex.is_some_and(|h| !h.is_empty() && h.bytes().all(|b| b.is_ascii_hexdigit())) => {
            Ok(SymbolValue::Number(text.to_owned()))
        }
        _ => Err((
            "a text without quotes: Kconfig ignores the line".into(),
            format!("write SYMBOL=\"{text}\""),
        )),
    }
}

/// The text up to the closing quote, and what follows it.
pub fn unquote(text: &str) -> Option<(String, &str)> {
    let mut inner = String::new();
    let mut characters = text.char_indices();
    while let Some((index, c)) = characters.next() {
        match c {
            '"' => return Some((inner, text.get(index + 1..).unwrap_or_default())),
            '\\' => inner.push(characters.next()?.1),
            c => inner.push(c),
        }
    }
    None
}

/// Merges fragments, given as path and text. Two requests that agree are both named as the origin;
/// two that disagree are a finding that names both.
pub fn merge_fragments<'a>(
    fragments: impl IntoIterator<Item = (&'a Utf8Path, &'a str)>,
) -> (Defconfig, Vec<ConfigFinding>) {
    let mut merged: Vec<SymbolRequest> = Vec::new();
    let mut known: BTreeMap<String, usize> = BTreeMap::new();
    let mut findings = Vec::new();
    for (file, text) in fragments {
        let (requests, malformed) = parse_fragment(file, text);
        findings.extend(malformed);
        for request in requests {
            let Some(&index) = known.get(&request.symbol) else {
                known.insert(request.symbol.clone(), merged.len());
                merged.push(request);
                continue;
            };
            let first = &mut merged[index];
            if first.value == request.value {
                first.places.extend(request.places);
                continue;
            }
            let (here, there) = (request.place(), first.place());
            let message = format!(
                "{} is requested as {} here, but as {} in {}:{}",
                request.symbol, request.value, first.value, there.file, there.line
            );
            let help = "Kconfig would use the later line; keep one of the two lines";
            findings.push(ConfigFinding::new(&here, message, help));
        }
    }
    (Defconfig(merged), findings)
}

impl Defconfig {
    /// The defconfig as text: each line after a comment with its origin.
    pub fn render(&self, title: &str) -> String {
        let mut out = format!(
            "# {title}. Generated; change the fragments that are named.\n\
             # Every line is a request: what Kconfig makes of it is compared with it.\n"
        );
        for request in &self.0 {
            let places: Vec<String> =
                request.places.iter().map(|p| format!("{}:{}", p.file, p.line)).collect();
            out.push_str(&format!("\n# {}\n{}\n", places.join(", "), request.line()));
        }
        out
    }

    /// The request for a symbol.
    pub fn get(&self, symbol: &str) -> Option<&SymbolRequest> {
        self.0.iter().find(|request| request.symbol == symbol)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(line: &str) -> Result<(String, SymbolValue), String> {
        let (requests, findings) = parse_fragment(Utf8Path::new("f"), line);
        match (requests.as_slice(), findings.as_slice()) {
            ([r], []) => Ok((r.symbol.clone(), r.value.clone())),
            ([], [f]) => Err(format!("{} [{}]", f.message, f.help)),
            ([], []) => Err("nothing".into()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_four_forms_are_taken() {
        assert_eq!(one("BR2_aarch64=y").expect("taken").1, SymbolValue::Yes);
        assert_eq!(one("BR2_X=n").expect("taken").1, SymbolValue::No);
        assert_eq!(one("# BR2_X is not set").expect("taken").1, SymbolValue::No);
        assert_eq!(one("BR2_X=0x2A").expect("taken").1, SymbolValue::Number("0x2A".into()));
        assert_eq!(one("BR2_X=-1").expect("taken").1, SymbolValue::Number("-1".into()));
        let (_, text) = one(r#"BR2_X="a \"b\" \\ $(C) # d""#).expect("taken");
        assert_eq!(text, SymbolValue::Text(r#"a "b" \ $(C) # d"#.into()));
        assert_eq!(text.to_string(), r#""a \"b\" \\ $(C) # d""#);
    }

    #[test]
    fn every_form_that_kconfig_drops_is_refused_with_its_cure() {
        for (line, cure) in [
            ("BR2_X = y", "write BR2_X=y"),
            ("BR2_X= y", "write BR2_X=y"),
            (" BR2_X=y", "write BR2_X=y"),
            ("BR2_X=y ", "write BR2_X=y"),
            ("BR2_X=robot", "write BR2_X=\"robot\""),
            ("BR2_X=m", "write BR2_X=y"),
            ("BR2_X=", "write BR2_X=y"),
            ("BR2_X=\"a", "end the text"),
            ("BR2_X=\"a\" # why", "a comment on a separate line"),
            ("BR2_X=y # why", "write BR2_X=\"y # why\""),
            ("#BR2_X is not set", "write exactly `# BR2_X is not set`"),
            ("# BR2_X is unset", "write exactly `# BR2_X is not set`"),
            ("BR2_X", "in one of these forms"),
            ("CONFIG_X=y", "to its own fragment"),
            ("PACKAGE_X=y", "begins with BR2_"),
            ("BR2_A-B=y", "is not the name of a symbol"),
        ] {
            let error = one(line).expect_err(line);
            assert!(error.contains(cure), "{line}: {error}");
        }
        for comment in ["# a word", "#", "# BR2_X=y", "# BR2_X decides what is not set", ""] {
            assert_eq!(one(comment).expect_err("a comment"), "nothing", "{comment}");
        }
    }

    #[test]
    fn agreement_has_two_origins_and_disagreement_names_both() {
        let (a, b) = (Utf8Path::new("a.fragment"), Utf8Path::new("b.fragment"));
        let (merged, findings) = merge_fragments([
            (a, "# why\nBR2_X=y\nBR2_T=\"one\"\n"),
            (b, "BR2_X=y\nBR2_T=\"two\"\n"),
        ]);
        assert_eq!(merged.0.len(), 2);
        let text = merged.render("t");
        assert!(text.contains("\n# a.fragment:2, b.fragment:1\nBR2_X=y\n"), "{text}");
        let [conflict] = findings.as_slice() else { panic!("{findings:?}") };
        assert_eq!(
            conflict.message,
            "BR2_T is requested as \"two\" here, but as \"one\" in a.fragment:3"
        );
        assert_eq!((conflict.place.file.as_path(), conflict.place.line), (b, 2));
    }

    #[test]
    fn what_is_rendered_reads_back_as_the_same() {
        let text = "BR2_A=y\n# BR2_B is not set\nBR2_C=\"x \\\" y\"\nBR2_D=7\n";
        let (merged, findings) = merge_fragments([(Utf8Path::new("f"), text)]);
        assert!(findings.is_empty(), "{findings:?}");
        let rendered = merged.render("t");
        let (again, findings) = merge_fragments([(Utf8Path::new("g"), rendered.as_str())]);
        assert!(findings.is_empty(), "{findings:?}");
        let plain = |d: &Defconfig| d.0.iter().map(SymbolRequest::line).collect::<Vec<_>>();
        assert_eq!(plain(&again), plain(&merged));
    }
}
