//! Reads the commands of a script for `/bin/sh` (POSIX.1-2024, Shell Command Language). Pure.
//!
//! Only certain commands are reported: literal first words of simple commands, also within `$(…)`,
//! functions and here-documents. A script that uses the syntax of another shell is not read.

use std::collections::BTreeSet;

/// A literal command and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShellCommand {
    /// The number of its line; the first is 1.
    pub line: usize,
    /// Its first word, without quotes.
    pub name: String,
}

/// The commands of a script.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ShellScript {
    /// All literal commands, without the script's own functions.
    pub commands: Vec<ShellCommand>,
    /// Names and paths that the script looks for itself (`command -v x`, `[ -x /usr/bin/x ]`), so it
    /// may work without them.
    pub optional: BTreeSet<String>,
    /// A name without a directory may be another command than the image's: the script reads another script,
    /// sets `PATH`, or uses `eval` or `alias`.
    pub redefines_names: bool,
}

/// Reads a script; `None` if it has a syntax error, or uses the syntax of another shell.
pub fn read_script(text: &str) -> Option<ShellScript> {
    let mut reader = ShellReader::new(text, 1);
    reader.read_list(ListEnd::Text)?;
    let ShellReader { mut script, functions, .. } = reader;
    script.commands.retain(|command| !functions.contains(&command.name));
    Some(script)
}

/// Where a list of commands ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ListEnd {
    /// With the text.
    Text,
    /// With `)`.
    Parenthesis,
    /// With `;;` or `esac`.
    CaseItem,
}

/// Words that are followed by a command.
const BEFORE_COMMANDS: [&str; 9] = ["if", "then", "elif", "else", "while", "until", "do", "!", "{"];
/// Words that end a compound command.
const AFTER_COMMANDS: [&str; 3] = ["fi", "done", "}"];
/// Words of other shells that begin a syntax of their own.
const FOREIGN: [&str; 4] = ["function", "[[", "select", "coproc"];

/// How deeply commands, substitutions and expansions may be nested; scripts that people write stay
/// far below.
const DEEPEST: usize = 64;

/// A word of a script.
struct Word {
    line: usize,
    /// Its value; `None` when the shell computes it.
    value: Option<String>,
    /// Without quotes: reserved words have none.
    plain: bool,
    /// The variable of an assignment `NAME=…`.
    assigns: Option<String>,
}

impl Word {
    fn is(&self, text: &str) -> bool {
        self.plain && self.value.as_deref() == Some(text)
    }

    fn is_one_of(&self, words: &[&str]) -> bool {
        words.iter().any(|word| self.is(word))
    }
}

/// A here-document whose text begins on the next line.
struct HereDocument {
    end: String,
    indented: bool,
    expanded: bool,
}

struct ShellReader {
    text: Vec<char>,
    at: usize,
    line: usize,
    script: ShellScript,
    functions: BTreeSet<String>,
    documents: Vec<HereDocument>,
    depth: usize,
}

impl ShellReader {
    fn new(text: &str, line: usize) -> Self {
        Self {
            text: text.chars().collect(),
            at: 0,
            line,
            script: ShellScript::default(),
            functions: BTreeSet::new(),
            documents: Vec::new(),
            depth: 0,
        }
    }

    /// Reads something that contains others of its kind.
    fn descend<T>(&mut self, read: impl FnOnce(&mut Self) -> Option<T>) -> Option<T> {
        if self.depth == DEEPEST {
            return None;
        }
        self.depth += 1;
        let found = read(self)?;
        self.depth -= 1;
        Some(found)
    }

    fn peek(&self) -> Option<char> {
        self.peek_at(0)
    }

    fn peek_at(&self, ahead: usize) -> Option<char> {
        self.text.get(self.at + ahead).copied()
    }

    fn next(&mut self) -> Option<char> {
        let found = self.peek()?;
        self.at += 1;
        self.line += usize::from(found == '\n');
        Some(found)
    }

    fn take(&mut self, expected: char) -> bool {
        let found = self.peek() == Some(expected);
        if found {
            self.next();
        }
        found
    }

    /// Skips blanks, continued lines and comments.
    fn skip_blanks(&mut self) {
        loop {
            match (self.peek(), self.peek_at(1)) {
                (Some(' ' | '\t'), _) => self.at += 1,
                (Some('\\'), Some('\n')) => {
                    self.next();
                    self.next();
                }
                (Some('#'), _) => {
                    while self.peek().is_some_and(|c| c != '\n') {
                        self.at += 1;
                    }
                }
                _ => return,
            }
        }
    }

