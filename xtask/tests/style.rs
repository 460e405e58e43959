//! The table of phrases in docs/contributing/style.md, applied to comments, strings and prose of every file.

use std::collections::BTreeSet;

use super::{complain, files, root};

/// The page with the table; it has to name the phrases.
const PAGE: &str = "docs/contributing/style.md";

/// This file, whose exceptions name phrases.
const OWN: &str = "xtask/tests/style.rs";

/// Uses that stay: the file, the phrase, and the reason.
const ALLOWED: [(&str, &str, &str); 6] = [
    ("board/common/boot.scr.j2", "passed over", "the script is on robots: its bytes stay"),
    ("board/common/boot.scr.j2", "this very", "the script is on robots: its bytes stay"),
    ("xtask/tests/fixtures/raspberrypi/packages.toml", "folder", "a key of the file"),
    ("xtask/tests/login.rs", "nobody", "a user of the system"),
    ("xtask/tests/system/services.rs", "folder", "a variable of a shell"),
    ("xtask/tests/wheel.rs", "is none", "Python"),
];

/// A line of the table.
struct Rule {
    /// The phrase to avoid, in lower case.
    phrase: String,
    /// Longer phrases with it that are correct.
    allowed: Vec<String>,
    /// What to write instead.
    instead: String,
}

fn rules() -> Vec<Rule> {
    let page = std::fs::read_to_string(root().join(PAGE)).expect(PAGE);
    let (_, table) = page.split_once("| avoid |").expect("the table of phrases");
    let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [phrase, allowed, instead] = cells[..] else { panic!("{PAGE}: three cells: {row}") };
        assert!(!phrase.is_empty() && !instead.is_empty(), "{PAGE}: an empty cell: {row}");
        let allowed = allowed.split(';').map(str::trim).filter(|text| !text.is_empty());
        Rule {
            phrase: phrase.to_lowercase(),
            allowed: allowed.map(str::to_lowercase).collect(),
            instead: instead.to_owned(),
        }
    })
    .collect()
}

/// Whether `phrase` is in `text` at `at`, and is not the part of a longer word.
fn is_at(text: &str, at: usize, phrase: &str) -> bool {
    let word = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
    let Some(rest) = text.get(at..).and_then(|rest| rest.strip_prefix(phrase)) else {
        return false;
    };
    let before = text[..at].chars().next_back().is_some_and(word);
    let inside = phrase.chars().next_back().is_some_and(word);
    let after = inside && rest.chars().next().is_some_and(word);
    !(before || after)
}

impl Rule {
    /// The byte offsets of the phrase in a text in lower case.
    fn find(&self, text: &str) -> Vec<usize> {
        let excused = |at: usize| {
            self.allowed.iter().any(|longer| {
                let ahead = longer.find(&self.phrase).expect("an exception has the phrase in it");
                at.checked_sub(ahead).is_some_and(|start| is_at(text, start, longer))
            })
        };
        text.match_indices(&self.phrase)
            .map(|(at, _)| at)
            .filter(|at| is_at(text, *at, &self.phrase) && !excused(*at))
            .collect()
    }
}

/// A run of text: words that are read together, each with its line.
#[derive(Default)]
struct Run(Vec<(usize, String)>);

impl Run {
    /// Adds the words of a line.
    fn add(&mut self, number: usize, line: &str) {
        self.0.extend(line.split_whitespace().map(|word| (number, word.to_lowercase())));
    }

    /// Each use of a phrase in it, with a message.
    fn findings<'a>(&self, path: &str, rules: &'a [Rule]) -> Vec<(&'a str, String)> {
        let mut text = String::new();
        let mut starts = Vec::new();
        for (number, word) in &self.0 {
            starts.push((text.len(), *number));
            text.push_str(word);
            text.push(' ');
        }
        let mut findings = Vec::new();
        for rule in rules {
            for at in rule.find(&text) {
                let index = starts.partition_point(|(start, _)| *start <= at).saturating_sub(1);
                let around = &self.0[index.saturating_sub(3)..self.0.len().min(index + 6)];
                let around: Vec<&str> = around.iter().map(|(_, word)| word.as_str()).collect();
                let message = format!(
                    "{path}:{}: `{}` in \"{}\"; write: {}",
                    starts[index].1,
                    rule.phrase,
                    around.join(" "),
                    rule.instead
                );
                findings.push((rule.phrase.as_str(), message));
            }
        }
        findings
    }
}

