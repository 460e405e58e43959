//! Kconfig's expressions (`A && !B || C = "x"`), evaluated with the values of a `.config`, so that
//! an error can name the part of a `depends on` that is not met. Buildroot has no tristate symbols.

use std::collections::BTreeMap;

/// The values that Kconfig set; a symbol that is absent or not set is `n`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KconfigValues(pub BTreeMap<String, String>);

impl KconfigValues {
    /// From the text of a `.config`.
    pub fn parse(config: &str) -> Self {
        let mut values = BTreeMap::new();
        for line in config.lines().filter(|line| !line.starts_with('#')) {
            if let Some((name, value)) = line.split_once('=') {
                let text = value.strip_prefix('"').and_then(crate::plan::fragment::unquote);
                let value = text.map_or_else(|| value.to_owned(), |(inner, _)| inner);
                values.insert(name.to_owned(), value);
            }
        }
        Self(values)
    }

    /// A symbol's value, `n` when it has none.
    pub fn get(&self, symbol: &str) -> &str {
        self.0.get(symbol).map_or("n", String::as_str)
    }

    /// Whether a symbol is `y`.
    pub fn is_set(&self, symbol: &str) -> bool {
        self.get(symbol) == "y"
    }
}

/// An expression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KconfigExpr {
    /// A symbol or a constant: true when it is `y`.
    Atom(String),
    /// `!x`
    Not(Box<KconfigExpr>),
    /// `x && y`
    And(Box<KconfigExpr>, Box<KconfigExpr>),
    /// `x || y`
    Or(Box<KconfigExpr>, Box<KconfigExpr>),
    /// `a = b`; the flag is set for `!=`.
    Equal(String, String, bool),
}

impl KconfigExpr {
    /// Parses an expression; `None` when the text is not one.
    pub fn parse(text: &str) -> Option<Self> {
        let tokens = tokenize(text)?;
        let mut parser = Parser { tokens: &tokens };
        let expr = parser.or()?;
        parser.tokens.is_empty().then_some(expr)
    }

    /// The value with these symbols.
    pub fn eval(&self, values: &KconfigValues) -> bool {
        match self {
            Self::Atom(name) => name == "y" || values.is_set(name),
            Self::Not(x) => !x.eval(values),
            Self::And(x, y) => x.eval(values) && y.eval(values),
            Self::Or(x, y) => x.eval(values) || y.eval(values),
            Self::Equal(a, b, differ) => {
                (operand_value(a, values) == operand_value(b, values)) != *differ
            }
        }
    }

    /// The parts of a conjunction that are false.
    pub fn unmet<'a>(&'a self, values: &KconfigValues) -> Vec<&'a Self> {
        match self {
            Self::And(x, y) => [x.unmet(values), y.unmet(values)].concat(),
            other if other.eval(values) => Vec::new(),
            other => vec![other],
        }
    }

    /// Every symbol in it, once, in order.
    pub fn symbols(&self) -> Vec<&str> {
        let mut found = match self {
            Self::Atom(name) => vec![name.as_str()],
            Self::Not(x) => x.symbols(),
            Self::And(x, y) | Self::Or(x, y) => [x.symbols(), y.symbols()].concat(),
            Self::Equal(a, b, _) => vec![a.as_str(), b.as_str()],
        };
        let mut seen = Vec::new();
        found.retain(|name| {
            let symbol = name.starts_with("BR2_") && !seen.contains(name);
            seen.push(*name);
            symbol
        });
        found
    }
}

fn operand_value<'a>(text: &'a str, values: &'a KconfigValues) -> &'a str {
    match text.strip_prefix('"') {
        Some(constant) => constant.trim_end_matches('"'),
        None if text.starts_with("BR2_") => values.get(text),
        None => text,
    }
}

fn tokenize(text: &str) -> Option<Vec<String>> {
    let mut tokens = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let two = rest.get(..2).filter(|t| ["&&", "||", "!="].contains(t));
        let length = if let Some(two) = two {
            two.len()
        } else if rest.starts_with(['(', ')', '!', '=']) {
            1
        } else if let Some(constant) = rest.strip_prefix('"') {
            constant.find('"')? + 2
        } else {
            let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || "_.-/$".contains(c)));
            end.unwrap_or(rest.len())
        };
        if length == 0 {
            return None;
        }
        tokens.push(rest.get(..length)?.to_owned());
        rest = rest.get(length..)?.trim_start();
    }
    Some(tokens)
}

