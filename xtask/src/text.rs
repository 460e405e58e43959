//! Printing. Much of the printed text comes from outside: names in images, release notes, messages
//! of robots and servers. Control characters in it could control the terminal, so they are never
//! printed.

use std::fmt::Write as _;
use std::io::Write as _;

use anyhow::{Context, Result};
use serde::Serialize;

/// Whether a terminal or a reader could misinterpret the character: C0 and C1 controls, and
/// characters that change the direction of writing (Unicode Standard Annex 9, table 4) or end a
/// line (U+2028, U+2029).
fn is_harmful(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn escape(text: &str, kept: &[char]) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if is_harmful(c) && !kept.contains(&c) {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// One line, with control characters escaped as in Rust, such as `\u{1b}` and `\n`.
pub fn printable(text: &str) -> String {
    escape(text, &[])
}

/// Several lines: like [`printable`], but keeps line ends and tabs.
pub fn printable_lines(text: &str) -> String {
    escape(text, &['\n', '\t'])
}

/// A value as readable JSON. Characters that [`printable`] would escape are escaped in JSON's form.
///
/// # Errors
/// When the value has no JSON form.
pub fn to_json(value: &impl Serialize) -> Result<String> {
    Ok(printable_json(&serde_json::to_string_pretty(value).context("writing JSON")?))
}

/// Escapes the remaining characters in JSON: serde escapes C0 in strings, and there are only line
/// ends outside of strings.
pub fn printable_json(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if is_harmful(c) && c != '\n' {
            // All of them are in the basic multilingual plane.
            write!(shown, "\\u{:04x}", u32::from(c)).expect("writing to a String cannot fail");
        } else {
            shown.push(c);
        }
    }
    shown
}

/// Prints results; used by [`outln!`](crate::outln). The program exits when they cannot be written:
/// with a closed pipe (`| head`) no more output is needed, and a full disk must not look like a
/// complete result.
pub fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let written = out.write_all(printable_lines(text).as_bytes()).and_then(|()| out.flush());
    if let Err(error) = written {
        drop(out);
        if error.kind() != std::io::ErrorKind::BrokenPipe {
            eprint(&format!("error: writing the result to standard output: {error}\n"));
        }
        std::process::exit(1);
    }
}

/// Prints everything other than results; used by [`errln!`](crate::errln). An error of standard
/// error cannot be reported and is ignored.
pub fn eprint(text: &str) {
    drop(std::io::stderr().lock().write_all(printable_lines(text).as_bytes()));
}

/// Asks on the terminal; returns the line that is typed, without surrounding spaces.
///
/// # Errors
/// When standard input cannot be read.
pub fn ask_line(question: &str) -> Result<String> {
    eprint(question);
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).context("reading the answer")?;
    Ok(answer.trim().to_owned())
}

/// `println!` without control characters.
#[macro_export]
macro_rules! outln {
    ($($words:tt)*) => { $crate::text::print(&(format!($($words)*) + "\n")) };
}

/// `print!` without control characters.
#[macro_export]
macro_rules! out {
    ($($words:tt)*) => { $crate::text::print(&format!($($words)*)) };
}

/// `eprintln!` without control characters.
#[macro_export]
macro_rules! errln {
    ($($words:tt)*) => { $crate::text::eprint(&(format!($($words)*) + "\n")) };
}

/// `eprint!` without control characters.
#[macro_export]
macro_rules! err {
    ($($words:tt)*) => { $crate::text::eprint(&format!($($words)*)) };
}

/// A human-readable error: what was being done and why it failed in one sentence, then all help
/// lines of the chain of causes.
pub fn describe_error(error: &anyhow::Error) -> String {
    let (mut causes, mut help) = (Vec::<String>::new(), String::new());
    for cause in error.chain() {
        let cause = cause.to_string();
        let at = cause.find("\nhelp: ").unwrap_or(cause.len());
        let (message, rest) = cause.split_at(at);
        if !causes.last().is_some_and(|last| last.starts_with(message)) {
            causes.push(message.to_owned());
        }
        help.push_str(rest);
    }
    causes.join(": ") + &help
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_drives_the_terminal() {
        let bad = "a\u{1b}]0;owned\u{7}\r\u{9b}31m\u{7f}\u{202e}\u{2066}é\tb\n";
        assert_eq!(
            printable(bad),
            "a\\u{1b}]0;owned\\u{7}\\r\\u{9b}31m\\u{7f}\\u{202e}\\u{2066}é\\tb\\n"
        );
        assert!(printable_lines(bad).ends_with("é\tb\n"));
        let json = to_json(&bad).expect("JSON");
        assert!(!json.chars().any(is_harmful), "{json}");
        assert_eq!(serde_json::from_str::<String>(&json).expect("the same"), bad);
    }

    #[test]
    fn help_comes_last() {
        let error = anyhow::anyhow!("no such file").context("reading a\nhelp: build it");
        assert_eq!(
            describe_error(&error.context("doing b")),
            "doing b: reading a: no such file\nhelp: build it"
        );
    }

    #[test]
    fn a_cause_is_said_once() {
        let error = anyhow::anyhow!("no such file").context("no such file (io)\nhelp: build it");
        assert_eq!(
            describe_error(&error.context("reading a")),
            "reading a: no such file (io)\nhelp: build it"
        );
    }
}