/// A line without what is in backquotes.
fn without_code(line: &str) -> String {
    line.split('`').step_by(2).collect::<Vec<_>>().join("`")
}

/// A line without what is between these: placeholders and expressions.
fn without(line: &str, open: char, close: char) -> String {
    let mut depth = 0_usize;
    let kept = line.chars().filter(|c| {
        if *c == open {
            depth += 1;
        }
        let outside = depth == 0;
        if *c == close {
            depth = depth.saturating_sub(1);
        }
        outside
    });
    kept.collect()
}

/// The comments and strings of a Rust file. Comments on consecutive lines are one run.
fn rust_runs(text: &str) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut comment = Run::default();
    let mut number = 1;
    let mut rest = text;
    while !rest.is_empty() {
        let length = if rest.starts_with("//") {
            let line = rest.lines().next().unwrap_or_default();
            let body = line.trim_start_matches(['/', '!']);
            if body.trim().is_empty() {
                runs.push(std::mem::take(&mut comment));
            }
            comment.add(number, &without_code(body));
            line.len()
        } else if let Some((length, body)) = string(rest) {
            runs.push(std::mem::take(&mut comment));
            let mut run = Run::default();
            // Of one word are keys, names and paths.
            if body.trim().contains([' ', '\n']) {
                for (index, line) in body.lines().enumerate() {
                    // An escape is the end of a word.
                    let line = line.replace("\\n", " ").replace('\\', " ");
                    run.add(number + index, &without(&line, '{', '}'));
                }
            }
            runs.push(run);
            length
        } else {
            let length = character(rest);
            if !rest[..length].trim().is_empty() {
                runs.push(std::mem::take(&mut comment));
            }
            length
        };
        number += rest[..length].matches('\n').count();
        rest = &rest[length..];
    }
    runs.push(comment);
    runs
}

/// The string literal that the text begins with: its length, and what is between its quotes.
fn string(text: &str) -> Option<(usize, &str)> {
    let hashes = text.strip_prefix('r').map(|rest| rest.len() - rest.trim_start_matches('#').len());
    if let Some(hashes) = hashes
        && text[1 + hashes..].starts_with('"')
    {
        let close = format!("\"{}", "#".repeat(hashes));
        let body = &text[2 + hashes..];
        let length = body.find(&close)?;
        return Some((2 + hashes + length + close.len(), &body[..length]));
    }
    let body = text.strip_prefix('"')?;
    let mut escaped = false;
    for (at, c) in body.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return Some((at + 2, &body[..at])),
            _ => {}
        }
    }
    None
}

/// The length of one piece of code: a word, a character literal, or a single character.
fn character(text: &str) -> usize {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    // A word ends before a quote, so that the `r` of a raw string is looked at by itself.
    let length = text.find(|c: char| !word(c)).unwrap_or(text.len());
    if length > 0 {
        let raw = text[..length].ends_with('r') && text[length..].starts_with(['"', '#']);
        return if raw && length > 1 { length - 1 } else { length };
    }
    if let Some(rest) = text.strip_prefix('\'') {
        if let Some(escaped) = rest.strip_prefix('\\') {
            let mut ends = escaped.char_indices().skip(1).filter(|(_, c)| *c == '\'');
            return ends.next().map_or(1, |(at, _)| at + 3);
        }
        let mut characters = rest.char_indices().skip(1);
        if let Some((at, '\'')) = characters.next() {
            return at + 2;
        }
    }
    text.chars().next().map_or(0, char::len_utf8)
}

/// The paragraphs of Markdown, TOML and templates, without fenced code.
fn prose_runs(text: &str) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut run = Run::default();
    let mut fenced = false;
    for (index, line) in text.lines().enumerate() {
        let body = line.trim_start().trim_start_matches(['#', '/', ';']);
        fenced ^= line.trim_start().starts_with("```");
        if body.trim().is_empty() || fenced {
            runs.push(std::mem::take(&mut run));
        } else {
            run.add(index + 1, &without(&without_code(body), '{', '}'));
        }
    }
    runs.push(run);
    runs
}