    /// Reads commands up to the end of the list. Returns whether `esac` has ended it.
    fn read_list(&mut self, end: ListEnd) -> Option<bool> {
        self.descend(|reader| reader.read_commands(end))
    }

    fn read_commands(&mut self, end: ListEnd) -> Option<bool> {
        let mut words: Vec<Word> = Vec::new();
        // After `fi`, `done` and `}` only redirections may follow.
        let mut closed = false;
        loop {
            self.skip_blanks();
            let Some(next) = self.peek() else {
                self.finish(&mut words);
                return (end == ListEnd::Text).then_some(false);
            };
            match next {
                '\n' | ';' | '&' | '|' => {
                    self.finish(&mut words);
                    closed = false;
                    self.next();
                    match next {
                        '\n' => self.read_documents()?,
                        ';' if self.take(';') => {
                            return (end == ListEnd::CaseItem).then_some(false);
                        }
                        _ => {}
                    }
                }
                ')' => {
                    self.finish(&mut words);
                    self.next();
                    return (end == ListEnd::Parenthesis).then_some(false);
                }
                '(' if words.is_empty() && !closed => {
                    // `((` is arithmetic in other shells.
                    if self.peek_at(1) == Some('(') {
                        return None;
                    }
                    self.next();
                    self.read_list(ListEnd::Parenthesis)?;
                    closed = true;
                }
                '(' => {
                    // Only a function's name is followed by a parenthesis.
                    let [Word { value: Some(name), plain: true, .. }] = words.as_slice() else {
                        return None;
                    };
                    self.functions.insert(name.clone());
                    words.clear();
                    self.next();
                    self.skip_blanks();
                    if !self.take(')') {
                        return None;
                    }
                }
                '<' | '>' => self.read_redirection()?,
                _ => {
                    let word = self.read_word()?;
                    let number = |v: &str| !v.is_empty() && v.bytes().all(|b| b.is_ascii_digit());
                    let redirects = matches!(self.peek(), Some('<' | '>'));
                    if redirects && word.plain && word.value.as_deref().is_some_and(number) {
                        continue;
                    }
                    if !words.is_empty() || closed {
                        words.push(word);
                    } else if word.is_one_of(&FOREIGN) {
                        return None;
                    } else if word.is("esac") {
                        return (end == ListEnd::CaseItem).then_some(true);
                    } else if word.is("case") {
                        self.read_case()?;
                        closed = true;
                    } else if word.is("for") {
                        self.read_for()?;
                    } else if word.is_one_of(&AFTER_COMMANDS) {
                        closed = true;
                    } else if !word.is_one_of(&BEFORE_COMMANDS) {
                        words.push(word);
                    }
                }
            }
            if closed {
                words.clear();
            }
        }
    }

    /// `case`: the word, and its items up to `esac`.
    fn read_case(&mut self) -> Option<()> {
        self.skip_blanks();
        self.read_word()?;
        self.skip_lines();
        if !self.read_word()?.is("in") {
            return None;
        }
        loop {
            self.skip_lines();
            if !self.take('(') {
                let before = (self.at, self.line);
                if self.read_word()?.is("esac") {
                    return Some(());
                }
                (self.at, self.line) = before;
            }
            loop {
                self.skip_blanks();
                match self.peek()? {
                    ')' => break,
                    '|' => self.at += 1,
                    '\n' | ';' | '&' | '<' | '>' | '(' => return None,
                    _ => drop(self.read_word()?),
                }
            }
            self.next();
            if self.read_list(ListEnd::CaseItem)? {
                return Some(());
            }
        }
    }

    /// `for`: the name and the values, up to `do`.
    fn read_for(&mut self) -> Option<()> {
        self.skip_blanks();
        self.read_word()?;
        loop {
            self.skip_lines();
            while self.take(';') {
                self.skip_lines();
            }
            if self.read_word()?.is("do") {
                return Some(());
            }
        }
    }

    fn skip_lines(&mut self) {
        loop {
            self.skip_blanks();
            if !self.take('\n') {
                return;
            }
        }
    }