struct Parser<'t> {
    tokens: &'t [String],
}

impl Parser<'_> {
    fn take(&mut self, token: &str) -> bool {
        match self.tokens.split_first() {
            Some((first, rest)) if first == token => {
                self.tokens = rest;
                true
            }
            _ => false,
        }
    }

    fn or(&mut self) -> Option<KconfigExpr> {
        let mut left = self.and()?;
        while self.take("||") {
            left = KconfigExpr::Or(Box::new(left), Box::new(self.and()?));
        }
        Some(left)
    }

    fn and(&mut self) -> Option<KconfigExpr> {
        let mut left = self.not()?;
        while self.take("&&") {
            left = KconfigExpr::And(Box::new(left), Box::new(self.not()?));
        }
        Some(left)
    }

    fn not(&mut self) -> Option<KconfigExpr> {
        if self.take("!") {
            return Some(KconfigExpr::Not(Box::new(self.not()?)));
        }
        if self.take("(") {
            let inner = self.or()?;
            return self.take(")").then_some(inner);
        }
        let left = self.word()?;
        for (sign, differ) in [("=", false), ("!=", true)] {
            if self.take(sign) {
                return Some(KconfigExpr::Equal(left, self.word()?, differ));
            }
        }
        Some(KconfigExpr::Atom(left))
    }

    fn word(&mut self) -> Option<String> {
        let (first, rest) = self.tokens.split_first()?;
        self.tokens = rest;
        let word = !["&&", "||", "!", "=", "!=", "(", ")"].contains(&first.as_str());
        word.then(|| first.clone())
    }
}

impl std::fmt::Display for KconfigExpr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Atom(name) => f.write_str(name),
            Self::Not(x) if matches!(**x, Self::Atom(_)) => write!(f, "!{x}"),
            Self::Not(x) => write!(f, "!({x})"),
            Self::And(x, y) => write!(f, "{x} && {y}"),
            Self::Or(x, y) => write!(f, "({x} || {y})"),
            Self::Equal(a, b, differ) => {
                write!(f, "{a} {} {b}", if *differ { "!=" } else { "=" })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values() -> KconfigValues {
        KconfigValues::parse("BR2_A=y\n# BR2_B is not set\nBR2_T=\"x \\\"y\\\"\"\nBR2_N=4\n")
    }

    #[test]
    fn values_are_read_without_quotes() {
        assert_eq!(values().get("BR2_T"), "x \"y\"");
        assert_eq!(values().get("BR2_B"), "n");
    }

    #[test]
    fn expressions_mean_what_kconfig_means() {
        for (text, expected) in [
            ("BR2_A", true),
            ("BR2_A && BR2_B", false),
            ("BR2_A && !BR2_B", true),
            ("BR2_B || BR2_A && BR2_A", true),
            ("!(BR2_A || BR2_B)", false),
            ("BR2_N=\"4\"", true),
            ("BR2_N != 4", false),
            ("BR2_B = n", true),
            ("y", true),
        ] {
            assert_eq!(KconfigExpr::parse(text).expect(text).eval(&values()), expected, "{text}");
        }
        for text in ["", "&&", "(BR2_A", "BR2_A BR2_B", "BR2_A =", "a ? b"] {
            assert!(KconfigExpr::parse(text).is_none(), "{text}");
        }
    }

    #[test]
    fn only_the_unmet_parts_are_named() {
        let expr = KconfigExpr::parse("BR2_A && (BR2_B || BR2_C) && !BR2_A").expect("parses");
        let unmet = expr.unmet(&values());
        let shown: Vec<String> = unmet.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["(BR2_B || BR2_C)", "!BR2_A"]);
        assert_eq!(expr.symbols(), ["BR2_A", "BR2_B", "BR2_C"]);
    }
}