/// TOML without its multi-line literal strings, which contain code. Line numbers stay the same.
fn without_literals(text: &str) -> String {
    let parts = text.split("'''").enumerate();
    let kept = parts.map(|(n, part)| match n % 2 {
        0 => part.to_owned(),
        _ => "\n".repeat(part.matches('\n').count()),
    });
    kept.collect()
}

/// The comments of a script, a unit or a configuration file: lines that begin with `#`.
fn comment_runs(text: &str) -> Vec<Run> {
    let comment = |line: &str| line.trim_start().starts_with('#');
    let lines = text.lines().map(|line| if comment(line) { line } else { "" });
    prose_runs(&lines.collect::<Vec<_>>().join("\n"))
}

fn runs(extension: Option<&str>, text: &str) -> Vec<Run> {
    match extension {
        Some("rs") => rust_runs(text),
        Some("toml") => prose_runs(&without_literals(text)),
        Some("md" | "j2" | "fragment" | "dtsi" | "defconfig" | "S") => prose_runs(text),
        None | Some("conf" | "in" | "mk" | "preset" | "rules" | "service" | "sh" | "yml") => {
            comment_runs(text)
        }
        _ => Vec::new(),
    }
}

#[test]
fn no_text_has_a_phrase_to_avoid() {
    let rules = rules();
    assert!(rules.len() >= 30, "only {} phrases", rules.len());
    let mut findings = Vec::new();
    let mut used = BTreeSet::new();
    let mut checked = 0;
    for (path, text) in files() {
        let path = path.as_path();
        if path == OWN || path == PAGE {
            continue;
        }
        for run in runs(path.extension(), &text) {
            checked += run.0.len();
            for (found, message) in run.findings(path.as_str(), &rules) {
                let known =
                    |(file, phrase, _): &(&str, &str, &str)| path == *file && found == *phrase;
                match ALLOWED.iter().position(known) {
                    Some(exception) => _ = used.insert(exception),
                    None => findings.push(message),
                }
            }
        }
    }
    assert!(checked > 100_000, "only {checked} words were checked");
    for (n, (file, phrase, _)) in ALLOWED.iter().enumerate() {
        if !used.contains(&n) {
            findings.push(format!("{file} no longer has `{phrase}`: remove it from ALLOWED"));
        }
    }
    complain(findings);
}

#[test]
fn each_phrase_is_found_in_each_kind_of_text_and_its_exceptions_are_not() {
    let rules = rules();
    for rule in &rules {
        let found = |extension: &str, text: &str| -> usize {
            let one = std::slice::from_ref(rule);
            runs(Some(extension), text).iter().map(|r| r.findings("x", one).len()).sum()
        };
        let broken = rule.phrase.replacen(' ', "\n/// ", 1);
        let continued = rule.phrase.replacen(' ', " \\\n        ", 1);
        let phrase = &rule.phrase;
        assert_eq!(found("rs", &format!("let a = '\"'; // x {phrase} y\n")), 1, "{phrase}");
        assert_eq!(found("rs", &format!("/// x {broken} y\nfn f() {{}}\n")), 1, "{phrase}");
        assert_eq!(found("rs", &format!("bail!(\"x {continued} y\")")), 1, "{phrase}");
        assert_eq!(found("rs", &format!("f(r#\"x \"{phrase} y\"#)")), 1, "{phrase}");
        assert_eq!(found("rs", &format!("bail!(\"x\\nx {phrase} y\")")), 1, "{phrase}");
        assert_eq!(
            found("md", &format!("x\n{} y\n", phrase.replacen(' ', "\n", 1))),
            1,
            "{phrase}"
        );
        assert_eq!(found("toml", &format!("# x {phrase} y\n")), 1, "{phrase}");
        assert_eq!(found("toml", &format!("a = '''\nx {phrase} y'''\n")), 0, "{phrase}");
        let broken = phrase.replacen(' ', "\n# ", 1);
        assert_eq!(found("service", &format!("# x {broken} y\n{phrase}\n")), 1, "{phrase}");
        let name = phrase.replace(' ', "_");
        assert_eq!(found("rs", &format!("let {name} = \"{name}\"; // `{phrase}`")), 0, "{phrase}");
        for longer in &rule.allowed {
            assert_eq!(found("rs", &format!("// x {longer} y")), 0, "{longer}");
        }
    }
}