    fn read_redirection(&mut self) -> Option<()> {
        let operator = self.next()?;
        let document = operator == '<' && self.take('<');
        let indented = document && self.take('-');
        match self.peek()? {
            // Other shells' `<<<` and `<(…)`.
            '(' => return None,
            '<' if document => return None,
            '&' | '>' | '|' if !document => self.at += 1,
            _ => {}
        }
        self.skip_blanks();
        let start = self.at;
        let word = self.read_word()?;
        if document {
            let raw: String = self.text.get(start..self.at)?.iter().collect();
            let expanded = !raw.contains(['\'', '"', '\\']);
            let end = if expanded { raw } else { word.value? };
            self.documents.push(HereDocument { end, indented, expanded });
        }
        Some(())
    }

    /// The texts of here-documents, which begin here.
    fn read_documents(&mut self) -> Option<()> {
        for document in std::mem::take(&mut self.documents) {
            let (start, first) = (self.at, self.line);
            let end = loop {
                let begin = self.at;
                self.peek()?;
                while self.next().is_some_and(|c| c != '\n') {}
                let line: String = self.text.get(begin..self.at)?.iter().collect();
                let line = line.trim_end_matches('\n');
                let line = if document.indented { line.trim_start_matches('\t') } else { line };
                if line == document.end {
                    break begin;
                }
            };
            if document.expanded {
                let text: String = self.text.get(start..end)?.iter().collect();
                self.read_within(&text, first, |reader| {
                    while let Some(next) = reader.peek() {
                        match next {
                            '\\' => {
                                reader.next();
                                reader.next();
                            }
                            '$' => {
                                reader.read_expansion(true)?;
                            }
                            '`' => reader.read_backquotes()?,
                            _ => {
                                reader.next();
                            }
                        }
                    }
                    Some(())
                })?;
            }
        }
        Some(())
    }

    /// Reads another text, whose first line has this number, and adds what it names.
    fn read_within(
        &mut self,
        text: &str,
        line: usize,
        read: impl FnOnce(&mut ShellReader) -> Option<()>,
    ) -> Option<()> {
        let mut inner = ShellReader::new(text, line);
        inner.depth = self.depth;
        inner.descend(read)?;
        self.script.commands.extend(inner.script.commands);
        self.script.optional.extend(inner.script.optional);
        self.script.redefines_names |= inner.script.redefines_names;
        self.functions.extend(inner.functions);
        Some(())
    }

    fn read_word(&mut self) -> Option<Word> {
        let line = self.line;
        let (start, mut value, mut plain) = (self.at, Some(String::new()), true);
        let mut assigns = None;
        while let Some(next) = self.peek() {
            match next {
                ' ' | '\t' | '\n' | ';' | '&' | '|' | '<' | '>' | '(' | ')' => break,
                '\\' => {
                    self.next();
                    let quoted = self.next()?;
                    if quoted != '\n' {
                        plain = false;
                        push(&mut value, quoted);
                    }
                }
                '\'' => {
                    plain = false;
                    self.next();
                    while !self.take('\'') {
                        let next = self.next()?;
                        push(&mut value, next);
                    }
                }
                '"' => {
                    plain = false;
                    self.next();
                    self.read_quoted(&mut value)?;
                }
                '$' if self.read_expansion(false)? => value = None,
                '$' => push(&mut value, '$'),
                '`' => {
                    self.read_backquotes()?;
                    value = None;
                }
                '=' if plain && assigns.is_none() => {
                    self.next();
                    assigns = value.clone().filter(|name| is_name(name));
                    push(&mut value, next);
                }
                _ => {
                    self.next();
                    push(&mut value, next);
                    // `[` alone is a command, and `[[` is other shells'.
                    let brackets = self.text.get(start..self.at)?.iter().all(|c| *c == '[')
                        && (self.ends_word() || self.peek() == Some('['));
                    let pattern = matches!(next, '*' | '?') || (next == '[' && !brackets);
                    if pattern || (next == '~' && self.at == start + 1) {
                        value = None;
                    }
                }
            }
        }
        (self.at > start).then_some(Word { line, value, plain, assigns })
    }

    fn ends_word(&self) -> bool {
        self.peek().is_none_or(|c| " \t\n;&|<>()".contains(c))
    }

