//! Printing. Much of what is printed was written by others: names in images, release notes, what a robot or a
//! server says. Control characters in it could drive the terminal, so none is printed, whoever wrote it.

use std::fmt::Write as _;
use std::io::Write as _;

use anyhow::{Context, Result};
use serde::Serialize;

/// Whether a terminal, or the eye, would take it for something else than a character: C0 and C1 controls, and
/// what turns the direction of writing (Unicode Standard Annex 9, table 4) or ends a line (U+2028, U+2029).
fn is_harmful(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn escaped(text: &str, kept: &[char]) -> String {
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

/// One line: control characters as Rust writes them, such as `\u{1b}` and `\n`.
pub fn printable(text: &str) -> String {
    escaped(text, &[])
}

/// Lines: as [`printable`], but line ends and tabs stay.
pub fn printable_lines(text: &str) -> String {
    escaped(text, &['\n', '\t'])
}

/// A value as JSON for people and programs. What [`printable`] would escape is escaped as JSON does it.
///
/// # Errors
/// When the value has no JSON form.
pub fn json(value: &impl Serialize) -> Result<String> {
    Ok(printable_json(&serde_json::to_string_pretty(value).context("writing JSON")?))
}

/// Escapes what is left in JSON: outside of strings it has line ends only, and inside of them serde escapes C0.
pub fn printable_json(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if is_harmful(c) && c != '\n' {
            // All of them are in the basic plane.
            write!(shown, "\\u{:04x}", u32::from(c)).expect("writing to a String cannot fail");
        } else {
            shown.push(c);
        }
    }
    shown
}

/// Prints results; used by [`outln!`](crate::outln). Where they cannot be written, the program ends: whoever has closed
/// the pipe (`| head`) wants no more, and a full disk must not look like a whole result.
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

/// Prints what is no result; used by [`errln!`](crate::errln). Nothing can be said about a standard error that is closed
/// or full, and the work goes on.
pub fn eprint(text: &str) {
    drop(std::io::stderr().lock().write_all(printable_lines(text).as_bytes()));
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

/// An error for people: what was being done and why it failed in one sentence, then what to do, wherever in the chain
/// of causes that was said. A cause whose words the one before it has begun with is not said again: libraries' errors
/// often have their cause's text, and the cause.
pub fn sentence(error: &anyhow::Error) -> String {
    let (mut causes, mut help) = (Vec::<String>::new(), String::new());
    for cause in error.chain() {
        let cause = cause.to_string();
        let at = cause.find("\nhelp: ").unwrap_or(cause.len());
        let (said, rest) = cause.split_at(at);
        if !causes.last().is_some_and(|last| last.starts_with(said)) {
            causes.push(said.to_owned());
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
        let json = json(&bad).expect("JSON");
        assert!(!json.chars().any(is_harmful), "{json}");
        assert_eq!(serde_json::from_str::<String>(&json).expect("the same"), bad);
    }

    #[test]
    fn help_comes_last() {
        let error = anyhow::anyhow!("no such file").context("reading a\nhelp: build it");
        assert_eq!(
            sentence(&error.context("doing b")),
            "doing b: reading a: no such file\nhelp: build it"
        );
    }

    #[test]
    fn a_cause_is_said_once() {
        let error = anyhow::anyhow!("no such file").context("no such file (io)\nhelp: build it");
        assert_eq!(
            sentence(&error.context("reading a")),
            "reading a: no such file (io)\nhelp: build it"
        );
    }
}