    /// The rest of a text in double quotes.
    fn read_quoted(&mut self, value: &mut Option<String>) -> Option<()> {
        loop {
            match self.peek()? {
                '"' => {
                    self.next();
                    return Some(());
                }
                '\\' => {
                    self.next();
                    let next = self.next()?;
                    if !"$`\"\\\n".contains(next) {
                        push(value, '\\');
                    }
                    if next != '\n' {
                        push(value, next);
                    }
                }
                '$' if self.read_expansion(true)? => *value = None,
                '$' => push(value, '$'),
                '`' => {
                    self.read_backquotes()?;
                    *value = None;
                }
                _ => {
                    let next = self.next()?;
                    push(value, next);
                }
            }
        }
    }

    /// Reads an expansion, which begins with `$`. Returns `false` if this `$` is a literal character.
    fn read_expansion(&mut self, quoted: bool) -> Option<bool> {
        self.descend(|reader| reader.read_variable(quoted))
    }

    fn read_variable(&mut self, quoted: bool) -> Option<bool> {
        self.next()?;
        match self.peek() {
            Some('(') if self.peek_at(1) == Some('(') => {
                let mut depth = 0;
                loop {
                    match self.next()? {
                        '(' => depth += 1,
                        ')' => depth -= 1,
                        _ => {}
                    }
                    if depth == 0 {
                        return Some(true);
                    }
                }
            }
            Some('(') => {
                self.next();
                let waiting = std::mem::take(&mut self.documents);
                self.read_list(ListEnd::Parenthesis)?;
                self.documents = waiting;
                Some(true)
            }
            Some('{') => {
                self.next();
                let mut ignored = None;
                loop {
                    match self.peek()? {
                        '}' => {
                            self.next();
                            return Some(true);
                        }
                        '\\' => {
                            self.next();
                            self.next()?;
                        }
                        // Whether this is a quote depends on the operator.
                        '\'' if quoted => return None,
                        '\'' => {
                            self.next();
                            while self.next()? != '\'' {}
                        }
                        '"' => {
                            self.next();
                            self.read_quoted(&mut ignored)?;
                        }
                        '$' => {
                            self.read_expansion(quoted)?;
                        }
                        '`' => self.read_backquotes()?,
                        _ => {
                            self.next();
                        }
                    }
                }
            }
            Some(c) if c.is_ascii_alphabetic() || c == '_' => {
                while self.peek().is_some_and(|c| c.is_ascii_alphanumeric() || c == '_') {
                    self.at += 1;
                }
                Some(true)
            }
            Some(c) if c.is_ascii_digit() || "@*#?-$!".contains(c) => {
                self.at += 1;
                Some(true)
            }
            // Other shells' `$'…'`.
            Some('\'') if !quoted => None,
            _ => Some(false),
        }
    }

    fn read_backquotes(&mut self) -> Option<()> {
        let line = self.line;
        self.next()?;
        let mut text = String::new();
        loop {
            match self.next()? {
                '`' => break,
                '\\' => {
                    let next = self.next()?;
                    if !"$`\\".contains(next) {
                        text.push('\\');
                    }
                    text.push(next);
                }
                next => text.push(next),
            }
        }
        self.read_within(&text, line, |reader| reader.read_list(ListEnd::Text).map(drop))
    }

    /// Records a simple command from its words: assignments, name, and the commands that some commands start
    /// or test for with their arguments.
    fn finish(&mut self, words: &mut Vec<Word>) {
        let words = std::mem::take(words);
        let mut rest = words.as_slice();
        while let [word, arguments @ ..] = rest {
            let Some(name) = &word.assigns else { break };
            self.script.redefines_names |= name == "PATH";
            rest = arguments;
        }
        while let [Word { line, value: Some(name), .. }, arguments @ ..] = rest {
            self.script.commands.push(ShellCommand { line: *line, name: name.clone() });
            let literal = |word: &Word| word.value.clone();
            let first = arguments.first().and_then(literal).unwrap_or_default();
            match name.as_str() {
                "." | "source" | "eval" | "alias" => self.script.redefines_names = true,
                "export" | "readonly" | "local" => {
                    let path = |word: &Word| word.assigns.as_deref() == Some("PATH");
                    self.script.redefines_names |= arguments.iter().any(path);
                }
                "command" if first == "-v" || first == "-V" => {
                    self.script.optional.extend(arguments.iter().skip(1).filter_map(literal));
                }
                "type" | "which" | "hash" => {
                    self.script.optional.extend(arguments.iter().filter_map(literal));
                }
                "[" | "test" => {
                    for pair in arguments.windows(2) {
                        let [test, path] = pair else { continue };
                        if test.is_one_of(&["-x", "-e", "-f", "-s"]) {
                            self.script.optional.extend(literal(path));
                        }
                    }
                }
                // These start another command.
                "command" | "exec" | "nohup" if !first.starts_with('-') => {
                    rest = arguments;
                    continue;
                }
                _ => {}
            }
            return;
        }
    }
}

/// Whether a variable can have this name.
fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

fn push(value: &mut Option<String>, next: char) {
    if let Some(value) = value {
        value.push(next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<String> {
        let script = read_script(text).unwrap_or_else(|| panic!("not understood: {text}"));
        script.commands.iter().map(|c| format!("{}:{}", c.line, c.name)).collect()
    }

    #[test]
    fn the_first_words_of_simple_commands_are_commands() {
        for (text, expected) in [
            ("a b c # d\n\ne;f&g|h&&i||j", "1:a 3:e 3:f 3:g 3:h 3:i 3:j"),
            ("if a; then b; elif c; then d; else e; fi >f; g", "1:a 1:b 1:c 1:d 1:e 1:g"),
            ("while ! a; do b; done <f | c", "1:a 1:b 1:c"),
            ("for x in $(a) b; do\n c \"$x\"\ndone\nfor x\ndo d; done", "1:a 2:c 5:d"),
            ("case $(a) in\n'' | *[!x]*) b ;;\n# x\n(c) d\ne;; esac\nf", "1:a 2:b 4:d 5:e 6:f"),
            ("{ a >x 2>&1 && b; } || (c; d)", "1:a 1:b 1:c 1:d"),
            ("f() {\n a\n}\nf; g() (b)\ng", "2:a 4:b"),
            ("X=1 Y=\"$(a)\" b x=y\nZ=`c d \\`e\\``", "1:a 1:b 2:e 2:c"),
            ("c \"it $(a \"$(b)\") \\\" ${x:-$(d)} $((1 + (2)))\" e", "1:b 1:a 1:d 1:c"),
            ("a <<E\nx $(b) \\$(c)\nE\nd <<-'E' | e\n$(f)\n\tE\ng", "1:a 2:b 4:d 4:e 7:g"),
            ("\"a b\" x; 'c'd; \\e; a\\\nb", "1:a b 1:cd 1:e 1:ab"),
            (
                "exec a; exec 3>&1; command b; command -p c; exec \"$@\"",
                "1:exec 1:a 1:exec 1:command 1:b 1:command 1:exec",
            ),
            ("\"$x\" a; $y b; ~/c; d*e; ${z#\"}\"} f; [ a = b ]", "1:["),
            ("", ""),
        ] {
            assert_eq!(names(text).join(" "), expected, "{text}");
        }
    }

    #[test]
    fn what_a_script_looks_for_itself_is_optional() {
        let text = "command -v a >/dev/null && a\n[ -x /b ] && /b\nif type c; then c; fi\n\
                    test -n d -a -e /e";
        let script = read_script(text).expect("understood");
        assert_eq!(script.optional.iter().collect::<Vec<_>>(), ["/b", "/e", "a", "c"]);
        assert!(!script.redefines_names);
        for text in [". /x", "a; eval b", "PATH=/x a", "export PATH=/x", "x() { PATH=; }"] {
            assert!(read_script(text).expect("understood").redefines_names, "{text}");
        }
    }

    #[test]
    fn what_is_nested_too_deeply_is_not_read() {
        for (open, close) in [("$(a ", ")"), ("${a:-", "}"), ("\"$(a ", ")\"")] {
            let nested = |depth: usize| format!("a {}{}", open.repeat(depth), close.repeat(depth));
            assert!(read_script(&nested(10)).is_some(), "{open}");
            assert_eq!(read_script(&nested(50_000)), None, "{open}");
        }
        assert_eq!(read_script(&"( a; ".repeat(50_000)), None);
    }

    #[test]
    fn another_shell_s_syntax_is_not_read() {
        for text in [
            "function f { a; }",
            "[[ a = b ]]",
            "a <<<b",
            "a <(b)",
            "x=(a b)",
            "((x = 1))",
            "a $'b'",
            "a 'b",
            "a \"b",
            "a $(b",
            "a)",
            "case x in a) b",
            "a <<E\nb\n",
            "a ;; b",
            "for ((;;)); do a; done",
        ] {
            assert_eq!(read_script(text), None, "{text}");
        }
    }
}
